"""Folders that are run: converted once, kept in the cache, and never half there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qrun.cli import main
from qrun.engine import Model
from qrun.engine.quantize import on_load, source
from qrun.formats import FormatError, GGUFReader

DATA = Path(__file__).parent.parent / "data" / "huggingface"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(DATA / "qwen3", tmp_path / "qwen3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for conversions; the kernels stay where they are."""
    monkeypatch.setattr(on_load, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "converted"


def file_type(path: Path) -> int:
    with GGUFReader(path) as reader:
        return int(reader.metadata["general.file_type"])


def test_a_folder_is_converted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = on_load.converted(folder)
    assert file_type(path) == 7  # Q8_0
    monkeypatch.setattr(source, "open_source", None)  # a second conversion would fail
    assert on_load.converted(folder) == path
    monkeypatch.chdir(folder.parent)
    assert on_load.converted(Path("qwen3")) == path


def test_each_type_is_kept(folder: Path, cache: Path) -> None:
    paths = [on_load.converted(folder, type) for type in ("q4_0", "Q8_0", "bf16")]
    assert [file_type(path) for path in paths] == [2, 7, 32]
    assert sorted(cache.glob("*.gguf")) == sorted(paths)


def test_a_folder_that_has_changed_is_converted_anew(folder: Path, cache: Path) -> None:
    before, other = on_load.converted(folder), on_load.converted(folder, "q4_0")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    after = on_load.converted(folder)
    assert after != before
    assert sorted(cache.glob("*.gguf")) == sorted([after, other])
    (folder / "qwen3-Q4_0.gguf").write_bytes(b"made of it")
    assert on_load.converted(folder) == after


def test_a_link_to_nothing_is_no_error(folder: Path) -> None:
    first = on_load.converted(folder)
    (folder / "blob").symlink_to("missing")
    assert on_load.converted(folder) == first


def test_two_folders_of_one_name_are_two_models(folder: Path, tmp_path: Path) -> None:
    second = shutil.copytree(folder, tmp_path / "b" / "qwen3")
    assert on_load.converted(folder) != on_load.converted(second)


def test_a_folder_can_be_loaded(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Model.load(folder, type="bf16", threads=1, converting=lambda done, total: seen.append((done, total))) as model:
        assert model.path.suffix == ".gguf"
        assert model.complete("Hello", max_tokens=3, temperature=0)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(
    ("type", "message"), [("q9", "'q9' is no type"), ("copy", "not run as COPY"), ("F16x", "is no type")]
)
def test_a_type_that_there_is_not(type: str, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Model.load(folder, type=type)


def test_a_type_for_a_file_is_refused(folder: Path) -> None:
    path = on_load.converted(folder)
    with pytest.raises(ValueError, match="a type is for folders with a checkpoint"):
        Model.load(path, type="q4_0")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"no checkpoint: it has no config\.json"):
        Model.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match='"architectures" is missing'):
        Model.load(tmp_path)
    assert not list(cache.glob("*.gguf*"))


def test_commands_take_a_folder(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["tokenize", str(folder), "Hello", "--type", "q4_0", "--json"]) == 0
    printed = capsys.readouterr()
    assert f"converting {folder} to Q4_0, once" in printed.err and '"tokens"' in printed.out
    assert main.main(["info", str(folder), "--type", "q4_0"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "qwen3" in printed.out
    assert main.main(["list"]) == 0
    assert "of converted checkpoints" in capsys.readouterr().err
    assert main.main(["rm", "--converted"]) == 0
    assert "of converted checkpoints" in capsys.readouterr().out
    assert not list(cache.glob("*.gguf"))


SLOW = """
import signal, sys, time
# As a terminal has it, even where the tests themselves run in the background or under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from qrun.cli.main import main
from qrun.formats import GGUFWriter
write = GGUFWriter.write_tensor
def slow(self, name, data):
    write(self, name, data)
    print("writing", flush=True)
    time.sleep(60)
GGUFWriter.write_tensor = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there, signals end a process at once")
@pytest.mark.parametrize(
    ("command", "signal_name"),
    [("convert", "SIGTERM"), ("convert", "SIGINT"), ("convert", "SIGHUP"), ("tokenize", "SIGTERM")],
)
def test_a_conversion_that_is_ended_leaves_nothing(command: str, signal_name: str, folder: Path) -> None:
    def files() -> set[Path]:
        found = {path for path in folder.parent.rglob("*") if path.is_file()}
        return {path for path in found if path.suffix not in (".lock", ".nbi", ".nbc")}

    before = files()
    arguments = [sys.executable, "-c", SLOW, command, str(folder), "--type", "bf16", *["text"] * (command != "convert")]
    environment = os.environ | {"QRUN_CACHE": str(folder.parent / "cache")}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    assert {path.suffix for path in files() - before} == {".part"}
    number = signal.Signals[signal_name]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
    assert files() == before


def test_where_the_cache_cannot_be_written_to_the_result_goes_with_the_process(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    code = (
        f"from pathlib import Path; from qrun.engine.quantize import on_load; folder = Path({str(folder)!r})\n"
        "path = on_load.converted(folder); print(path, path == on_load.converted(folder), path.is_file())"
    )
    environment = os.environ | {"QRUN_CACHE": str(tmp_path / "file" / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path, same, whole = done.stdout.split()
    assert (same, whole) == ("True", "True")
    assert done.stderr.count("converted checkpoints are not kept: ") == 1 and "QRUN_CACHE" in done.stderr
    assert not Path(path).parent.exists()
