"""`qrun convert` and what is under it: whole files, and all that can go wrong with them."""

from __future__ import annotations

import functools
from pathlib import Path

import command_line
import numpy as np
import pytest
from web_server import add_repository, run_with_hub, serve

from qrun.engine.quantize import convert as converting
from qrun.engine.quantize.convert import convert, plan
from qrun.engine.quantize.imatrix import Imatrix
from qrun.engine.quantize.mixes import Choice
from qrun.engine.quantize.source import GGUFSource
from qrun.formats import GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.blocks import quantize
from qrun.models import store
from qrun.models.catalog import catalog_entry

ROW = 256
N_LAYERS = 2
WEIGHTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_model(
    path: Path, type: TensorType = TensorType.F16, *, experts: int = 0, row: int = ROW, poison: float | None = None
) -> Path:
    """A llama of two layers with random weights."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (300, row), "output.weight": (300, row)}
    for i in range(N_LAYERS):
        for name in WEIGHTS:
            if experts and name.startswith("ffn"):
                shapes[f"blk.{i}.{name}_exps.weight"] = (experts, 96, row)
            else:
                shapes[f"blk.{i}.{name}.weight"] = (96, row)
        shapes[f"blk.{i}.attn_norm.weight"] = (row,)
    rng = np.random.default_rng(1)
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.architecture", "llama", ValueType.STRING)
        writer.set_metadata("general.file_type", 1, ValueType.UINT32)
        for key, value in (("block_count", N_LAYERS), ("attention.head_count", 4), ("expert_count", experts)):
            writer.set_metadata(f"llama.{key}", value, ValueType.UINT32)
        writer.set_metadata("tokenizer.ggml.tokens", ["a", "b"], ValueType.ARRAY, ValueType.STRING)
        types = {name: type if len(shape) > 1 else TensorType.F32 for name, shape in shapes.items()}
        for name, shape in shapes.items():
            writer.add_tensor(name, types[name], shape)
        for name, shape in shapes.items():
            values = rng.normal(size=shape).astype(np.float32) * 0.02
            if poison is not None and name == "blk.1.ffn_up.weight":
                values[3, 5] = poison
            writer.write_tensor(name, quantize(values, types[name]) if len(shape) > 1 else values)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model-f16.gguf")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


run = functools.partial(command_line.run, "convert")


# Files


@pytest.mark.parametrize("type", ["q4_k_m", "q8_0", "iq4_xs", "bf16", "f32", "q2_k"])
def test_tensors_are_those_of_the_plain_quantiser(type: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("out.gguf")
    assert run(source, out, "--type", type, capsys=capsys)[0] == 0
    with GGUFReader(source) as before, GGUFReader(out) as after:
        assert list(after.tensors) == list(before.tensors)
        for name, tensor in after.tensors.items():
            original = before.tensors[name]
            assert tensor.shape == original.shape
            expected = original.raw if tensor.type == original.type else quantize(original.dequantize(), tensor.type)
            np.testing.assert_array_equal(tensor.raw, expected)
        assert after.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
        assert after.metadata["general.quantization_version"] == 2
        assert after.metadata["general.file_type"] != before.metadata["general.file_type"]


@pytest.mark.parametrize("type", ["q3_k_m", "q4_0", "q5_1"])
def test_any_number_of_threads_gives_the_same_file(
    type: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(converting, "CHUNK_WEIGHTS", 7 * ROW)  # so that there are chunks to be mixed up
    files = []
    for threads in (1, 2, 5):
        out = source.with_name(f"{threads}.gguf")
        assert run(source, out, "--type", type, "-t", threads, capsys=capsys)[0] == 0
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]


def test_importance_goes_to_each_expert(tmp_path: Path) -> None:
    source = write_model(tmp_path / "moe.gguf", experts=3)
    rng = np.random.default_rng(5)
    name = "blk.0.ffn_up_exps.weight"
    values = rng.lognormal(0, 1, (3, ROW)).astype(np.float32)
    imatrix = Imatrix(Path("i.gguf"), {name: values.reshape(-1)}, ["text"], 4)
    out = tmp_path / "out.gguf"
    with GGUFReader(source) as reader:
        result = convert(plan(GGUFSource(reader), Choice("Q4_K_M"), imatrix=imatrix), out)
        weights = reader.tensors[name].dequantize()
    with GGUFReader(out) as reader:
        tensor = reader.tensors[name]
        importance = imatrix.importance(name, weights.shape)
        assert importance is not None
        expected = [quantize(weights[i], tensor.type, importance[i]) for i in range(3)]
        np.testing.assert_array_equal(tensor.raw, np.concatenate(expected))
        assert reader.metadata["quantize.imatrix.dataset"] == "text"
    assert result.losses[TensorType.Q4_K].weighted_rmse < result.losses[TensorType.Q4_K].relative_rmse


def test_q2_k_s_without_importance_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("out.gguf")
    status, _, err = run(source, out, "--type", "q2_k_s", capsys=capsys)
    assert (status, err) == (1, f"qrun: {source}: Q2_K_S needs an importance matrix (--imatrix)\n")
    imatrix = Imatrix(Path("i.gguf"), {"blk.0.attn_v.weight": np.ones(ROW, np.float32)})
    message = r"needs an importance matrix, and i\.gguf has nothing of blk\.0\.attn_q\.weight"
    with GGUFReader(source) as reader, pytest.raises(ValueError, match=message):
        plan(GGUFSource(reader), Choice("Q2_K_S"), imatrix=imatrix)
    assert leftovers(source.parent) == [source.name]


def test_copy_is_the_same_tensors(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("copy.gguf")
    values = ("llama.block_count=int:3", "general.name=str:a=b:c", "x.flag=bool:true")
    options = [part for value in values for part in ("--override", value)]
    assert run(source, out, "--type", "copy", *options, capsys=capsys)[0] == 0
    with GGUFReader(source) as before, GGUFReader(out) as after:
        for name, tensor in after.tensors.items():
            np.testing.assert_array_equal(tensor.raw, before.tensors[name].raw)
        assert after.metadata["llama.block_count"] == 3
        assert after.metadata["general.name"] == "a=b:c"
        assert after.metadata["x.flag"] is True
        assert after.metadata["general.file_type"] == 1


def test_a_result_can_be_split_and_joined(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--type", "q8_0", "--split-max-size", "100K")
    status, out, _ = run(source, source.with_name("s.gguf"), *options, capsys=capsys)
    assert status == 0
    parts = sorted(source.parent.glob("s-*.gguf"))
    assert len(parts) > 2 and all(str(part) in out for part in parts)
    joined, whole = source.with_name("joined.gguf"), source.with_name("whole.gguf")
    assert run(parts[0], joined, "--type", "copy", capsys=capsys)[0] == 0
    assert run(source, whole, "--type", "q8_0", capsys=capsys)[0] == 0
    assert joined.read_bytes() == whole.read_bytes()


def test_out_is_named_after_source_and_type(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, "--type", "q4_0", capsys=capsys)[0] == 0
    assert leftovers(source.parent) == ["model-Q4_0.gguf", "model-f16.gguf"]


# Sources that are named


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, outside of a store that is new."""
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def file_type(path: Path) -> int:
    with GGUFReader(path) as reader:
        return int(reader.metadata["general.file_type"])


