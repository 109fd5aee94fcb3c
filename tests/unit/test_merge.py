"""Adapters merged into a model while it is converted, against a merge in plain NumPy."""

from __future__ import annotations

import functools
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import command_line
import numpy as np
import pytest
from adapter_files import matrices, merged_model, product, random_pair, read_pairs, write_adapter
from test_convert import write_model

from qrun.engine.quantize.convert import convert, plan
from qrun.engine.quantize.imatrix import Imatrix
from qrun.engine.quantize.merge import MergedSource, open_sources
from qrun.engine.quantize.mixes import Choice
from qrun.engine.quantize.source import GGUFSource
from qrun.formats import GGUFReader, TensorType, ValueType
from qrun.formats.blocks import quantize
from qrun.models.adapter import Lora

EXPERTS = 4


def convert_with(
    source: Path, out: Path, *loras: Lora, type: str = "F32", threads: int = 2, **settings: object
) -> Path:
    with closing(GGUFSource(GGUFReader(source))) as base, open_sources(loras, base) as adapters:
        planned = plan(MergedSource(base, adapters), Choice(type), **settings)  # type: ignore[arg-type]
        convert(planned, out, threads=threads)
    return out


def weights(path: Path) -> dict[str, np.ndarray]:
    with GGUFReader(path) as reader:
        return {name: tensor.dequantize() for name, tensor in reader.tensors.items()}


def adapter_of(
    rng: np.random.Generator, model: Path, out: Path, names: tuple[str, ...] = (), type: TensorType = TensorType.F32
) -> Path:
    shapes = matrices(model)
    pairs = {name: random_pair(rng, name, shapes[name], int(rng.integers(1, 20))) for name in names or shapes}
    return write_adapter(out, pairs, type=type)


