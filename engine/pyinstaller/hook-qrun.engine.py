"""The engine imports most of itself when it is first needed. Kernels are compiled on the user's machine; with their
sources beside their bytecode, compiled code is called as it is outside of the app, and shared with it."""

from PyInstaller.utils.hooks import collect_submodules, copy_metadata


def wanted(name):  # type: ignore[no-untyped-def]
    return not name.startswith("qrun.engine.pyinstaller")


hiddenimports = collect_submodules("qrun.engine", filter=wanted)
hiddenimports += collect_submodules("qrun.formats") + collect_submodules("qrun.models")
datas = copy_metadata("numba") + copy_metadata("llvmlite")
module_collection_mode = {
    "qrun.engine.kernels": "pyz+py",
    "qrun.engine.simd": "pyz+py",
    "qrun.engine.native": "pyz+py",
    "qrun.engine.sampling": "pyz+py",  # help texts are read from it
    "qrun.formats.blocks": "pyz+py",
}
