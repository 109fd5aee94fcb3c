"""`qrun convert --calibrate`: importance and mixes from one's own texts, on small models of random weights."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import random_pair, write_adapter
from command_line import run
from tiny_model import write_tiny_model

from qrun.cli import against, console, convert_calibrated
from qrun.engine import Tokenizer
from qrun.engine.quantize import calibrated, measure_folder
from qrun.engine.quantize.convert import Plan, Result, convert, plan
from qrun.engine.quantize.mixes import Choice
from qrun.engine.quantize.samples import read_samples
from qrun.engine.quantize.source import open_source
from qrun.engine.text.chat_template import ChatTemplate
from qrun.formats import GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.whole_file import temporary_name

LENGTH = 32
WORDS = ["clocks", "were", "striking", "thirteen", "bright", "cold", "day", "in", "April", "heard", "it", "at", "once"]


def prose(n_words: int, seed: int = 3) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    write_tiny_model(folder / "model.gguf")
    write_tiny_model(folder / "experts.gguf", architecture="qwen3moe-moe", experts=5)
    (folder / "text.txt").write_text(prose(120))
    return folder


SIZED = ("--candidates", "q4_0,q5_0,q8_0")  # few kernels to compile


def calibrating(folder: Path, model: str, out: Path, *more: object) -> tuple[object, ...]:
    return ("convert", folder / f"{model}.gguf", out, "--calibrate", folder / "text.txt", "--samples", 4, "--length",
            LENGTH, "-t", 2, *more)  # fmt: skip


# A type that is named


@pytest.mark.parametrize("model", ["model", "experts"])
def test_a_calibrated_file_is_what_an_importance_matrix_of_the_samples_gives(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    arguments = calibrating(folder, model, out, "--type", "q4_0", "--method", "imatrix")
    status, text, errors = run(*arguments, capsys=capsys)
    assert status == 0, errors
    assert "4 samples of 32 tokens; 2 are held out" in errors
    assert "by importance" in text and "that were held out" in text
    assert not list(tmp_path.glob(".*"))
    with GGUFReader(out) as reader:
        assert reader.metadata["quantize.imatrix.dataset"] == "text.txt"
        assert TensorType.Q4_0 in {tensor.type for tensor in reader.tensors.values()}


def test_the_same_on_any_number_of_threads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for threads in (1, 2):
        out = tmp_path / f"{threads}" / "out.gguf"
        out.parent.mkdir()
        arguments = calibrating(folder, "model", out, "--bpw", 5.5, *SIZED, "-t", threads)
        assert run(*arguments, capsys=capsys)[0] == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("model", ["model", "experts"])
def test_columns_are_rounded_one_by_one_and_the_loss_is_shown_beside_plain_rounding(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for method in ("imatrix", "gptq"):
        out = tmp_path / f"{method}.gguf"
        status, text, errors = run(
            *calibrating(folder, model, out, "--type", "q4_0", "--method", method), capsys=capsys
        )
        assert status == 0, errors
        assert ("rounded plainly" in text) == (method == "gptq")
        with GGUFReader(out) as reader:
            files[method] = {name: (tensor.type, bytes(tensor.raw)) for name, tensor in reader.tensors.items()}
    differing = {name for name, raw in files["gptq"].items() if raw != files["imatrix"][name]}
    assert "blk.0.attn_q.weight" in differing and "blk.1.attn_output.weight" in differing
    assert all(type == files["imatrix"][name][0] for name, (type, _) in files["gptq"].items())
    assert not any("exps" in name or "embd" in name for name in differing)


def test_where_more_is_lost_column_by_column_the_file_is_the_one_that_is_rounded_plainly(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    settings = ("--type", "q4_0", "--override", "general.name=str:new")
    assert run(*calibrating(folder, "model", plain, *settings, "--method", "imatrix"), capsys=capsys)[0] == 0
    losses = {"out.gguf": 2.0, "rounded plainly": 1.0}
    monkeypatch.setattr(convert_calibrated.Judged, "loss", property(lambda row: losses[row.name]))
    written: list[Path] = []
    write = convert_calibrated.write

    def counted(planned: Plan, to: Path, *more: Any) -> Result:
        written.append(to)
        return write(planned, to, *more)

    monkeypatch.setattr(convert_calibrated, "write", counted)
    arguments = calibrating(folder, "model", out, *settings, "--measures", tmp_path / "work")
    status, text, errors = run(*arguments, capsys=capsys)
    assert status == 0 and "weights are rounded each by itself" in errors
    assert out.read_bytes() == plain.read_bytes()
    assert str(out) in text.splitlines() and "column by column" in text
    assert len(written) == 2  # each way once
    assert not (tmp_path / "work" / "named.gguf").exists()


def test_rounding_that_was_broken_off_goes_on_and_gives_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "MOMENT_BYTES", 1)  # a layer at a time
    results = []
    for _ in range(2):
        out = tmp_path / "out.gguf"
        arguments = calibrating(folder, "model", out, "--type", "q4_0", "--measures", tmp_path / "work")
        status, _, errors = run(*arguments, capsys=capsys)
        assert status == 0, errors
        results.append(out.read_bytes())
        rounded = sorted((tmp_path / "work").glob("rounded-*"))
        assert len(rounded) > 8
        for path in rounded[3:]:
            path.unlink()
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["awq", "both"])
def test_scales_go_into_an_ordinary_file(
    method: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    out = tmp_path / "out.gguf"
    arguments = calibrating(folder, "model", out, "--type", "q4_0", "--method", method)
    status, text, errors = run(*arguments, capsys=capsys)
    assert status == 0, errors
    assert "rounded plainly" in text and not list(tmp_path.glob(".*"))
    with GGUFReader(folder / "model.gguf") as reader:
        before = {name: tensor.dequantize() for name, tensor in reader.tensors.items()}
    with GGUFReader(out) as reader:
        after = {name: (tensor.type, tensor.dequantize()) for name, tensor in reader.tensors.items()}
    assert after.keys() == before.keys()
    scaled = {name for name, (type, values) in after.items() if type is TensorType.F32
              and not np.array_equal(values, before[name])}  # fmt: skip
    assert scaled and all(name.endswith(("_norm.weight", ".bias")) for name in scaled)
    lora = tmp_path / "lora.gguf"
    write_adapter(lora, {"blk.0.attn_q.weight": random_pair(rng, "", before["blk.0.attn_q.weight"].shape, 2)})
    adapt = ("--lora", lora, "--max-tokens", 1)
    assert run("run", folder / "model.gguf", "a", *adapt, capsys=capsys)[0] == 0
    refused = f"{lora}: the model was converted with scales (--method awq or both): adapters of the original do not fit"
    assert run("run", out, "a", *adapt, capsys=capsys) == (1, "", f"qrun: {refused}\n")
    merge = ("convert", out, tmp_path / "merged.gguf", "--type", "q8_0", "--allow-requantize", "--merge-lora", lora)
    status, _, errors = run(*merge, capsys=capsys)
    assert status == 1 and errors.endswith(f"qrun: {refused}\n")
    if method == "both":  # columns are far from what they were, and their outputs near
        return
    # With the norm's scale taken back, the matrix after it is what it was, but for rounding.
    name = next(name for name in scaled if name.startswith("blk.0.attn_norm"))
    scale = before[name] / after[name][1]
    found = after["blk.0.attn_q.weight"][1] / scale
    assert np.square(found - before["blk.0.attn_q.weight"]).mean() < 0.02 * np.square(found).mean()


def test_what_was_killed_at_any_stage_goes_on_and_gives_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name that is cut where the file is not yet complete.
    whole, out = tmp_path / "whole.gguf", tmp_path / f"out-{'of-a-long-name-' * 5}.gguf"
    settings = ("--bpw", 5.5, *SIZED, "--method", "both")
    assert run(*calibrating(folder, "model", whole, *settings), capsys=capsys)[0] == 0
    work, statuses = calibrated.Calibration.folder_for(out), []
    for stage in ("slopes", "scales-*", "scaled/rounded-*"):
        command = [sys.executable, "-m", "qrun.cli.main", *map(str, calibrating(folder, "model", out, *settings))]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not list(work.glob(stage)):
                time.sleep(0.002)
            process.kill()
        statuses.append(process.returncode)
        if out.exists():  # it was done before the kill came
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
    assert any(status != 0 for status in statuses)
    temporary_name(out).write_bytes(b"GGUF")
    temporary_name(out.with_stem(f"{out.stem}-q5")).write_bytes(b"GGUF")  # another run writes it now
    (work / ".working.gguf.12345678.part").write_bytes(b"GGUF")
    assert run(*calibrating(folder, "model", out, *settings), capsys=capsys)[0] == 0
    assert out.read_bytes() == whole.read_bytes()
    assert len(list(tmp_path.glob(".*"))) == 1


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_result_is_not_there_before_it_is_judged(
    trouble: BaseException, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise trouble

    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    arguments = calibrating(folder, "model", out, "--type", "q4_0")
    with monkeypatch.context() as patch:
        patch.setattr(convert_calibrated.Judge, "row", fail)
        status, _, errors = run(*arguments, capsys=capsys)
    assert status == (130 if isinstance(trouble, KeyboardInterrupt) else 1)
    assert out.read_bytes() == b"old" and "what was measured stays in" in errors
    assert run(*arguments, capsys=capsys)[0] == 0
    assert out.read_bytes()[:4] == b"GGUF" and list(tmp_path.iterdir()) == [out]


def test_no_room_for_the_judging_is_said_before_anything_is_rounded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(against.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    # The working file is made before, when there was room.
    monkeypatch.setattr(calibrated.Calibration, "working", folder / "model.gguf")
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    arguments = calibrating(folder, "model", out, "--type", "q4_0", "--measures", work)
    status, _, errors = run(*arguments, capsys=capsys)
    assert status == 1
    assert re.search(
        rf"{re.escape(str(work))}: 2 chunks take .* of logits, and 1\.0 kB are free "
        r"\(give fewer --samples, another folder as --measures, or --no-judge\)", errors,
    )  # fmt: skip
    assert [path.name for path in work.iterdir()] == ["key"] and not out.exists()


def test_no_room_for_the_rounding_is_said_before_it_begins(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(calibrated.shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    arguments = calibrating(folder, "model", tmp_path / "out.gguf", "--type", "q4_0", "--no-judge")
    status, _, errors = run(*arguments, capsys=capsys)
    assert status == 1
    assert errors.endswith("the disk has 0.0 GB free, and rounding needs 0.0 GB\n")
    assert not (tmp_path / "out.gguf").exists()
    assert not list((tmp_path / ".out.gguf.calibration").glob("rounded*"))


def test_what_goes_into_layers_with_scales_is_kept_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales see the inputs of the original, and rounding those of what is rounded so far."""
    source = tmp_path / "model.gguf"
    with GGUFReader(folder / "model.gguf") as reader, GGUFWriter.from_reader(source, reader) as writer:
        for name in sorted(reader.tensors):  # so that both have the same tensors in the same order
            writer.add_tensor(name, TensorType.F32, reader.tensors[name].shape)
        for name in sorted(reader.tensors):
            writer.write_tensor(name, reader.tensors[name].dequantize())
    shutil.copy(folder / "text.txt", tmp_path)
    files: dict[str, set[str]] = {}

    class Watched(calibrated.Relay):
        def reach(self, band: int, step: Any) -> None:
            super().reach(band, step)
            files[method] |= {path.name for path in work.glob("entering-*")}

    monkeypatch.setattr(calibrated, "Relay", Watched)
    work = tmp_path / "work"
    for method in ("awq", "gptq"):
        files[method] = set()
        arguments = calibrating(tmp_path, "model", tmp_path / f"{method}.gguf", "--type", "q4_0", "--method", method)
        status, _, errors = run(*arguments, "--no-judge", "--measures", work, capsys=capsys)
        assert status == 0, errors
    assert files["awq"] and files["gptq"] and not files["awq"] & files["gptq"]


