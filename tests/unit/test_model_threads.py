"""The number of threads that a model gets by default."""

import os
from pathlib import Path

import pytest

from qrun.engine.native.cpu_count import available_cores, count_cores, cpu_quota


def machine(root: Path, siblings: list[str]) -> Path:
    for cpu, text in enumerate(siblings):
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


def test_the_threads_of_a_core_count_once(tmp_path: Path) -> None:
    root = machine(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert count_cores(range(4), root) == 2
    assert count_cores([0, 1], root) == 2
    assert count_cores([0, 2], root) == 1


def test_cpus_of_which_nothing_is_known_count_each(tmp_path: Path) -> None:
    assert count_cores(range(3), tmp_path) == 3


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("", None),
        ("1 0", None),
    ],
)
def test_a_containers_quota(tmp_path: Path, text: str, quota: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


def test_this_machine_has_a_core() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_a_sandbox_may_not_say_which_cores_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int) -> set[int]:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", refuse, raising=False)
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
