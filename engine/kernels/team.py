"""Running a program: operation after operation, on every thread, with a barrier where the next one needs all of it.

The shared record that all threads see is laid out in `engine.records`, like the program's records.
"""

from qrun.engine.records import (
    ARRIVED,
    ASLEEP,
    CLOSING,
    EPOCH,
    GENERATION,
    N_OPERATIONS,
    N_THREADS,
    OP_BARRIER,
    OP_COUNTER,
    OP_KERNEL,
    PROGRAM,
    RECORD_BYTES,
    STALLS,
    STEP,
    YIELD,
)
from qrun.engine.simd.operations import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    call_kernel,
    call_plain,
    helper,
    load_i64,
    pause,
    store_i64,
)

SPINS_BEFORE_YIELD = 2000
SPINS_BEFORE_SLEEP = 40000
# So long a wait at a barrier (about a millisecond) means that another program has the other thread's core.
SPINS_OF_A_STALL = 4000


def begin_step(shared, _step, _thread):  # type: ignore[no-untyped-def]
    """Announce a new step: reset the chunk counters, then let waiting threads see the next epoch, if they take part."""
    program = load_i64(shared + PROGRAM)
    for i in range(load_i64(shared + N_OPERATIONS)):
        store_i64(program + i * RECORD_BYTES + OP_COUNTER, 0)
    store_i64(shared + STALLS, 0)
    if load_i64(shared + N_THREADS) > 1:
        atomic_add(shared + EPOCH, 1)


@helper
def run_step(shared, _step, thread):  # type: ignore[no-untyped-def]
    """Run the whole program once, as thread number `thread`."""
    program = load_i64(shared + PROGRAM)
    step = load_i64(shared + STEP)
    n_threads = load_i64(shared + N_THREADS)
    yield_address = load_i64(shared + YIELD)
    for i in range(load_i64(shared + N_OPERATIONS)):
        op = program + i * RECORD_BYTES
        call_kernel(load_i64(op + OP_KERNEL), op, step, thread)
        if n_threads > 1 and load_i64(op + OP_BARRIER) != 0:
            generation = atomic_load(shared + GENERATION)
            if atomic_add(shared + ARRIVED, 1) == n_threads - 1:
                atomic_exchange(shared + ARRIVED, 0)
                atomic_add(shared + GENERATION, 1)
            else:
                spins = 0
                while atomic_load(shared + GENERATION) == generation:
                    pause()
                    spins += 1
                    if spins > SPINS_BEFORE_YIELD:
                        call_plain(yield_address)
                if spins > SPINS_OF_A_STALL:
                    store_i64(shared + STALLS, 1)


def serve(shared, seen, thread):  # type: ignore[no-untyped-def]
    """Take part in steps as they come; return (to sleep) when none has come for a while.

    `seen` is the address of this thread's own record of the last epoch that it took part in.
    """
    yield_address = load_i64(shared + YIELD)
    while True:
        spins = 0
        while atomic_load(shared + EPOCH) == load_i64(seen):
            if load_i64(shared + CLOSING) != 0:
                return
            pause()
            spins += 1
            if spins > SPINS_BEFORE_YIELD:
                call_plain(yield_address)
            if spins > SPINS_BEFORE_SLEEP:
                # Say so first, look once more after: a step that begins in between is seen by one side or the other.
                atomic_exchange(shared + ASLEEP + 8 * thread, 1)
                if atomic_load(shared + EPOCH) == load_i64(seen):
                    return
                if atomic_exchange(shared + ASLEEP + 8 * thread, 0) == 0:
                    return  # the wake-up is already on its way
                spins = 0
        store_i64(seen, load_i64(seen) + 1)
        run_step(shared, 0, thread)
