"""What is said of a file that can or cannot be run here: by `qrun info` and `qrun list`, and by whoever loads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_files import random_pair, write_adapter
from click.testing import CliRunner
from gguf_builder import Tensor, array, build, scalar
from tiny_model import write_tiny_model

from qrun.cli.info import describe
from qrun.cli.main import cli
from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.blocks import BLOCK_FORMATS, BLOCK_SIZES
from qrun.models import ARCHITECTURES, build_graph
from qrun.models.adapter import Adapter
from qrun.models.examine import examine, glance
from qrun.models.store import models_folder
from qrun.models.support import NO_LANGUAGE_MODELS, purpose

LLAMA = Path(__file__).parents[1] / "data" / "arch" / "llama-dense.gguf"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))


def info(path: Path, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["info", str(path), *arguments])
    return done.exit_code, done.stdout, done.stderr


def text(value: str) -> bytes:
    return scalar(ValueType.STRING, value)


def write(path: Path, pairs: list[tuple[str | bytes, bytes]], tensors: list[Tensor] | None = None) -> Path:
    path.write_bytes(build(pairs, tensors or []))
    return path


def changed_llama(
    path: Path,
    *,
    architecture: str = "llama",
    without: tuple[str, ...] = (),
    more: tuple[Tensor, ...] = (),
    types: dict[str, TensorType] | None = None,
) -> Path:
    """The small Llama under another name, without some tensors, or with more of them. types: of some tensors, whose
    bytes are then zeros."""
    tensors: list[Tensor] = []
    with GGUFReader(LLAMA) as reader:
        pairs: list[tuple[str | bytes, bytes]] = [("general.architecture", text(architecture))]
        for key, value in reader.metadata.items():
            if key.startswith("llama.") and isinstance(value, int | float) and not isinstance(value, bool):
                type, _ = reader.metadata_types[key]
                pairs.append((key.replace("llama.", f"{architecture}."), scalar(type, value)))
        for name, tensor in reader.tensors.items():
            if name in without:
                continue
            type_of = (types or {}).get(name, tensor.type)
            size, n_bytes = BLOCK_SIZES[type_of]
            data = tensor.raw.tobytes() if type_of == tensor.type else bytes(tensor.raw.size // 4 // size * n_bytes)
            tensors.append(Tensor(name, type_of, tensor.shape[::-1], data))
    return write(path, pairs, [*tensors, *more])


UNDECODED = next(type for type in reversed(TensorType) if type not in BLOCK_FORMATS and BLOCK_SIZES[type][0] <= 64)


def some_of(type: TensorType) -> dict[str, TensorType]:
    return {f"blk.{layer}.attn_q.weight": type for layer in (0, 1)}


Make = Callable[[Path], Path]


def adapter(path: Path) -> Path:
    name = "blk.0.attn_q.weight"
    return write_adapter(path, {name: random_pair(np.random.default_rng(1), name, (64, 64), 4)})


def tower(**flags: bool) -> Make:
    pairs = [(f"clip.has_{name}_encoder", scalar(ValueType.BOOL, flag)) for name, flag in flags.items()]
    weights = Tensor("v.patch_embd.weight", TensorType.F32, [4], bytes(16))
    return lambda path: write(path, [("general.architecture", text("clip")), *pairs], [weights])


def vocabulary(path: Path) -> Path:
    tokens = ("tokenizer.ggml.tokens", array(ValueType.STRING, ["a", "b"]))
    names = [("general.architecture", text("llama")), ("tokenizer.ggml.model", text("gpt2"))]
    return write(path, [*names, tokens])


def importance(path: Path) -> Path:
    sums = Tensor("blk.0.attn_q.weight.in_sum2", TensorType.F32, [4], bytes(16))
    return write(path, [("general.type", text("imatrix"))], [sums])


def named(architecture: str) -> Make:
    return lambda path: changed_llama(path, architecture=architecture)


CASES: list[tuple[str, Make, str, str]] = [
    ("adapter", adapter, "adapter", "this is an adapter, not a model: name it after --lora, beside its model"),
    ("vision", tower(vision=True), "vision tower",
     "this is a vision tower: it goes beside a model, and cannot be run alone"),
    ("old vision", tower(), "vision tower", "this is a vision tower: it goes beside a model, and cannot be run alone"),
    ("audio", tower(audio=True, vision=False), "audio tower",
     "this is an audio tower: it goes beside a model, and cannot be run alone"),
    ("both", tower(audio=True, vision=True), "vision and audio tower",
     "this is a vision and audio tower: it goes beside a model, and cannot be run alone"),
    ("vocabulary", vocabulary, "vocabulary", "this is a vocabulary alone: the file has no weights"),
    ("imatrix", importance, "importance matrix",
     "this is an importance matrix, not a model: name it after --imatrix"),
    ("control vector", named("controlvector"), "control vector",
     "this is a control vector, not a model: such are not supported"),
    ("unknown", named("other"), "model", f"architecture 'other' is not supported ({len(ARCHITECTURES)} others are)"),
    ("misspelt", named("mistral"), "model",
     "architecture 'mistral' is not supported (much like it: mistral4, mistral3)"),
    ("images", named("flux"), "model",
     "architecture 'flux' is not supported: it is a model of images or video"),
    ("no name", lambda path: write(path, [], [Tensor("x", TensorType.F32, [4], bytes(16))]), "model",
     "general.architecture is missing or not a string"),
    ("tensor", lambda path: changed_llama(path, without=("blk.1.ffn_up.weight",)), "model",
     "tensor blk.1.ffn_up.weight is missing"),
    ("types", lambda path: changed_llama(path, types=some_of(UNDECODED)), "model",
     f"tensor blk.0.attn_q.weight has type {UNDECODED.name}, which is not supported "
     f"(tensors of such types in all: 2 of {UNDECODED.name})"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "problem"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_file_that_does_not_run_says_why_everywhere_alike(
    make: Make, kind: str, problem: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.gguf")
    status, out, err = info(path)
    assert (status, err) == (0, "")
    assert f"runs here       no: {problem}\n" in out
    facts = json.loads(info(path, "--json")[1])
    assert (facts["kind"], facts["runs"], facts["problem"]) == (kind, False, problem)
    assert "memory" not in facts

    with GGUFReader(path) as reader:
        assert examine(reader) == (examine(reader)[0], None)
        with pytest.raises(FormatError) as caught:
            build_graph(reader)
        assert caught.value.reason == problem
        if problem != "tensor blk.1.ffn_up.weight is missing":  # a glance does not see that
            assert glance(reader).problem == problem

            models_folder().mkdir(parents=True)
            shutil.copyfile(path, models_folder() / "org.gguf")
            assert f"qrun: org does not run here: {problem}\n" in CliRunner().invoke(cli, ["list"]).stderr
            (row,) = json.loads(CliRunner().invoke(cli, ["list", "--json"]).stdout)
            assert row["problem"] == problem
    done = CliRunner().invoke(cli, ["run", str(path), "x"])
    assert done.exit_code == 1 and str(done.exception).startswith(f"{path}: {problem}")


def test_a_model_that_runs_says_so(tmp_path: Path) -> None:
    assert "runs here       yes\n" in info(write_tiny_model(tmp_path / "m.gguf"))[1]
    facts = json.loads(info(tmp_path / "m.gguf", "--json")[1])
    assert (facts["kind"], facts["runs"], facts["problem"]) == ("model", True, None)
    assert facts["tokenizer"]["problem"] is None
    with GGUFReader(LLAMA) as reader:
        assert glance(reader).runs


def test_a_model_that_gives_logits_only_says_so() -> None:
    problem = "tokenizer kind 'test' is not supported"
    assert f"runs here       yes, but it reads no text: {problem}\n" in info(LLAMA)[1]
    facts = json.loads(info(LLAMA, "--json")[1])
    assert facts["runs"] and facts["tokenizer"]["problem"] == problem


def test_tensors_that_nobody_asks_for_may_have_any_type(tmp_path: Path) -> None:
    path = changed_llama(tmp_path / "m.gguf", more=(Tensor("extra", TensorType.I64, [2], bytes(16)),))
    assert json.loads(info(path, "--json")[1])["runs"]
    with GGUFReader(path) as reader:
        assert glance(reader).runs


def test_what_is_supported_is_not_said_to_be_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The table of what makes no text is for names that are not supported, as long as they are not."""
    names = [name for group in NO_LANGUAGE_MODELS.values() for name in group]
    assert len(names) == len(set(names))
    with GGUFReader(changed_llama(tmp_path / "m.gguf", architecture="flux")) as reader:
        assert not glance(reader).runs
        monkeypatch.setitem(ARCHITECTURES, "flux", ARCHITECTURES["llama"])
        assert glance(reader).runs


