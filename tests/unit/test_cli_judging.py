"""`qrun imatrix`, `qrun perplexity --against`, `qrun compare`: whole commands over small models of random weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from tiny_model import PIECES, TEXT, write_tiny_model

from qrun.cli import compare, compare_plot, plot, plot_labels
from qrun.cli.comparison import Comparison, Measured
from qrun.engine import Tokenizer
from qrun.engine.judging.divergence import Divergence
from qrun.engine.judging.scoring import Score
from qrun.engine.quantize import sensitivity
from qrun.engine.quantize.calibrated import Calibration, TooSmall
from qrun.engine.quantize.imatrix import read_imatrix
from qrun.engine.quantize.mixes import Choice
from qrun.formats import GGUFReader, TensorType
from qrun.models import build_graph
from tests import reference

CHUNK = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judging")
    write_tiny_model(folder / "model.gguf")
    write_tiny_model(folder / "experts.gguf", architecture="qwen3moe-moe", experts=5)
    write_tiny_model(folder / "other.gguf", pieces=["<|endoftext|>", *reversed(PIECES[1:])])
    (folder / "text.txt").write_text(TEXT)
    return folder


# imatrix


@pytest.mark.usefixtures("half_precision_cache")
@pytest.mark.parametrize("model", ["model", "experts"])
def test_an_importance_matrix_is_that_of_a_plain_forward_pass(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = folder / f"{model}.gguf", tmp_path / "i.gguf"
    arguments = ("imatrix", path, folder / "text.txt", "-o", out, "--ctx", CHUNK, "--chunks", 2, "-t", 2)
    status, text, _ = run(*arguments, capsys=capsys)
    assert status == 0 and f"2 chunks of {CHUNK}; perplexity" in text
    tokens = Tokenizer.load(path).encode(TEXT)
    with GGUFReader(path) as reader:
        graph = build_graph(reader, CHUNK)
        chunks = [reference.input_squares(graph, tokens[i * CHUNK : (i + 1) * CHUNK]) for i in range(2)]
    found = read_imatrix(out)
    names = {name for name in chunks[0] if name.startswith("blk.")}
    assert found.values.keys() == names
    assert (found.datasets, found.chunks) == (["text.txt"], 2)
    for name in names:
        sums, counts = (sum(np.asarray(chunk[name][i]) for chunk in chunks) for i in range(2))
        expected = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], 1).reshape(-1)
        assert np.linalg.norm(found.values[name] - expected) <= 2e-4 * np.linalg.norm(expected), name


def test_converting_takes_the_importance_matrix(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imatrix, out = tmp_path / "i.gguf", tmp_path / "out.gguf"
    source = folder / "experts.gguf"
    run("imatrix", source, folder / "text.txt", "-o", imatrix, "--ctx", CHUNK, capsys=capsys)
    status, text, _ = run("convert", source, out, "--type", "q4_0", "--imatrix", imatrix, capsys=capsys)
    assert status == 0 and "by importance" in text
    with GGUFReader(out) as reader:
        assert reader.metadata["quantize.imatrix.dataset"] == "text.txt"


def test_nothing_is_left_of_an_importance_matrix_that_was_not_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qrun.engine.quantize.importance.scored_logits", stop)
    out = tmp_path / "i.gguf"
    assert run("imatrix", folder / "model.gguf", folder / "text.txt", "-o", out, capsys=capsys)[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_experts_that_were_never_used_are_told_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("aaaa")
    out = tmp_path / "i.gguf"
    arguments = ("imatrix", folder / "experts.gguf", tmp_path / "short.txt", "-o", out, "--ctx", 4)
    assert "of the experts' matrices were never used" in run(*arguments, capsys=capsys)[2]
    assert (read_imatrix(out).values["blk.0.ffn_up_exps.weight"] > 0).all()


# perplexity --against


def test_a_model_is_nothing_away_from_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.gguf"
    arguments = ("perplexity", path, folder / "text.txt", "--against", path, "--ctx", CHUNK, "--chunks", 2, "--json")
    found = json.loads(run(*arguments, capsys=capsys)[1])
    assert found["kl_divergence"]["max"] < 1e-6
    assert found["top1_agreement"] == {"value": 1, "error": 0} and found["ratio"] == {"value": 1, "error": 0}
    assert (found["perplexity"], found["error"]) == (found["reference"]["value"], found["reference"]["error"])
    assert (found["tokens"], found["chunks"], found["ctx"]) == (2 * 31, 2, CHUNK)


def test_a_quantised_model_is_a_little_away(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, small = folder / "model.gguf", tmp_path / "small.gguf"
    run("convert", path, small, "--type", "q8_0", capsys=capsys)
    arguments = ("perplexity", small, folder / "text.txt", "--against", path, "--ctx", CHUNK)
    status, text, _ = run(*arguments, capsys=capsys)
    assert status == 0 and "same top token" in text and "root mean square" in text
    found = json.loads(run(*arguments, "--json", capsys=capsys)[1])
    assert 0 < found["kl_divergence"]["median"] < found["kl_divergence"]["p99"] <= found["kl_divergence"]["max"] < 1
    alone = json.loads(run("perplexity", small, folder / "text.txt", "--ctx", CHUNK, "--json", capsys=capsys)[1])
    assert alone["perplexity"] == pytest.approx(found["perplexity"], rel=1e-12)
    assert f"perplexity {alone['perplexity']:.4f} ± " in run(
        "perplexity", small, folder / "text.txt", "--ctx", CHUNK, capsys=capsys
    )[1]


def test_more_context_than_the_model_was_trained_for_is_said_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "model.gguf"
    with GGUFReader(path) as reader:
        trained = build_graph(reader).context_length
    beyond = (
        f"qrun: a context of {trained + 2} tokens, and the model was trained for {trained}: "
        "what it says beyond that may be nonsense\n"
    )
    arguments = ("perplexity", path, folder / "text.txt", "--against", path, "--chunks", 1, "--ctx")
    assert run(*arguments, trained + 2, capsys=capsys)[::2] == (0, beyond)
    assert run(*arguments, trained, capsys=capsys)[::2] == (0, "")
    assert run("info", path, "--ctx", trained + 2, capsys=capsys)[::2] == (0, beyond)
    assert run("run", path, "a", "--max-tokens", 1, "--ctx", trained + 2, capsys=capsys)[::2] == (0, beyond)
    assert run("run", path, "a", "--max-tokens", 1, capsys=capsys)[::2] == (0, "")


def test_numbers_that_json_lacks_are_null(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("perplexity", folder / "model.gguf", folder / "text.txt", "--ctx", 4, "--chunks", 1, "--json")
    assert json.loads(run(*arguments, capsys=capsys)[1])["error"] is None  # one token has no standard error


# compare


def compared(folder: Path, *more: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    common = ("compare", folder / "model.gguf", "--text", folder / "text.txt", "--ctx", CHUNK, "--chunks", 2)
    return run(*common, *more, capsys=capsys)


def test_types_are_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, text, _ = compared(folder, "--types", "q8_0,Q4_0", "--json", capsys=capsys)
    assert status == 0
    assert list(tmp_path.iterdir()) == []
    found = json.loads(text)
    assert (found["source"], found["text"], found["tokens"]) == ("model.gguf", "text.txt", 62)
    small, large = found["types"]
    assert (small["type"], large["type"]) == ("Q4_0", "Q8_0")
    assert small["bytes"] < large["bytes"] < found["bytes"] == (folder / "model.gguf").stat().st_size
    assert 4 < small["bits_per_weight"] < large["bits_per_weight"] < found["bits_per_weight"]
    assert 0.03 < small["relative_rmse"] < 0.2 and 0.001 < large["relative_rmse"] < 0.02
    assert 0 < large["kl_divergence"]["mean"] < small["kl_divergence"]["mean"]
    # The logits that were kept give what both models side by side give.
    out = tmp_path / "q4.gguf"
    run("convert", folder / "model.gguf", out, "--type", "q4_0", capsys=capsys)
    against = ("perplexity", out, folder / "text.txt", "--against", folder / "model.gguf", "--ctx", CHUNK)
    together = json.loads(run(*against, "--chunks", 2, "--json", capsys=capsys)[1])
    assert {key: together[key] for key in ("kl_divergence", "reference", "perplexity")} == {
        key: small[key] for key in ("kl_divergence", "reference", "perplexity")
    }


def test_mixes_of_measured_sensitivity_are_as_large_as_the_types_beside_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sensitivity, "CANDIDATES", (TensorType.Q4_0, TensorType.Q8_0))
    pictures: list[Comparison] = []
    monkeypatch.setattr(compare_plot, "draw", lambda comparison, path: pictures.append(comparison))
    monkeypatch.setattr(plot, "check_plot", lambda path: None)
    words = ("--types", "q8_0,q5_0", "--calibrate", folder / "text.txt", "--samples", 4, "--length", CHUNK, "--plot",
             "x.svg")  # fmt: skip
    status, text, errors = compared(folder, *words, "--json", capsys=capsys)
    assert status == 0, errors
    assert "calibrating by 4 samples" in errors
    types = {each["type"]: each for each in json.loads(text)["types"]}
    (mix,) = types.keys() - {"Q5_0", "Q8_0"}  # of more bits than Q8_0 has there is none
    assert mix.startswith("mix ") and 0.9 * types["Q5_0"]["bytes"] < types[mix]["bytes"] <= types["Q5_0"]["bytes"]
    assert [each.type for each in pictures[0].types if each.measured] == [mix]


def test_mixes_have_names_of_their_own_and_one_that_cannot_be_as_small_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0")
    sizes: list[int] = []

    def mix(self: Calibration, imatrix: object, n_bytes: int, types: object) -> Choice:
        """Of as many bits each, the first and the third of the same types."""
        sizes.append(n_bytes)
        if len(sizes) == len(names):
            raise TooSmall(f"{self.source.path}: the smallest file has 9 bytes")
        type = (TensorType.IQ4_NL, TensorType.Q4_0, TensorType.IQ4_NL)[len(sizes) - 1]
        quantised = sensitivity.quantised_names(self.source)
        return Choice(type.name, types={
            name: type if name in quantised else tensor.type for name, tensor in self.source.tensors.items()
        })  # fmt: skip

    monkeypatch.setattr(Calibration, "mix", mix)
    words = ("--types", ",".join(names), "--calibrate", folder / "text.txt", "--samples", 4, "--length", CHUNK)
    status, text, errors = compared(folder, *words, "--keep", tmp_path, "--json", capsys=capsys)
    assert status == 0, errors
    found = [each["type"] for each in json.loads(text)["types"]]
    first, second = sorted(set(found) - set(names))
    assert first.startswith("mix ") and second == f"{first} IQ4_NL" and len(found) == len(names) + 2
    assert len(list(tmp_path.iterdir())) == len(found)
    assert f"no mix of the size of Q5_0: {folder / 'model.gguf'}: the smallest file has 9 bytes" in errors


def test_types_of_one_size_have_one_mix(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sensitivity, "CANDIDATES", (TensorType.Q4_0, TensorType.Q8_0))
    monkeypatch.setattr(sensitivity, "LOW_CANDIDATES", ())
    words = ("--types", "q4_0,iq4_nl", "--calibrate", folder / "text.txt", "--samples", 4, "--length", CHUNK)
    status, text, errors = compared(folder, *words, "--json", capsys=capsys)
    assert status == 0, errors
    found = [each["type"] for each in json.loads(text)["types"]]
    assert len(found) == len(set(found)) == 3 and sum(name.startswith("mix ") for name in found) == 1


@pytest.mark.parametrize("option", [("--samples", 128), ("--length", 99), ("--measures", "x")])
def test_what_goes_with_a_text_to_calibrate_by_is_not_passed_over(
    option: tuple[str, object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = compared(folder, *option, capsys=capsys)
    assert status == 2 and f"{option[0]} goes with --calibrate." in errors


def test_types_are_asked_questions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [{"question": f"How many are {i}?", "right": " few", "wrong": [" many", " none"]} for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    status, text, _ = compared(folder, "--types", "q8_0", "--tasks", questions, "--json", capsys=capsys)
    assert status == 0
    found = json.loads(text)
    assert found["tasks"]["count"] == found["types"][0]["tasks"]["count"] == 3
    assert 0 <= found["types"][0]["tasks"]["same_answer"]["value"] <= 1
    table = compared(folder, "--types", "q8_0", "--tasks", questions, capsys=capsys)[1].splitlines()
    assert table[0].endswith("answered") and table[1].endswith("%") and table[2].endswith("%")
    assert "3 questions asked" in table[3]


def test_the_table_has_a_line_for_each_type_and_models_can_be_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = tmp_path / "kept"
    status, text, _ = compared(folder, "--types", "q8_0", "--keep", keep, capsys=capsys)
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["Q8_0", "source", "model.gguf;"]
    assert [path.name for path in keep.iterdir()] == ["model-Q8_0.gguf"]


def test_nothing_is_left_of_a_comparison_that_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        assert len(list(tmp_path.rglob("model-Q8_0.gguf"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compare, "score_against", stop)
    assert compared(folder, "--types", "q8_0", capsys=capsys)[0] == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("perplexity", "model.gguf", "text.txt", "--against", "other.gguf"), "other.gguf: token 1 of its vocabulary"),
        (("perplexity", "model.gguf", "text.txt", "--against", "none.gguf"), "none.gguf"),
        (("imatrix", "model.gguf", "text.txt", "--ctx", "9999"), "text.txt: 2880 tokens, but one chunk takes 9999"),
        (("imatrix", "model.gguf", "text.txt", "-o", "model.gguf"), "model.gguf: this is the model itself"),
        (("imatrix", "model.gguf", "text.txt", "-o", "no/i.gguf"), "no such folder to write into"),
        (("compare", "model.gguf", "--text", "none.txt"), "none.txt: No such file"),
        (("compare", "model.gguf", "--text", "text.txt", "--types", "q9"), "'q9' is no type"),
        (("compare", "model.gguf", "--text", "text.txt", "--types", "copy"), "COPY is no type to compare"),
        (("compare", "model.gguf", "--text", "text.txt", "--tasks", "text.txt"), "text.txt, line 1: it is no JSON"),
        (("compare", "model.gguf", "--text", "text.txt", "--imatrix", "model.gguf"), "not of an importance matrix"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    status, out, err = run(*arguments, capsys=capsys)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert sorted(folder.iterdir()) == before


def test_a_disk_without_room_for_the_logits_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    status, _, err = compared(folder, "--types", "q8_0", capsys=capsys)
    assert status == 1 and "2 chunks take 31.7 kB of logits, and 1.0 kB are free" in err


# The picture


def point(name: str, size: int, loss: float) -> Measured:
    divergence = Divergence(
        Score([np.array([2.0, 2.2])]), Score([np.array([2.0, 2.1])]), [np.array([loss, 1.1 * loss])], [np.ones(2)]
    )
    return Measured(name, size, 4.5, 0.1, divergence)


def test_the_best_are_those_that_no_other_beats() -> None:
    types = [point("a", 4, 0.4), point("b", 3, 0.5), point("c", 5, 0.45), point("d", 3, 0.6), point("e", 6, 0.1)]
    assert [each.type for each in compare_plot.undominated(types)] == ["b", "a", "e"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_comparison_is_drawn(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    types = [point("Q4_0", 400, 0.2), point("Q8_0", 800, 0.001), point("F16", 1600, 0.0)]
    types += [replace(point("mix 4.20", 390, 0.1), measured=True), replace(point("mix 6", 600, 0.01), measured=True)]
    path = tmp_path / f"loss.{ending}"
    compare_plot.draw(Comparison("m", "t", 1600, 16.0, Score([np.array([2.0, 2.1])]), types), str(path))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert list(tmp_path.iterdir()) == [path]


def test_labels_do_not_hide_each_other() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Annotation

    from qrun.cli.plot import new_figure

    _, (axes,) = new_figure(6, 4)
    x, y = [1.0, 1.02, 1.04, 2.0, 3.0], [1.0, 1.02, 1.01, 1.5, 1.0]
    names = ["Q4_K_M", "Q4_K_S", "IQ4_NL", "Q5_0", "Q6_K"]
    axes.scatter(x, y)
    plot_labels.label_points(axes, list(zip(x, y, strict=True)), names)
    boxes = [plot_labels.text_box(text) for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in axes.texts) == sorted(names)
    inside = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1
