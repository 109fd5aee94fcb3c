"""The records through which Python tells kernels what to do: byte offsets of their fields, all of them int64.

An operation's record begins with what the team needs (its kernel, whether a barrier follows, where the counter is from
which threads take chunks, or parts where IN_PARTS is set); the rest is the kernel's own. Addresses of float32 rows go
with a stride in bytes between rows.

A program's counters (int64) lie together, one behind the other: all threads write them, and read the records.
"""

RECORD_BYTES = 256
OP_KERNEL, OP_BARRIER, OP_COUNTER, OP_IN_PARTS = 0, 8, 16, 24
# IN_PARTS of an operation with which a phase begins in which no row is shared among parts: see `kernels.team`.
IN_PARTS_BY_ROWS = 2
_FIRST = 32

# Shared record of a team. Who opens a phase writes PHASE_BEGIN, and has STATE's line already. ALONE: the step's record
# with one part, or 0. Each thread has a record too.
STATE, PHASE_BEGIN, OPENED, LATE = 0, 8, 64, 128
PROGRAM, N_OPERATIONS, STEP, ALONE, CLOSING, YIELD, CLOCK, CLOCK_ID = range(192, 256, 8)
THREAD, THREAD_BYTES, MAX_THREADS = 256, 64, 256
ASLEEP, DEADLINE, TIME, IN_VAIN = 0, 8, 16, 32  # TIME: a timespec
SHARED_BYTES = THREAD + THREAD_BYTES * MAX_THREADS

# What varies from step to step. Ranges are [count, (matrix, first column, columns) ...]: see kernels.matmul.
(STEP_PARTS, N_ROWS, TOKENS, POSITIONS, SELECTED, N_TILES, TILES, PAGE_TABLES, STEP_TEAM, N_SEGMENTS,
 SEGMENTS) = range(0, 88, 8)  # fmt: skip
ROW_RANGES = 88
STEP_BYTES = 120

# Attention tiles: rows of one sequence at consecutive positions. END: how many positions the sequence has then.
# SOURCE: how many the source has that it answers.
TILE_FIRST_ROW, TILE_ROWS, TILE_FIRST_POSITION, TILE_END, TILE_SOURCE = range(0, 40, 8)
TILE_BYTES = 40

# Segments: all rows of one sequence. LOGGED: how many positions of its chunk the block IN has; the step ends in the
# block OUT, which may be the same. See program.state_blocks.
SEG_FIRST_ROW, SEG_ROWS, SEG_LOGGED, SEG_IN, SEG_OUT = range(0, 40, 8)
SEG_BYTES = 40
# Positions in a chunk, after which a block of state goes on from its new beginning; and the most numbers that a vector
# of a head's state may have.
STATE_ROWS, MAX_STATE_DIM = 16, 256

# The KV cache: positions in one page, and bits of a value by the cache's type.
PAGE_POSITIONS = 64
CACHE_BITS = {"f16": 16, "q8_0": 8, "q4_0": 4}
# The same of what layers may be kept as: those that need every digit are not kept as float16.
KIND_BITS = {"f32": 32, **CACHE_BITS}

# Rows of one sequence that attention takes together, heads that it takes together at most, and the longest head that it
# has room for.
TILE_SIZE, MAX_HEADS_TOGETHER, MAX_HEAD_DIM = 16, 8, 576

# A matrix tile's columns are at most this many at a time (its accumulators lie on the stack).
MAX_COLUMNS = 512

# With so many rows or more, steps are divided among threads otherwise.
MANY_ROWS = 64

# What 32 quantised activations of one column take, what they take in bfloat16, and in a tile of whole numbers: see
# kernels.columns.
PACKED_BYTES, ROUNDED_BYTES, TILE_PACKED_BYTES = 52, 64, 80
# How many columns a panel has in tiles of whole numbers, and the most that are packed otherwise: unpacking weights for
# tiles takes longer, and 16 columns take as long without them.
TILE_COLUMNS, MOST_WITHOUT_TILES = 16, 24


def _fields(count: int) -> range:
    return range(_FIRST, _FIRST + 8 * count, 8)


