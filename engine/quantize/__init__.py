"""Making model files: quantising tensors, choosing types for them, converting a file from one type to another."""
