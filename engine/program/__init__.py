"""From a graph to a program in memory, and the runtime that runs it step by step over a KV cache."""