@pytest.fixture(params=[0, EXPERTS], ids=["dense", "experts"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """F32, so that the merge itself is all that rounds."""
    return write_model(tmp_path / "model.gguf", TensorType.F32, experts=request.param)


def test_rows_are_those_of_a_plain_merge(rng: np.random.Generator, model: Path, tmp_path: Path) -> None:
    first = adapter_of(rng, model, tmp_path / "a.gguf", type=TensorType.F16)
    second = adapter_of(rng, model, tmp_path / "b.gguf", ("token_embd.weight", "blk.0.attn_q.weight"))
    wanted = [(first, 1.5), (second, -0.5)]
    out = weights(convert_with(model, tmp_path / "out.gguf", *(Lora(*one) for one in wanted)))
    expected = weights(merged_model(model, tmp_path / "expected.gguf", wanted))
    assert list(out) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(out[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_rows_come_out_alike_in_any_pieces(rng: np.random.Generator, model: Path, tmp_path: Path) -> None:
    lora = Lora(adapter_of(rng, model, tmp_path / "a.gguf"), 0.5)
    pairs, alpha = read_pairs(lora.path)
    assert alpha is not None
    with closing(GGUFSource(GGUFReader(model))) as base, open_sources([lora], base) as adapters:
        for name, tensor in MergedSource(base, adapters).tensors.items():
            if name not in pairs:
                continue
            change = 0.5 * alpha / pairs[name][1].shape[-1] * product(name, pairs[name])
            before = base.tensors[name].rows(0, tensor.n_rows)
            expected = before + change.reshape(before.shape)
            cuts = [0, *sorted(rng.integers(0, tensor.n_rows, 3)), tensor.n_rows]
            pieces = [tensor.rows(a, b) for a, b in pairwise(cuts)]
            np.testing.assert_allclose(np.concatenate(pieces), expected, rtol=1e-5, atol=1e-6)
            tensor.forget()


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_quantised_is_the_merged_row(
    rng: np.random.Generator, model: Path, tmp_path: Path, threads: int
) -> None:
    lora = Lora(adapter_of(rng, model, tmp_path / "a.gguf", ("blk.0.attn_q.weight", "output.weight")))
    merged = weights(convert_with(model, tmp_path / "merged.gguf", lora))
    out = convert_with(model, tmp_path / "out.gguf", lora, type="Q4_K_M", threads=threads)
    with GGUFReader(out) as reader:
        for name in ("blk.0.attn_q.weight", "output.weight", "blk.1.attn_q.weight"):
            tensor = reader.tensors[name]
            assert np.array_equal(tensor.raw, quantize(merged[name], tensor.type)), name


def test_importance_of_experts_goes_with_merged_rows(rng: np.random.Generator, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", TensorType.F32, experts=EXPERTS)
    name = "blk.0.ffn_up_exps.weight"
    lora = Lora(adapter_of(rng, model, tmp_path / "a.gguf", (name,)))
    imatrix = Imatrix(tmp_path / "imatrix.gguf", {name: rng.random(EXPERTS * 256).astype(np.float32)})
    merged = weights(convert_with(model, tmp_path / "merged.gguf", lora))[name]
    importance = imatrix.importance(name, merged.shape)
    assert importance is not None
    out = convert_with(model, tmp_path / "out.gguf", lora, type="Q4_0", imatrix=imatrix)
    with GGUFReader(out) as reader:
        tensor = reader.tensors[name]
        expected = [quantize(merged[i], tensor.type, importance[i]) for i in range(EXPERTS)]
        assert np.array_equal(tensor.raw, np.concatenate(expected))


def test_a_head_that_is_the_embedding_becomes_its_own(rng: np.random.Generator, tmp_path: Path) -> None:
    tied = Path(__file__).parents[1] / "data" / "arch" / "gemma-dense.gguf"
    pairs = {
        name: random_pair(rng, name, matrices(tied)[name], 4) for name in ("token_embd.weight", "output.weight")
    }
    before = weights(tied)
    for names in (["token_embd.weight"], ["output.weight"], list(pairs)):
        chosen = {name: pairs[name] for name in names}
        lora = write_adapter(tmp_path / "a.gguf", chosen, architecture="gemma", alpha=4.0)
        out = weights(convert_with(tied, tmp_path / "out.gguf", Lora(lora)))
        for name in pairs:
            expected = before["token_embd.weight"] + (product(name, pairs[name]) if name in names else 0)
            np.testing.assert_allclose(out[name], expected, rtol=1e-5, atol=1e-6)
    untouched = weights(convert_with(tied, tmp_path / "out.gguf"))
    assert "output.weight" not in untouched


def test_scale_0_changes_no_byte(rng: np.random.Generator, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    lora = Lora(adapter_of(rng, model, tmp_path / "a.gguf"), 0.0)
    assert convert_with(model, tmp_path / "out.gguf", lora, type="COPY").read_bytes() == model.read_bytes()


# The command

run_convert = functools.partial(command_line.run, "convert")


def test_the_command_merges(rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model.gguf")
    a, b = (adapter_of(rng, model, tmp_path / f"{name}.gguf") for name in "ab")
    out = tmp_path / "out.gguf"
    options = ("--type", "q8_0", "--merge-lora", a, "--merge-lora", f"{b}=-0.25")
    assert run_convert(model, out, *options, capsys=capsys)[0] == 0
    expected = weights(merged_model(model, tmp_path / "expected.gguf", [(a, 1.0), (b, -0.25)]))
    for name, values in weights(out).items():
        assert np.abs(values - expected[name]).max() <= np.abs(expected[name]).max() / 120


def test_blocks_are_merged_into_where_that_is_allowed(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.gguf", TensorType.Q8_0)
    name = "blk.0.attn_q.weight"
    lora = adapter_of(rng, model, tmp_path / "a.gguf", (name,))
    out = tmp_path / "out.gguf"
    for type in ("copy", "q8_0"):
        options = (model, out, "--type", type, "--merge-lora", lora)
        status, _, error = run_convert(*options, capsys=capsys)
        assert status == 1 and f"{name} is quantised already (Q8_0)" in error and not out.exists()
        assert run_convert(*options, "--allow-requantize", capsys=capsys)[0] == 0
        expected = weights(merged_model(model, tmp_path / "expected.gguf", [(lora, 1.0)]))[name]
        with GGUFReader(out) as reader, GGUFReader(model) as before:
            assert reader.tensors[name].type == TensorType.Q8_0
            other = "blk.1.attn_q.weight"
            assert np.array_equal(reader.tensors[other].raw, before.tensors[other].raw)
            assert np.abs(reader.tensors[name].dequantize() - expected).max() <= np.abs(expected).max() / 120
        out.unlink()


def test_an_adapter_of_another_model_is_refused(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.gguf")
    other = write_model(tmp_path / "other.gguf", row=512)
    lora = adapter_of(rng, other, tmp_path / "a.gguf")
    status, _, error = run_convert(model, tmp_path / "out.gguf", "--type", "f16", "--merge-lora", lora, capsys=capsys)
    assert status == 1 and error.startswith(f"qrun: {lora}: tensor ") and "it is an adapter of another model" in error
    norm = write_adapter(tmp_path / "norm.gguf", {"blk.0.attn_norm.weight": (np.ones((1, 256)), np.ones((1, 1)))})
    status, _, error = run_convert(model, tmp_path / "out.gguf", "--type", "f16", "--merge-lora", norm, capsys=capsys)
    assert status == 1 and "the model has no matrix 'blk.0.attn_norm.weight'" in error
    assert not (tmp_path / "out.gguf").exists()


def test_the_adapter_is_not_written_over(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.gguf")
    lora = adapter_of(rng, model, tmp_path / "a.gguf")
    status, _, error = run_convert(model, lora, "--type", "f16", "--merge-lora", lora, capsys=capsys)
    assert status == 1 and "this is the source itself" in error


def test_weights_that_are_not_finite_are_named(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.gguf")
    name = "blk.0.attn_q.weight"
    a, b = random_pair(rng, name, (96, 256), 4)
    b[7] = np.nan
    lora = write_adapter(tmp_path / "a.gguf", {name: (a, b)})
    status, _, error = run_convert(model, tmp_path / "out.gguf", "--type", "f16", "--merge-lora", lora, capsys=capsys)
    assert status == 1 and f"'{name}' has weights that are not finite" in error
    assert "with the adapters merged into it" in error and not (tmp_path / "out.gguf").exists()


def test_a_model_that_is_merged_runs_as_with_the_adapter(rng: np.random.Generator, tmp_path: Path) -> None:
    from qrun.engine import Model

    model = Path(__file__).parents[1] / "data" / "arch" / "llama-dense.gguf"
    lora = adapter_of(rng, model, tmp_path / "a.gguf")
    merged = convert_with(model, tmp_path / "out.gguf", Lora(lora, 0.5))
    tokens = [int(token) for token in rng.integers(0, 128, 20)]
    with Model.load(model, loras=[(lora, 0.5)]) as one, Model.load(merged) as other:
        result, expected = one.logits(tokens), other.logits(tokens)
    assert np.mean((result - expected) ** 2) / np.mean(expected**2) <= 1e-6
    with GGUFReader(merged) as reader:
        assert reader.metadata_types["general.architecture"] == (ValueType.STRING, None)
