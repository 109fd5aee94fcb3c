"""Packed apps: what packers must see, what they are told, and one app that is packed and run."""

import ast
import importlib
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tiny_model import write_tiny_model

from qrun.cli import options
from qrun.cli.main import COMMANDS, cli
from qrun.engine import Model, kernels
from qrun.engine.native import codegen, packs, sources
from qrun.engine.native.linker import Image
from qrun.engine.pyinstaller import hook_folders
from qrun.engine.simd.target import host_target

ENGINE = Path(__file__).parents[2] / "engine"


def names_imported(path: Path) -> set[str]:
    """What the file imports, also where that is never run."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes for alias in node.names}


def test_modules_that_are_imported_by_name_are_written_out() -> None:
    assert set(kernels._MODULES.values()) <= names_imported(ENGINE / "kernels" / "__init__.py")
    import qrun.engine

    assert set(qrun.engine._MODULES) <= names_imported(ENGINE / "__init__.py")
    assert set(COMMANDS) <= names_imported(ENGINE.parent / "cli" / "__init__.py")


def test_an_app_without_sources_has_its_options_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(thing: object) -> str:
        raise OSError("could not get source code")

    assert options._field_docs()["temperature"]
    monkeypatch.setattr("inspect.getsource", none)
    monkeypatch.setattr(options, "_field_docs", options._field_docs.__wrapped__)  # what was found before is kept
    assert options._field_docs() == {}

    @click.command()
    @options.sampling_options
    def command(sampling: dict[str, object]) -> None:
        click.echo(sampling)

    assert CliRunner().invoke(command, ["--temperature", "0"]).output == "{'temperature': 0.0}\n"
    assert "--temperature" in CliRunner().invoke(command, ["--help"]).output


def test_versions_are_asked_for_by_names_that_are_written_out() -> None:
    assert set(codegen._VERSIONS) == set(codegen.OLDEST)
    for name, version in codegen._VERSIONS.items():
        assert name in version.__code__.co_consts


def test_nothing_stops_nuitka() -> None:
    """Nuitka 4.3 breaks off where `reversed(...)` is among values for several names."""
    for folder in ("engine", "models", "formats"):
        for path in (ENGINE.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Assign) and any(isinstance(target, ast.Tuple) for target in node.targets):
                    values = ast.walk(node.value) if isinstance(node.value, ast.Tuple) else ()
                    names = {name.id for name in values if isinstance(name, ast.Name)}
                    assert "reversed" not in names, f"{path}:{node.lineno}"


CODE = """
def outer(x, *, y=1):
    small = x in {"a", "b", "c", "d"}
    def inner(): return [x, y, 1.5, None, ..., b"z", (1, -0.0)]
    return inner if small else (lambda: None)