(MM_WEIGHTS, MM_ROW_BYTES, MM_MATRIX_BYTES, MM_ROWS, MM_BLOCKS, MM_TAIL, MM_INPUT, MM_COLUMN_BYTES, MM_RANGES, MM_OUT,
 MM_OUT_STRIDE, MM_BIAS, MM_RESIDUAL, MM_RESIDUAL_STRIDE, MM_SCALE, MM_CHUNK, MM_NEXT,
 MM_NEXT_BYTES) = _fields(18)  # fmt: skip

# Operations on rows: y from x (and z), `width` floats wide in `groups` groups; packed for a matmul where PACKED is set.
# A norm's weight and bias are float32 rows, or 0; WEIGHT_STRIDE is what lies between those of neighbouring groups.
(ROW_COUNT, ROW_X, ROW_X_STRIDE, ROW_Z, ROW_Z_STRIDE, ROW_Y, ROW_Y_STRIDE, ROW_WIDTH, ROW_GROUPS, ROW_WEIGHT,
 ROW_FACTOR, ROW_PACKED, ROW_ROPE_HEAD_DIM, ROW_ROPE_DIMS, ROW_ROPE_INTERLEAVED, ROW_ROPE_TABLE, ROW_BIAS,
 ROW_WEIGHT_STRIDE, ROW_ROPE_START, ROW_X_HEAD, ROW_X_START, ROW_X_SIZE, ROW_Z_HEAD, ROW_Z_START,
 ROW_Z_SIZE, ROW_ADD, ROW_ADD_STRIDE, ROW_ROPE_BEHIND) = _fields(28)  # fmt: skip

# Streams that are mixed by their scores, beside the last one.
MAX_STREAMS = 512

# BY_POSITION: the rows are those of positions, not of tokens. Hashes: MULTIPLIERS are int64, as many as LENGTH; SIZES
# and OFFSETS have an int64 for each row of ROW_SIZE floats; STATE is where in a block the tokens lie.
(EMBED_WEIGHTS, EMBED_ROW_BYTES, EMBED_BLOCKS, EMBED_TAIL, EMBED_OUT, EMBED_OUT_STRIDE, EMBED_SCALE,
 EMBED_BY_POSITION, HASH_LENGTH, HASH_PER_LENGTH, HASH_ROW_SIZE, HASH_MULTIPLIERS, HASH_SIZES, HASH_OFFSETS, HASH_END,
 HASH_STATE) = _fields(16)  # fmt: skip

# EVERY: only the last of so many positions writes an entry.
(KV_K, KV_K_STRIDE, KV_V, KV_V_STRIDE, KV_HEADS, KV_DIM_K, KV_DIM_V, KV_K_OFFSET, KV_V_OFFSET, KV_K_HEAD_BYTES,
 KV_V_HEAD_BYTES, KV_GROUP, KV_EVERY) = _fields(13)  # fmt: skip

# OF_TILE: where a tile says how many positions there are. BEFORE: rows from this position on are left to others.
# BIASES: float32 for each head, 2 REACH + 2 PAGE_POSITIONS, of distances from -REACH - PAGE_POSITIONS on.
(ATT_Q, ATT_Q_STRIDE, ATT_OUT, ATT_OUT_STRIDE, ATT_HEADS, ATT_KV_HEADS, ATT_DIM_K, ATT_DIM_V, ATT_K_OFFSET,
 ATT_V_OFFSET, ATT_K_HEAD_BYTES, ATT_V_HEAD_BYTES, ATT_GROUP, ATT_SCALE, ATT_SOFTCAP, ATT_WINDOW, ATT_SINKS,
 ATT_SLOPES, ATT_CHUNKED, ATT_AHEAD, ATT_ENTRIES_EVERY, ATT_ENTRIES_GROUP,
 ATT_ENTRIES_OFFSET, ATT_OF_TILE, ATT_BIASES, ATT_REACH, ATT_BEFORE) = _fields(27)  # fmt: skip

# An index of keys, and what is chosen by it (`models.graph.Index`): from the position START on. CHOSEN takes int32, for
# each row and group how many and which. SCORES: float32 for each group of a row, for INDEXED_ROWS rows or as many as
# there are threads, GROUP_BYTES apart.
INDEXED_ROWS = 16
(IDX_Q, IDX_Q_STRIDE, IDX_WEIGHTS, IDX_WEIGHTS_STRIDE, IDX_HEADS, IDX_GROUPS, IDX_DIM, IDX_KEYS, IDX_PAGES, IDX_EVERY,
 IDX_BLOCK, IDX_BUDGET, IDX_LOCAL, IDX_CLIPPED, IDX_OF_ENTRIES, IDX_START, IDX_SCORES, IDX_GROUP_BYTES, IDX_CHOSEN,
 IDX_CHOSEN_STRIDE, IDX_CHOSEN_GROUP) = _fields(21)  # fmt: skip

