"""The CPU that this process runs on: what it is (`features`), and machine code that it may run (`code_memory`)."""
