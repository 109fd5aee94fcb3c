"""The catalog of models is a file beside the modules."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("qrun.models", includes=["*.toml"])
