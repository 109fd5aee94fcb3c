"""What the compiler needs, and what names the code that it makes."""

import configparser
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qrun.cli.main import main
from qrun.engine.native import codegen, sources
from qrun.engine.simd.target import host_target

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Versions that are said to be installed."""
    versions = {"numba": "0.66.0", "llvmlite": "0.48.0"}

    monkeypatch.setattr(codegen, "_recorded_version", versions.get)
    codegen.code_digest.cache_clear()
    yield versions
    codegen.code_digest.cache_clear()


def test_the_lowest_versions_are_those_of_the_packaging() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    for package, version in codegen.OLDEST.items():
        assert f"{package}>={'.'.join(map(str, version))}" in lines


@pytest.mark.parametrize(("package", "version"), [("numba", "0.65.1"), ("numba", "0.61.0"), ("llvmlite", "0.47.0")])
def test_versions_that_are_too_old_are_named(
    installed: dict[str, str], capsys: pytest.CaptureFixture[str], package: str, version: str
) -> None:
    installed[package] = version
    assert main(["warmup"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qrun: {package} 0.") and said.count("\n") == 1
    assert f"or newer is needed to compile kernels, and {version} is installed" in said


@pytest.mark.parametrize("version", ["0.66.0", "0.66.0rc1", "0.100.0", "1.0", "0.69.0dev0+12.g3f"])
def test_later_versions_will_do(installed: dict[str, str], version: str) -> None:
    installed["numba"] = version
    assert codegen.code_digest(host_target())


@pytest.mark.parametrize(("version", "named"), [("0.68.3", False), ("0.69.0", True), ("1.0", True)])
def test_a_numba_that_has_moved_what_is_used_of_it_is_named(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, version: str, named: bool
) -> None:
    monkeypatch.setattr(codegen, "_recorded_version", lambda package: version)
    monkeypatch.setitem(codegen.sys.modules, "qrun.engine.simd.frontend", None)
    with pytest.raises(codegen.CompileError if named else ImportError) as caught:
        codegen.compile_kernel("lead", host_target())
    assert (f"Numba {version} is newer than 0.68, the last that was tried" in str(caught.value)) is named


def test_an_apps_own_code_means_what_it_meant() -> None:
    """Operations of kernels have the names of Python's functions, in a process that compiles others with Numba too."""
    from numba import njit

    codegen.compile_kernel("lead", host_target())
    largest, smallest = njit(lambda a, b: max(a, b)), njit(lambda a, b: min(a, b))
    of_three, size = njit(lambda a, b, c: max(a, b, c)), njit(lambda a: abs(a))
    huge = np.uint64(2**63 + 5)
    assert largest(huge, np.uint64(3)) == huge and smallest(np.uint32(2**32 - 1), np.uint32(1)) == 1
    assert of_three(huge, np.uint64(1), np.uint64(2)) == huge and size(-3) == 3 and smallest(1, 2.5) == 1.0


def test_a_compiler_that_is_not_there_is_named(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del installed["numba"]
    monkeypatch.setitem(codegen.sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"numba 0\.66 or newer is needed to compile kernels, and cannot be imported"):
        codegen.code_digest(host_target())


def test_an_app_without_records_of_what_was_installed_compiles(installed: dict[str, str]) -> None:
    installed["llvmlite"] = "0.99.0"
    before = codegen.code_digest(host_target())
    codegen.code_digest.cache_clear()
    del installed["llvmlite"]
    assert codegen.code_digest(host_target()) != before  # the version is that of the package itself


def test_a_version_is_that_of_the_installation_s_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in codegen.OLDEST:
        assert codegen._recorded_version(package) == importlib.metadata.version(package)
    place = tmp_path / "numba" / "__init__.py"
    monkeypatch.setattr(codegen, "compiler_place", lambda package: place)
    assert codegen._recorded_version("numba") == importlib.metadata.version("numba"), "the folder is not there"
    for version in ("0.71.2", "0.72"):
        (tmp_path / f"numba-{version}.dist-info").mkdir()
        (tmp_path / f"numba_extra-{version}.dist-info").mkdir()
        one = codegen._recorded_version("numba")
        assert one == ("0.71.2" if version == "0.71.2" else importlib.metadata.version("numba")), "of one record"

    def none(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert codegen._recorded_version("numba") is None


def test_an_app_without_sources_names_code_by_its_bytecode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "qrun.engine.native.built", None)
    with_sources = sources.sources_digest.__wrapped__()
    monkeypatch.setattr("importlib.machinery.SourceFileLoader.get_source", lambda loader, name: None)
    without = sources.sources_digest.__wrapped__()
    assert without != with_sources
    assert sources.sources_digest.__wrapped__() == without
