"""What memory this machine has, by the operating system's own word, and what a model takes of it."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

from qrun.formats.dataclass import dataclass

# Python, NumPy, the compiler's libraries, kernels, and the intermediate values of a step
WORKING_BYTES = 250_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not say."""

    total: int | None
    available: int | None

    @property
    def room(self) -> int | None:
        """For a model: what is available, or where that is not known, all of it."""
        return self.total if self.available is None else self.available


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes."""

    file: int
    cache: int
    working: int = WORKING_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.file + self.cache + self.working

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {"file": self.file, "cache": self.cache, "working": self.working, "total": self.total}


def cpu_name() -> str:
    """What the CPU is called, by the operating system's own word, or else its architecture."""
    import platform

    name = os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows
    with suppress(OSError):
        if sys.platform == "darwin":
            import subprocess

            words = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        else:
            lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return name or platform.machine()


def memory() -> Memory:
    """The machine's memory, or what a container's limit leaves of it."""
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin":
        import subprocess  # elsewhere no start waits for it

        with suppress(OSError, ValueError, subprocess.SubprocessError):
            answer = subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, text=True, timeout=5)
            return Memory(int(answer.stdout), None)
        return Memory(None, None)
    return _linux(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def _linux(meminfo: Path, cgroup: Path) -> Memory:
    fields: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                fields[name] = int(rest.split()[0]) * 1024
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    with suppress(OSError, ValueError):  # cgroup v2; "max" (no limit) is the ValueError
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        with suppress(OSError, ValueError):  # what was read of files, which is available as it is above
            stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            used -= int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
        if total is None or limit < total:
            total = limit
            available = limit - used if available is None else min(available, limit - used)
    return Memory(total, available)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in
          ("total", "available", "total_page", "available_page", "total_virtual", "available_virtual", "extended")),
    )  # fmt: skip


def _windows() -> Memory:
    status = _MemoryStatus()
    status.length = ctypes.sizeof(status)
    library = getattr(ctypes, "windll").kernel32  # noqa: B009 (mypy knows this name on Windows only)
    if not library.GlobalMemoryStatusEx(ctypes.byref(status)):
        return Memory(None, None)
    return Memory(status.total, status.available)
