"""The page of `qrun serve` is files beside the modules."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("qrun.server", includes=["static/*"])