# Split models


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The small Llama in three files."""
    paths = [tmp_path / f"m-0000{no}-of-00003.gguf" for no in (1, 2, 3)]
    with GGUFReader(LLAMA) as reader:
        names = list(reader.tensors)
        for no, path in enumerate(paths):
            with GGUFWriter.from_reader(path, reader) as writer:
                for key, value in (("split.no", no), ("split.count", 3)):
                    writer.set_metadata(key, value, ValueType.UINT16)
                writer.set_metadata("split.tensors.count", len(names), ValueType.INT32)
                chosen = names[no::3]
                for name in chosen:
                    writer.add_tensor(name, TensorType.F32, reader.tensors[name].shape)
                for name in chosen:
                    writer.write_tensor(name, np.ascontiguousarray(reader.tensors[name].dequantize()))
    return paths


def test_the_first_part_stands_for_the_model(parts: list[Path]) -> None:
    status, out, _ = info(parts[0])
    assert status == 0 and "runs here       yes" in out and "and 2 more" in out


def test_another_part_is_shown_by_itself(parts: list[Path]) -> None:
    problem = f"this is part 2 of 3: name the first part, {parts[0].name}"
    status, out, err = info(parts[1], "--tensors")
    assert (status, err) == (0, "") and f"runs here       no: {problem}\n" in out
    facts = json.loads(info(parts[1], "--json", "--tensors")[1])
    assert (facts["kind"], facts["problem"]) == ("part of a split model", problem)
    with GGUFReader(LLAMA) as reader:
        assert [tensor["name"] for tensor in facts["tensors"]] == list(reader.tensors)[1::3]


def test_a_first_part_whose_others_are_not_there_is_shown_too(parts: list[Path]) -> None:
    parts[2].unlink()
    status, out, _ = info(parts[0])
    assert status == 0
    assert re.search(r"runs here +no: part 3 of 3 is missing: m-00003-of-00003.gguf should lie beside it\n", out)
    done = CliRunner().invoke(cli, ["run", str(parts[0]), "x"])
    assert str(done.exception) == f"{parts[0]}: part 3 of 3 is missing: m-00003-of-00003.gguf should lie beside it"


def test_a_file_that_is_damaged_is_an_error_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(LLAMA.read_bytes()[:-100])
    done = CliRunner().invoke(cli, ["info", str(path)])
    assert done.exit_code == 1 and done.stdout == "" and "its download was cut short" in str(done.exception)


STRANGE: list[Any] = [np.array([1, 2], np.int32), np.array([], np.float32), ["a", "b"], 7, True, float("nan"), "\udcff"]


@pytest.mark.parametrize("value", STRANGE, ids=str)
@pytest.mark.parametrize(
    "key",
    ["general.architecture", "general.type", "general.name", "llama.pooling_type", "llama.context_length",
     "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template", "adapter.type"],
)  # fmt: skip
def test_metadata_of_another_kind_are_told_or_passed_over(key: str, value: Any) -> None:
    with GGUFReader(LLAMA) as whole:
        reader: Any = SimpleNamespace(
            path=whole.path, files=whole.files, tensors=whole.tensors, metadata={**whole.metadata, key: value},
            version=3, strings=lambda key: [],
        )  # fmt: skip
        support, graph = examine(reader)
        assert (support.problem is None) == (graph is not None)
        purpose(reader)
        json.dumps(describe(reader, with_tensors=False))
        with pytest.raises(FormatError):
            Adapter(reader)
