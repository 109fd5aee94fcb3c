"""Running a program: phase after phase, on as many threads as have a core. A phase is the operations up to a barrier.

Threads are members of a step while they work on it. Others that come along join, and one that is about to lose its core
leaves, in the middle of a phase if need be: nobody waits for a thread that is not running. That needs no plan of who
does what: an operation's work is handed out in chunks by a counter, or in parts, so that a member finds whatever has
not been taken. The shared record that all threads see is laid out in `kernels.records`, like the program's records.

STATE is one word: PHASE times the number of phases so far, MEMBER times the number of members, and how many of these
have arrived at the barrier. The last one opens the next phase. Without members, no step is under way.

Those that wait look at OPENED, the number of the newest phase, so that those that arrive have STATE to themselves. That
is a hint: a thread that has left may write it late, after newer ones. Only STATE is sure.
"""

from qrun.engine.kernels.records import (
    ALONE,
    ASLEEP,
    CLOCK,
    CLOCK_ID,
    CLOSING,
    DEADLINE,
    IN_PARTS_BY_ROWS,
    IN_VAIN,
    LATE,
    N_OPERATIONS,
    OP_BARRIER,
    OP_COUNTER,
    OP_IN_PARTS,
    OP_KERNEL,
    OPENED,
    PHASE_BEGIN,
    PROGRAM,
    RECORD_BYTES,
    STATE,
    STEP,
    STEP_PARTS,
    STEP_TEAM,
    THREAD,
    THREAD_BYTES,
    TIME,
    YIELD,
)
from qrun.engine.simd.operations import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_replace,
    call_kernel,
    call_plain,
    helper,
    load_i64,
    pause,
    store_i64,
)

MEMBER, PHASE = 1 << 12, 1 << 24

SPINS_BEFORE_YIELD = 2000
# A thread that waits for a step sleeps after this time. Spins say little of time: where another program wants the core,
# each yield takes as long as that is given. Where there is no clock they have to do.
NANOSECONDS_BEFORE_SLEEP = 5_000_000
SPINS_BETWEEN_LOOKS = 64
SPINS_BEFORE_SLEEP = 4000

# A thread whose core another program wants too gets it for 4 ms and then loses it for 4 ms (Linux at 250 ticks a
# second; measured), often with a chunk in hand for which all others wait. So after a delay of that kind it gives the
# core away by itself, in time and between chunks: every 2 ms, for as long as somebody takes it.
NANOSECONDS_AT_A_TIME = 2_000_000
NANOSECONDS_OF_A_PAUSE = 50_000  # a yield that takes no longer has met nobody
NANOSECONDS_BEFORE_ANOTHER, MOST_IN_VAIN = 500_000, 20


@helper
def members_in(state):  # type: ignore[no-untyped-def]
    return state // MEMBER % (PHASE // MEMBER)


@helper
def record_of(shared, thread):  # type: ignore[no-untyped-def]
    return shared + THREAD + thread * THREAD_BYTES


@helper
def now(shared, thread):  # type: ignore[no-untyped-def]
    """Nanoseconds."""
    place = record_of(shared, thread) + TIME
    call_kernel(load_i64(shared + CLOCK), load_i64(shared + CLOCK_ID), place, thread)
    return load_i64(place) * 1_000_000_000 + load_i64(place + 8)


@helper
def time_is_up(shared, thread):  # type: ignore[no-untyped-def]
    """Whether this thread had better take no more work now: another program wants its core."""
    deadline = load_i64(record_of(shared, thread) + DEADLINE)
    return deadline != 0 and now(shared, thread) >= deadline


@helper
def more_wanted(step, thread):  # type: ignore[no-untyped-def]
    """Whether a kernel should take another chunk. Where it should not, the thread steps aside and comes back for it."""
    shared = load_i64(step + STEP_TEAM)
    return shared == 0 or not time_is_up(shared, thread)


@helper
def claim(op, count):  # type: ignore[no-untyped-def]
    """The number of a chunk, of `count`, that nobody has taken; at least `count` where all are.

    To look is cheap, for all threads at once; to add is for one after the other.
    """
    counter = load_i64(op + OP_COUNTER)
    if atomic_load(counter) >= count:
        return count
    return atomic_add(counter, 1)


