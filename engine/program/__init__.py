"""From a graph to a program in memory, and the runtime that runs it step by step over a KV cache.

In the order in which things happen:

    early_selection   rows whose logits nobody wants leave the graph early
    lowering          operations become records, which name kernels and places of values; it writes them with
                      record_writer, record, lowering_experts, rope_table
    adapted           the same for steps in which sequences have adapters of their own
    observing         the same with sums of what matrices are given
    arena             places of values become places in one block of memory
    program           records get addresses, and barriers between them
    kv_cache          what is kept of a sequence: pages of keys and values (pages), states beside them (state_blocks)
    step              rows of one or more sequences, as kernels read them
    pieces            operations of a program are run some at a time
    runtime           steps through a program, by a team of threads
    background        a batch that has a program of its own, so that steps may come in between

`needs` says beforehand what a model will take.
"""
