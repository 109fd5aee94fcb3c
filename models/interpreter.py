"""The Python by which this process runs, to start others with.

`python -m` and `python -c` look for modules in the working directory first: whatever lies there under the name of a
module, as a `numba.py`, would be run. `-P` keeps it out. What the user has set for Python as a whole (a home,
isolation, no user site) holds for the others, too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

# python, python3.14t, pythonw.exe, python_d.exe, Python (of macOS), python3.12-dbg
_NAME = re.compile(r"python(w|_d)?[\d.]*[tdmw]*(-dbg|-intel64|-arm64)?(\.exe)?", re.IGNORECASE)

# The only ones of Python's variables that others get: where Python itself lies, and where it may write. Others say what
# is imported (PYTHONPATH), run (PYTHONSTARTUP, PYTHONINSPECT) or printed.
_VARIABLES = {
    "PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONUSERBASE", "PYTHONPYCACHEPREFIX", "PYTHONCOERCECLOCALE", "PYTHONMALLOC",
    "PYTHONLEGACYWINDOWSFSENCODING",
}  # fmt: skip


def interpreter() -> list[str] | None:
    """The words that start this Python, with the flags that it was started with and `-P`.

    None where there is no such program: in a packed app, and in a program that embeds Python. To start `sys.executable`
    there would start that program once more.
    """
    path = sys.executable
    if getattr(sys, "frozen", False) or not path or not os.path.isabs(path):
        return None
    if not _NAME.fullmatch(os.path.basename(path)) or not os.access(path, os.X_OK):
        return None
    flags = sys.flags
    given = {
        "-I": flags.isolated, "-E": flags.ignore_environment, "-s": flags.no_user_site, "-S": flags.no_site,
        "-B": flags.dont_write_bytecode,
    }  # fmt: skip
    return [path, "-P", *(flag for flag, on in given.items() if on), "-X", f"utf8={flags.utf8_mode}"]


def clean_environment() -> dict[str, str]:
    """The environment without what would have another Python import, run or print something of its own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _VARIABLES or not name.startswith(("PYTHON", "NUMBA_"))
    }


def in_background() -> dict[str, Any]:
    """Options of `subprocess.Popen`: no window opens for the process, and Ctrl-C in the terminal is not sent to it."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NO_WINDOW}
    return {"process_group": 0}
