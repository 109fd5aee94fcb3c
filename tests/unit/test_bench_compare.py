"""`qrun bench --compare`, with small programs in the places of other engines, and the speed of memory."""

import datetime
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qrun.cli import bench, bench_compare
from qrun.cli.main import cli, main
from qrun.cli.peer_bench import switched_on
from qrun.engine.native.bandwidth import read_bandwidth
from qrun.engine.native.machine import cpu_name
from qrun.engine.program.needs import bytes_per_token
from qrun.engine.simd.target import host_target
from qrun.formats import GGUFReader
from qrun.models import build_graph

MODEL = Path(__file__).parents[1] / "data" / "arch" / "llama-dense.gguf"
TASK = bench_compare.Task(str(MODEL), prompt=4, gen=2, reps=1, depth=3, seqs=2)
# Prints its arguments as figures.
ECHO = f"{sys.executable} -c 'import json, sys; print(json.dumps(dict(pp4=int(sys.argv[1]), tg2=float(sys.argv[2]))))'"


def test_figures_of_qrun_s_and_the_peers_own_benchmarks() -> None:
    answer = {"peer": "x", "threads": 2, "depth": 0, "pp512": 10, "tg64": 2.5}
    assert bench_compare.figures(answer) == {"pp512": 10, "tg64": 2.5}


def test_figures_of_llama_bench() -> None:
    tests: list[dict[str, Any]] = [
        {"n_prompt": 512, "n_gen": 0, "avg_ts": 90.0, "samples_ts": [80.0, 100.0]},
        {"n_prompt": 0, "n_gen": 64, "avg_ts": 9.0},
        {"n_prompt": 512, "n_gen": 64, "avg_ts": 50.0},
    ]
    assert bench_compare.figures(tests) == {"pp512": 100.0, "tg64": 9.0}


def test_a_command_is_filled_in() -> None:
    peer = bench_compare.Peer("mine=run '{model}' -t {threads} -p {prompt},{gen} {unknown} {reps}{depth}{seqs}")
    task = bench_compare.Task("a model's {gen}.gguf", prompt=4, gen=2, reps=1, depth=3, seqs=2)
    assert peer.name == "mine"
    assert peer.command(task, 7) == ["run", "a model's {gen}.gguf", "-t", "7", "-p", "4,2", "{unknown}", "132"]
    assert bench_compare.Peer("/opt/llama-bench -m {model}").name == "llama-bench"


def test_engines_take_turns_and_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    speeds = iter([10.0, 30.0, 20.0, 5.0, 7.0, 6.0])

    def run_qrun(task: bench_compare.Task, threads: int) -> dict[str, float]:
        turns.append(("qrun", threads))
        speed = next(speeds)
        return {"pp4": speed, "tg2": speed, "tg2x2": speed, "memory": 10 * speed, "share": 0.5, "simd": "avx2"}

    class Fake(bench_compare.Peer):
        def run(self, task: bench_compare.Task, threads: int) -> dict[str, float]:
            turns.append((str(self.name), threads))
            self.uses = ["SSE3", "AVX"] if self.name == "a" else []
            return {"pp4": 15.0, "tg2": 20.0}

    monkeypatch.setattr(bench_compare, "run_qrun", run_qrun)
    rows = bench_compare.compare(TASK, [Fake("a={model}"), Fake("b={model}")], [1, 2], rounds=3)
    assert turns == [(name, threads) for threads in (1, 2) for _ in range(3) for name in ("qrun", "a", "b")]
    assert [(row["threads"], row["metric"], row["qrun"]) for row in rows] == [
        (1, "pp4", 30.0), (1, "tg2", 30.0), (1, "tg2x2", 30.0), (2, "pp4", 7.0), (2, "tg2", 7.0), (2, "tg2x2", 7.0),
    ]  # fmt: skip
    assert rows[0]["ratios"] == {"a": 2.0, "b": 2.0}
    assert (rows[1]["memory"], rows[1]["share"]) == (300.0, 0.5)
    assert rows[2]["peers"] == {}
    text = bench_compare.table(TASK, rows).splitlines()
    assert text[2].split() == ["1", "pp4", "30.00", "15.00", "(2.00x)", "15.00", "(2.00x)"]
    assert text[3].endswith("50% of 300.0 GB/s")
    assert text[4].split() == ["1", "tg2x2", "30.00", "-", "-"]
    assert text[-2:] == ["a uses SSE3 AVX", "qrun uses avx2"]
    assert rows[0]["uses"] == {"a": "SSE3 AVX", "qrun": "avx2"}


def test_a_peer_tells_what_its_library_was_built_for() -> None:
    told = {"peer": "other", "uses": ["AVX2", "FMA"], "pp4": 1.5}
    peer = bench_compare.Peer("{model}")
    peer.name, peer._words = None, [sys.executable, "-c", "import sys; print(sys.argv[1])", json.dumps(told)]
    assert peer.run(TASK, 1) == {"pp4": 1.5}
    assert (peer.name, peer.uses) == ("other", ["AVX2", "FMA"])
    info = "AVX = 1 | AVX_VNNI = 0 | AVX2 = 1 | CPU : SSE3 = 1 | AVX2 = 1 | n_threads = 1 | FP16_VA = 10 |"
    assert switched_on(info) == ["AVX", "AVX2", "SSE3"]


