"""The catalog of models is a file beside the modules.

An app with a pack of kernels (see the engine's hook) brings its models along, or fetches those of the catalog, which
takes no package. What fetches others from Hugging Face stays outside, unless the app imports `huggingface_hub` itself.
"""

from PyInstaller.utils.hooks import collect_data_files

from qrun.engine.pyinstaller import pack, unused_cutters

datas = collect_data_files("qrun.models", includes=["*.toml"])
if pack() is not None:
    excludedimports = ["huggingface_hub", *unused_cutters()]
