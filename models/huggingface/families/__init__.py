"""One file for each group of families: what the checkpoints of their classes look like."""