def test_a_llama_bench_tells_which_build_it_is() -> None:
    told = [{"n_prompt": 4, "n_gen": 0, "avg_ts": 1.5, "build_number": 9, "build_commit": "abc"}]
    peer = bench_compare.Peer("other={model}")
    peer._words = [sys.executable, "-c", "import sys; print(sys.argv[1])", json.dumps(told)]
    assert peer.run(TASK, 1) == {"pp4": 1.5}
    rows = [{"uses": {"qrun": "avx2"}, "builds": {"other": peer.build}}]
    assert bench_compare.engines(rows) == ["other is b9 (abc)", "qrun uses avx2"]


def test_the_table_says_when_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    bench_table = importlib.import_module("table")
    row = {"threads": 1, "metric": "pp4", "qrun": 9.0, "peers": {"a": 3.0}, "ratios": {"a": 3.0}, "uses": {"a": "AVX"}}
    rows = [row]
    text = bench_table.caption([(TASK, rows)])
    assert text.startswith(f"{datetime.date.today()}, {cpu_name()}, ") and text.endswith("; a uses AVX")
    assert "9.0 | 3.0 (**3.00x**)" in bench_table.markdown([(TASK, rows)])


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_comparison_is_drawn(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"threads": t, "metric": m, "qrun": 9.0, "peers": {"a": 3.0}, "ratios": {"a": 3.0}}
        for t in (1, 2) for m in TASK.metrics
    ]  # fmt: skip
    path = tmp_path / f"speed.{ending}"
    bench_compare.draw(TASK, rows, str(path))
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_a_whole_comparison() -> None:
    arguments = ["bench", str(MODEL), "-p", "4", "-n", "2", "-r", "1", "-t", "1", "--no-bandwidth"]
    result = CliRunner().invoke(cli, [*arguments, "--compare", f"echo={ECHO} {{prompt}} {{gen}} {{model}}", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert [(row["metric"], row["peers"]) for row in answer["results"]] == [("pp4", {"echo": 4}), ("tg2", {"echo": 2})]
    assert all(row["qrun"] > 0 for row in answer["results"])


@pytest.mark.parametrize(
    ("peer", "message"),
    [("no-such-python", "is no file, and no command with {model} in it"),
     ("x=no-such-program {model}", "x: no-such-program cannot be run"),
     (f"x={sys.executable} -c 'exit(\"out of luck\")' {{model}}", "x failed (1): out of luck"),
     (f"x={sys.executable} -c 'print(1)' {{model}}", "x printed no JSON"),
     (f"x={sys.executable} -c 'print([1])' {{model}}", "x printed JSON without figures"),
     ("x={model}'", "No closing quotation")],
)  # fmt: skip
def test_a_peer_that_does_not_work_is_one_line(peer: str, message: str) -> None:
    with pytest.raises((bench_compare.EngineFailed, click.UsageError), match=re.escape(message)):
        bench_compare.Peer(peer).run(TASK, 1)


def test_an_engine_that_fails_is_no_internal_error(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(MODEL), "-p", "4", "-n", "0", "-r", "1", "-t", "1", "--no-bandwidth"]
    assert main([*arguments, "--compare", "x=no-such-program {model}"]) == 1
    assert capsys.readouterr().err.endswith("qrun: x: no-such-program cannot be run: No such file or directory\n")


def test_a_plot_needs_a_comparison_and_a_known_ending() -> None:
    result = CliRunner().invoke(cli, ["bench", str(MODEL), "--plot", "x.png"])
    assert result.exit_code == 2 and "--plot needs --compare" in result.output
    result = CliRunner().invoke(cli, ["bench", str(MODEL), "--compare", "x {model}", "--plot", "x.pdf"])
    assert result.exit_code == 2 and "must end in .png or .svg" in result.output


@pytest.mark.parametrize("threads", [1, 2])
def test_all_of_the_memory_is_read(threads: int) -> None:
    assert read_bandwidth(threads, passes=1, size=1 << 20) > 1e6


def test_bytes_of_a_token() -> None:
    with GGUFReader(MODEL) as reader:
        graph = build_graph(reader)
        weights = [t for n, t in reader.tensors.items() if n.endswith(".weight") and len(t.shape) == 2]
        expected = sum(t.n_bytes for t in weights if t.name != "token_embd.weight")
        assert "output.weight" in reader.tensors
        assert bytes_per_token(graph, "f16", 0) == expected
        # 32 dimensions at least, of keys and of values, four bytes each, as the file is in float32
        per_position = sum(
            layer.n_kv_heads * (-(-layer.head_dim_k // 32) + -(-layer.head_dim_v // 32)) * 128
            for layer in graph.cache_layers
        )
        assert bytes_per_token(graph, "f16", 100) == expected + 100 * per_position


def test_bench_says_how_much_of_the_memory_s_speed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "memory_share", lambda runtime, speed, position: {"memory": 20.0, "share": 0.9})
    arguments = ["bench", str(MODEL), "-p", "4", "-n", "2", "-r", "1", "-t", "1"]
    assert "memory         20.00 GB/s, of which tg2 uses 90%" in CliRunner().invoke(cli, arguments).stdout
    answer = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert set(answer) == {"pp4", "tg2", "memory", "share", "threads", "depth", "cache_type", "simd"}
    assert answer["simd"] == host_target().form
