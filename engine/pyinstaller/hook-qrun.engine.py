"""The engine imports most of itself when it is first needed.

If QRUN_KERNELS names a pack of kernels (`qrun pack`) while the app is packed, the pack goes into the app, where it is
found, and Numba and llvmlite stay outside: nothing is compiled. Without one, kernels are compiled on the user's
machine. With their sources beside their bytecode, compiled code is called as it is outside of the app, and shared with
it.
"""

import os
from pathlib import Path

from PyInstaller.utils.hooks import collect_submodules, copy_metadata


def wanted(name):  # type: ignore[no-untyped-def]
    return not name.startswith("qrun.engine.pyinstaller")


hiddenimports = collect_submodules("qrun.engine", filter=wanted)
hiddenimports += collect_submodules("qrun.formats") + collect_submodules("qrun.models")
module_collection_mode = {
    "qrun.engine.kernels": "pyz+py",
    "qrun.engine.simd": "pyz+py",
    "qrun.engine.native": "pyz+py",
    "qrun.engine.sampling": "pyz+py",  # help texts are read from it
    "qrun.formats.blocks": "pyz+py",
}
pack = os.environ.get("QRUN_KERNELS")
if pack:
    manifest = Path(os.path.expanduser(pack), "manifest.json")
    if not manifest.is_file():
        raise SystemExit(f"QRUN_KERNELS names {pack}, where there is no pack of kernels (qrun pack makes one)")
    datas = [(str(file), "kernels") for file in (manifest, *sorted(manifest.parent.glob("*.code")))]
    excludedimports = ["numba", "llvmlite"]
else:
    datas = copy_metadata("numba") + copy_metadata("llvmlite")
