"""Starting this Python again, without what lies in the working directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from qrun.models.interpreter import clean_environment, in_background, interpreter


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def call(name: str) -> list[str] | None:
        path = tmp_path / name
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return interpreter()

    return call


@pytest.mark.parametrize(
    "name",
    ["python", "python3", "python3.11", "python3.13t", "python.exe", "pythonw.exe", "pythonw3.14.exe", "python_d.exe",
     "Python", "python3.12-dbg", "python3-intel64"],
)  # fmt: skip
def test_a_python_is_known_by_its_name(called, name: str) -> None:  # type: ignore[no-untyped-def]
    words = called(name)
    assert words is not None and words[0].endswith(name) and "-P" in words


@pytest.mark.parametrize("name", ["uwsgi", "myapp", "myapp.exe", "blender", "pythonista", "ipython", "my-python-app"])
def test_no_other_program_is_started_as_if_it_were_one(called, name: str) -> None:  # type: ignore[no-untyped-def]
    assert called(name) is None


@pytest.mark.parametrize("path", ["", None, "python3", "/nowhere/python3"])
def test_a_process_may_have_no_python(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    monkeypatch.setattr(sys, "executable", path)
    assert interpreter() is None


def test_a_packed_app_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert interpreter() is None


@pytest.mark.parametrize("flag", ["-I", "-E", "-s", "-S", "-B", "-P"])
def test_flags_are_handed_on(flag: str) -> None:
    interpreter_file = Path(__file__).parents[2] / "models" / "interpreter.py"
    code = f"exec(open({str(interpreter_file)!r}).read()); print(interpreter())"
    done = subprocess.run([sys.executable, flag, "-c", code], capture_output=True, text=True, check=True)
    assert f"'{flag}'" in done.stdout and "'-P'" in done.stdout


def test_variables_that_have_python_import_or_run_something_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = ["PYTHONPATH", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONWARNINGS", "PYTHONIOENCODING", "NUMBA_DUMP_IR"]
    kept = ["PYTHONHOME", "PATH", "QRUN_SIMD"]
    for name in [*left_out, *kept]:
        monkeypatch.setenv(name, "1")
    environment = clean_environment()
    assert [name for name in left_out if name in environment] == []
    assert [environment[name] for name in kept] == ["1"] * 3


def test_on_windows_no_window_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert in_background() == {"creationflags": 0x08000000}
