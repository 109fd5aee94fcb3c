"""The engine imports most of itself when it is first needed.

If QRUN_KERNELS names a pack of kernels (`qrun pack`) while the app is packed, the pack goes into the app, where it is
found. Numba and llvmlite stay outside, as nothing is compiled, and so does what cuts texts for other models than the
pack was made for. Without one, kernels are compiled on the user's machine. With their sources beside their bytecode,
compiled code is called as it is outside of the app, and shared with it.
"""

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_submodules, copy_metadata

from qrun.engine.pyinstaller import pack, unused_cutters


def wanted(name):  # type: ignore[no-untyped-def]
    return not name.startswith("qrun.engine.pyinstaller")


hiddenimports = collect_submodules("qrun.engine", filter=wanted)
hiddenimports += collect_submodules("qrun.formats") + collect_submodules("qrun.models")
module_collection_mode = {"qrun.engine.sampling": "pyz+py"}  # help texts are read from it
folder = pack()
# A pack belongs to sources: where those have no name of their own (`native.sources`), they are read.
if folder is None or find_spec("qrun.engine.native.built") is None:
    for name in ("qrun.engine.kernels", "qrun.engine.simd", "qrun.engine.native", "qrun.formats.blocks"):
        module_collection_mode[name] = "pyz+py"
if folder is not None:
    datas = [(str(file), "kernels") for file in (folder / "manifest.json", *sorted(folder.glob("*.code")))]
    excludedimports = ["numba", "llvmlite", *unused_cutters()]
else:
    datas = copy_metadata("numba") + copy_metadata("llvmlite")
