"""Kernel packs: what is in them, where they are looked for, and that with one nothing is compiled."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from test_adapter import random_adapter
from tiny_embedder import write_embedder
from tiny_model import write_half_model, write_tiny_model

from qrun.cli.main import cli
from qrun.engine import Model
from qrun.engine.errors import CacheWarning
from qrun.engine.native import packs, sources, workers
from qrun.engine.native.compiler import CompileError, default_target, load_images
from qrun.engine.native.linker import AARCH64, X86_64, Image
from qrun.engine.native.packs import FORMAT, MANIFEST, Pack, PackError
from qrun.engine.native.sources import sources_digest
from qrun.engine.program.adapted import ADAPTER_KERNELS
from qrun.engine.simd.target import (
    MACHINES,
    folded_target,
    host_target,
    machine_name,
    machine_target,
    usable_machines,
)

ROOT = Path(__file__).parents[2]
HOST = usable_machines()[0]


def image(key: str, machine: str = HOST) -> bytes:
    """What stands for a kernel's code: no two are alike."""
    kind = X86_64 if machine_target(machine).is_x86 else AARCH64
    return Image(kind, 0, None, f"{key} for {machine}".encode()).to_bytes()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, no packs, and the list of what is compiled, that is, stood in for."""
    monkeypatch.setenv("QRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QRUN_KERNELS", raising=False)
    keys: list[str] = []

    def compile_all(missing: list[str], target: object) -> Iterator[tuple[str, bytes]]:
        keys.extend(missing)
        (name,) = [name for name in MACHINES if machine_target(name) == target]
        yield from ((key, image(key, name)) for key in missing)

    monkeypatch.setattr(workers, "compile_all", compile_all)
    return keys


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setitem(sys.modules, "llvmlite", None)


def write(folder: Path, keys: list[str], machine: str = HOST) -> Path:
    packs.write(folder, "0.0.9", {machine: {key: image(key, machine) for key in keys}})
    return folder


def change(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | fields, indent=2))


def test_a_pack_is_one_file_a_machine_and_a_manifest_that_says_what_is_where(
    compiled: list[str], tmp_path: Path
) -> None:
    model, out = write_tiny_model(tmp_path / "model.gguf"), tmp_path / "app" / "kernels"
    arguments = ["pack", str(model), "--out", str(out), "--targets", "avx2, neon", "--cache-type", "q8_0"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {MANIFEST, "avx2.code", "neon.code"}
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["format"] == FORMAT and manifest["sources"] == sources_digest()
    assert list(manifest["targets"]) == ["avx2", "neon"]
    assert manifest["packages"] == ["tokenizers"]
    kernels = manifest["targets"]["neon"]["kernels"]
    assert {"lead", "serve", "append-q8_0"} <= set(kernels) and "append-f16" not in kernels
    assert result.stdout.startswith(f"{out}: {len(kernels)} kernels for avx2, neon, ")
    pack = Pack.open(out)
    for machine in ("avx2", "neon"):
        assert all(pack.read(machine, key) == image(key, machine) for key in kernels)
    assert pack.read("avx512", "lead") is None and pack.read("neon", "wkv-plain") is None
    assert [path.name for path in out.parent.iterdir()] == ["kernels"], "no temporary folder is left"


def test_a_pack_has_all_that_a_model_needs_on_any_number_of_threads(compiled: list[str], tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "model.gguf"), tmp_path / "kernels"
    CliRunner().invoke(cli, ["pack", str(model), "--out", str(out), "--targets", "all"])
    assert set(json.loads((out / MANIFEST).read_text())["targets"]) == set(MACHINES) - {"amx-folded"}
    packed = set(Pack.open(out).targets[HOST][1])
    compiled.clear()
    from qrun.engine.program.needs import kernels_of
    from qrun.formats import GGUFReader
    from qrun.models import build_graph

    with GGUFReader(model) as reader:
        graph = build_graph(reader)
        assert all(set(kernels_of(graph, threads=threads)) <= packed for threads in (1, 2, 3, 8, 64))


def test_models_that_make_vectors_have_folded_tiles_in_their_packs(compiled: list[str], tmp_path: Path) -> None:
    """Of two models, the one that does; the other's code for such a machine is that for all models."""
    embeds, writes = write_embedder(tmp_path / "embeds.gguf"), write_half_model(tmp_path / "writes.gguf")

    def packed(*arguments: str) -> dict[str, set[str]]:
        out = tmp_path / "kernels"
        result = CliRunner().invoke(cli, ["pack", *arguments, "--out", str(out)])
        assert result.exit_code == 0, result.output
        return {name: set(places) for name, (_, places) in Pack.open(out).targets.items()}

    both = packed(str(embeds), str(writes))
    assert set(both) == set(MACHINES)
    assert "append-f16" in both["amx"] and "append-f16" not in both["amx-folded"]
    assert set(packed(str(writes), "--targets", "host")) == {HOST}
    assert set(packed(str(embeds), "--targets", "host")) == {HOST, machine_name(folded_target())}
    assert set(packed(str(embeds), "--targets", "avx2")) == {"avx2"}


