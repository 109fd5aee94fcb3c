"""How many threads are worth starting here."""

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Physical cores that this process may use, at least 1.

    The threads of one core share its vector units, and threads that wait for each other by spinning lose much when
    there are more of them than cores. So: the cores of the CPUs in the process's affinity mask, and no more than a
    container's CPU quota allows. Where the system does not tell which CPUs share a core, every CPU counts as one.
    """
    cpus: Iterable[int] = range(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        with suppress(OSError):  # a sandbox may forbid it
            cpus = os.sched_getaffinity(0)
    quota = cpu_quota(_CGROUP)
    n_cores = count_cores(cpus, _CPUS)
    return max(1, n_cores if quota is None else min(n_cores, quota))


def count_cores(cpus: Iterable[int], root: Path) -> int:
    """Distinct cores among CPU numbers, by `root`/cpuN/topology (Linux)."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def cpu_quota(root: Path) -> int | None:
    """CPUs that the control group at `root` may keep busy, rounded up; None without a limit (Linux)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
