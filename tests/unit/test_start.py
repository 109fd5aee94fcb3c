"""What a first run compiles, and what each run imports before its first token: as little as it can."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import ARCHITECTURES as TOYS
from tiny_model import write_tiny_model

from qrun.engine.program.needs import kernels_of
from qrun.formats import GGUFReader
from qrun.models import ARCHITECTURES, DRAFTS, architectures, build_graph
from qrun.models.architectures import Later
from tests.bench import random_model

PLACES = [build.place for build in ARCHITECTURES.values() if isinstance(build, Later)]
PLACES += [drafts.block.place for drafts in DRAFTS.values() if isinstance(drafts.block, Later)]


def modules_after(code: str) -> set[str]:
    """What a Python has imported once it has run that."""
    code += "\nimport sys; sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_every_architecture_is_a_function_of_a_file() -> None:
    assert len(PLACES) == len(ARCHITECTURES) + len(DRAFTS)
    for place in PLACES:
        module, _, function = place.partition(".")
        path = Path(architectures.__file__).with_name(f"{module}.py")
        names = [node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
        assert function in names, place


def test_those_who_pack_apps_see_the_file_of_every_architecture() -> None:
    tree = ast.parse(Path(architectures.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "qrun.models"]
    seen = [alias.name for node in imports for alias in node.names]
    assert set(seen) == {place.partition(".")[0] for place in PLACES}


def test_of_the_architectures_a_model_imports_its_own_alone() -> None:
    path = str(TOYS / "llama-dense.gguf")
    imported = modules_after(
        "from qrun.formats import GGUFReader\nfrom qrun.models import build_graph\n"
        f"with GGUFReader({path!r}) as reader: build_graph(reader)"
    )
    files = {f"qrun.models.{place.partition('.')[0]}" for place in PLACES}
    assert imported & files == {"qrun.models.llama"}


def test_a_process_that_compiles_imports_nothing_of_models() -> None:
    imported = modules_after("from qrun.engine.native.workers import serve")
    ours = {name for name in imported if name.startswith("qrun.models.")}
    assert ours <= {"qrun.models.interpreter", "qrun.models.store"}
    assert "numpy" not in imported


def test_a_run_imports_neither_what_compiles_nor_what_it_does_not_use(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf")
    arguments = ["run", str(path), "th", "--max-tokens", "1", "--ctx", "64"]
    run = f"from qrun.cli.main import main\nassert main({arguments}) == 0"
    modules_after(run)  # the kernels are there now
    imported = modules_after(run)
    heavy = {"numba", "llvmlite", "jinja2", "rich", "sentencepiece", "logging", "concurrent.futures", "tomllib",
             "difflib", "subprocess", "numpy.ma"}  # fmt: skip
    assert imported & heavy == set()
    assert {name for name in imported if name.endswith((".workers", ".download"))} == set()


def test_the_default_model_needs_few_kernels(tmp_path: Path) -> None:
    """A model of its shape and types: each kernel more is half a second of a first run."""
    model = random_model.llama(layers=2, width=576, ffn=1536, heads=9, kv_heads=3, vocabulary=256)
    random_model.write(tmp_path / "model.gguf", "Q4_1", model)
    with GGUFReader(tmp_path / "model.gguf") as reader:
        assert len(kernels_of(build_graph(reader), threads=2)) <= 13


@pytest.mark.parametrize("key", ["rms_norm-q8", "append-q4_0"])
def test_a_kernel_is_compiled_by_what_kernels_need_of_numba_alone(key: str) -> None:
    """Numba's own way of typing and lowering, which knows arrays and all else, takes twice the time."""
    code = f"""
from numba.core.compiler import Compiler
from qrun.engine.native.codegen import compile_kernel
from qrun.engine.simd.target import host_target
def refuse(compiler):
    raise AssertionError(compiler.state.func_id)
Compiler.define_pipelines = refuse
compile_kernel({key!r}, host_target())
"""
    assert "numba" in modules_after(code)
