"""The part of `qrun compare` that calibrates: mixes of measured sensitivity, as large as the named ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from qrun.cli.console import CompileProgress, notice

if TYPE_CHECKING:
    from qrun.engine.quantize.convert import Plan
    from qrun.engine.quantize.source import Source

MIX = "mix"
MOST_BITS = 8.0  # a mix of more bits for a weight is a file of Q8_0


def calibrated_plans(
    source: Source, path: Path, names: Sequence[str], texts: Sequence[Path], samples: int, length: int, folder: Path,
    threads: int | None, allow_requantize: bool,
) -> list[tuple[str, Plan]]:  # fmt: skip
    """Named mixes with the importance that the texts show, and for each one of the same size whose types are measured;
    all with their names for the table, no mix twice. What is found of the model lies in `folder`."""
    from qrun.cli.convert_calibrated import read, say_samples, stage_bars
    from qrun.engine.quantize.calibrated import Calibration, TooSmall, check_not_quantised
    from qrun.engine.quantize.convert import file_bytes, plan
    from qrun.engine.quantize.mixes import Choice
    from qrun.engine.quantize.sensitivity import candidates_for

    check_not_quantised(source, allow_requantize)
    found = read(path, source, texts, length=length, samples=samples, seed=1)
    say_samples(found)
    with ExitStack() as stack:
        stage = stack.enter_context(stage_bars())
        calibration = Calibration(
            source, found, folder, threads, allow_requantize, stage=stage, compiling=CompileProgress(), notice=notice
        )
        stack.enter_context(calibration.measures.opened())
        imatrix = calibration.imatrix()

        def planned(choice: Choice) -> Plan:
            return plan(source, choice, imatrix=imatrix, allow_requantize=allow_requantize)

        plans = {name: planned(Choice(name)) for name in names}
        mixes: dict[str, Plan] = {}
        for name, named in plans.items():
            bits = named.bits_per_weight(named.n_bytes)
            if bits >= MOST_BITS:
                continue
            try:
                mix = planned(calibration.mix(imatrix, file_bytes(named), candidates_for(bits)))
            except TooSmall as error:
                notice(f"no mix of the size of {name}: {error}")
                continue
            if any(mix.choice.types == other.choice.types for other in mixes.values()):
                continue
            title = f"{MIX} {mix.bits_per_weight(mix.n_bytes):.2f}"
            mixes[f"{title} {name}" if title in mixes else title] = mix
    return [*plans.items(), *mixes.items()]