@helper
def join(shared):  # type: ignore[no-untyped-def]
    """Become a member. Returns the operation with which the phase begins, or 0 if no step is under way."""
    yield_address = load_i64(shared + YIELD)
    spins = 0
    while True:
        state = atomic_load(shared + STATE)
        members = members_in(state)
        if members == 0:
            return 0
        if state % MEMBER < members:  # else the next phase is about to begin
            op = load_i64(shared + PHASE_BEGIN)
            if atomic_replace(shared + STATE, state, state + MEMBER):
                return op
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            call_plain(yield_address)


@helper
def run_phase(op, step, thread):  # type: ignore[no-untyped-def]
    """Do what there is to do of the phase that begins with `op`. Returns the address of its last operation."""
    while True:
        if load_i64(op + OP_IN_PARTS) != 0:
            # All such operations in a row for one part, then for another: so they need no barrier between them.
            parts = load_i64(step + STEP_PARTS)
            last = op
            while load_i64(last + OP_BARRIER) == 0 and load_i64(last + RECORD_BYTES + OP_IN_PARTS) != 0:
                last += RECORD_BYTES
            part = claim(op, parts)
            while part < parts:
                for each in range(op, last + RECORD_BYTES, RECORD_BYTES):
                    call_kernel(load_i64(each + OP_KERNEL), each, step, part)
                part = claim(op, parts)
            op = last
        else:
            call_kernel(load_i64(op + OP_KERNEL), op, step, thread)
        if load_i64(op + OP_BARRIER) != 0:
            return op
        op += RECORD_BYTES


@helper
def next_to(shared, last):  # type: ignore[no-untyped-def]
    """The operation behind `last`, or 0 if that is the program's last."""
    end = load_i64(shared + PROGRAM) + load_i64(shared + N_OPERATIONS) * RECORD_BYTES
    return last + RECORD_BYTES if last + RECORD_BYTES < end else 0


@helper
def behind_rows(shared, op):  # type: ignore[no-untyped-def]
    """The first operation, from `op` on, that begins a phase for all threads, or 0. In a step of few rows, the phases
    that would keep one thread busy are done by the last one at the barrier: to meet twice takes longer."""
    alone = load_i64(shared + ALONE) != 0
    while alone and op != 0 and load_i64(op + OP_IN_PARTS) == IN_PARTS_BY_ROWS:
        while load_i64(op + OP_BARRIER) == 0:
            op += RECORD_BYTES
        op = next_to(shared, op)
    return op


