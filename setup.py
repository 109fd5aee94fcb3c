"""What setup.cfg cannot say: a distribution holds the name of the sources that its kernels are compiled from."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildPy(build_py):
    """Writes `qrun/engine/native/built.py`. Not for a checkout that is installed to be worked on: what changes there is
    named anew each time."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            path = Path(self.build_lib, "qrun", "engine", "native", "built.py")
            path.write_text(
                f'"""Made when the distribution was built: see `sources`."""\n\nSOURCES = "{kernel_sources()}"\n'
            )


def kernel_sources() -> str:
    """The name, as `sources_digest` gives it, of the files here."""
    module = runpy.run_path(str(HERE / "engine" / "native" / "sources.py"))
    files = {}
    for name in module["MODULES"]:
        files[name] = HERE.joinpath(*name.split(".")[1:]).with_suffix(".py")
    for package in module["PACKAGES"]:
        for path in HERE.joinpath(*package.split(".")[1:]).glob("*.py"):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return str(module["digest_of"]({name: path.read_text("utf-8").encode() for name, path in files.items()}))


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy})
