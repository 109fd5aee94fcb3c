"""LoRA adapters: what they change when a model runs with them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
from adapter_files import matrices, merged_model, random_pair, read_pairs, write_adapter
from command_line import run

from qrun.cli import loading
from qrun.cli.main import cli
from qrun.cli.options import LoraFile
from qrun.engine import Model
from qrun.engine.judging.scoring import Score, scored_logits
from qrun.engine.program.needs import bytes_per_token
from qrun.engine.program.runtime import Runtime
from qrun.formats import FormatError, GGUFReader, TensorType
from qrun.models import build_graph
from qrun.models import graph as G
from qrun.models.adapter import Lora, adapt, open_adapters
from tests.reference import forward, hangs_on_a_digit, values_of

FILES = sorted((Path(__file__).parents[1] / "data" / "arch").glob("*.gguf"))
LLAMA = next(path for path in FILES if path.stem == "llama-dense")
# Odd ones too: rows that are no whole vector, block or word.
RANKS = (1, 3, 4, 8, 12, 16, 17, 33)


def architecture_of(model: Path) -> str:
    with GGUFReader(model) as reader:
        return str(reader.metadata["general.architecture"])


def random_adapter(
    rng: np.random.Generator, model: Path, out: Path, type: TensorType = TensorType.F32, names: Sequence[str] = ()
) -> Path:
    """An adapter of all matrices of a model, or of those named, each with a rank of its own."""
    shapes = matrices(model)
    pairs = {n: random_pair(rng, n, shapes[n], int(rng.choice(RANKS))) for n in names or shapes}
    return write_adapter(out, pairs, type=type, architecture=architecture_of(model))


def logits(
    model: Path,
    loras: Sequence[Lora] = (),
    *,
    cuts: Sequence[int] = (0, 32),
    threads: int = 2,
) -> np.ndarray:
    """Logits of 32 tokens, computed in the batches between the cuts."""
    tokens = np.arange(32) * 37 % 128
    with GGUFReader(model) as reader, open_adapters(loras) as adapters:
        runtime = Runtime(build_graph(reader, 64, adapters), threads=threads, context=64)
        sequence = runtime.sequence()
        parts = [runtime.evaluate(sequence, tokens[a:b], "all") for a, b in pairwise(cuts)]
        runtime.close()
    return np.concatenate(parts)  # type: ignore[arg-type]


def error_of(result: np.ndarray, expected: np.ndarray) -> float:
    """The normalised mean squared error."""
    return float(np.mean((result - expected) ** 2) / np.mean(expected**2))


# What is computed


@pytest.mark.parametrize("type", [TensorType.F32, TensorType.F16, TensorType.BF16])
def test_a_changed_matrix_is_w_plus_b_a(rng: np.random.Generator, type: TensorType, tmp_path: Path) -> None:
    width, rows, n_vocab = 96, 70, 50
    embedding, matrix = rng.normal(size=(n_vocab, width)), rng.normal(0, width**-0.5, (rows, width))
    x, y = G.Value(0, width), G.Value(1, width)
    out = G.Value(2, rows)

    def weight(name: str, values: np.ndarray) -> G.Weight:
        return G.Weight(name, TensorType.F32, values.shape, values.astype(np.float32).reshape(-1).view(np.uint8))

    operations: list[G.Operation] = [
        G.Embed(x, weight("token_embd.weight", embedding), 1.0),
        G.SelectRows(y, x),
        G.Linear(out, y, weight("output.weight", matrix), None),
    ]
    graph = G.Graph("llama", operations, out, [], rows, width, 64)
    for rank in RANKS:
        path = write_adapter(
            tmp_path / "adapter.gguf",
            {"output.weight": random_pair(rng, "output.weight", matrix.shape, rank, size=1.0)},
            alpha=3.0,
            type=type,
        )
        ((a, b),) = read_pairs(path)[0].values()
        with open_adapters([Lora(path, 0.7)]) as adapters:
            runtime = Runtime(adapt(graph, adapters), threads=2, context=64)
        for count in (1, 5):
            tokens = rng.integers(0, n_vocab, count)
            result = runtime.evaluate(runtime.sequence(), tokens, "all")
            factor = 0.7 * 3.0 / rank
            expected = embedding[tokens] @ (matrix + factor * b.astype(np.float64) @ a).T
            # Every product's rounding counts, also where a sum is small because its terms cancel.
            size = np.abs(embedding[tokens]) @ (np.abs(matrix) + factor * np.abs(b.astype(np.float64)) @ np.abs(a)).T
            assert result is not None and np.all(np.abs(result - expected) <= 3e-6 * size)
        runtime.close()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_adapter_does_what_merging_it_does(rng: np.random.Generator, path: Path, tmp_path: Path) -> None:
    lora = Lora(random_adapter(rng, path, tmp_path / "adapter.gguf"), 1.5)
    merged = merged_model(path, tmp_path / "merged.gguf", [(lora.path, 1.5)])
    expected = logits(merged)
    assert error_of(logits(path), expected) > 1e-2
    assert error_of(logits(path, [lora]), expected) <= 1e-6


def test_only_the_changes_of_chosen_experts_count(rng: np.random.Generator) -> None:
    n_experts, width, ffn = 5, 64, 96

    def weight(name: str, *shape: int) -> G.Weight:
        values = rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        return G.Weight(name, TensorType.F32, shape, values.reshape(-1).view(np.uint8))

    x, y, out = (G.Value(i, width) for i in range(3))
    router = weight("router", n_experts, width)
    gate, up = weight("gate", n_experts, ffn, width), weight("up", n_experts, ffn, width)
    down = weight("down", n_experts, width, ffn)
    changes = []
    for changed in (router, gate, up, down, gate):
        *experts, rows, columns = changed.shape
        rank = int(rng.choice(RANKS))
        changes.append(
            G.Change(changed, weight("a", *experts, rank, columns), weight("b", *experts, rows, rank), rng.normal())
        )
    moe = G.MoE(
        y, x, router, None, gate, up, down, 2, "silu", normalize=True, scale=1.0, gating="softmax",
        changes=tuple(changes),
    )  # fmt: skip
    operations: list[G.Operation] = [G.Embed(x, weight("e", 50, width), 8.0), moe, G.SelectRows(out, y)]
    graph = G.Graph("test", operations, out, [], width, width, 64)
    runtime = Runtime(graph, threads=2, context=64)
    for count in (1, 7, 40):
        tokens = rng.integers(0, 50, count)
        while hangs_on_a_digit(graph, values := values_of(graph, tokens)):
            tokens = rng.integers(0, 50, count)
        result = runtime.evaluate(runtime.sequence(), tokens, "all")
        np.testing.assert_allclose(result, values[out.id], rtol=1e-4, atol=1e-4)
    runtime.close()


def test_several_adapters_add_up(rng: np.random.Generator, tmp_path: Path) -> None:
    first = random_adapter(rng, LLAMA, tmp_path / "a.gguf", TensorType.F16)
    second = random_adapter(rng, LLAMA, tmp_path / "b.gguf", names=["blk.0.attn_q.weight", "output.weight"])
    wanted = [(first, 0.5), (second, -1.0), (second, 0.25)]
    merged = merged_model(LLAMA, tmp_path / "merged.gguf", wanted)
    assert error_of(logits(LLAMA, [Lora(*one) for one in wanted]), logits(merged)) <= 1e-6


def test_an_adapter_of_blocks(rng: np.random.Generator, tmp_path: Path) -> None:
    adapter = random_adapter(rng, LLAMA, tmp_path / "a.gguf", TensorType.Q8_0)
    merged = merged_model(LLAMA, tmp_path / "merged.gguf", [(adapter, 1.0)])
    # The rows that it is multiplied with are rounded to int8 too, as for any matrix of blocks.
    assert error_of(logits(LLAMA, [Lora(adapter)]), logits(merged)) <= 1e-3


def test_without_alpha_a_change_counts_as_it_is(rng: np.random.Generator, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    pairs = {name: random_pair(rng, name, matrices(LLAMA)[name], 8)}
    plain = write_adapter(tmp_path / "plain.gguf", pairs, alpha=None)
    zero = write_adapter(tmp_path / "zero.gguf", pairs, alpha=0.0)
    same = write_adapter(tmp_path / "same.gguf", pairs, alpha=8.0)
    expected = logits(LLAMA, [Lora(same)])
    assert np.array_equal(logits(LLAMA, [Lora(plain)]), expected)
    assert np.array_equal(logits(LLAMA, [Lora(zero)]), expected)


def test_scale_0_is_the_model_to_the_bit(rng: np.random.Generator, tmp_path: Path) -> None:
    adapter = random_adapter(rng, LLAMA, tmp_path / "a.gguf")
    assert np.array_equal(logits(LLAMA, [Lora(adapter, 0.0)]), logits(LLAMA))


@pytest.mark.parametrize("stem", ["llama-dense", "gemma-dense", "qwen3moe-moe"])
def test_bits_are_the_same_in_any_batch_and_on_any_threads(
    rng: np.random.Generator, stem: str, tmp_path: Path
) -> None:
    path = next(path for path in FILES if path.stem == stem)
    loras = [
        Lora(random_adapter(rng, path, tmp_path / f"{type.name}.gguf", type), 0.5)
        for type in (TensorType.F32, TensorType.F16, TensorType.Q8_0)
    ]
    whole = logits(path, loras, threads=1)
    assert np.array_equal(whole, logits(path, loras))
    assert np.array_equal(whole, logits(path, loras, cuts=range(33)))
    assert np.array_equal(whole, logits(path, loras, cuts=[0, 5, 6, 23, 32], threads=1))


@pytest.mark.parametrize("stem", ["llama-dense", "llama-moe"])
def test_the_reference_reads_the_graph_alike(rng: np.random.Generator, stem: str, tmp_path: Path) -> None:
    path = next(path for path in FILES if path.stem == stem)
    loras = [Lora(random_adapter(rng, path, tmp_path / f"{name}.gguf"), 0.5) for name in "ab"]
    with GGUFReader(path) as reader, open_adapters(loras) as adapters:
        expected = forward(build_graph(reader, 64, adapters), list(np.arange(32) * 37 % 128))
    assert error_of(logits(path, loras), expected) <= 1e-6


def test_bytes_of_a_token_count_the_factors(rng: np.random.Generator, tmp_path: Path) -> None:
    path = next(path for path in FILES if path.stem == "llama-moe")
    lora = Lora(random_adapter(rng, path, tmp_path / "a.gguf"))
    with GGUFReader(path) as reader, open_adapters([lora]) as adapters:
        plain = bytes_per_token(build_graph(reader, 64), "f16", 10)
        factors = [tensor for name, tensor in adapters[0].file.tensors.items() if name != "token_embd.weight.lora_a"]
        assert reader.metadata["llama.expert_count"] == reader.metadata["llama.expert_used_count"]
        assert bytes_per_token(build_graph(reader, 64, adapters), "f16", 10) - plain == sum(t.n_bytes for t in factors)


# The library


@pytest.fixture
def adapter(rng: np.random.Generator, tmp_path: Path) -> Path:
    return random_adapter(rng, LLAMA, tmp_path / "adapter.gguf")


def test_a_model_takes_paths_and_scales(adapter: Path) -> None:
    tokens = list(np.arange(32) * 37 % 128)
    with Model.load(LLAMA, context=64, loras=[str(adapter), (adapter, 0.5)]) as model:
        assert [(lora.path, lora.scale) for lora in model.loras] == [(adapter, 1.0), (adapter, 0.5)]
        result = model.logits(tokens)
    assert np.array_equal(result, logits(LLAMA, [Lora(adapter), Lora(adapter, 0.5)]))


def test_a_closed_model_lets_the_adapter_go(adapter: Path) -> None:
    with Model.load(LLAMA, context=64, loras=[adapter]) as model:
        (held,) = model.loras
        operations = [o for o in model.graph.operations if isinstance(o, G.Linear) and ".lora_" in o.weight.name]
        assert operations and held.changes == {}
    assert model.graph.operations == []


def test_a_session_belongs_to_its_adapters(rng: np.random.Generator, adapter: Path, tmp_path: Path) -> None:
    other = random_adapter(rng, LLAMA, tmp_path / "other.gguf")

    def session_of(*loras: tuple[Path, float]) -> tuple[Model, Path]:
        model = Model.load(LLAMA, context=64, loras=loras)
        path = tmp_path / "session"
        with model.session() as session:
            for _ in session.generate([1, 2, 3], max_tokens=1):
                pass
            session.save(path)
        return model, path

    plain, path = session_of()
    sets = [[(adapter, 1.0)], [(adapter, 0.5)], [(other, 1.0)], [(adapter, 1.0), (other, 1.0)]]
    for loras in sets:
        with Model.load(LLAMA, context=64, loras=loras) as model:
            with pytest.raises(FormatError, match="saved by a session of another model"):
                model.session().load(path)
            model.session().save(path)
            model.session().load(path)
    with Model.load(LLAMA, context=64, loras=[(adapter, 0.0)]) as model:
        with pytest.raises(FormatError, match="saved by a session of another model"):
            model.session().load(path)
        plain.session().save(path)
        model.session().load(path)
    plain.close()


# What is refused


def test_an_adapter_of_another_architecture_is_refused(adapter: Path) -> None:
    qwen2 = next(path for path in FILES if path.stem == "qwen2-dense")
    with pytest.raises(FormatError, match=r"adapter.gguf: this is an adapter of architecture 'llama', and .* 'qwen2'"):
        Model.load(qwen2, loras=[(adapter, 0.0)])  # also where it would change nothing


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"blk.0.attn_q.weight": (64, 32)}, r"has shape \(64, 64\) in the model, and \(64, 32\) in the adapter"),
        ({"blk.0.attn_q.weight": (2, 64, 64)}, r"has shape \(64, 64\) in the model, and \(2, 64, 64\) in the adapter"),
        ({"token_embd.weight": (127, 64)}, r"has shape \(128, 64\) in the model, and \(127, 64\) in the adapter"),
        ({"blk.2.attn_q.weight": (64, 64)}, r"the model has no matrix 'blk.2.attn_q.weight'"),
        ({"blk.0.attn_norm.weight": (64, 64)}, r"the model has no matrix 'blk.0.attn_norm.weight'"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    rng: np.random.Generator, names: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    pairs = {name: random_pair(rng, name, shape, 4) for name, shape in names.items()}
    path = write_adapter(tmp_path / "adapter.gguf", pairs)
    with pytest.raises(FormatError, match=f"^{path}: .*{message}: it is an adapter of another model$"):
        Model.load(LLAMA, loras=[path])


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as error, open_adapters([Lora(path)]):
        pass
    assert str(error.value).startswith(f"{path}: ")
    return error.value.reason


def test_files_that_are_no_adapters_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    assert refusal(LLAMA) == "this is not an adapter: its general.type is not 'adapter'"
    assert refusal(tmp_path / "nothing.gguf") == "there is no such file"
    name = "blk.0.attn_q.weight"
    pair = random_pair(rng, name, (64, 64), 4)
    path = tmp_path / "adapter.gguf"

    def written(**settings: object) -> str:
        return refusal(write_adapter(path, {name: pair}, **settings))  # type: ignore[arg-type]

    assert written(metadata={"adapter.type": "dora"}) == "adapters of type 'dora' are not supported, only 'lora'"
    assert "(aLoRA) is not supported" in written(metadata={"adapter.alora.invocation_tokens": "1"})
    assert written(alpha=float("nan")) == "adapter.lora.alpha is not a finite number: nan"
    assert written(extra={"other.weight": pair[0]}) == "tensor 'other.weight' is neither .lora_a nor .lora_b"
    missing = "tensor 'x.weight.lora_b' is missing, and the other one of its pair is there"
    assert written(extra={"x.weight.lora_a": pair[0]}) == missing
    assert refusal(write_adapter(path, {})) == (
        "the adapter changes nothing: it has no pairs of tensors .lora_a and .lora_b"
    )
    for a, b in [((4, 64), (64, 5)), ((64, 4), (64, 4)), ((2, 4, 64), (3, 64, 4)), ((0, 64), (64, 0))]:
        reason = refusal(write_adapter(path, {name: (np.zeros(a), np.zeros(b))}))
        assert reason.endswith(f"have shapes {a} and {b}, which do not go together")
    embedding = {"token_embd.weight": (np.zeros((2, 2, 4)), np.zeros((2, 2, 4)))}
    assert refusal(write_adapter(path, embedding)).endswith("which do not go together")
    assert refusal(write_adapter(path, {name: (np.zeros(4), np.zeros(4))})).endswith("it is no matrix")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path / "peft") == "this is a PEFT adapter: make a GGUF file of it with `qrun convert --lora`"


def test_an_adapter_alone_is_no_model(adapter: Path) -> None:
    with pytest.raises(FormatError, match="this is an adapter, not a model: name it after --lora"):
        Model.load(adapter)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_a_finite_number(adapter: Path, scale: float) -> None:
    with pytest.raises(ValueError, match="the scale of an adapter is a finite number"):
        Model.load(LLAMA, loras=[(adapter, scale)])


def test_a_damaged_adapter_raises_nothing_but_format_error(
    rng: np.random.Generator, adapter: Path, tmp_path: Path
) -> None:
    whole = adapter.read_bytes()
    path = tmp_path / "damaged.gguf"
    end = whole.index(b"blk.1.") if b"blk.1." in whole else 2000
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, end, int(rng.integers(1, 4))):
            damaged[at] = int(rng.integers(0, 256))
        path.write_bytes(damaged[: int(rng.integers(0, len(damaged)))] if rng.random() < 0.2 else damaged)
        with GGUFReader(LLAMA) as reader:
            try:
                with open_adapters([Lora(path)]) as adapters:
                    build_graph(reader, 64, adapters)
            except FormatError as error:
                assert "\n" not in str(error)


def test_norms_are_left_out_with_a_notice(rng: np.random.Generator, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    pairs = {name: random_pair(rng, name, (64, 64), 4)}
    norms = {f"blk.{i}.attn_norm.weight": np.ones(64) for i in range(2)}
    path = write_adapter(tmp_path / "a.gguf", pairs, extra=norms)
    plain = write_adapter(tmp_path / "b.gguf", pairs)
    with open_adapters([Lora(path), Lora(plain)]) as (with_norms, without):
        assert with_norms.notice == f"{path}: the norms in the adapter (2) are left out"
        assert without.notice is None
    assert np.array_equal(logits(LLAMA, [Lora(path)]), logits(LLAMA, [Lora(plain)]))


# The command line


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))


def test_every_command_that_runs_a_model_takes_adapters() -> None:
    for name in ("chat", "run", "bench", "perplexity", "imatrix", "warmup", "info"):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert "loras" in {parameter.name for parameter in command.params}, name


def test_files_and_scales(tmp_path: Path) -> None:
    strange = tmp_path / "a=2.gguf=0.5"
    strange.touch()
    for text, expected in {
        "a.gguf": Lora(Path("a.gguf")),
        "a.gguf=0.5": Lora(Path("a.gguf"), 0.5),
        "dir=x/a.gguf=-2": Lora(Path("dir=x/a.gguf"), -2.0),
        str(strange): Lora(strange),
        f"{strange}=1e-1": Lora(strange, 0.1),
    }.items():
        assert LoraFile().convert(text, None, None) == expected
    file = tmp_path / "poet.gguf"
    file.touch()
    assert LoraFile(named=True).convert(f"poet={file}", None, None) == Lora(file, 1.0, "poet")
    assert LoraFile(named=True).convert(f"a poet={file}=-0.5", None, None) == Lora(file, -0.5, "a poet")
    for text in ("a.gguf=x", "a.gguf=nan", f"{file}=poet", f"poet={tmp_path}/none.gguf"):
        with pytest.raises(click.BadParameter, match="is no scale of an adapter"):
            LoraFile().convert(text, None, None)
    with pytest.raises(click.BadParameter, match="only qrun serve takes a name"):
        LoraFile().convert(f"poet={file}", None, None)


def test_bench_and_warmup_with_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-p", 4, "-n", 2, "-r", 1, "--no-bandwidth", "--json", "--lora", f"{adapter}=0.5")
    status, out, _ = run("bench", LLAMA, *options, capsys=capsys)
    assert status == 0 and set(json.loads(out)) >= {"pp4", "tg2"}
    assert run("bench", LLAMA, "--compare", "{model} x", "--lora", adapter, capsys=capsys)[0] == 2
    assert run("warmup", "--lora", adapter, capsys=capsys)[0] == 2
    status, out, _ = run("warmup", LLAMA, "--lora", adapter, capsys=capsys)
    assert status == 0 and "kernels compiled" in out


def test_perplexity_with_an_adapter_is_that_of_the_merged_model(
    rng: np.random.Generator, adapter: Path, tmp_path: Path
) -> None:
    tokens = [int(token) for token in rng.integers(0, 128, 48)]
    merged = merged_model(LLAMA, tmp_path / "merged.gguf", [(adapter, 0.5)])
    scores = []
    for path, loras in ((LLAMA, [Lora(adapter, 0.5)]), (merged, []), (LLAMA, [])):
        score = Score()
        with loading.open_runtime(path, loading.RunOptions(1, loras=loras), 48) as runtime:
            for rows, targets in scored_logits(runtime, tokens, None):
                score.add(rows, targets)
        scores.append(score.perplexity.value)
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    assert abs(scores[0] - scores[1]) < abs(scores[0] - scores[2])


@pytest.mark.parametrize("stem", ["llama-dense", "llama-moe"])
def test_importance_with_an_adapter_is_that_of_the_merged_model(
    rng: np.random.Generator, stem: str, tmp_path: Path
) -> None:
    path = next(path for path in FILES if path.stem == stem)
    lora = Lora(random_adapter(rng, path, tmp_path / "a.gguf"), 0.5)
    merged = merged_model(path, tmp_path / "merged.gguf", [(lora.path, 0.5)])
    found = []
    for model, loras in ((path, [lora]), (merged, [])):
        with loading.open_runtime(model, loading.RunOptions(2, loras=loras), 32, observe=True) as runtime:
            runtime.evaluate(runtime.sequence(), np.arange(32) * 37 % 128, "all")
            found.append({name: each.sums.copy() for each in runtime.observations for name in each.names})
    assert found[0].keys() == found[1].keys()
    for name, sums in found[1].items():
        np.testing.assert_allclose(found[0][name], sums, rtol=1e-3, err_msg=name)


def test_info_tells_what_an_adapter_changes(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {f"blk.{i}.{kind}.weight": (64, 64) for i in range(2) for kind in ("attn_q", "attn_v")}
    pairs = {name: random_pair(rng, name, shape, 8) for name, shape in names.items()}
    path = write_adapter(tmp_path / "a.gguf", pairs, alpha=24.0, extra={"blk.0.attn_norm.weight": np.ones(64)})
    status, out, _ = run("info", path, capsys=capsys)
    assert status == 0
    assert "LoRA adapter    4 matrices, rank 8, alpha 24\n" in out
    assert "it changes      attn_q, attn_v\n" in out
    assert "the norms in the adapter (1) are left out" in out
    facts = json.loads(run("info", path, "--json", capsys=capsys)[1])
    assert facts["adapter"]["ranks"] == [8] and facts["adapter"]["alpha"] == 24
    assert "memory" not in facts

    before = json.loads(run("info", LLAMA, "--json", capsys=capsys)[1])["memory"]["needed"]["f16"]
    after = json.loads(run("info", LLAMA, "--lora", path, "--json", capsys=capsys)[1])["memory"]["needed"]["f16"]
    assert after["file"] - before["file"] == path.stat().st_size
    broken = write_adapter(tmp_path / "b.gguf", {})
    status, out, error = run("info", broken, capsys=capsys)
    assert status == 1 and "architecture    llama" in out and "the adapter changes nothing" in error


def test_a_wrong_adapter_is_one_line(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("run", LLAMA, "x", "--lora", LLAMA),
        ("chat", LLAMA, "--lora", LLAMA),
        ("bench", LLAMA, "--lora", LLAMA),
        ("info", LLAMA, "--lora", LLAMA),
        ("warmup", LLAMA, "--lora", LLAMA),
    ):
        status, _, error = run(*arguments, capsys=capsys)
        assert (status, error) == (1, f"qrun: {LLAMA}: this is not an adapter: its general.type is not 'adapter'\n")
    status, _, error = run("run", adapter, "x", capsys=capsys)
    assert (status, error) == (
        1, f"qrun: {adapter}: this is an adapter, not a model: name it after --lora, beside its model\n"
    )  # fmt: skip


def test_the_command_says_what_is_left_out(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "blk.0.attn_q.weight"
    pairs = {name: random_pair(rng, name, (64, 64), 4)}
    path = write_adapter(tmp_path / "a.gguf", pairs, extra={"blk.0.attn_norm.weight": np.ones(64)})
    notice = f"qrun: {path}: the norms in the adapter (1) are left out\n"
    assert notice in run("bench", LLAMA, "-p", 2, "-n", 0, "-r", 1, "--lora", path, capsys=capsys)[2]
    with loading.load_model(str(LLAMA), {"loras": [Lora(path)]}):
        assert notice in capsys.readouterr().err
