"""Making model files: quantising tensors, choosing types for them, converting a file from one type to another.

    source         what a file is made from; merge puts adapters into it
    mixes          which type each tensor gets, by a name such as Q4_K_M; imatrix: what of it matters
    convert        a plan, and the file; each tensor by the encoder; on_load: of a checkpoint that is run
    importance     an importance matrix, from a text
    calibrated     all that texts are good for: samples, importance, sensitivity of each tensor, by it a mix of a given
                   size (allocation), rounding by columns (gptq) or with scales (awq), by sums over the inputs
                   (moments), layer after layer (stretches); measure_folder keeps what was found
"""