@pytest.mark.parametrize("name", ["org/repo/m-F16", "SMOLLM2-135m-instruct"])
def test_a_model_of_the_store_is_converted_out_of_it(
    name: str, source: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = catalog_entry(name)
    stored = entry.path if entry else store.models_folder() / f"{name}.gguf"
    stored.parent.mkdir(parents=True)
    source.rename(stored)
    assert run(name, "--type", "q8_0", capsys=capsys)[0] == 0
    (made,) = elsewhere.iterdir()
    assert made.name == ("SmolLM2-135M-Instruct-Q8_0.gguf" if entry else "m-Q8_0.gguf")
    assert file_type(made) == 7
    assert leftovers(stored.parent) == [stored.name]


def test_a_model_that_is_not_pulled_yet_is_said_to_be_so(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("SmolLM2-135M-Instruct", "--type", "q8_0", capsys=capsys)
    assert status == 1 and "fetch it with: qrun pull SmolLM2-135M-Instruct" in err
    assert leftovers(elsewhere) == []


def test_a_model_is_fetched_and_converted(source: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve() as site:
        site.files["/model-f16.gguf"] = source.read_bytes()
        assert run(f"{site.address}/model-f16.gguf", "--type", "q8_0", capsys=capsys)[0] == 0
        add_repository(site, "org/repo", {"m-F16.gguf": source.read_bytes()})
        done = run_with_hub(site, "convert", "hf:org/repo:F16", "named.gguf", "--type", "q8_0")
        assert done.returncode == 0, done.stderr
    assert leftovers(elsewhere) == ["model-Q8_0.gguf", "named.gguf"]
    assert (elsewhere / "named.gguf").read_bytes() == (elsewhere / "model-Q8_0.gguf").read_bytes()
    assert [model.name for model in store.stored_models()] == ["127.0.0.1/model-f16", "org/repo/m-F16"]


# What it says


def test_the_end_says_what_was_lost(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(source, source.with_name("o.gguf"), "--type", "q4_k_m", capsys=capsys)
    assert status == 0 and "converting" in err
    losses = {line.split()[0]: float(line.split()[-1]) for line in out.splitlines()[1:-2]}
    assert 0.06 < losses["Q4_K"] < 0.0715
    assert 0.015 < losses["Q6_K"] < 0.0176
    assert "(16.0" in out.splitlines()[-2]


def test_a_dry_run_says_all_and_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(source, "--type", "q4_k_m", "--dry-run", capsys=capsys)
    assert status == 0
    assert "F16 -> Q6_K" in out and "blk.0.attn_q.weight" in out
    assert "bits per weight" in out.splitlines()[-1]
    assert leftovers(source.parent) == ["model-f16.gguf"]
    run(source, "--type", "q4_k_m", capsys=capsys)
    with GGUFReader(source.with_name("model-Q4_K_M.gguf")) as reader:
        assert f"{sum(t.n_bytes for t in reader.tensors.values()) / 1e3:.0f} kB" in out.splitlines()[-1]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "q9"], "'q9' is no type"),
        (["--type", "q4_0", "--output-type", "q8_1"], "'q8_1' is no type of a tensor"),
        (["--type", "q4_0", "--tensor-type", "ffn"], "PATTERN=TYPE"),
        (["--type", "q4_0", "--tensor-type", "(=q8_0"], "--tensor-type '(=q8_0'"),
        (["--type", "q4_0", "--override", "a=int:x"], "'x' is no int"),
        (["--type", "q4_0", "--override", "a=list:x"], "'list' is no type"),
        (["--type", "q4_0", "--imatrix", "none.dat"], "none.dat"),
    ],
)
def test_wrong_arguments_take_one_line(
    arguments: list[str], message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(source, *arguments, capsys=capsys)
    assert (status, out) == (1, "")
    assert message in err and len(err.splitlines()) == 1
    assert leftovers(source.parent) == ["model-f16.gguf"]


def test_quantising_twice_has_to_be_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "m.gguf", TensorType.Q8_0)
    status, _, err = run(source, "--type", "q4_k_m", capsys=capsys)
    assert status == 1 and "quantised already (Q8_0)" in err and len(err.splitlines()) == 1
    assert leftovers(tmp_path) == ["m.gguf"]
    assert run(source, "--type", "q4_k_m", "--allow-requantize", capsys=capsys)[0] == 0
    assert run(source, "--type", "q8_0", capsys=capsys)[0] == 0  # nothing changes its type


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_found(
    poison: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "m.gguf", poison=poison)
    status, _, err = run(source, "--type", "q4_k_m", capsys=capsys)
    assert status == 1 and "'blk.1.ffn_up.weight' has weights that are not finite" in err
    assert leftovers(tmp_path) == ["m.gguf"]


