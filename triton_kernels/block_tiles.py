"""How the groups of a tile lie in memory, and in blocks, when values are compressed.

A thread holds ``C.run`` groups in a row, so that a block is in as few threads as can be and what is done once a
block is done seldom. The price is that a load of a warp touches four times the lines of memory that it needs; the loads
after it find the rest of them in the cache.

Group m of a tile of N is the group ``numbers(N, C)[m]`` of its memory: the groups that a thread holds lie N / run apart in
the tile. A tensor [BLOCKS] has the blocks of a tile in an order that goes with this.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005
# (Triton knows no Python types, and no stars in tuples)

import triton
import triton.language as tl


@triton.constexpr_function
def run(N, C) -> int:
    """Groups in a row that one thread holds."""
    return int(min(C.run, N))


@triton.constexpr_function
def _shape(N, C) -> tuple[int, int, int, int]:
    """Blocks in a run, groups in one of these, parts of a tile, threads that share a block."""
    groups, length = C.block // 8, run(N, C)
    inside = min(groups, length)
    return (length // inside, inside, N // length // (groups // inside), groups // inside)


@triton.jit
def numbers(N: tl.constexpr, C: tl.constexpr):
    """The place in memory of each group [N] of a tile."""
    RUN: tl.constexpr = run(N, C)
    group = tl.arange(0, N)
    return (group % (N // RUN)) * RUN + group // (N // RUN)


@triton.jit
def places(N: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """The place in memory of each part [N * SIZE] of a tile whose groups are SIZE such parts."""
    RUN: tl.constexpr = run(N, C)
    part = tl.arange(0, N * SIZE)
    group = part // SIZE
    return (group % (N // RUN)) * (RUN * SIZE) + (group // (N // RUN)) * SIZE + part % SIZE


@triton.jit
def rows(N: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """The places in memory of the parts of a tile, SIZE of them a group, a run a row: [N // run, run * SIZE]."""
    RUN: tl.constexpr = run(N, C)
    return tl.arange(0, N // RUN).expand_dims(1) * (RUN * SIZE) + tl.arange(0, RUN * SIZE).expand_dims(0)


@triton.jit
def as_rows(parts, C: tl.constexpr):
    """The parts of the groups of a tile, [N] or [N, SIZE], in that order."""
    N: tl.constexpr = parts.shape[0]
    RUN: tl.constexpr = run(N, C)
    SIZE: tl.constexpr = parts.numel // N
    of_runs = tl.permute(tl.reshape(parts, [RUN, N // RUN, SIZE]), [1, 0, 2])
    return tl.reshape(of_runs, [N // RUN, RUN * SIZE])


@triton.jit
def by_thread(values, C: tl.constexpr):
    """``values`` [N, 4] as [blocks in a run, values of a thread and block, parts of the tile, threads of a block]."""
    SHAPE: tl.constexpr = _shape(values.shape[0], C)
    inside = tl.reshape(values, [SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3], 4])
    return tl.reshape(tl.permute(inside, [0, 1, 4, 2, 3]), [SHAPE[0], SHAPE[1] * 4, SHAPE[2], SHAPE[3]])


@triton.jit
def of_threads(values):
    """The greatest [BLOCKS] of each block's ``values``, one a thread and block, of the shape above."""
    return tl.reshape(tl.max(values, axis=3), [values.shape[0] * values.shape[2]])


@triton.jit
def largest(values, C: tl.constexpr):
    """The greatest [BLOCKS] of each block's ``values`` [N, 4]."""
    values = tl.max(by_thread(values, C), axis=1)
    return of_threads(values.expand_dims(1))


@triton.jit
def sums(values, C: tl.constexpr):
    """The sum [BLOCKS] of each block's ``values`` [N, 4]."""
    values = tl.sum(tl.sum(by_thread(values, C), axis=3), axis=1)
    return tl.reshape(values, [values.numel])


@triton.constexpr_function
def blocks_in_run(N, C) -> int:
    """Blocks that end in a run, at least 1; and no block is in two threads if it is more."""
    return int(_shape(N, C)[0])


@triton.constexpr_function
def groups_of_run(N, C) -> int:
    """Groups of one block in a run."""
    return int(_shape(N, C)[1])


@triton.jit
def one_by_one(values):
    """A tuple of the rows [R] of ``values`` [1, 2 or 4, R]."""
    if values.shape[0] == 1:
        return (tl.reshape(values, [values.shape[1]]),)
    elif values.shape[0] == 2:
        return tl.split(tl.permute(values, [1, 0]))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(values, [2, 2, values.shape[1]]), [2, 0, 1]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def together(rows):
    """[R, 1, 2 or 4] of as many tensors [R]: the inverse, but for the order of dimensions."""
    if len(rows) == 1:
        return tl.reshape(rows[0], [rows[0].shape[0], 1])
    elif len(rows) == 2:
        return tl.join(rows[0], rows[1])
    else:
        both = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
        return tl.reshape(both, [rows[0].shape[0], 4])


@triton.jit
def groups_in_turn(values, C: tl.constexpr):
    """The values of a tile [N, 4] by the groups of a run, each a tuple of four tensors [N // run]."""
    N: tl.constexpr = values.shape[0]
    RUN: tl.constexpr = run(N, C)
    parts = one_by_one(tl.reshape(values, [RUN, N // RUN * 4]))
    groups = ()
    for i in tl.static_range(RUN):
        groups = groups + (one_by_one(tl.trans(tl.reshape(parts[i], [N // RUN, 4]))),)
    return groups


@triton.jit
def for_runs(values, N: tl.constexpr, C: tl.constexpr):
    """What ``values`` [BLOCKS] have for each value of a run, in the order of ``groups_in_turn``."""
    return groups_in_turn(tl.broadcast_to(for_groups(values, N, C).expand_dims(1), [N, 4]), C)


@triton.jit
def sums_of_runs(totals, N: tl.constexpr, C: tl.constexpr):
    """The sum [BLOCKS] (int32) of what each block's threads have, a tuple as above, of whole numbers."""
    SHAPE: tl.constexpr = _shape(N, C)
    each = tl.trans(together(totals)).to(tl.int32)
    return tl.reshape(tl.sum(tl.reshape(each, [SHAPE[0], SHAPE[2], SHAPE[3]]), axis=2), [SHAPE[0] * SHAPE[2]])


@triton.jit
def for_groups(values, N: tl.constexpr, C: tl.constexpr):
    """For each group [N] what ``values`` [BLOCKS] have for its block."""
    SHAPE: tl.constexpr = _shape(N, C)
    return tl.reshape(tl.broadcast_to(tl.reshape(values, [SHAPE[0], 1, SHAPE[2], 1]), SHAPE), [N])


@triton.jit
def store(pointers, values, keep, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=keep)


@triton.jit
def store_for_blocks(
    pointer, values, rest, N: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr, APART: tl.constexpr = 1
):
    """Store ``values`` [BLOCKS], so far APART, at ``pointer`` in the order of the blocks.

    The last of them may hold but ``rest`` values.
    """
    SHAPE: tl.constexpr = _shape(N, C)
    if SHAPE[0] > 1 and APART > 1:  # one by one, so that every thread stores its own
        values = one_by_one(tl.reshape(values, [SHAPE[0], SHAPE[2]]))
        for i in tl.static_range(len(values)):
            block = tl.arange(0, SHAPE[2]) * SHAPE[0] + i
            store(pointer + block * APART, values[i], block * C.block < rest, FULL)
    elif SHAPE[0] > 1:
        block = tl.arange(0, SHAPE[2]).expand_dims(1) * SHAPE[0] + tl.arange(0, SHAPE[0]).expand_dims(0)
        store(pointer + block, tl.trans(tl.reshape(values, [SHAPE[0], SHAPE[2]])), block * C.block < rest, FULL)
    else:
        thread = tl.max_contiguous(tl.arange(0, SHAPE[2] * SHAPE[3]), 1)
        block = thread // SHAPE[3]
        values = tl.reshape(tl.broadcast_to(values.expand_dims(1), [SHAPE[2], SHAPE[3]]), [SHAPE[2] * SHAPE[3]])
        keep = block * C.block < rest
        if SHAPE[3] > 1:  # by the first of the threads
            first = thread % SHAPE[3] == 0
            tl.store(pointer + block * APART, values, mask=first if FULL else first & keep)
        else:
            store(pointer + block * APART, values, keep, FULL)
