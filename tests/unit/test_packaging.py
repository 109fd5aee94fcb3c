"""What setup.cfg says is so."""

import configparser
import importlib.metadata
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

import qrun.engine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_version_is_said_alike_everywhere(config: configparser.ConfigParser) -> None:
    assert qrun.engine.__version__ == config["metadata"]["version"] == importlib.metadata.version("qrun-gguf")


def test_every_folder_is_packed(config: configparser.ConfigParser) -> None:
    folders = {
        f"qrun.{'.'.join(path.parent.relative_to(ROOT).parts)}"
        for top in ("engine", "formats", "models", "cli", "server")
        for path in (ROOT / top).rglob("*.py")
    }
    assert set(config["options"]["packages"].split()) == folders


def test_files_that_are_no_code_are_packed(config: configparser.ConfigParser) -> None:
    data = {
        path
        for top in ("engine", "formats", "models", "cli", "server")
        for path in (ROOT / top).rglob("*.*")
        if path.suffix not in (".py", ".pyc", ".typed", ".md") and path.name != ".keep"
    }
    packed = {
        path
        for package, names in config["options.package_data"].items()
        for name in names.split()
        if package != "*"
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(name)
        if not path.name.startswith(".")  # setuptools' patterns leave these out
    }
    assert data == packed >= {ROOT / "models" / "catalog.toml"}


def test_the_licence_is_packed(config: configparser.ConfigParser) -> None:
    assert config["metadata"]["license_expression"] == "Apache-2.0"
    for name in config["metadata"]["license_files"].split():
        assert "Apache License\n                           Version 2.0" in (ROOT / name).read_text("utf-8")


def test_all_requirements_have_a_lowest_version() -> None:
    spec = importlib.util.spec_from_file_location("lowest", ROOT / ".ci" / "lowest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    requirements = module.lowest((ROOT / "setup.cfg").read_text("utf-8"))
    assert "numba==0.66" in requirements and "pytest==8" in requirements
    assert not [line for line in requirements if line.startswith(("ruff", "mypy"))]
    with pytest.raises(SystemExit, match="numpy has no lower bound"):
        module.lowest("[options]\ninstall_requires =\n    numpy\n[options.extras_require]\ntest =\n")


def test_the_archive_of_the_sources_holds_all_that_is_tracked() -> None:
    """Who packs for a distribution runs the tests from it."""
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    manifest = ROOT.joinpath("MANIFEST.in").read_text("utf-8").splitlines()
    rules = [line.split() for line in manifest if not line.startswith("#")]
    grafted = {name for kind, *names in rules if kind == "graft" for name in names}
    included = {name for kind, *names in rules if kind == "include" for name in names}
    # Packages, their data and what setuptools takes by itself.
    grafted |= {"engine", "formats", "models", "cli", "server"}
    included |= {"README.md", "LICENSE", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", ".gitignore"}
    missed = [
        name for name in listed.split("\0") if name and name not in included and name.split("/")[0] not in grafted
    ]
    assert not missed


def test_what_is_not_committed_is_not_published(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    if shutil.which("git") is None or shutil.which("make") is None:
        pytest.skip("no git, or no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "dist").mkdir()
    git("init")
    git("add", "Makefile")
    git("commit", "-m", "All")
    (tmp_path / "stray.py").touch()
    made = subprocess.run(["make", "dist"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0 and "not committed, and would be published: ?? stray.py" in made.stderr
    assert (tmp_path / "dist").is_dir()