def test_the_source_is_not_written_over(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = source.read_bytes()
    status, _, err = run(source, source, "--type", "q4_0", capsys=capsys)
    assert status == 1 and "the source itself" in err
    assert source.read_bytes() == before


def test_a_folder_is_no_name_for_the_result(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source.with_name("out")
    folder.mkdir()
    status, _, err = run(source, folder, "--type", "q4_0", capsys=capsys)
    assert (status, err.splitlines()[-1]) == (1, f"qrun: {folder}: is a folder: name a file")
    assert leftovers(source.parent) == [source.name, "out"]


def test_another_models_importance_is_refused(source: Path) -> None:
    with GGUFReader(source) as reader, pytest.raises(ValueError, match="of another model"):
        plan(GGUFSource(reader), Choice("Q4_K_M"), imatrix=Imatrix(Path("i"), {"x": np.ones(4, np.float32)}))


def test_a_full_disk_is_seen_before(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    status, _, err = run(source, "--type", "q4_0", capsys=capsys)
    assert status == 1 and "GB are needed" in err
    assert leftovers(source.parent) == ["model-f16.gguf"]


@pytest.mark.parametrize("split", [[], ["--split-max-size", "50K"]])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(
    error: BaseException | type[BaseException],
    split: list[str],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = GGUFWriter.write_tensor

    def failing(self: GGUFWriter, name: str, data: object) -> None:
        if name == "blk.1.attn_v.weight":
            raise error
        write(self, name, data)

    monkeypatch.setattr(GGUFWriter, "write_tensor", failing)
    status, _, _ = run(source, "--type", "q4_0", *split, capsys=capsys)
    assert status == (130 if error is KeyboardInterrupt else 1)
    assert leftovers(source.parent) == ["model-f16.gguf"]


def test_the_parts_of_a_split_appear_together_or_not_at_all(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    close, closed = GGUFWriter.close, []

    def failing(self: GGUFWriter) -> None:
        closed.append(self)
        if len(closed) == 3:
            self.abort()
            raise OSError(28, "No space left on device")
        close(self)

    monkeypatch.setattr(GGUFWriter, "close", failing)
    assert run(source, "--type", "q8_0", "--split-max-size", "50K", capsys=capsys)[0] == 1
    assert leftovers(source.parent) == ["model-f16.gguf"]
