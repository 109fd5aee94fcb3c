"""The script that measures converting, on a model of random weights, with a program in the place of llama-quantize."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from test_convert import ROW, write_model

from qrun.engine.quantize.convert import convert, plan
from qrun.engine.quantize.imatrix import InputSums, read_imatrix, write_imatrix
from qrun.engine.quantize.mixes import Choice
from qrun.engine.quantize.source import GGUFSource
from qrun.formats import GGUFReader

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import quantize_table


@pytest.mark.parametrize("experts", [0, 3])
def test_errors_are_those_that_converting_tells(
    experts: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_table, "CHUNK", 7 * ROW)
    source, out = write_model(tmp_path / "source.gguf", experts=experts), tmp_path / "out.gguf"
    with GGUFReader(source) as reader:
        matrices = [tensor for tensor in reader.tensors.values() if len(tensor.shape) > 1]
    sums = {}
    for tensor in matrices:
        if tensor.name.startswith("blk."):
            n = tensor.shape[0] if len(tensor.shape) > 2 else 1
            sums[tensor.name] = InputSums(rng.lognormal(0, 1, (n, ROW)), np.ones(n, int))
    write_imatrix(tmp_path / "i.gguf", sums, dataset="t", chunks=1, chunk_size=1)
    imatrix = read_imatrix(tmp_path / "i.gguf")
    with GGUFReader(source) as reader:
        losses = convert(plan(GGUFSource(reader), Choice("Q4_0"), imatrix=imatrix), out).losses.values()
    rmse, weighted = quantize_table.errors(source, out, imatrix)
    assert rmse == pytest.approx(math.sqrt(sum(x.error for x in losses) / sum(x.energy for x in losses)), rel=1e-4)
    expected = math.sqrt(sum(x.weighted_error for x in losses) / sum(x.weighted_energy for x in losses))
    assert weighted == pytest.approx(expected, rel=1e-4)
    assert math.isnan(quantize_table.errors(source, out, None)[1])


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source.gguf")
    peer = tmp_path / "peer"
    peer.write_text(f"#!{sys.executable}\nimport shutil, sys\nshutil.copy(*sys.argv[1:3])\n")
    peer.chmod(0o755)
    quantize_table.main([str(source), "--types", "q8_0", "--quantize", str(peer), "-r", "1"])
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| type | imatrix | MB | RMSE, qrun | RMSE, peer | seconds, qrun | seconds, peer |"
    cells = [cell.strip(" *") for cell in row.split("|")[1:-1]]
    assert cells[:2] == ["Q8_0", "no"]
    assert 0.001 < float(cells[3]) < 0.01 and float(cells[4]) == 0  # the copy has lost nothing
    assert quantize_table.best_bold([2.0, 1.0, math.nan], 1) == ["2.0", "**1.0**", ""]


def test_a_program_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failed: out of luck"):
        quantize_table.run(sys.executable, "-c", "exit('out of luck')")