# Attention to what is chosen, of the rows from the position START on. CHOSEN_GROUP: bytes between what is chosen for
# neighbouring heads of keys and values. With entries, single positions are seen as far as WINDOW.
(SPA_Q, SPA_Q_STRIDE, SPA_OUT, SPA_OUT_STRIDE, SPA_HEADS, SPA_KV_HEADS, SPA_DIM_K, SPA_DIM_V, SPA_K_OFFSET,
 SPA_V_OFFSET, SPA_K_HEAD_BYTES, SPA_V_HEAD_BYTES, SPA_GROUP, SPA_SCALE, SPA_SINKS, SPA_CHOSEN, SPA_CHOSEN_STRIDE,
 SPA_CHOSEN_GROUP, SPA_START, SPA_WINDOW, SPA_ENTRIES_GROUP, SPA_ENTRIES_OFFSET) = _fields(22)  # fmt: skip

# A pool: PLACES is float32, `every` rows of ROW_BYTES; X_OFFSET and SCORES_OFFSET say where in a page its rows lie, of
# ROW_BYTES each.
(POOL_Y, POOL_Y_STRIDE, POOL_WIDTH, POOL_EVERY, POOL_OVERLAP, POOL_PLACES, POOL_X_OFFSET, POOL_SCORES_OFFSET,
 POOL_ROW_BYTES, POOL_GROUP) = _fields(10)  # fmt: skip

# CHANCES takes two float32 for each expert. GATING is a place in `GATINGS`. BY_TOKEN is 0 or int32
# [vocabulary, used]. SELECTION is 0 or a float32 for each; SCALES and BIASES are 0, or a float32
# and a float32 row for each.
(MOE_LOGITS, MOE_LOGITS_STRIDE, MOE_EXPERTS, MOE_USED, MOE_NORMALIZE, MOE_GATING, MOE_SCALE, MOE_SLOTS, MOE_WEIGHTS,
 MOE_CHANCES, MOE_COUNTS, MOE_RANGES, MOE_N_SLOTS, MOE_X, MOE_X_STRIDE, MOE_Y, MOE_Y_STRIDE, MOE_WIDTH, MOE_SELECTION,
 MOE_GROUPS, MOE_GROUPS_USED, MOE_SCALES, MOE_BIASES, MOE_TOGETHER, MOE_BY_TOKEN) = _fields(25)  # fmt: skip
# How logits become probabilities.
GATINGS = ("softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen", "sigmoid_of_chosen")
SOFTMAX, SIGMOID, SQRT_SOFTPLUS, SOFTMAX_OF_CHOSEN, SIGMOID_OF_CHOSEN = range(5)

# A matrix for each head: x has HEAD_DIM floats a head, of which WIDTH from START on are taken.
(HEADS_X, HEADS_X_STRIDE, HEADS_Y, HEADS_Y_STRIDE, HEADS_COUNT, HEADS_DIM, HEADS_START, HEADS_WIDTH,
 HEADS_RANGES) = _fields(9)  # fmt: skip

# A convolution: WEIGHT is float32 [taps, width], BIAS a row or 0; STATE is where in a block its rows lie.
(CONV_X, CONV_X_STRIDE, CONV_Y, CONV_Y_STRIDE, CONV_WIDTH, CONV_TAPS, CONV_WEIGHT, CONV_BIAS,
 CONV_STATE) = _fields(9)  # fmt: skip

# Linear attention. Neighbouring heads share one of KEY_HEADS heads of q and k, or with TILED every KEY_HEADS-th does.
# DECAY has a value for each head, or for each of its DIM_K dimensions; all rows have the same if its stride is 0.
(LIN_Q, LIN_Q_STRIDE, LIN_K, LIN_K_STRIDE, LIN_V, LIN_V_STRIDE, LIN_DECAY, LIN_DECAY_STRIDE, LIN_BETA, LIN_BETA_STRIDE,
 LIN_OUT, LIN_OUT_STRIDE, LIN_HEADS, LIN_KEY_HEADS, LIN_TILED, LIN_DIM_K, LIN_DIM_V, LIN_SCALE, LIN_STATE,
 LIN_HEAD_BYTES) = _fields(20)  # fmt: skip

