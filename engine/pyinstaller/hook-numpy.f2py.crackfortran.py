"""NumPy guesses the encoding of Fortran's sources by a package, if it is there. An app that imports it has it."""

excludedimports = ["charset_normalizer", "chardet"]