"""


def digest_in_a_process(before: str) -> str:
    program = (
        f"{before}\nimport hashlib, qrun.engine.native.sources as c\n"
        f"print(hashlib.sha256(c._bytecode(compile({CODE!r}, 'x', 'exec'))).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_the_name_of_bytecode_is_the_same_in_every_process() -> None:
    assert digest_in_a_process("") == digest_in_a_process("import json, email; kept = ['outer', 'inner', 'small']")


@pytest.mark.parametrize(
    ("old", "new"),
    [("1.5", "1.6"), ("-0.0", "0.0"), ('"d"', '"e"'), ("y=1", "y=2"), ("None)", "0)"), ("[x, y", "[y, x"), ("*, ", "")],
)
def test_other_code_has_another_name(old: str, new: str) -> None:
    assert old in CODE
    codes = [compile(text, "x", "exec") for text in (CODE, CODE.replace(old, new), CODE)]
    names = [sources._bytecode(code) for code in codes]
    assert names[0] == names[2] != names[1]
    assert names[0] == sources._bytecode(codes[0].replace(co_filename="elsewhere", co_firstlineno=7))


def test_pyinstaller_finds_the_hooks() -> None:
    (found,) = [entry for entry in entry_points(group="pyinstaller40") if entry.value.startswith("qrun.")]
    assert found.name == "hook-dirs" and found.load() is hook_folders
    (folder,) = hook_folders()
    assert {path.name for path in Path(folder).glob("hook-*.py")} == {
        "hook-qrun.engine.py", "hook-qrun.models.py", "hook-qrun.cli.py",
        "hook-qrun.server.py", "hook-qrun.formats.py", "hook-numpy.__config__.py", "hook-numpy.f2py.crackfortran.py",
    }  # fmt: skip


def test_what_the_hooks_collect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With stand-ins for PyInstaller's own helpers."""
    helpers = types.ModuleType("PyInstaller.utils.hooks")
    helpers.collect_submodules = lambda package, filter=None: [package]  # type: ignore[attr-defined]
    helpers.collect_data_files = lambda package, includes: [(package, *includes)]  # type: ignore[attr-defined]
    helpers.copy_metadata = lambda name: [(name, "info")]  # type: ignore[attr-defined]
    for name in ("PyInstaller", "PyInstaller.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "PyInstaller.utils.hooks", helpers)
    monkeypatch.delenv("QRUN_KERNELS", raising=False)
    (folder,) = map(Path, hook_folders())
    engine = runpy.run_path(str(folder / "hook-qrun.engine.py"))
    assert engine["hiddenimports"] == ["qrun.engine", "qrun.formats", "qrun.models"]
    assert engine["datas"] == [("numba", "info"), ("llvmlite", "info")] and "excludedimports" not in engine
    # whatever names compiled code
    named = ("qrun.engine.simd", "qrun.engine.kernels", "qrun.formats.blocks", codegen.__name__.rpartition(".")[0])
    for package in named:
        assert engine["module_collection_mode"][package] == "pyz+py"
    assert not engine["wanted"]("qrun.engine.pyinstaller") and engine["wanted"]("qrun.engine.kernels.rows")
    assert runpy.run_path(str(folder / "hook-qrun.models.py"))["datas"] == [("qrun.models", "*.toml")]
    assert runpy.run_path(str(folder / "hook-qrun.server.py"))["datas"] == [("qrun.server", "static/*")]
    assert runpy.run_path(str(folder / "hook-qrun.cli.py"))["hiddenimports"] == ["qrun.cli"]
    for other in ("hook-qrun.formats.py", "hook-qrun.models.py"):
        assert "excludedimports" not in runpy.run_path(str(folder / other))
    # what NumPy can do without, as it says itself
    for name, unused in (("__config__", "yaml"), ("f2py.crackfortran", "charset_normalizer")):
        assert unused in runpy.run_path(str(folder / f"hook-numpy.{name}.py"))["excludedimports"]
        lines = inspect.getsource(importlib.import_module(f"numpy.{name}")).splitlines()
        (place,) = [i for i, line in enumerate(lines) if line.strip() == f"import {unused}"]
        assert any("except ModuleNotFoundError" in line or "except ImportError" in line for line in lines[place:])
    # with a pack the app has the pack, and no compiler
    pack = tmp_path / "kernels"
    monkeypatch.setenv("QRUN_KERNELS", str(pack))
    with pytest.raises(SystemExit, match=f"QRUN_KERNELS names {pack}, where there is no pack"):
        runpy.run_path(str(folder / "hook-qrun.engine.py"))
    packs.write(pack, "1", {"avx2": {"a": Image(62, 0, None, b"code").to_bytes()}}, ["tokenizers"])
    engine = runpy.run_path(str(folder / "hook-qrun.engine.py"))
    assert engine["datas"] == [(str(pack / name), "kernels") for name in ("manifest.json", "avx2.code")]
    # and of what cuts texts, only what the pack's models need
    assert engine["excludedimports"] == ["numba", "llvmlite", "sentencepiece"]
    models = runpy.run_path(str(folder / "hook-qrun.models.py"))
    assert models["excludedimports"] == ["huggingface_hub", "sentencepiece"]
    assert runpy.run_path(str(folder / "hook-qrun.formats.py"))["excludedimports"] == ["gguf"]
    manifest = json.loads((pack / "manifest.json").read_text())
    del manifest["packages"]  # as of an older version
    (pack / "manifest.json").write_text(json.dumps(manifest))
    engine = runpy.run_path(str(folder / "hook-qrun.engine.py"))
    assert engine["excludedimports"] == ["numba", "llvmlite"]


@pytest.mark.parametrize("built", [False, True])
def test_sources_are_packed_where_something_is_read_from_them(
    built: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The name of a wheel's sources is in the wheel, and a checkout's is made of them."""
    helpers = types.ModuleType("PyInstaller.utils.hooks")
    helpers.collect_submodules = helpers.copy_metadata = lambda *_, **__: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "PyInstaller.utils.hooks", helpers)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if built else None)
    packs.write(tmp_path / "kernels", "1", {"avx2": {"a": Image(62, 0, None, b"code").to_bytes()}})
    (folder,) = map(Path, hook_folders())
    for pack, packed in ((None, True), (tmp_path / "kernels", not built)):
        monkeypatch.setenv("QRUN_KERNELS", str(pack or ""))
        modes = runpy.run_path(str(folder / "hook-qrun.engine.py"))["module_collection_mode"]
        assert ("qrun.engine.kernels" in modes) == packed and "qrun.engine.sampling" in modes


def test_the_documentation_has_the_commands_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ENGINE.parent / "tests" / "bench"))
    import packers

    text = re.sub(r"\\\n\s*", "", (ENGINE.parent / "docs" / "embedding.md").read_text("utf-8"))
    for name, program, out in (("nuitka", "nuitka", []), ("cx_freeze", "cxfreeze", ["--build-exe=dist/app"])):
        command = [part.replace("KERNELS", "kernels") for part in packers.COMMANDS[name] if "OUT" not in part]
        (written,) = [line for line in re.split(r"[\n`]", text) if re.match(f"{program} (build|--)", line)]
        assert sorted(written.split()[1:]) == sorted([*command[1:], *out])


APP = """
import sys, threading
from qrun.engine import Model, pull

def main():
    if sys.argv[1] == "qrun":
        from qrun.cli.main import main
        return main(sys.argv[2:])
    if sys.argv[1] == "beside":
        from sidecar import Sidecar
        with Sidecar(sys.argv[2], command=(sys.executable, "qrun")) as server:
            message = {"role": "user", "content": "It was"}
            return print("".join(server.chat([message], max_tokens=5, temperature=0)))
    barrier, answers, compiled = threading.Barrier(2), [], []

    def load():
        barrier.wait()
        with Model.load(sys.argv[1], threads=1, progress=lambda done, total: compiled.append(total)) as model:
            answers.append(model.complete("It was", max_tokens=5, temperature=0))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(len(answers), len(set(answers)), bool(compiled))

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.slow  # packing takes a minute
@pytest.mark.skipif(os.name != "posix", reason="paths of the app")
def test_an_app_with_a_pack_and_a_server_beside_it_has_no_compiler_and_writes_nothing(tmp_path: Path) -> None:
    model, kernels = write_tiny_model(tmp_path / "model.gguf"), tmp_path / "packed kernels"
    made = CliRunner().invoke(cli, ["pack", str(model), "--out", str(kernels), "--targets", "host"])
    assert made.exit_code == 0, made.output
    shutil.copy(ENGINE.parent / "examples" / "sidecar" / "sidecar.py", tmp_path)
    with packed_app(tmp_path, QRUN_KERNELS=str(kernels)) as (folder, run):
        shutil.rmtree(kernels)
        assert not [path for path in folder.rglob("*") if "llvmlite" in path.name and path.suffix == ".so"]
        assert not list(folder.rglob("numba/*"))
        assert run(str(model)) == "2 1 False\n"  # two threads at once
        with Model.load(model, threads=1) as loaded:
            answer = "".join(loaded.chat("It was", max_tokens=5, temperature=0))
        assert answer and run("beside", str(model)) == f"{answer}\n"
        assert not (tmp_path / "cache").exists()


@pytest.mark.slow  # packing takes a minute, and so does compiling in the process on one core
@pytest.mark.skipif(os.name != "posix", reason="paths of the app")
@pytest.mark.skipif("QRUN_TEST_PACKERS" not in os.environ, reason="`make test-packers` runs it")
def test_an_app_without_a_pack_compiles_once(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")
    with packed_app(tmp_path) as (folder, run):
        assert run(str(model)) == "2 1 True\n"  # two threads at once, with an empty cache
        assert run(str(model)) == "2 1 False\n"
        assert [path.name for path in (tmp_path / "cache" / "kernels").iterdir()] == [
            codegen.code_digest(host_target())
        ]
        assert "temperature" in run("qrun", "run", "--help")
        assert "qwen3" in run("qrun", "list", "--remote")
        assert list(folder.rglob("libllvmlite*"))


def has_shared_library() -> bool:
    """Whether this Python can be put into an app: Debian's, for one, has its library in a package of its own."""
    from PyInstaller.depend.bindepend import get_python_library_path
    from PyInstaller.exceptions import PythonLibraryNotFoundError

    try:
        return bool(get_python_library_path())
    except PythonLibraryNotFoundError:
        return False


# What the tests bring along, and PyInstaller takes because others could use it: half of the time that it takes.
NOT_OURS = ["huggingface_hub", "matplotlib", "PIL", "pygments", "setuptools", "pytest", "hypothesis"]


@contextmanager
def packed_app(tmp_path: Path, **environment: str) -> Iterator[tuple[Path, Callable[..., str]]]:
    """The folder of the app as PyInstaller makes it, and a function that runs it."""
    pytest.importorskip("PyInstaller")
    if not has_shared_library() or (sys.platform == "linux" and shutil.which("objdump") is None):
        pytest.skip("PyInstaller needs a Python that has a shared library, and binutils")
    script = tmp_path / "app.py"
    script.write_text(APP)
    wanted = ["--noconfirm", "--onedir", "--log-level", "ERROR", "--distpath", str(tmp_path / "Äpp mit Leerzeichen")]
    paths = ["--workpath", str(tmp_path / "work"), "--specpath", str(tmp_path)]
    paths += [f"--exclude-module={name}" for name in NOT_OURS]
    command = [sys.executable, "-m", "PyInstaller", *wanted, *paths, str(script)]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | environment)
    folder = tmp_path / "Äpp mit Leerzeichen" / "app"
    for path in (*folder.rglob("*"), folder):
        path.chmod(path.stat().st_mode & ~0o222)  # as an app is installed
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "numba.py").write_text("raise SystemExit('not that one')")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [folder / "app", *arguments], capture_output=True, text=True, timeout=600, cwd=tmp_path / "elsewhere",
            env={"QRUN_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    try:
        yield folder, run
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
