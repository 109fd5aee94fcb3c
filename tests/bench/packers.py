"""Packs a program with each packer, and starts it as on a machine that has neither qrun nor this Python.

    python tests/bench/packers.py model.gguf
    python tests/bench/packers.py model.gguf --packers nuitka window --keep /tmp/packed

It needs what the extra `packers` of setup.cfg names and, for Nuitka, a C compiler and time. `make test-packers` runs
it. Each program brings a pack of kernels along. It is started from a path with spaces and umlauts, without a home, with
a cache that cannot be written to, in a folder whose modules are named as those that it imports, and twice at once; the
sources and this environment are hidden meanwhile where this system can do that (`unshare`, on Linux). Each time it has
to give the answer that the library gives here. The sample with a window is packed and started, but asked nothing.
"""

import argparse
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from qrun.engine import Model, pull

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is"
APP = f"""
import sys
from qrun.engine import Model

if __name__ == "__main__":
    with Model.load(sys.argv[1]) as model:
        print(model.complete({PROMPT!r}, max_tokens=5, temperature=0))
"""
# As docs/embedding.md says. OUT is where the app goes, KERNELS the pack.
PYINSTALLER = ["PyInstaller", "--noconfirm", "--log-level=ERROR", "--distpath=OUT"]
EXCLUDED = "numba,llvmlite,gguf,huggingface_hub"
LEFT_OUT = "numba,llvmlite,huggingface_hub,prompt_toolkit,gguf,PyInstaller"
AS_BYTECODE = ["qrun", "numpy", "jinja2", "markupsafe", "tokenizers", "sentencepiece", "filelock"]
COMMANDS = {
    "pyinstaller": [*PYINSTALLER, "app.py"],
    "pyinstaller-file": [*PYINSTALLER, "--onefile", "app.py"],
    "cx_freeze": ["cx_Freeze", "build", "--script=app.py", "--build-exe=OUT/app", f"--excludes={EXCLUDED}"],
    "nuitka": [
        "nuitka", "--standalone", "--output-dir=OUT", "--include-data-dir=KERNELS=kernels",
        "--include-package=qrun.engine,qrun.models,qrun.formats", f"--nofollow-import-to={LEFT_OUT}",
        *(f"--noinclude-custom-mode={name}:bytecode" for name in AS_BYTECODE), "app.py",
    ],
    "window": [*PYINSTALLER, str(ROOT / "examples" / "desktop_qt" / "qrun_desktop.spec")],
}  # fmt: skip
PROGRAMS = {"pyinstaller-file": "app", "nuitka": "app.dist/app.bin", "window": "qrun_desktop/qrun_desktop"}


def pack(packer: str, kernels: Path, folder: Path) -> Path:
    """The program that the packer makes, in a new folder."""
    out = folder / f"Äpp von {packer}"
    (folder / "app.py").write_text(APP)
    command = [part.replace("OUT", str(out)).replace("KERNELS", str(kernels)) for part in COMMANDS[packer]]
    environment = os.environ | {"QRUN_KERNELS": str(kernels), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    with open(folder / f"{packer}.log", "w") as log:
        subprocess.run(
            [sys.executable, "-m", *command], check=True, cwd=folder, env=environment, stdout=log, stderr=log
        )  # fmt: skip
    program = out / PROGRAMS.get(packer, "app/app")
    if packer == "cx_freeze":
        shutil.copytree(kernels, program.parent / "kernels")
    return program


def size(path: Path) -> int:
    """Bytes of all files; links take none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def hidden(command: Sequence[str]) -> list[str]:
    """The command in a mount namespace without the sources, this environment and its Python."""
    gone = {ROOT, Path(sys.prefix), Path(sys.base_prefix)} - {Path("/usr")}
    outermost = [str(folder) for folder in gone if gone.isdisjoint(folder.parents)]
    mounts = "".join(f"mount -t tmpfs none {shlex.quote(folder)} && " for folder in outermost)
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mounts}exec "$@"', "sh", *command]


def start(program: Path, arguments: Sequence[str], cwd: Path, hide: bool) -> subprocess.Popen[str]:
    command = [str(program), *arguments]
    environment = {"QRUN_CACHE": "/dev/null/cache", "QT_QPA_PLATFORM": "offscreen", "PATH": "/usr/sbin:/usr/bin:/bin"}
    return subprocess.Popen(
        hidden(command) if hide else command, env=environment, cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def check(program: Path, arguments: Sequence[str], cwd: Path, hide: bool, expected: str) -> float:
    """Start it, twice at once and then alone. Returns the processor seconds that it took alone, at best."""
    for process in [start(program, arguments, cwd, hide) for _ in range(2)]:
        expect(process, expected)
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        expect(start(program, arguments, cwd, hide), expected)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def expect(process: subprocess.Popen[str], expected: str) -> None:
    output, errors = process.communicate(timeout=300)
    if (process.returncode, output) != (0, expected):
        raise SystemExit(f"{process.args}: {process.returncode}, {output!r} for {expected!r}\n{errors}")


def check_window(program: Path, cwd: Path, hide: bool) -> None:
    """It opens, and stays."""
    process = start(program, [], cwd, hide)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
    else:
        raise SystemExit(f"{program} ended with {process.returncode}\n{process.communicate()[1]}")


def measure(packer: str, model: Path, kernels: Path, folder: Path, hide: bool, expected: str) -> str:
    """A row of the table."""
    begun = time.perf_counter()
    program = pack(packer, kernels, folder)
    built = time.perf_counter() - begun
    cwd = folder / "elsewhere"
    cwd.mkdir(exist_ok=True)
    for name in ("numpy", "json", "numba", "qrun", "kernels"):
        (cwd / f"{name}.py").write_text("raise SystemExit('that is not the one')")
    if packer == "window":
        check_window(program, cwd, hide)
        seconds = ""
    else:
        seconds = f"{check(program, [str(model)], cwd, hide, expected):.1f} s"
    packed = program if packer.endswith("-file") else program.parent
    return f"| {packer} | {size(packed) / 1e6:.0f} MB | {built:.0f} s | {seconds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file, or a model of the catalog")
    parser.add_argument("--packers", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--keep", type=Path, help="a folder for the apps, which otherwise go")
    args = parser.parse_args()
    model = Path(args.model).resolve() if Path(args.model).exists() else pull(args.model)
    hide = subprocess.run(hidden(["true"]), capture_output=True).returncode == 0 if shutil.which("unshare") else False
    with Model.load(model) as loaded:
        expected = loaded.complete(PROMPT, max_tokens=5, temperature=0) + "\n"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        kernels = folder / "kernels"
        command = ["qrun.cli.main", "pack", str(model), "--out", str(kernels), "--targets", "host,x86-64"]
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        print("Sources and environment are", "hidden." if hide else "NOT hidden: `unshare` cannot do it here.")
        print("| packer | size | packing | processor time of a start with an answer |\n|---|--:|--:|--:|")
        for packer in args.packers:
            print(measure(packer, model, kernels, folder, hide, expected), flush=True)


if __name__ == "__main__":
    main()