def test_what_helps_to_go_on_stays_until_a_result_is_complete(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that is kept, too, and whatever result that is."""

    class BrokenOff(calibrated.Relay):
        def observe(self, band: int, names: Any, *more: Any) -> None:
            if band:
                raise KeyboardInterrupt
            super().observe(band, names, *more)

    monkeypatch.setattr(calibrated, "MOMENT_BYTES", 1)  # a layer at a time
    work = tmp_path / "work"

    def convert_to(type: str, method: str) -> int:
        out = tmp_path / f"{type}.gguf"
        arguments = calibrating(folder, "model", out, "--type", type, "--method", method, "--measures", work)
        return run(*arguments, capsys=capsys)[0]

    def passing() -> set[str]:
        found = {path.name for path in work.rglob("*") if re.fullmatch(measure_folder.PASSING, path.name)}
        return {re.sub("-.*", "", name) for name in found}

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "Relay", BrokenOff)
        assert convert_to("q4_0", "gptq") == 130
        before = set(work.glob("entering-*"))
        assert before and passing() == {"entering", "rounded.gguf"}
        assert convert_to("q5_0", "gptq") == 130
        assert passing() == {"entering", "rounded.gguf"} and not before & set(work.glob("entering-*"))
        (work / measure_folder.SCALED).mkdir()
        (work / measure_folder.SCALED / "key").write_text("0123456789abcdef")
        (work / measure_folder.SCALED / ".entering-01234567-9.12345678.part").touch()
        (work / measure_folder.SCALED / "entering-01234567-9").touch()
        (work / "named.gguf").touch()
    assert convert_to("q8_0", "imatrix") == 0
    assert not passing() and not list((work / measure_folder.SCALED).glob(".*"))
    assert {"working.gguf", "imatrix.gguf"} <= {path.name for path in work.iterdir()}
    assert list(work.glob("rounded-*"))


# The folder of measures


@pytest.mark.parametrize("key", [None, b"", b"-----BEGIN PRIVATE KEY-----", b"0123456789abcdeg"])
def test_a_folder_of_other_things_is_refused_and_left_as_it_is(
    key: bytes | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    (work / "scaled" / "images").mkdir(parents=True)
    names = ["scaled/images/photo.png", ".download.part", "rounded-numbers.csv", "logits", *(["key"] if key else [])]
    for name in names:
        (work / name).write_bytes(key or b"theirs")
    if key == b"":
        (work / "key").touch()
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    arguments = calibrating(folder, "model", tmp_path / "out.gguf", "--type", "q4_0", "--measures", work)
    status, _, errors = run(*arguments, capsys=capsys)
    assert status == 1
    assert errors.endswith(f"{work}: other things than measures lie here: name a new folder, or an empty one\n")
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


def test_what_others_put_beside_measures_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / ".out.gguf.calibration", tmp_path / "out.gguf"
    run(*calibrating(folder, "model", out, "--bpw", 5.5, *SIZED, "--dry-run"), capsys=capsys)
    (work / "scaled" / "images").mkdir(parents=True)
    theirs = ["scaled/images/photo.png", ".download.part", "rounded-numbers.csv", "scales-12345678-x"]
    for name in theirs:
        (work / name).write_bytes(b"theirs")
    for name in (".slopes.12345678.part", ".rounded-01234567-3.12345678.part", "rounded-01234567-3"):
        (work / name).write_bytes(b"ours")
    (tmp_path / "other.txt").write_text(prose(120, 9))
    arguments = ("convert", folder / "model.gguf", out, "--calibrate", tmp_path / "other.txt", "--samples", 4,
                 "--length", LENGTH, "--type", "q4_0", "--no-judge")  # fmt: skip
    assert run(*arguments, capsys=capsys)[0] == 0
    assert sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()) == sorted(theirs)


@pytest.mark.skipif(os.name != "posix", reason="locks of folders")
def test_a_folder_at_which_another_run_is_at_work_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    work = tmp_path / "work"
    work.mkdir()
    arguments = calibrating(folder, "model", tmp_path / "out.gguf", "--type", "q4_0", "--measures", work, "--no-judge")
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        status, _, errors = run(*arguments, capsys=capsys)
    finally:
        os.close(descriptor)
    assert status == 1
    assert errors.endswith(f"{work}: another run is at work here: name another folder, or wait for it\n")
    assert list(work.iterdir()) == []
    assert run(*arguments, capsys=capsys)[0] == 0


def test_a_lock_beside_a_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    """What stands in for locks of folders where a system has none."""
    locked, work = measure_folder.locked_beside, tmp_path / "work"
    with locked(work):
        with pytest.raises(ValueError, match="work: another run is at work here"), locked(work):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(work):
        pass


def test_a_place_that_a_result_cannot_take_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.gguf").symlink_to(folder / "model.gguf")
    (tmp_path / "folder.gguf").mkdir()
    places = {folder / "model.gguf": "the source itself", tmp_path / "link.gguf": "the source itself",
              tmp_path / "folder.gguf": "is a folder", Path(os.devnull): "is a device"}  # fmt: skip
    for out, message in places.items():
        measures = ("--measures", tmp_path / "work")
        status, _, errors = run(*calibrating(folder, "model", out, "--type", "q4_0", *measures), capsys=capsys)
        assert status == 1 and message in errors
    assert not (tmp_path / "work").exists()


# A size


@pytest.mark.parametrize("model", ["model", "experts"])
def test_a_file_has_no_more_bytes_than_are_asked_for(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for name in ("q4_0", "q8_0"):
        with closing(open_source(folder / f"{model}.gguf")) as source:
            convert(plan(source, Choice(name.upper())), tmp_path / f"{name}.gguf")
        sizes[name] = (tmp_path / f"{name}.gguf").stat().st_size
    size = (sizes["q4_0"] + sizes["q8_0"]) // 2
    out = tmp_path / "out.gguf"
    status, text, errors = run(*calibrating(folder, model, out, "--size", size, *SIZED), capsys=capsys)
    assert status == 0, errors
    assert 0.9 * size < out.stat().st_size <= size
    assert "KL divergence" in text
    with GGUFReader(out) as reader:
        types = {tensor.type for tensor in reader.tensors.values() if len(tensor.shape) > 1}
    assert len(types) > 1  # a mix


def test_bits_of_a_weight_are_those_of_the_tensors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert run(*calibrating(folder, "model", out, "--bpw", 5.5, *SIZED), capsys=capsys)[0] == 0
    with GGUFReader(out) as reader:
        n_bytes = sum(tensor.n_bytes for tensor in reader.tensors.values())
        n_weights = sum(int(np.prod(tensor.shape)) for tensor in reader.tensors.values())
    assert 5.0 < 8 * n_bytes / n_weights <= 5.5


def test_a_dry_run_shows_the_choice_and_leaves_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    status, text, errors = run(*calibrating(folder, "model", out, "--bpw", 5.5, *SIZED, "--dry-run"), capsys=capsys)
    assert status == 0 and "blk.0.ffn_down.weight" in text
    work = tmp_path / ".out.gguf.calibration"
    assert not out.exists() and (work / "slopes").is_file()
    assert f"what was measured stays in {work}, for another run with this result: else remove it" in errors


def test_a_dry_run_of_a_named_type_measures_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    arguments = calibrating(folder, "experts", out, "--type", "q4_0")
    status, shown, errors = run(*arguments, "--dry-run", capsys=capsys)
    assert status == 0 and "stays in" not in errors
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, "--no-judge", capsys=capsys)[0] == 0
    with GGUFReader(out) as reader:
        types = {name: tensor.type.name for name, tensor in reader.tensors.items()}
    lines = [line.split() for line in shown.splitlines()[: len(types)]]
    assert {line[0]: line[-3] for line in lines} == types


def test_where_nothing_comes_of_it_what_was_measured_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    arguments = calibrating(folder, "model", tmp_path / "out.gguf", "--size", "1k", *SIZED)
    with monkeypatch.context() as patch:
        patch.setattr(calibrated.Calibration, "working", property(fail))
        status, _, errors = run(*arguments, capsys=capsys)
    assert status == 1 and "stays in" not in errors and list(tmp_path.iterdir()) == []
    status, _, errors = run(*arguments, capsys=capsys)
    assert status == 1 and f"what was measured stays in {tmp_path / '.out.gguf.calibration'}" in errors
    status, _, errors = run(*arguments, "--measures", tmp_path / "work", capsys=capsys)
    assert status == 1 and "stays in" not in errors


def test_a_run_that_was_killed_goes_on_and_gives_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    assert run(*calibrating(folder, "model", whole, "--bpw", 5.5, *SIZED), capsys=capsys)[0] == 0
    run(*calibrating(folder, "model", out, "--bpw", 5.5, *SIZED, "--dry-run"), capsys=capsys)
    work = tmp_path / ".out.gguf.calibration"
    slopes = (work / "slopes").read_text().splitlines(keepends=True)
    # It stopped within a line, with a tensor rounded.
    (work / "slopes").write_text("".join(slopes[:5]) + slopes[5][:20])
    leave_a_tensor_rounded(work)
    assert run(*calibrating(folder, "model", out, "--bpw", 5.5, *SIZED), capsys=capsys)[0] == 0
    assert out.read_bytes() == whole.read_bytes()


def leave_a_tensor_rounded(work: Path) -> None:
    """What a run leaves that is killed while it measures."""
    (work / "probing").touch()
    working = bytearray((work / "working.gguf").read_bytes())
    working[-5000:-4000] = bytes(1000)
    (work / "working.gguf").write_bytes(working)


@pytest.mark.parametrize("wish", [("--type", "q4_0"), ("--bpw", 5.5, *SIZED)], ids=["type", "all slopes known"])
def test_a_damaged_working_file_is_used_for_nothing_else(
    wish: tuple[object, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, after, work = tmp_path / "whole.gguf", tmp_path / "after.gguf", tmp_path / "work"
    measures = ("--measures", work, "--no-judge")
    run(*calibrating(folder, "model", whole, "--bpw", 5.5, *SIZED, *measures, "--dry-run"), capsys=capsys)
    assert run(*calibrating(folder, "model", whole, *wish, *measures), capsys=capsys)[0] == 0
    for rounded in work.glob("rounded-*"):
        rounded.unlink()
    leave_a_tensor_rounded(work)
    assert run(*calibrating(folder, "model", after, *wish, *measures), capsys=capsys)[0] == 0
    assert after.read_bytes() == whole.read_bytes()
    assert not (work / "probing").exists()


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bpw", "4", "--size", "1M"), "--bpw and --size do not go together"),
        (("--bpw", "4", "--type", "q4_0"), "chooses the types itself"),
        (("--type", "q4_0", "--imatrix", "x.gguf"), "does not go with --imatrix"),
        (("--type", "q4_0", "--candidates", "q4_0"), "--candidates goes with"),
        (("--type", "q4_0", "--split-max-size", "1M"), "does not go with --split-max-size"),
        (("--size", "1k", *SIZED), "the smallest file has"),
        (("--bpw", "5", "--candidates", "q9_9"), "is no type of a tensor"),
        (("--fit", "100000000000", *SIZED), "a context of 100000000000 tokens"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(
    arguments: tuple[str, ...], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = run(*calibrating(folder, "model", tmp_path / "out.gguf", *arguments), capsys=capsys)
    assert status != 0 and message in " ".join(errors.split())
    assert not (tmp_path / "out.gguf").exists()
    assert not list(tmp_path.glob(".*/slopes"))


@pytest.mark.parametrize(
    ("metadata", "purpose"),
    [
        ({"general.architecture": "bert"}, " (embeddings)"),
        ({"general.architecture": "llada"}, " (text by diffusion: it fills in what is masked)"),
        ({"llama.attention.causal": False}, ""),
    ],
    ids=["encoder", "diffusion", "both ways"],
)
def test_a_model_that_predicts_no_next_token_is_refused_before_anything_is_made(
    metadata: dict[str, object], purpose: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.gguf"
    with GGUFReader(folder / "model.gguf") as reader, GGUFWriter.from_reader(source, reader) as writer:
        for key, value in metadata.items():
            writer.set_metadata(key, value, ValueType.STRING if isinstance(value, str) else ValueType.BOOL)
        for name, tensor in reader.tensors.items():
            writer.add_tensor(name, tensor.type, tensor.shape)
        for name, tensor in reader.tensors.items():
            writer.write_tensor(name, tensor.raw)
    arguments = ("convert", source, tmp_path / "out.gguf", "--type", "q4_0", "--calibrate", folder / "text.txt")
    status, _, errors = run(*arguments, capsys=capsys)
    assert status == 1
    assert errors == (
        f"qrun: {source}: it does not predict the next token{purpose}, by which --calibrate measures: convert it with "
        "--type alone\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf"]


def test_a_size_needs_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = run("convert", folder / "model.gguf", "--bpw", "4", capsys=capsys)
    assert status != 0 and "--bpw needs --calibrate" in errors


def test_a_source_that_is_quantised_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", folder / "model.gguf", tmp_path / "q.gguf", "--type", "q8_0", capsys=capsys)[0] == 0
    arguments = ("convert", tmp_path / "q.gguf", tmp_path / "out.gguf", "--type", "q4_0", "--calibrate",
                 folder / "text.txt", "--length", LENGTH)  # fmt: skip
    status, _, errors = run(*arguments, capsys=capsys)
    assert status != 0 and "is quantised already" in errors and "--allow-requantize" in errors
    assert run(*arguments, "--allow-requantize", capsys=capsys)[0] == 0


def test_inputs_that_are_no_numbers_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    with GGUFReader(folder / "model.gguf") as reader, GGUFWriter.from_reader(broken, reader) as writer:
        arrays = {name: tensor.dequantize() for name, tensor in reader.tensors.items()}
        arrays["blk.1.attn_norm.weight"] = arrays["blk.1.attn_norm.weight"] * np.float32(np.nan)
        for name, array in arrays.items():
            writer.add_tensor(name, TensorType.F32, array.shape)
        for name, array in arrays.items():
            writer.write_tensor(name, array)
    arguments = ("convert", broken, tmp_path / "out.gguf", "--type", "q4_0", "--calibrate", folder / "text.txt",
                 "--length", LENGTH, "--samples", 4)  # fmt: skip
    status, _, errors = run(*arguments, capsys=capsys)
    assert status != 0 and "blk.1.attn" in errors and "not finite" in errors
    assert not (tmp_path / "out.gguf").exists()


def test_too_little_text_for_a_matrix_and_experts_that_none_of_it_reached_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path / "experts.gguf", architecture="qwen3moe-moe", experts=64)
    out = tmp_path / "out.gguf"
    arguments = ("convert", tmp_path / "experts.gguf", out, "--type", "q4_0", "--calibrate", folder / "text.txt",
                 "--samples", 2, "--length", 16, "--method", "both")  # fmt: skip
    status, _, errors = run(*arguments, capsys=capsys)
    assert status == 0, errors
    assert errors.count("32 tokens of text are few for matrices of ") == 1
    assert "of the experts' matrices were never used: rounded as if all inputs were alike" in errors
    with GGUFReader(out) as reader:
        assert all(np.isfinite(tensor.dequantize()).all() for tensor in reader.tensors.values())


def test_samples_are_no_longer_than_what_the_model_was_trained_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.gguf"
    with GGUFReader(folder / "model.gguf") as reader, GGUFWriter.from_reader(short, reader) as writer:
        writer.set_metadata("llama.context_length", 24, ValueType.UINT32)
        for name, tensor in reader.tensors.items():
            writer.add_tensor(name, tensor.type, tensor.shape)
        for name, tensor in reader.tensors.items():
            writer.write_tensor(name, tensor.raw)
    arguments = ("convert", short, tmp_path / "out.gguf", "--type", "q4_0", "--calibrate", folder / "text.txt",
                 "--samples", 4, "--method", "imatrix")  # fmt: skip
    status, _, errors = run(*arguments, capsys=capsys)
    assert status == 0, errors
    assert "samples have 24 tokens: the model was not trained for 512" in errors


# Texts


def read(folder: Path, *paths: Path, length: int = LENGTH, limit: int = 100, seed: int = 1):  # type: ignore[no-untyped-def]
    with GGUFReader(folder / "model.gguf") as reader:
        tokenizer = Tokenizer.load(reader)
        template = ChatTemplate.from_reader(reader, tokenizer)
        return tokenizer, read_samples(paths, tokenizer, template, length=length, limit=limit, seed=seed)


def test_no_sample_is_both_calibrated_and_judged_by(folder: Path) -> None:
    tokenizer, samples = read(folder, folder / "text.txt")
    taken, held_out = {tuple(chunk) for chunk in samples.taken}, {tuple(chunk) for chunk in samples.held_out}
    assert len(held_out) >= 2 and not taken & held_out and samples.repeated == 0
    assert len(taken) + len(held_out) == len(tokenizer.encode(prose(120), add_special=False)) // LENGTH


def test_samples_that_repeat_count_once(folder: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.txt"
    twice.write_text((folder / "text.txt").read_text())
    _, once = read(folder, folder / "text.txt")
    _, samples = read(folder, folder / "text.txt", twice)
    assert samples.repeated == len(once.taken) + len(once.held_out)
    assert samples.taken.tokens == once.taken.tokens


def test_lines_of_json_have_texts_or_messages(folder: Path, tmp_path: Path) -> None:
    lines = [{"text": prose(40)}, {"messages": [{"role": "user", "content": prose(40, 4)},
                                                {"role": "assistant", "content": prose(40, 5)}]}]  # fmt: skip
    path = tmp_path / "chats.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    tokenizer, samples = read(folder, path)
    joined = [tokenizer.decode(chunk) for chunk in (*samples.taken, *samples.held_out)]
    assert any("User:" in text for text in joined) and any("Assistant:" in text for text in joined)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"too little", "different samples of 32"),
        ("same.txt", b"abcdefgh" * 400, "that repeat them"),
        ("bytes.txt", b"\xff\xfe\x00", "no UTF-8 text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2: it is no JSON"),
        ("other.jsonl", b'{"prompt": "a"}', 'line 1: it has neither a "text" nor "messages"'),
        ("chat.jsonl", b'{"messages": [{"role": 7, "content": "a"}]}', "line 1: "),
        ("silent.jsonl", b'{"messages": [{"role": "user"}]}', r"line 1: messages\[0\] has no content"),
        ("text.jsonl", b'{"messages": "hello"}', 'line 1: "messages" is no list of messages'),
        ("list.jsonl", b"[1]", "line 1: it has neither"),
    ],
)
def test_texts_that_cannot_be_used_are_named(
    name: str, content: bytes, message: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(folder, path)
    assert str(path) in str(caught.value)


# What a terminal shows


class Screen(io.StringIO):
    """Standard error of a terminal."""

    def isatty(self) -> bool:
        return True


def test_kernels_that_are_compiled_meanwhile_are_told_in_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    with console.step_bar("importance") as report:
        compiling = console.CompileProgress()
        for done in range(4):
            compiling(done, 3)
            report(done, 3)
        before = screen.getvalue()
        compiling(1, 4)
    shown = screen.getvalue()
    assert "compiling kernels for this CPU  1/4" in shown[len(before) :]
    assert shown.count("\n") <= 2  # one line, rewritten
    console.CompileProgress()(1, 4)
    assert screen.getvalue()[len(shown) :] == "\r\033[Kcompiling kernels for this CPU  1/4"
