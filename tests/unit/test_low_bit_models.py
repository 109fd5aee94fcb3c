"""Models of the types of one to four bits: they run as a plain forward pass does, scales of whole tensors included."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_model import ARCHITECTURES

from qrun.cli.main import main
from qrun.engine import Model
from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.blocks import BLOCK_FORMATS
from qrun.formats.blocks.grids import grid
from qrun.models import build_graph
from tests.reference import forward

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import random_model

SMALL = random_model.llama(layers=1, width=256, ffn=512, heads=4, kv_heads=2, vocabulary=260)
LOW = [
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0",
]  # fmt: skip
TOKENS = [1, 200, 7, 7, 259]


def agrees(path: Path, tokens: list[int]) -> bool:
    """Whether the engine's logits are those of the plain forward pass, but for activations of eight bits."""
    with GGUFReader(path) as reader:
        expected = forward(build_graph(reader, 32), tokens)
    with Model.load(path, threads=1, context=32) as model:
        found = model.logits(tokens)
    return bool(np.square(found - expected).sum() < 3e-4 * np.square(expected).sum())


@pytest.mark.parametrize("name", LOW)
def test_a_model_of_one_type_gives_the_logits_of_the_plain_forward_pass(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    random_model.write(path, name, SMALL)
    assert agrees(path, TOKENS)


def as_nvfp4(path: Path, architecture: str, scaled: Callable[[str], bool]) -> set[str]:
    """One of the small architectures with its matrices in NVFP4, and scales, far from 1, for those that `scaled` names:
    one of a matrix, or of each expert. Returns the names of what has one."""
    rng = np.random.default_rng(5)
    with GGUFReader(ARCHITECTURES / f"{architecture}.gguf") as reader, GGUFWriter.from_reader(path, reader) as writer:
        tensors: dict[str, tuple[TensorType, tuple[int, ...], np.ndarray]] = {}
        for name, tensor in reader.tensors.items():
            tensors[name] = (tensor.type, tensor.shape, tensor.raw)
            whole = name.removesuffix(".weight")
            if len(tensor.shape) < 2 or tensor.shape[-1] % 64 or "ffn_gate_inp" in name or f"{whole}.scale" in tensors:
                continue
            deviation = float(tensor.dequantize().std())
            n_weights = int(np.prod(tensor.shape))
            raw = random_model.random_blocks(rng, TensorType.NVFP4, n_weights, deviation)
            tensors[name] = (TensorType.NVFP4, tensor.shape, raw)
            if scaled(whole):
                scale = rng.uniform(0.3, 3.0, tensor.shape[0] if whole.endswith("_exps") else 1).astype(np.float32)
                tensors[f"{whole}.scale"] = (TensorType.F32, scale.shape, scale.view(np.uint8))
        for name, (type_, shape, _) in tensors.items():
            writer.add_tensor(name, type_, shape)
        for name, (_, _, raw) in tensors.items():
            writer.write_tensor(name, raw)
    return {name for name in tensors if name.endswith(".scale")}


@pytest.mark.parametrize("architecture", ["llama-dense", "llama-moe"])
def test_a_scale_beside_a_matrix_of_nvfp4_counts(tmp_path: Path, architecture: str) -> None:
    with_scales, without = tmp_path / "scales.gguf", tmp_path / "none.gguf"
    scales = as_nvfp4(with_scales, architecture, lambda name: "token_embd" not in name)
    as_nvfp4(without, architecture, lambda name: False)
    of_layer = {name.removeprefix("blk.0.") for name in scales if name.startswith("blk.0.")}
    assert {"attn_q.scale", "attn_k.scale", "attn_v.scale", "attn_output.scale"} <= of_layer
    assert any(name.startswith("ffn") for name in of_layer)
    assert agrees(with_scales, [1, 100, 7, 7])
    logits = []
    for path in (with_scales, without):
        with Model.load(path, threads=1, context=32) as model:
            logits.append(model.logits([3, 4]))
    assert np.square(logits[0] - logits[1]).sum() > 0.01 * np.square(logits[1]).sum()


@pytest.mark.parametrize("name", LOW)
def test_a_file_that_is_cut_short_says_so_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    random_model.write(path, name, SMALL)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40_000)
    with pytest.raises(FormatError, match=r"model\.gguf: ") as caught:
        Model.load(path, threads=1, context=32)
    assert "\n" not in str(caught.value)


def test_a_first_run_without_the_package_that_has_the_tables_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    random_model.write(path, "IQ1_M", SMALL)
    monkeypatch.setenv("QRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    grid.cache_clear()
    assert main(["bench", str(path), "-p", "2", "-n", "1"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("qrun: gguf 0.18 or newer is needed for weights of type IQ1_S (pip install --upgrade gguf)")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="300"), GGUFWriter(path) as writer:
        writer.set_metadata("general.architecture", "llama", ValueType.STRING)
        writer.add_tensor("token_embd.weight", TensorType.IQ3_S, (2, 300))


@pytest.mark.parametrize("name", ["IQ3_S", "IQ1_M", "NVFP4", "TQ1_0"])
def test_a_file_converts_to_another_type(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    random_model.write(path, name, SMALL)
    assert main(["convert", str(path), str(out), "--type", "q8_0", "--allow-requantize"]) == 0
    with GGUFReader(path) as before, GGUFReader(out) as after:
        for tensor, converted in zip(before.tensors.values(), after.tensors.values(), strict=True):
            weights, found = tensor.dequantize(), converted.dequantize()
            assert np.square(found - weights).sum() <= 1e-4 * np.square(weights).sum()
    assert main(["convert", str(path), str(tmp_path / "other.gguf"), "--type", "q8_0"]) == 1
    assert "quantised already" in capsys.readouterr().err


def test_every_type_of_a_tensor_that_can_be_decoded_can_be_run() -> None:
    from qrun.engine.kernels.unpack import TYPES

    assert set(TYPES) == {type.name for type in BLOCK_FORMATS}