# A selective scan: FADING is float32 [groups of SCAN_CHANNELS channels, DIM, channels], KEPT a row of whole groups.
SCAN_CHANNELS = 16
(SCAN_X, SCAN_X_STRIDE, SCAN_TIME, SCAN_TIME_STRIDE, SCAN_B, SCAN_B_STRIDE, SCAN_C, SCAN_C_STRIDE, SCAN_OUT,
 SCAN_OUT_STRIDE, SCAN_WIDTH, SCAN_DIM, SCAN_FADING, SCAN_KEPT, SCAN_STATE) = _fields(15)  # fmt: skip

# The memory of RWKV: WIDTH is that of all heads. A and B are 0 where there are none.
(WKV_R, WKV_R_STRIDE, WKV_KEPT, WKV_KEPT_STRIDE, WKV_K, WKV_K_STRIDE, WKV_V, WKV_V_STRIDE, WKV_A, WKV_A_STRIDE, WKV_B,
 WKV_B_STRIDE, WKV_OUT, WKV_OUT_STRIDE, WKV_WIDTH, WKV_DIM, WKV_STATE) = _fields(17)  # fmt: skip

# Changes by adapters: see kernels.lora. RANKS: inner numbers of a row, of all adapters together.
(LORA_X, LORA_X_STRIDE, LORA_WIDTH, LORA_INNER, LORA_INNER_STRIDE, LORA_RANKS, LORA_OUT, LORA_OUT_STRIDE,
 LORA_OUT_WIDTH, LORA_ADAPTERS, LORA_STARTS, LORA_ENTRIES, LORA_IN_HEAD) = _fields(13)  # fmt: skip
LORA_A, LORA_B, LORA_RANK, LORA_OFFSET, LORA_FACTOR = range(0, 40, 8)
LORA_ADAPTER_BYTES = 40

# Observing: x is float32 rows, or with BY_SLOT slots; SUMS takes float32 [experts, width], COUNTS int64 [experts].
(OBS_X, OBS_X_STRIDE, OBS_WIDTH, OBS_SUMS, OBS_COUNTS, OBS_SLOTS, OBS_RANGES, OBS_USED, OBS_BY_SLOT) = _fields(9)

# Quantising: blocks of floats to bytes. SOURCE_TYPE is F32, F16 or BF16, as GGUF numbers them. IMPORTANCE is 0 or the
# address of one float32 row that all rows share; SUMS takes float32 [4, lanes] (`STATS` in kernels.quantize_fit);
# TRIALS holds pairs of float32: see formats.blocks.fitting. LEVELS and CANDIDATES are tables of formats.blocks.grids.
(Q_SOURCE, Q_SOURCE_TYPE, Q_BLOCKS, Q_IMPORTANCE, Q_ROW_BLOCKS, Q_OUT, Q_SUMS, Q_TRIALS, Q_N_TRIALS, Q_REFINEMENTS,
 Q_ROUNDS, Q_LEVELS, Q_CANDIDATES, Q_BY_SIZE) = _fields(14)  # fmt: skip

# Rounding columns one by one: see kernels.spread.
(SPREAD_X, SPREAD_WEIGHTS, SPREAD_TILES, SPREAD_SCALES, SPREAD_MINIMUMS, SPREAD_CODES, SPREAD_FACTOR) = _fields(7)

# Second moments: see kernels.moments. A block of sums has MOM_BLOCK columns, a step so many rows.
MOM_BLOCK, MOM_ROWS = 32, 32
(MOM_X, MOM_X_STRIDE, MOM_STEPS, MOM_FIRST, MOM_LAST, MOM_PACKED, MOM_TURNED, MOM_SUMS) = _fields(8)

# The highest of logits: of each group as many as PEAKS, of those numbers that are so many apart. Rows of Y have no gap.
PEAKS, PEAK_GROUP = 16, 1024
PEAKS_X, PEAKS_X_STRIDE, PEAKS_Y, PEAKS_GROUPS = _fields(4)

# For measuring memory: blocks of READ_BLOCK bytes are read; sums go to a place of 64 bytes for each part.
READ_BLOCK = 1024
READ_ADDRESS, READ_BLOCKS, READ_OUT = _fields(3)
