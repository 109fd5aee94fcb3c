"""The commands other than chat: what each computes and prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_fakes import ChatTokenizer, Template, make_model
from click.testing import CliRunner, Result
from engine_fakes import FakeRuntime, ids_of

from qrun.cli import bench, info, loading
from qrun.cli.main import cli
from qrun.engine.native import machine
from qrun.models.graph import CacheLayer, Convolution, Value
from qrun.models.store import models_folder

ARCHITECTURES = Path(__file__).parents[1] / "data" / "arch"
LLAMA = str(ARCHITECTURES / "llama-dense.gguf")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))


def run(*arguments: str, **settings: Any) -> Result:
    return CliRunner().invoke(cli, list(arguments), **settings)


# run


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", lambda source, options: make_model())


@pytest.mark.usefixtures("fake_model")
def test_run_prints_what_follows_the_prompt_and_not_the_prompt() -> None:
    assert run("run", "m", "abc", "--max-tokens", "4").stdout == "defg\n"


@pytest.mark.usefixtures("fake_model")
def test_run_reads_standard_input_as_it_is() -> None:
    assert run("run", "m", "-", "--max-tokens", "2", input=b"a\r\n").stdout == "de\n"


@pytest.mark.usefixtures("fake_model")
def test_run_with_chat_applies_the_template() -> None:
    assert run("run", "m", "hello", "--chat", "--system", "s").stdout == "HELLO!\n"


@pytest.mark.usefixtures("fake_model")
def test_run_reads_special_tokens_only_where_asked() -> None:
    assert run("run", "m", "(u)x</s>(a)", "--special").stdout == "X!\n"
    assert run("run", "m", "(u)x</s>(a)").stdout == "X!\n"  # the same text, in other tokens
    whole = json.loads(run("run", "m", "(u)x</s>(a)", "--special", "--json").stdout)
    assert whole["timings"]["prompt_tokens"] == 4 + 1 + 3


def test_a_turn_is_read_with_special_tokens_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[dict[str, Any]] = []

    class Noting(Template):
        def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True, **variables: Any) -> str:
            rendered.append({name: value for name, value in variables.items() if name != "tools"})
            return super().render(messages, add_generation_prompt, **variables)

    model = make_model()
    model.chat_template = Noting()  # type: ignore[assignment]
    monkeypatch.setattr(loading, "load_model", lambda source, options: model)
    for arguments, lines in ((["run", "m", "x", "--chat"], ""), (["chat", "m"], "x\n")):
        monkeypatch.setattr(model, "close", lambda: None)
        assert CliRunner().invoke(cli, arguments, input=lines).stdout == "X!\n"
        assert CliRunner().invoke(cli, [*arguments, "--special"], input=lines).stdout == "X!\n"
        assert rendered == [{}, {"special_tokens_in_messages": True}]
        rendered.clear()


@pytest.mark.usefixtures("fake_model")
def test_run_with_json_prints_one_object() -> None:
    result = run("run", "m", "hé", "--chat", "--json", "--max-tokens", "3")
    answer = json.loads(result.stdout)
    assert answer["text"] == "HÉ"
    assert answer["tokens"] == ids_of("HÉ")
    assert answer["stop_reason"] == "length"
    timings = answer["timings"]
    assert timings["prompt_tokens"] == 10 and timings["cached_tokens"] == 0 and timings["generated_tokens"] == 3
    assert timings["prompt_seconds"] >= 0 and timings["generated_tokens_per_second"] > 0


# info


def test_info_shows_what_a_file_holds() -> None:
    text = run("info", LLAMA, "--tensors").stdout
    assert "llama, 2 layers, 64 wide" in text
    assert "32.0 bits per weight" in text
    assert "blk.0.attn_q.weight" in text
    assert all(f"\n  {kind}" in text for kind in ("f16", "q8_0", "q4_0"))


def test_info_as_json() -> None:
    facts = json.loads(run("info", LLAMA, "--json", "--ctx", "128").stdout)
    assert facts["architecture"] == "llama"
    assert facts["file_bytes"] == Path(LLAMA).stat().st_size
    assert sum(held["bytes"] for held in facts["tensor_types"].values()) == facts["parameters"] * 4
    assert facts["memory"]["context"] == 128
    f16 = facts["memory"]["needed"]["f16"]
    assert f16["total"] == f16["file"] + f16["cache"] + f16["working"]
    assert "tensors" not in facts


def graph_of(*layers: CacheLayer) -> Any:
    return SimpleNamespace(cache_layers=list(layers), n_states=0, operations=[])


def test_memory_of_the_cache_counts_bytes_of_keys_and_values() -> None:
    graph = graph_of(CacheLayer(8, 2, 64, 32, None), CacheLayer(8, 2, 64, 32, None))
    values = 2 * 1024 * 2 * (64 + 32)  # whole pages of 64 positions
    assert info.memory_needed(graph, 7, 1000, "f16").cache == values * 2
    assert info.memory_needed(graph, 7, 1000, "q8_0").cache == values * 34 // 32
    assert info.memory_needed(graph, 7, 1000, "q4_0").cache == values * 18 // 32
    assert info.memory_needed(graph, 7, 1000, "q4_0").file == 7


def test_states_are_counted_with_their_checkpoints_and_do_not_grow() -> None:
    graph = graph_of()
    x = Value(0, 10)
    graph.operations = [Convolution(Value(1, 10), x, np.zeros((4, 10), np.float32), None, True, 0)]
    graph.n_states = 1
    assert info.memory_needed(graph, 0, 1000, "f16").cache == 10 * 768  # 4 * 10 * (4 - 1 + 16), in whole cache lines
    assert info.memory_needed(graph, 0, 1000, "f16") == info.memory_needed(graph, 0, 10, "q4_0")


def test_layers_with_a_window_keep_the_window_only() -> None:
    graph = graph_of(CacheLayer(4, 1, 64, 64, 512))
    assert info.memory_needed(graph, 0, 100_000, "f16") == info.memory_needed(graph, 0, 50_000, "f16")
    assert info.memory_needed(graph, 0, 100, "f16").cache == 128 * 128 * 2


def test_memory_of_this_machine_is_known() -> None:
    has = machine.memory()
    assert has.total is not None and has.total > 1 << 28


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    800 kB\nHugePages_Total: 0\n")
    assert machine._linux(meminfo, tmp_path) == machine.Memory(1_024_000, 819_200)
    (tmp_path / "memory.max").write_text("512000\n")
    (tmp_path / "memory.current").write_text("112000\n")
    assert machine._linux(meminfo, tmp_path) == machine.Memory(512_000, 400_000)
    (tmp_path / "memory.stat").write_text("anon 40000\ninactive_file 30000\nactive_file 20000\n")
    assert machine._linux(meminfo, tmp_path) == machine.Memory(512_000, 450_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._linux(meminfo, tmp_path) == machine.Memory(1_024_000, 819_200)
    assert machine._linux(tmp_path / "missing", tmp_path / "missing") == machine.Memory(None, None)


# tokenize


def test_tokenize_prints_ids_and_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Tokenizer(ChatTokenizer):
        add_bos = True

    monkeypatch.setattr("qrun.engine.Tokenizer", SimpleNamespace(load=lambda path: Tokenizer()), raising=False)
    a, end = ids_of("a")[0], 1
    assert run("tokenize", LLAMA, "a</s>", "--special", "--no-bos").stdout.split() == [
        str(a),
        "'a'",
        str(end),
        "'</s>'",
    ]
    tokens = json.loads(run("tokenize", LLAMA, "aé", "--json").stdout)
    assert tokens == {"tokens": [0, *ids_of("aé")], "pieces": ["<s>", "a", "\\xc3", "\\xa9"]}
    from_stdin = json.loads(run("tokenize", LLAMA, "-", "--no-bos", "--json", input=b"a\r\n").stdout)
    assert from_stdin["tokens"] == ids_of("a\r\n")


def test_what_was_passed_over_in_a_tokenizer_is_said_beside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer(ChatTokenizer):
        notices = ("x.gguf: eos is passed over",)

    monkeypatch.setattr("qrun.engine.Tokenizer", SimpleNamespace(load=lambda path: Tokenizer()), raising=False)
    result = run("tokenize", LLAMA, "a")
    assert result.stderr == "qrun: x.gguf: eos is passed over\n" and "'a'" in result.stdout


# list, rm


def test_list_and_rm() -> None:
    result = run("list")
    assert result.stdout == "" and "no models" in result.stderr
    path = models_folder() / "org" / "m.gguf"
    path.parent.mkdir(parents=True)
    shutil.copyfile(LLAMA, path)
    (models_folder() / "damaged.gguf").write_bytes(b"GGUF")
    (model, damaged) = sorted(json.loads(run("list", "--json").stdout), key=lambda row: row["size"], reverse=True)
    assert model == {
        "name": "org/m", "size": path.stat().st_size, "type": "llama F32", "problem": None, "path": str(path)
    }  # fmt: skip
    assert damaged["type"] == "damaged" and "remain in the file" in damaged["problem"]
    assert "qrun: damaged does not run here: " in run("list").stderr
    assert run("list").stdout.splitlines()[1].split() == ["org/m", "371", "kB", "llama", "F32", str(path)]
    assert run("rm", "org/m", "nonsense").exit_code != 0
    assert path.exists()  # all or nothing
    assert run("rm", "org/m", "damaged").stdout == "deleted org/m, 371 kB\ndeleted damaged, 4 B\n"
    assert json.loads(run("list", "--json").stdout) == []


def test_rm_deletes_nothing_outside_of_the_store(tmp_path: Path) -> None:
    outside = tmp_path / "mine.gguf"
    outside.write_bytes(b"GGUF")
    for name in (str(outside), "../../mine.gguf", "../mine"):
        assert run("rm", name).exit_code != 0
    assert outside.exists()


def test_rm_partial_says_what_it_frees() -> None:
    folder = models_folder() / ".partial" / "m.gguf"
    folder.mkdir(parents=True)
    (folder / "m.gguf.part").write_bytes(b"x" * 5000)
    assert "unfinished downloads" in run("list").stderr
    assert "of unfinished downloads" in run("rm", "--partial").stdout
    assert not folder.exists()


# bench


class CountingRuntime(FakeRuntime):
    """Writes down what is measured: tokens already there, tokens given."""

    def __init__(self) -> None:
        super().__init__(context=10_000, n_vocab=300)
        self.steps: list[tuple[int, int]] = []

    def evaluate(self, sequence: Any, tokens: Any, logits: str = "last", cancelled: Any = None) -> Any:
        self.steps.append((sequence.n_past, len(tokens)))
        sequence.held += tokens

    def evaluate_together(self, sequences: list[Any], tokens: list[int]) -> None:
        assert len(set(map(id, sequences))) == len(tokens)
        self.steps.append((-len(sequences), len(tokens)))


def test_bench_takes_a_new_sequence_for_every_repetition_and_a_warm_up_before() -> None:
    runtime = CountingRuntime()
    best = bench.measure(runtime, prompt=20, gen=2, reps=3, depth=0, seqs=1)  # type: ignore[arg-type]
    assert runtime.steps == [(0, 20), (0, 1), (1, 1)] * 4
    assert set(best) == {"pp20", "tg2"} and min(best.values()) > 0
    assert all(sequence.closed for sequence in runtime.sequences)


def test_bench_at_a_depth_and_with_several_sequences() -> None:
    runtime = CountingRuntime()
    best = bench.measure(runtime, prompt=20, gen=2, reps=1, depth=7, seqs=3)  # type: ignore[arg-type]
    assert runtime.steps == [(0, 7), (7, 20), (0, 7), (7, 1), (8, 1), (-3, 3), (-3, 3)] * 2
    assert set(best) == {"pp20", "tg2", "tg2x3"}


def test_bench_tokens_are_those_of_other_engines_benchmarks() -> None:
    assert bench.bench_tokens(49152, 3) == [100, 8019, 15938]
    assert bench.bench_tokens(262144, 7)[6] == 6 * 7919 % 40000 + 100
    assert max(bench.bench_tokens(128, 500)) < 128


# perplexity


def test_a_text_that_is_too_short_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qrun.engine.Tokenizer", SimpleNamespace(load=lambda path: ChatTokenizer()), raising=False)
    text = tmp_path / "text.txt"
    text.write_text("short")
    result = run("perplexity", LLAMA, str(text))
    assert "text.txt: 5 tokens, but one chunk takes 512" in str(result.exception)