def test_a_pack_for_adapters_serves_those_that_are_switched(
    compiled: list[str], rng: np.random.Generator, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")
    adapter = random_adapter(rng, model, tmp_path / "adapter.gguf")
    arguments = ["pack", str(model), "--out", str(tmp_path / "kernels"), "--targets", "avx2", "--lora", str(adapter)]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert set(ADAPTER_KERNELS) <= set(Pack.open(tmp_path / "kernels").targets["avx2"][1])


@pytest.mark.parametrize(("arguments", "said"), [
    (["--targets", "avx3"], "'avx3' is no kind of machine; there are host, all, amx, amx-folded,"),
    (["--targets", ""], "'' is no kind of machine"),
    (["--out", "photos"], "photos has files in it, and is no pack of kernels: name another folder"),
    (["--out", "photos/cat.png"], "cat.png is no folder: name another one"),
    (["--out", "photos/cat.png/kernels"], "cat.png: Not a directory"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_compiled(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    model = write_tiny_model(tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-m", "qrun.cli.main", "pack", str(model), "--out", "kernels", *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat" and not (tmp_path / "kernels").exists()


def test_a_pack_is_replaced_as_a_whole_and_stays_if_the_next_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = write(tmp_path / "kernels", ["a", "b"])
    with pytest.raises(PackError):
        packs.write(folder, "1", {HOST: {"c": b"no image"}})
    assert Pack.open(folder).read(HOST, "a") == image("a")
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(Path, "write_text", full)
        packs.write(folder, "1", {HOST: {"c": image("c")}})
    assert caught.value.filename == str(folder)
    other = "neon" if machine_target(HOST).is_x86 else "avx2"
    write(folder, ["c"], other)
    pack = Pack.open(folder)
    assert pack.read(HOST, "a") is None and pack.read(other, "c") == image("c", other)
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


def test_packs_are_searched_in_order_and_what_they_have_is_not_compiled(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, variable, app = (write(tmp_path / name / "kernels", [name]) for name in ("named", "variable", "app"))
    monkeypatch.setenv("QRUN_KERNELS", str(variable))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(app.parent / "program"))
    with packs.using(named):
        assert [pack.folder for pack in packs.packs()] == [named, variable, app]
        keys = ["named", "variable", "app"]
        assert load_images(keys, host_target()) == {key: image(key) for key in keys}
    assert not compiled and not (tmp_path / "cache").exists(), "no cache is made"
    assert [pack.folder for pack in packs.packs()] == [variable, app]
    assert set(load_images(["app", "other"], host_target())) == {"app", "other"}
    assert compiled == ["other"]


def test_the_working_directory_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QRUN_KERNELS", raising=False)
    write(tmp_path / "kernels", ["a"])
    monkeypatch.chdir(tmp_path)
    assert packs.packs() == []
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert packs.packs() == []


def test_a_program_that_nuitka_has_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library may be in it as bytecode: only the program's own module says so."""
    monkeypatch.delenv("QRUN_KERNELS", raising=False)
    inside, beside = write(tmp_path / "app.dist" / "kernels", ["a"]), write(tmp_path / "kernels", ["a"])
    program = sys.modules["__main__"]
    monkeypatch.setattr(program, "__file__", str(tmp_path / "app.dist" / "app.py"), raising=False)
    assert packs.packs() == []
    monkeypatch.setattr(program, "__compiled__", SimpleNamespace(containing_dir=str(tmp_path)), raising=False)
    assert [pack.folder for pack in packs.packs()] == [inside, beside]


def test_a_folder_that_is_named_must_be_a_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=f"no pack of kernels in {tmp_path / 'empty'}: manifest.json: No such file"):
        Model.load(tmp_path / "model.gguf", kernels=tmp_path / "empty")
    monkeypatch.setenv("QRUN_KERNELS", str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"QRUN_KERNELS names .*gone, where there is no pack"):
        packs.packs()
    folder = write(tmp_path / "kernels", ["a"])
    for text in ("", "[1]", "{}", json.dumps({"format": FORMAT}), "[" * 100000):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(PackError, match="no manifest of a pack of kernels, or it is damaged"):
            Pack.open(folder)


def test_nothing_outside_of_the_pack_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "kernels", ["a"])
    place = json.loads((folder / MANIFEST).read_text())["targets"][HOST]["kernels"]["a"]
    for name, change_of_place in (("../secret", {}), (f"{HOST}.code", {"offset": -4}), (f"{HOST}.code", {"bytes": -1})):
        change(folder, targets={HOST: {"file": name, "kernels": {"a": place | change_of_place}}})
        with pytest.raises(PackError):
            Pack.open(folder)
    for change_of_place in ({"offset": 10**30}, {"bytes": 10**18}, {"bytes": 0}, {"sha256": ""}):
        change(folder, targets={HOST: {"file": f"{HOST}.code", "kernels": {"a": place | change_of_place}}})
        with pytest.raises(PackError, match="the kernel a is damaged"):
            Pack.open(folder).read(HOST, "a")


@pytest.mark.parametrize("damage", ["a byte", "cut off", "gone"])
def test_damaged_code_is_not_run_but_compiled(compiled: list[str], tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "kernels", ["a", "b"])
    path = folder / f"{HOST}.code"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1] if damage == "a byte" else []))
    said = "cannot be read: No such file" if damage == "gone" else "the kernel b is damaged"
    with packs.using(folder), pytest.warns(CacheWarning, match=said):
        assert load_images(["b"], host_target()) == {"b": image("b")}
    assert compiled == ["b"]


def test_a_pack_of_another_version_is_said_and_not_used(compiled: list[str], tmp_path: Path) -> None:
    folder = write(tmp_path / "kernels", ["a"])
    change(folder, sources="other")
    said = "was packed by qrun 0.0.9, whose kernels are others, and is not used"
    with packs.using(folder), pytest.warns(CacheWarning, match=said):
        load_images(["a"], host_target())
    assert compiled == ["a"]
    change(folder, format="qrun kernels 2")
    assert "by another version of qrun" in str(Pack.open(folder).problem)


def test_without_a_compiler_what_is_missing_is_one_clear_error(
    compiled: list[str], no_compiler: None, tmp_path: Path
) -> None:
    folder = write(tmp_path / "kernels", ["a"])
    with packs.using(folder):
        assert load_images(["a"], host_target()) == {"a": image("a")}
        with pytest.raises(CompileError) as error:
            load_images(["a", "b"], host_target())
    assert str(error.value) == (
        f"the kernel b for {HOST} is not in the pack {folder}, and nothing can be compiled, as Numba is not there: "
        f"make the pack again (qrun pack MODEL --out {folder} --targets {HOST})"
    )
    change(folder, sources="other")
    with packs.using(folder), pytest.raises(CompileError, match=r"packed by qrun 0\.0\.9.*make the pack again"):
        load_images(["a"], host_target())


def test_without_a_compiler_code_for_a_lesser_machine_does(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesser = usable_machines()[-1]
    folder = write(tmp_path / "kernels", ["a"], lesser)
    with packs.using(folder):
        assert default_target() == host_target(), "with a compiler nothing is slower than without a pack"
        monkeypatch.setitem(sys.modules, "numba", None)
        assert default_target() == machine_target(lesser)
    write(folder, ["a"])
    with packs.using(folder):
        assert default_target() == default_target(folded=True) == host_target()
    if HOST == "amx":
        write(folder, ["a"], lesser := usable_machines()[1])
        with packs.using(folder):
            assert default_target() == machine_target(lesser)
    write(folder, ["a"], "amx-folded")
    with packs.using(folder):
        assert default_target(folded=True) == folded_target()
    assert default_target(folded=True) == folded_target()


HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "llvmlite"):
            raise ImportError(name + " is hidden")
sys.meta_path.insert(0, Hidden())
"""

ANSWER = """
from qrun.engine import Model
with Model.load(sys.argv[1], kernels=sys.argv[2], threads=2) as model:
    print(model.complete("It was", max_tokens=8, temperature=0))
"""


def test_with_a_pack_a_model_answers_where_neither_numba_nor_llvmlite_is(tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "model.gguf"), tmp_path / "Äpp mit Pack" / "kernels"
    result = CliRunner().invoke(cli, ["pack", str(model), "--out", str(out), "--targets", "host"])
    assert result.exit_code == 0, result.output
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QRUN", "XDG"))}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONIOENCODING": "utf-8"}
    answers = [
        subprocess.run(
            [sys.executable, "-c", before + ANSWER, str(model), str(out)], capture_output=True, text=True, timeout=60,
            env=environment, cwd=tmp_path, check=True, encoding="utf-8",
        ).stdout
        for before in (HIDDEN, "import sys\n")
    ]  # fmt: skip
    assert answers[0] == answers[1] != "\n"
    assert not (tmp_path / "home").exists(), "nothing is written"
    with Model.load(model, threads=2) as loaded:
        assert loaded.complete("It was", max_tokens=8, temperature=0) == answers[0].removesuffix("\n")


def test_a_distribution_names_its_sources_as_a_checkout_does() -> None:
    # In a process of its own: setuptools wants to be imported before what else there may be of distutils.
    program = f"import runpy; print(runpy.run_path({str(ROOT / 'setup.py')!r})['kernel_sources']())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == sources.digest_of({n: sources._source(n) for n in sources.source_names()})