@helper
def open_next(shared, state, following, after, thread):  # type: ignore[no-untyped-def]
    """All members have arrived: do what is for one thread, from the operation `following` on, and let them go on with
    `after`, or end the step if that is 0."""
    arrived = state % MEMBER
    while following != after:
        following = next_to(shared, run_phase(following, load_i64(shared + ALONE), thread))
    if after != 0:
        store_i64(shared + PHASE_BEGIN, after)
        atomic_add(shared + STATE, PHASE - arrived)
    else:
        atomic_add(shared + STATE, PHASE - arrived - arrived * MEMBER)
    atomic_exchange(shared + OPENED, state // PHASE + 1)


@helper
def step_aside(shared, op, following, after, thread):  # type: ignore[no-untyped-def]
    """Leave in the middle of the phase that begins with `op`, give the core away, join again; returns what `join` does.

    What this thread has taken it has done. The only member stays one.
    """
    yield_address = load_i64(shared + YIELD)
    while True:
        state = atomic_load(shared + STATE)
        members = members_in(state)
        if members == 1:
            call_plain(yield_address)
            return op
        if atomic_replace(shared + STATE, state, state - MEMBER):
            if state % MEMBER == members - 1:
                open_next(shared, state - MEMBER, following, after, thread)
            call_plain(yield_address)
            return join(shared)


@helper
def meet(shared, following, after, thread):  # type: ignore[no-untyped-def]
    """Wait until all members have arrived. Returns `after`, with which to go on; 0 if the step is over.

    After a long wait: leave, give the core away, and return -1. The next phase may begin before it comes back.
    """
    state = atomic_add(shared + STATE, 1) + 1
    phase = state // PHASE
    if state % MEMBER == members_in(state):
        open_next(shared, state, following, after, thread)
        return after
    yield_address = load_i64(shared + YIELD)
    spins = 0
    while atomic_load(shared + OPENED) != phase + 1:
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            state = atomic_load(shared + STATE)
            if state // PHASE != phase:
                break
            store_i64(shared + LATE, 1)
            closed = state % MEMBER < members_in(state)
            if closed and atomic_replace(shared + STATE, state, state - MEMBER - 1):
                call_plain(yield_address)
                return -1
            if not closed:  # the last one is opening the next phase, and may need this core for it
                call_plain(yield_address)
    return after


@helper
def run_step(shared, thread):  # type: ignore[no-untyped-def]
    """Take part in the step that is under way, as thread number `thread`, until it is over."""
    own = record_of(shared, thread)
    op = load_i64(shared + PHASE_BEGIN) if thread == 0 else join(shared)
    fresh = True  # has not been here since the phase began
    while op != 0:
        last = run_phase(op, load_i64(shared + STEP), thread)
        following = next_to(shared, last)
        after = behind_rows(shared, following)
        if time_is_up(shared, thread):
            start = now(shared, thread)
            op = step_aside(shared, op, following, after, thread)
            fresh = True
            back = now(shared, thread)
            if back - start > NANOSECONDS_OF_A_PAUSE:
                store_i64(own + DEADLINE, back + NANOSECONDS_AT_A_TIME)
                store_i64(own + IN_VAIN, 0)
            elif load_i64(own + IN_VAIN) < MOST_IN_VAIN:
                # The system may think that this thread has been short of time: it will not be so for long.
                store_i64(own + DEADLINE, back + NANOSECONDS_BEFORE_ANOTHER)
                store_i64(own + IN_VAIN, load_i64(own + IN_VAIN) + 1)
            else:
                store_i64(own + DEADLINE, 0)
        else:
            if load_i64(shared + LATE) != 0 and load_i64(shared + CLOCK) != 0 and not fresh:
                # Somebody has waited long for this thread: it may not have been running.
                store_i64(shared + LATE, 0)
                store_i64(own + DEADLINE, now(shared, thread) + NANOSECONDS_AT_A_TIME)
                store_i64(own + IN_VAIN, 0)
            op = meet(shared, following, after, thread)
            fresh = op < 0
            if fresh:
                op = join(shared)


def lead(shared, _step, thread):  # type: ignore[no-untyped-def]
    """Begin a step, as thread 0, and see it through. One call, so that nothing of Python's comes between: with its
    caller gone, a step would go on for ever.

    The counters are reset, and the step begins with the caller as its only member.
    """
    program = load_i64(shared + PROGRAM)
    counters = load_i64(program + OP_COUNTER)
    for i in range(load_i64(shared + N_OPERATIONS)):
        store_i64(counters + 8 * i, 0)
    store_i64(shared + PHASE_BEGIN, program)
    atomic_add(shared + STATE, MEMBER)
    run_step(shared, thread)


def serve(shared, _step, thread):  # type: ignore[no-untyped-def]
    """Take part in steps as they come; return (to sleep) when none has come for a while."""
    yield_address = load_i64(shared + YIELD)
    has_clock = load_i64(shared + CLOCK) != 0
    asleep = record_of(shared, thread) + ASLEEP
    while True:
        spins = 0
        since = now(shared, thread) if has_clock else 0
        while members_in(atomic_load(shared + STATE)) == 0:
            if load_i64(shared + CLOSING) != 0:
                return
            pause()
            spins += 1
            yielding = spins > SPINS_BEFORE_YIELD
            if yielding:
                call_plain(yield_address)
            if has_clock:
                look = yielding or spins % SPINS_BETWEEN_LOOKS == 0
                tired = look and now(shared, thread) - since > NANOSECONDS_BEFORE_SLEEP
            else:
                tired = spins > SPINS_BEFORE_SLEEP
            if tired:
                # Say so first, look once more after: a step that begins in between is seen by one side or the other.
                atomic_exchange(asleep, 1)
                if members_in(atomic_load(shared + STATE)) == 0:
                    return
                if atomic_exchange(asleep, 0) == 0:
                    return  # the wake-up is already on its way
                spins = 0
                since = now(shared, thread) if has_clock else 0
        run_step(shared, thread)
