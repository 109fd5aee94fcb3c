"""NumPy prints how it was built by the package `yaml`, if it is there; otherwise as JSON. An app that imports `yaml`
itself has it."""

excludedimports = ["yaml"]
