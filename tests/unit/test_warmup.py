"""What `qrun warmup` compiles is what models need."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_model import write_half_model

from qrun.cli.main import cli
from qrun.engine.kernels import all_keys
from qrun.engine.kernels.records import CACHE_BITS
from qrun.engine.kernels.unpack import TYPES, Quantised
from qrun.engine.native import workers
from qrun.engine.program import needs as warmup
from qrun.engine.program.kv_cache import CacheLayout
from qrun.engine.program.lowering import Lowering
from qrun.engine.program.state_blocks import state_sizes
from qrun.engine.simd.target import TILES, host_target, machine_target
from qrun.formats import GGUFReader
from qrun.models import build_graph

MODELS = sorted((Path(__file__).parents[1] / "data" / "arch").glob("*.gguf"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_all_kernels_are_all_that_any_model_needs(path: Path) -> None:
    with GGUFReader(path) as reader:
        graph = build_graph(reader)
        for cache_type in CACHE_BITS:
            needed = warmup.kernels_of(graph, cache_type)
            kind = "f32" if cache_type == "f16" else cache_type  # the files are in float32
            assert any(key.startswith(f"attention-{kind}-") for key in needed)
            assert set(needed) <= set(all_keys(host_target()))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_that_was_warmed_up_needs_no_other_kernel_on_fewer_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "available_cores", lambda: 5)
    with GGUFReader(path) as reader:
        graph = build_graph(reader)
        warmed = warmup.kernels_of(graph)
        layout = CacheLayout(graph.cache_layers, "f16", state_sizes(graph))
        for threads in range(1, 6):
            program = Lowering(graph, layout, host_target(), batch=8, head_rows=8, context=64, threads=threads)
            assert set(program.kernel_keys) <= set(warmed)


def test_no_kernel_is_named_twice() -> None:
    assert len(set(all_keys())) == len(all_keys())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and the list of what is put there in place of machine code."""
    monkeypatch.setenv("QRUN_CACHE", str(tmp_path))
    keys: list[str] = []

    def compile_all(missing: list[str], target: object) -> Iterator[tuple[str, bytes]]:
        keys.extend(missing)
        yield from ((key, b"") for key in missing)

    monkeypatch.setattr(workers, "compile_all", compile_all)
    return keys


def test_a_model_s_kernels_are_compiled_once(compiled: list[str]) -> None:
    path = str(MODELS[0])
    first = CliRunner().invoke(cli, ["warmup", path])
    assert first.exit_code == 0, first.output
    assert first.stdout == f"{len(compiled)} kernels compiled, 0 were there\n"
    assert f"compiling {len(compiled)} kernels for this CPU" in first.stderr
    n = len(compiled)
    assert CliRunner().invoke(cli, ["warmup", path]).stdout == f"0 kernels compiled, {n} were there\n"
    assert len(compiled) == n


def test_another_cache_type_needs_two_more(compiled: list[str]) -> None:
    CliRunner().invoke(cli, ["warmup", str(MODELS[0])])
    compiled.clear()
    CliRunner().invoke(cli, ["warmup", str(MODELS[0]), "--cache-type", "q8_0"])
    assert sorted(compiled) == ["append-q8_0", "attention-q8_0-1"]


def test_without_a_model_everything_is_compiled(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target = machine_target("avx512-vnni")
    monkeypatch.setattr(warmup, "default_target", lambda folded: target)
    result = CliRunner().invoke(cli, ["warmup"])
    assert result.stdout == f"{len(all_keys())} kernels compiled, 0 were there\n"
    assert sorted(compiled) == sorted(all_keys()) == sorted(all_keys(target))


def test_everything_includes_what_models_that_make_vectors_choose(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "default_target", lambda folded: machine_target("amx-folded" if folded else "amx"))
    result = CliRunner().invoke(cli, ["warmup"])
    counts = [len(all_keys(machine_target(name))) for name in TILES]
    assert result.stdout == f"{sum(counts)} kernels compiled, 0 were there\n"
    assert [line for line in result.stderr.splitlines() if "compiling" in line] == [
        f"qrun: compiling {count} kernels for this CPU (once)" for count in counts
    ]


def test_all_kernels_of_tiles_are_all_that_a_model_needs(tmp_path: Path) -> None:
    target = machine_target("amx")
    with GGUFReader(write_half_model(tmp_path / "model.gguf")) as reader:
        needed = set(warmup.kernels_of(build_graph(reader), target=target))
    assert {"matmul-F16-tiles", "rms_norm-f16"} <= needed <= set(all_keys(target))
    quantised = [f"matmul-{name}-tiles" for name, spec in TYPES.items() if isinstance(spec, Quantised)]
    assert {*quantised, "rms_norm-whole", "pack-whole"} <= set(all_keys(target)) - set(all_keys())
