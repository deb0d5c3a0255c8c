"""Filtered normalization for GPUs, in Triton; :mod:`fbn_plugin.ops.triton` plans and launches what is here.

Three launches forward, :func:`measure` (band edges), :func:`measure_kept` (moments, running statistics) and
:func:`normalize`; two backward, :func:`measure_gradient` and :func:`input_gradient`.

A *unit* is one channel of the batch form, or one channel of one sample of the group form; a *set* shares a mean and is
one unit of the batch form, or the ``set_units`` units of a group. Units are numbered so that those of a set are
neighbours. A *tile* is what one program reads: ``STEPS * A`` rows of ``B`` columns, columns being neighbours in memory.
What lies along its axes, and so which of them a statistic is summed over (``REDUCED``), depends on layout and form:

=========================  =====================  ==================  =================  =======
layout, form               block                  rows (axis 0)       columns (axis 1)   REDUCED
=========================  =====================  ==================  =================  =======
contiguous, batch          a channel              samples             positions          2, both
contiguous, group          a group of a sample    channels            positions          1
channels-last, either      all, or a sample       positions           channels           0
=========================  =====================  ==================  =================  =======

**Sums.** A tile leaves what it has summed in *slots*: one for each of its units (its lanes), or, where all of a tile
belongs to one set and the set is all that matters, one. ``slots`` are laid out ``(blocks, entries, width)``: the
``entries`` tiles that a block's units are cut into, and the ``width`` lanes of a block. The programs whose slots make
up the same sets are a *family*. Each counts its arrival in a counter of the family, and who finds that it is the last
adds up all slots, in double and in an order that does not depend on who that is: results repeat bit for bit. No program
waits for another, hence none can wait in vain. Slots of large families are added up in two stages, ``CHUNK`` tiles at a
time and then the chunks, so that none adds up many thousand. (Had each program of the next launch added up its own
sets' slots, as could be done without counters, tiles of channels-last tensors with few channels would read more slots
than values.) The last to arrive leaves the counter at zero, as it found it.

**Accuracy.** A tile's values are in registers, so that its own mean comes first and the squares are taken around that;
tiles are put together by means and deviations, as Chan, Golub and LeVeque do ("Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances", 1979). No value of the input has to be near the mean for that, as a shift
for all tiles would have to be. A mean in a slot is two float32, its rounding and the rest.

**Arguments.** Pointers have their shape beside them; ``C`` is ``channels``, and slots, chunks, units and sets are those
of above. All else are whole numbers, or compile-time constants in capitals, which mean the same in every launch:

==============================  ========================================================================================
``rows, cols``                  of a block
``tiles_a, tiles_b``            tiles of a block along its rows and along its columns; the grid is ``(blocks * tiles_a *
                                tiles_b,)``
``block_stride, row_stride``    values from a block to the next, and from a row to the next; columns have stride 1
``set_units``                   units of a set: 1 in the batch form, ``C / num_groups`` in the group form
``samples``                     N in the group form, 1 in the batch form
``A, B, STEPS``                 a tile, as above; A and B are powers of two
``REDUCED``                     the axes that sums go along, as above
``VECTOR``                      values that a thread reads at once: ``cols`` and both strides are multiples of it
``JOINT``                       whether a set is made of several lanes' slots
``CHUNK``                       tiles of a chunk; 0 adds up in one stage
``CHUNK_ENTRIES``               entries that the last program of a chunk holds at a time
``ENTRIES, LANES``              entries, and lanes of each, that the last program of a family holds at a time
``SET_ENTRIES, SETS``           units, and sets, that it holds at a time when units become sets
==============================  ========================================================================================

``kappa`` is the variance of a unit normal that is cut off at t_sigma, or 1; ``momentum`` is a number, or None for the
average of all batches.
"""

import triton
import triton.language as tl

# Sizes that the kernels are not compiled anew for; VECTOR tells what matters of them.
_sizes = ["rows", "cols", "tiles_a", "tiles_b", "block_stride", "row_stride", "channels", "set_units", "samples"]


@triton.jit
def _place(tiles_a, tiles_b):
    """This program's block, and the place of its tile in it along both axes."""
    program = tl.program_id(0)  # divided in 32 bits, which is many times faster
    row = program // tiles_b
    return (row // tiles_a).to(tl.int64), (row % tiles_a).to(tl.int64), (program % tiles_b).to(tl.int64)


@triton.jit
def _blocks(tiles_a, tiles_b):
    return (tl.num_programs(0) // tiles_b // tiles_a).to(tl.int64)


@triton.jit
def _aligned(cols, block_stride, row_stride, VECTOR: tl.constexpr):
    """Tells the compiler that these are multiples of ``VECTOR``: so many neighbours are read at a time."""
    return cols // VECTOR * VECTOR, block_stride // VECTOR * VECTOR, row_stride // VECTOR * VECTOR


@triton.jit
def _values(
    block,
    ia,
    ib,
    step,
    rows,
    cols,
    block_stride,
    row_stride,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Offsets of a step's values, (A, B), and which of them exist. In 64 bits: a tensor may pass 2^31 values."""
    a = (ia * STEPS + step) * A + tl.arange(0, A)[:, None]
    b = ib * B + tl.arange(0, B)[None, :]
    return block * block_stride + a * row_stride + b, (a < rows) & (b < cols)


@triton.jit
def _lanes(
    block,
    ia,
    ib,
    rows,
    cols,
    tiles_a,
    tiles_b,
    channels,
    set_units,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """The tile's lanes in its block, (B,), (A,) or (1,), their sets and channels, and which of them exist;
    :func:`_spread` lays them along the values."""
    if REDUCED == 0:  # of a sample, or of all
        lane = ib * B + tl.arange(0, B)
        exists = lane < cols
        s = block * (cols // set_units) + lane.to(tl.int32) // set_units
        channel = lane
    elif REDUCED == 1:  # of a group, which is a set
        lane = ia * A + tl.arange(0, A)
        exists = lane < rows
        s = tl.zeros_like(lane) + block
        channel = block % (channels // set_units) * set_units + lane
    else:  # a channel, which is a set
        lane = tl.zeros([1], tl.int64)
        exists = lane == 0
        s, channel = lane + block, lane + block
    return lane, s, channel, exists


@triton.jit
def _spread(v, REDUCED: tl.constexpr):
    """One number a lane, to broadcast against the values."""
    if REDUCED == 1:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def _sum(v, REDUCED: tl.constexpr):
    """Sums of a tile, one a lane."""
    if REDUCED == 2:
        return tl.zeros([1], v.dtype) + tl.sum(tl.sum(v, 1), 0)
    else:
        return tl.sum(v, REDUCED)


@triton.jit
def _min(v, REDUCED: tl.constexpr):
    if REDUCED == 2:
        return tl.zeros([1], v.dtype) + tl.min(tl.min(v, 1), 0)
    else:
        return tl.min(v, REDUCED)


@triton.jit
def _lanes_of_sums(ia, ib, rows, cols, tiles_a, tiles_b, REDUCED: tl.constexpr):
    """Where a tile's sums go: its entry and the number of entries, the lanes of a block, and which of how many tiles
    next to each other across the lanes it is."""
    if REDUCED == 0:
        entry, entries, width, across, of = ia, tiles_a, cols, ib, tiles_b
    elif REDUCED == 1:
        entry, entries, width, across, of = ib, tiles_b, rows, ia, tiles_a
    else:
        entry, entries, width, across, of = (
            ia * tiles_b + ib,
            tiles_a * tiles_b,
            tiles_a * 0 + 1,
            ib * 0,
            tiles_a * 0 + 1,
        )
    return entry, entries, width, across, of


# --- arrival ----------------------------------------------------------------------------------------------------------


@triton.jit
def _is_last(
    counter_ptr,  # (), int32
    arrivals,
):
    """Whether this is the last of so many programs to come here; then it sees what all of them have stored."""
    tl.debug_barrier()  # every thread has stored before one of them says so
    last = arrivals == 1
    if arrivals > 1:
        last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == arrivals - 1
        if last:
            tl.store(counter_ptr, 0)  # for the next launch
    return last


@triton.jit
def _family(block, across, of, entries, chunks, JOINT: tl.constexpr):
    """A program's family, and how many entries or chunks arrive there. Counters of families are followed by those of
    chunks. ``JOINT`` families are a block; otherwise the tiles across a block's lanes are families of their own."""
    if JOINT:
        return block, chunks * of
    else:
        return block * of + across, chunks


# --- moments ----------------------------------------------------------------------------------------------------------


@triton.jit
def _store_moments(
    slots_ptr,  # (4, slots)
    slots,
    slot,
    exists,
    count,
    mean,
    squares,
):
    """Count, mean (as two numbers) and sum of squared deviations, each of the shape of ``slot``, into rows 0 to 3."""
    high = mean.to(tl.float32)
    tl.store(slots_ptr + slot, count.to(tl.float32), mask=exists)
    tl.store(slots_ptr + slots + slot, high, mask=exists)
    tl.store(slots_ptr + 2 * slots + slot, (mean - high.to(tl.float64)).to(tl.float32), mask=exists)
    tl.store(slots_ptr + 3 * slots + slot, squares.to(tl.float32), mask=exists)


@triton.jit
def _add_moments(
    slots_ptr,  # (4, slots)
    slots,
    first,
    entries,
    entry_stride,
    lane_stride,
    lane,
    exists,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count, mean and sum of squared deviations of each lane, (LANES,) in double, from those of its entries, the slots
    ``first + entry * entry_stride + lane * lane_stride``."""
    count = tl.zeros([LANES], tl.float64)
    mean = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = (entry < entries)[:, None] & exists[None, :]
        slot = first + entry.to(tl.int64)[:, None] * entry_stride + (lane * lane_stride)[None, :]
        n = tl.load(slots_ptr + slot, mask=inside, other=0.0).to(tl.float64)
        m = tl.load(slots_ptr + slots + slot, mask=inside, other=0.0).to(tl.float64)
        m += tl.load(slots_ptr + 2 * slots + slot, mask=inside, other=0.0).to(tl.float64)
        q = tl.load(slots_ptr + 3 * slots + slot, mask=inside, other=0.0).to(tl.float64)
        more = tl.sum(n, 0)
        center = tl.sum(n * m, 0) / tl.maximum(more, 1.0)
        d = m - center[None, :]
        squares += tl.sum(q + n * d * d, 0)
        total = count + more
        share = more / tl.maximum(total, 1.0)
        d = center - mean
        squares += d * d * count * share
        mean += d * share
        count = total
    return count, mean, squares


@triton.jit
def _tile_moments(v, kept, REDUCED: tl.constexpr):
    """Count, mean (in double) and sum of squared deviations of a tile's kept values, one a lane."""
    count = _sum(tl.where(kept, 1.0, 0.0), REDUCED)
    some = tl.maximum(count, 1.0)
    center = _sum(tl.where(kept, v, 0.0), REDUCED) / some
    # Around that mean, which sums of large values have rounded; what it was off by comes out here.
    d = tl.where(kept, v - _spread(center, REDUCED), 0.0)
    off, squares = _sum(d, REDUCED).to(tl.float64), _sum(d * d, REDUCED).to(tl.float64)
    some = some.to(tl.float64)
    squares -= off / some * off
    return count, center.to(tl.float64) + off / some, tl.where(squares < 0, 0.0, squares)


@triton.jit
def _arrive_with_moments(
    workspace_ptr,  # (6, slots); (4, chunks)
    counters_ptr,  # (families + chunks,) int32
    block,
    entry,
    entries,
    width,
    across,
    of,
    lane,
    exists,
    blocks,
    JOINT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """True in the last program of a family, before which the chunks are added up."""
    if CHUNK == 0:
        family, arrivals = _family(block, across, of, entries, entries, JOINT)
        last = _is_last(counters_ptr + family, arrivals)
    else:
        slots, chunks = blocks * entries * width, (entries + CHUNK - 1) // CHUNK
        family, arrivals = _family(block, across, of, entries, chunks, JOINT)
        families, _ = _family(blocks, across * 0, of, entries, chunks, JOINT)
        chunk = entry // CHUNK
        tiles = tl.minimum(entries - chunk * CHUNK, CHUNK)
        last = _is_last(counters_ptr + families + (block * chunks + chunk) * of + across, tiles)
        if last:
            first = (block * entries + chunk * CHUNK) * width
            n, m, q = _add_moments(workspace_ptr, slots, first, tiles, width, 1, lane, exists, CHUNK_ENTRIES, LANES)
            slot = (block * chunks + chunk) * width + lane
            _store_moments(workspace_ptr + 6 * slots, blocks * chunks * width, slot, exists, n, m, q)
            last = _is_last(counters_ptr + family, arrivals)
    return last


@triton.jit
def _add_moments_of_units(
    slots_ptr,  # (4, slots)
    units_ptr,  # (4, units), written
    slots,
    units,
    block,
    entries,
    width,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The moments of a block's units, from those of their entries."""
    for start in range(0, width, LANES):
        unit = start + tl.arange(0, LANES).to(tl.int64)
        there = unit < width
        n, m, q = _add_moments(
            slots_ptr, slots, block * entries * width, entries, width, 1, unit, there, ENTRIES, LANES
        )
        _store_moments(units_ptr, units, block * width + unit, there, n, m, q)


@triton.jit
def _finish_moments(
    workspace_ptr,  # (6, slots); (4, chunks); (4, units)
    moments_ptr,  # (5, sets)
    running_mean_ptr,  # (C,) or None
    running_var_ptr,  # (C,) or None
    num_batches_ptr,  # () or None
    momentum,
    kappa,
    t_sigma,
    eps,
    block,
    entries,
    width,
    lane,
    exists,
    blocks,
    set_units,
    WRITES: tl.constexpr,
    JOINT: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
    SET_ENTRIES: tl.constexpr,
    SETS: tl.constexpr,
):
    """What the last program of a family does: adds up its sets, and writes what becomes of their moments."""
    slots = blocks * entries * width
    at = workspace_ptr
    if CHUNK > 0:
        at += 6 * slots
        entries = (entries + CHUNK - 1) // CHUNK
    rows = blocks * entries * width
    if JOINT:  # several lanes are a set: first the units, then the sets
        units_ptr, units = at, blocks * width
        if entries > 1:
            units_ptr += (6 if CHUNK == 0 else 4) * rows
            _add_moments_of_units(at, units_ptr, rows, units, block, entries, width, ENTRIES, LANES)
            tl.debug_barrier()
        sets = width // set_units
        for start in range(0, sets, SETS):
            s = start + tl.arange(0, SETS).to(tl.int64)
            inside = s < sets
            n, m, q = _add_moments(
                units_ptr, units, block * width, set_units, 1, set_units, s, inside, SET_ENTRIES, SETS
            )
            _write_moments(
                moments_ptr, running_mean_ptr, running_var_ptr, num_batches_ptr, momentum, kappa, t_sigma, eps,
                blocks * sets, block * sets + s, inside, n, m, q, WRITES,
            )  # fmt: skip
    else:
        n, m, q = _add_moments(at, rows, block * entries * width, entries, width, 1, lane, exists, ENTRIES, LANES)
        _write_moments(
            moments_ptr, running_mean_ptr, running_var_ptr, num_batches_ptr, momentum, kappa, t_sigma, eps,
            blocks * width, block * width + lane, exists, n, m, q, WRITES,
        )  # fmt: skip


@triton.jit
def _write_moments(
    moments_ptr,  # (5, sets)
    running_mean_ptr,  # (C,) or None
    running_var_ptr,  # (C,) or None
    num_batches_ptr,  # () or None
    momentum,
    kappa,
    t_sigma,
    eps,
    sets,
    s,
    exists,
    count,
    mean,
    squares,
    WRITES: tl.constexpr,
):
    """The rows of the moments that are known now, of the sets ``s``, and the running statistics."""
    mean = tl.where(count > 0, mean, float("nan"))
    var = squares / count
    if WRITES == "band edges":  # Eq. 2-5
        sigma = tl.sqrt(var + eps)
        # Wide enough to hold a value even where the deviation is below the rounding of the mean.
        floor = tl.where(sigma < 1.1754944e-38, 1.1754944e-38, sigma)
        width, least = t_sigma * floor, sigma + 16 * 1.1920929e-07 * (sigma + tl.abs(mean))
        width = tl.where(width > least, width, least)
        tl.store(moments_ptr + 2 * sets + s, (mean - width).to(tl.float32), mask=exists)
        tl.store(moments_ptr + 3 * sets + s, (mean + width).to(tl.float32), mask=exists)
    else:  # Eq. 6 and 7
        var = var / kappa
        tl.store(moments_ptr + s, mean.to(tl.float32), mask=exists)
        tl.store(moments_ptr + sets + s, var.to(tl.float32), mask=exists)
        tl.store(moments_ptr + 4 * sets + s, count.to(tl.float32), mask=exists)
        if running_mean_ptr is not None:
            _update(running_mean_ptr, running_var_ptr, num_batches_ptr, momentum, s, exists, mean, var, count)


@triton.jit
def _update(
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    num_batches_ptr,  # (), read where momentum is None
    momentum,
    s,
    exists,
    mean,
    var,
    count,
):
    """Moves running statistics to a mean and the unbiased variance, in double, where both are finite."""
    weight = tl.zeros_like(mean) + 1
    if momentum is not None:
        weight *= momentum
    else:
        weight /= tl.load(num_batches_ptr).to(tl.float64) + 1  # not yet counted
    unbiased = var * (count / tl.maximum(count - 1, 1.0))
    largest = 3.4028234663852886e38
    finite = exists & (tl.abs(mean) <= largest) & (tl.abs(unbiased) <= largest)
    old = tl.load(running_mean_ptr + s, mask=finite, other=0.0).to(tl.float64)
    tl.store(running_mean_ptr + s, (old + weight * (mean - old)).to(running_mean_ptr.dtype.element_ty), mask=finite)
    old = tl.load(running_var_ptr + s, mask=finite, other=0.0).to(tl.float64)
    tl.store(running_var_ptr + s, (old + weight * (unbiased - old)).to(running_var_ptr.dtype.element_ty), mask=finite)


@triton.jit
def _count_batch(num_batches_ptr):
    """In one program, of a launch in which no other reads the counter."""
    if num_batches_ptr is not None:  # noqa: SIM102, Triton 3.2 compiles both sides of an "and"
        if tl.program_id(0) == 0:
            tl.store(num_batches_ptr, tl.load(num_batches_ptr) + 1)


@triton.jit(do_not_specialize=_sizes)
def measure(
    x_ptr,  # like the input
    workspace_ptr,  # (6, slots) count, mean (2), squares, smallest, largest; (4, chunks); (4, units)
    counters_ptr,  # (families + chunks,) int32, zero
    moments_ptr,  # (5, sets): rows 2 and 3, or 0, 1 and 4, are written
    set_units,
    t_sigma,
    eps,
    rows,
    cols,
    tiles_a,
    tiles_b,
    block_stride,
    row_stride,
    WRITES: tl.constexpr,
    JOINT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_ENTRIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
    SET_ENTRIES: tl.constexpr,
    SETS: tl.constexpr,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """First pass of the moments, of all values; grid: (tiles of all blocks,)."""
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    blocks = _blocks(tiles_a, tiles_b)
    ALONG: tl.constexpr = 0 if REDUCED == 0 else 2  # a contiguous tile is of one set
    lane, _, _, exists = _lanes(block, ia, ib, rows, cols, tiles_a, tiles_b, cols, set_units, ALONG, A, B)
    entry, entries, width, across, of = _lanes_of_sums(ia, ib, rows, cols, tiles_a, tiles_b, ALONG)
    slots, slot = blocks * entries * width, (block * entries + entry) * width + lane
    offsets, inside = _values(block, ia, ib, 0, rows, cols, block_stride, row_stride, A * STEPS, B, 1)
    v = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(workspace_ptr + 4 * slots + slot, _min(tl.where(inside, v, float("inf")), ALONG), mask=exists)
    tl.store(workspace_ptr + 5 * slots + slot, -_min(tl.where(inside, -v, float("inf")), ALONG), mask=exists)
    count, mean, squares = _tile_moments(v, inside, ALONG)
    _store_moments(workspace_ptr, slots, slot, exists, count, mean, squares)
    last = _arrive_with_moments(
        workspace_ptr, counters_ptr, block, entry, entries, width, across, of, lane, exists, blocks, JOINT, CHUNK,
        CHUNK_ENTRIES, B if ALONG == 0 else 1,
    )  # fmt: skip
    if last:
        _finish_moments(
            workspace_ptr, moments_ptr, None, None, None, None, 1.0, t_sigma, eps, block, entries, width, lane, exists,
            blocks, set_units, WRITES, JOINT, CHUNK, ENTRIES, LANES, SET_ENTRIES, SETS,
        )  # fmt: skip


@triton.jit(do_not_specialize=_sizes)
def measure_kept(
    x_ptr,  # like the input
    workspace_ptr,  # what measure() has left there
    counters_ptr,  # (families + chunks,) int32, zero
    moments_ptr,  # (5, sets): rows 2 and 3 are read, 0, 1 and 4 written
    running_mean_ptr,  # (C,) or None
    running_var_ptr,  # (C,) or None
    num_batches_ptr,  # (), read where momentum is None
    momentum,
    kappa,
    set_units,
    rows,
    cols,
    tiles_a,
    tiles_b,
    block_stride,
    row_stride,
    JOINT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_ENTRIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
    SET_ENTRIES: tl.constexpr,
    SETS: tl.constexpr,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Second pass: replaces the sums of the tiles that hold a value outside of the band, and reads no other; grid:
    (tiles of all blocks,)."""
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    blocks = _blocks(tiles_a, tiles_b)
    ALONG: tl.constexpr = 0 if REDUCED == 0 else 2
    lane, s, _, exists = _lanes(block, ia, ib, rows, cols, tiles_a, tiles_b, cols, set_units, ALONG, A, B)
    entry, entries, width, across, of = _lanes_of_sums(ia, ib, rows, cols, tiles_a, tiles_b, ALONG)
    slots, slot = blocks * entries * width, (block * entries + entry) * width + lane
    sets = blocks * width
    if JOINT:
        sets = sets // set_units
    lower = tl.load(moments_ptr + 2 * sets + s, mask=exists, other=0.0)
    upper = tl.load(moments_ptr + 3 * sets + s, mask=exists, other=0.0)
    low = tl.load(workspace_ptr + 4 * slots + slot, mask=exists, other=0.0)
    high = tl.load(workspace_ptr + 5 * slots + slot, mask=exists, other=0.0)
    outliers = tl.max(tl.where((low >= lower) & (high <= upper), 0, 1), 0)  # 1 if the band is NaN
    if outliers > 0:
        offsets, inside = _values(block, ia, ib, 0, rows, cols, block_stride, row_stride, A * STEPS, B, 1)
        v = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        kept = inside & (v >= _spread(lower, ALONG)) & (v <= _spread(upper, ALONG))
        count, mean, squares = _tile_moments(v, kept, ALONG)
        _store_moments(workspace_ptr, slots, slot, exists, count, mean, squares)
    last = _arrive_with_moments(
        workspace_ptr, counters_ptr, block, entry, entries, width, across, of, lane, exists, blocks, JOINT, CHUNK,
        CHUNK_ENTRIES, B if ALONG == 0 else 1,
    )  # fmt: skip
    if last:
        _finish_moments(
            workspace_ptr, moments_ptr, running_mean_ptr, running_var_ptr, num_batches_ptr, momentum, kappa, 0.0, 0.0,
            block, entries, width, lane, exists, blocks, set_units, "moments", JOINT, CHUNK, ENTRIES, LANES,
            SET_ENTRIES, SETS,
        )  # fmt: skip


# --- output -----------------------------------------------------------------------------------------------------------


@triton.jit
def _sets(block, rows, cols, tiles_a, tiles_b, set_units, REDUCED: tl.constexpr):
    """The number of sets."""
    sets = _blocks(tiles_a, tiles_b)
    if REDUCED == 0:
        sets *= cols // set_units
    return sets


@triton.jit
def _affine(
    moments_ptr,  # (5, sets)
    sets,
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    s,
    channel,
    exists,
    eps,
    REDUCED: tl.constexpr,
):
    """What normalizes a lane: mean, inverse deviation, weight and bias."""
    m = tl.load(moments_ptr + s, mask=exists, other=0.0)
    var = tl.load(moments_ptr + sets + s, mask=exists, other=1.0)
    r = tl.div_rn(1.0, tl.sqrt_rn(var + eps))  # a card's own rsqrt is an approximation, and takes denormals for 0
    w, b = tl.zeros_like(m) + 1, tl.zeros_like(m)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    return _spread(m, REDUCED), _spread(r, REDUCED), _spread(w, REDUCED), _spread(b, REDUCED)


@triton.jit
def _of_set(
    ptr,  # (sets,)
    s,
    exists,
    REDUCED: tl.constexpr,
):
    return _spread(tl.load(ptr + s, mask=exists, other=0.0), REDUCED)


@triton.jit(do_not_specialize=_sizes)
def normalize(
    x_ptr,  # like the input
    y_ptr,  # like the input
    residual_ptr,  # like the input, or None
    moments_ptr,  # (5, sets)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    num_batches_ptr,  # (), counted up by one, or None
    channels,
    set_units,
    eps,
    negative_slope,
    rows,
    cols,
    tiles_a,
    tiles_b,
    block_stride,
    row_stride,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """``y = activation(weight (x - mean) / sigma' + bias + residual)`` (Eq. 8); grid: (tiles of all blocks,)."""
    _count_batch(num_batches_ptr)
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    _, s, channel, exists = _lanes(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    sets = _sets(block, rows, cols, tiles_a, tiles_b, set_units, REDUCED)
    m, r, w, b = _affine(moments_ptr, sets, weight_ptr, bias_ptr, s, channel, exists, eps, REDUCED)
    for step in tl.static_range(STEPS):
        offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
        z = (tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - m) * r * w + b
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            z = tl.where(z < 0, 0.0, z)  # a NaN stays
        elif ACTIVATION == "leaky_relu":
            z = tl.where(z < 0, z * negative_slope, z)
        elif ACTIVATION == "silu":
            z = z * tl.sigmoid(z)
        tl.store(y_ptr + offsets, z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def update_running_stats(
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    num_batches_ptr,  # () or None
    mean_ptr,  # (C,)
    var_ptr,  # (C,)
    count_ptr,  # (C,)
    momentum,
    channels,
    BLOCK: tl.constexpr,
):
    """Running statistics by moments of several processes; grid: (1,)."""
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        exists = c < channels
        mean = tl.load(mean_ptr + c, mask=exists, other=0.0).to(tl.float64)
        var = tl.load(var_ptr + c, mask=exists, other=0.0).to(tl.float64)
        count = tl.load(count_ptr + c, mask=exists, other=1.0).to(tl.float64)
        _update(running_mean_ptr, running_var_ptr, num_batches_ptr, momentum, c, exists, mean, var, count)
    tl.debug_barrier()  # all have read the counter
    _count_batch(num_batches_ptr)


# --- gradients --------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(
    g,
    offsets,
    inside,
    xhat,
    w,
    b,
    other_ptr,  # like the input, or None
    negative_slope,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """The gradient before the activation. ``other_ptr`` is the output (``OUTPUT``, whose sign tells enough), the
    residual, or None."""
    if ACTIVATION != "identity":
        if OUTPUT:
            z = tl.load(other_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            z = xhat * w + b
            if other_ptr is not None:
                z += tl.load(other_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            g = tl.where(z <= 0, 0.0, g)
        elif ACTIVATION == "leaky_relu":
            g = tl.where(z <= 0, g * negative_slope, g)
        else:
            sigmoid = tl.sigmoid(z)
            g = g * sigmoid * (1 + z * (1 - sigmoid))
    return g


@triton.jit
def _add_gradients(
    slots_ptr,  # (2, slots)
    slots,
    first,
    weight_ptr,  # (C,), from the weight of lane 0's first entry on, or None
    entries,
    entry_stride,
    lane_stride,
    lane,
    exists,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The two sums of each lane, (LANES,) in double, from those of its entries, as in :func:`_add_moments`."""
    product = tl.zeros([LANES], tl.float64)
    total = tl.zeros([LANES], tl.float64)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = (entry < entries)[:, None] & exists[None, :]
        slot = entry.to(tl.int64)[:, None] * entry_stride + (lane * lane_stride)[None, :]
        p = tl.load(slots_ptr + first + slot, mask=inside, other=0.0).to(tl.float64)
        t = tl.load(slots_ptr + slots + first + slot, mask=inside, other=0.0).to(tl.float64)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + slot, mask=inside, other=0.0).to(tl.float64)
            p, t = p * w, t * w
        product += tl.sum(p, 0)
        total += tl.sum(t, 0)
    return product, total


@triton.jit
def _store_gradients(
    slots_ptr,  # (2, slots)
    slots,
    slot,
    exists,
    product,
    total,
):
    tl.store(slots_ptr + slot, product.to(tl.float32), mask=exists)
    tl.store(slots_ptr + slots + slot, total.to(tl.float32), mask=exists)


@triton.jit
def _write_coefficients(
    coefficients_ptr,  # (2, sets)
    moments_ptr,  # (5, sets)
    sets,
    s,
    exists,
    kappa,
    product,
    total,
):
    """What :func:`input_gradient` subtracts, of the sets ``s``, from their sums times the weight."""
    count = tl.load(moments_ptr + 4 * sets + s, mask=exists, other=1.0).to(tl.float64)
    _store_gradients(coefficients_ptr, sets, s, exists, product / kappa / count, total / count)


@triton.jit
def _arrive_with_gradients(
    slots_ptr,  # (2, slots); (2, chunks)
    counters_ptr,  # (families + chunks,) int32
    block,
    entry,
    entries,
    width,
    across,
    of,
    lane,
    exists,
    blocks,
    JOINT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """True in the last program of a family, before which the chunks are added up."""
    if CHUNK == 0:
        family, arrivals = _family(block, across, of, entries, entries, JOINT)
        last = _is_last(counters_ptr + family, arrivals)
    else:
        slots, chunks = blocks * entries * width, (entries + CHUNK - 1) // CHUNK
        family, arrivals = _family(block, across, of, entries, chunks, JOINT)
        families, _ = _family(blocks, across * 0, of, entries, chunks, JOINT)
        chunk = entry // CHUNK
        tiles = tl.minimum(entries - chunk * CHUNK, CHUNK)
        last = _is_last(counters_ptr + families + (block * chunks + chunk) * of + across, tiles)
        if last:
            first = (block * entries + chunk * CHUNK) * width
            p, t = _add_gradients(slots_ptr, slots, first, None, tiles, width, 1, lane, exists, CHUNK_ENTRIES, LANES)
            slot = (block * chunks + chunk) * width + lane
            _store_gradients(slots_ptr + 2 * slots, blocks * chunks * width, slot, exists, p, t)
            last = _is_last(counters_ptr + family, arrivals)
    return last


@triton.jit
def _finish_gradients_of_units(
    slots_ptr,  # (2, slots)
    units_ptr,  # (2, units), written
    coefficients_ptr,  # (2, sets), written
    moments_ptr,  # (5, sets)
    weight_ptr,  # (C,) or None
    channels,
    set_units,
    kappa,
    block,
    entries,
    width,
    slots,
    units,
    sets,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
    SET_ENTRIES: tl.constexpr,
    SETS: tl.constexpr,
):
    """What the last program of a family does where several lanes are a set: first the units, which
    :func:`input_gradient` wants too, then the sets."""
    for start in range(0, width, LANES):
        unit = start + tl.arange(0, LANES).to(tl.int64)
        there = unit < width
        p, t = _add_gradients(
            slots_ptr, slots, block * entries * width, None, entries, width, 1, unit, there, ENTRIES, LANES
        )
        _store_gradients(units_ptr, units, block * width + unit, there, p, t)
    tl.debug_barrier()
    block_sets = width // set_units
    weights_ptr = weight_ptr
    if weight_ptr is not None:
        weights_ptr = weight_ptr + block % (channels // width) * width
    for start in range(0, block_sets, SETS):
        one = start + tl.arange(0, SETS).to(tl.int64)
        there = one < block_sets
        p, t = _add_gradients(
            units_ptr, units, block * width, weights_ptr, set_units, 1, set_units, one, there, SET_ENTRIES, SETS
        )
        _write_coefficients(coefficients_ptr, moments_ptr, sets, block * block_sets + one, there, kappa, p, t)


@triton.jit
def _finish_gradients_of_lanes(
    slots_ptr,  # (2, slots)
    parameters_ptr,  # (2, C), written
    coefficients_ptr,  # (2, sets), written
    moments_ptr,  # (5, sets)
    weight_ptr,  # (C,) or None
    kappa,
    block,
    entries,
    width,
    slots,
    units,
    sets,
    lane,
    s,
    channel,
    exists,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """What the last program of a family does where each lane is a set, and a channel."""
    p, t = _add_gradients(
        slots_ptr, slots, block * entries * width, None, entries, width, 1, lane, exists, ENTRIES, LANES
    )
    _store_gradients(parameters_ptr, units, channel, exists, p, t)
    if weight_ptr is not None:
        each = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float64)
        p, t = p * each, t * each
    _write_coefficients(coefficients_ptr, moments_ptr, sets, s, exists, kappa, p, t)


@triton.jit(do_not_specialize=_sizes)
def measure_gradient(
    grad_ptr,  # like the input
    x_ptr,  # like the input
    other_ptr,  # like the input, or None
    dz_ptr,  # like the input: where the gradient before the activation goes if it is the residual's, or None
    moments_ptr,  # (5, sets)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    workspace_ptr,  # (2, sets) for input_gradient(); (2, units) if JOINT; (2, slots); (2, chunks)
    counters_ptr,  # (families + chunks,) int32, zero
    parameters_ptr,  # (2, C): gradients of weight and bias, written unless JOINT
    channels,
    set_units,
    kappa,
    eps,
    negative_slope,
    rows,
    cols,
    tiles_a,
    tiles_b,
    block_stride,
    row_stride,
    PAPER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    JOINT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_ENTRIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
    SET_ENTRIES: tl.constexpr,
    SETS: tl.constexpr,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """First pass of the gradients; sums, in this order, of the gradient times xhat and of the gradient; grid: (tiles of
    all blocks,)."""
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    blocks = _blocks(tiles_a, tiles_b)
    lane, s, channel, exists = _lanes(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    sets = _sets(block, rows, cols, tiles_a, tiles_b, set_units, REDUCED)
    m, r, w, b = _affine(moments_ptr, sets, weight_ptr, bias_ptr, s, channel, exists, eps, REDUCED)
    if PAPER:
        lower = _of_set(moments_ptr + 2 * sets, s, exists, REDUCED)
        upper = _of_set(moments_ptr + 3 * sets, s, exists, REDUCED)
    total = tl.zeros([A, B], tl.float32)
    product = tl.zeros([A, B], tl.float32)
    for step in tl.static_range(STEPS):
        offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
        v = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        xhat = (v - m) * r
        g = _gradient(g, offsets, inside, xhat, w, b, other_ptr, negative_slope, ACTIVATION, OUTPUT)
        if dz_ptr is not None:
            rounded = g.to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + offsets, rounded, mask=inside)
            g = rounded.to(tl.float32)  # what the second pass reads
        if PAPER:
            inside = inside & (v >= lower) & (v <= upper)
        total += tl.where(inside, g, 0.0)
        product += tl.where(inside, g * xhat, 0.0)

    entry, entries, width, across, of = _lanes_of_sums(ia, ib, rows, cols, tiles_a, tiles_b, REDUCED)
    slots, slot = blocks * entries * width, (block * entries + entry) * width + lane
    units, units_ptr = blocks * width, workspace_ptr + 2 * sets
    at = units_ptr
    if JOINT:
        at += 2 * units
    _store_gradients(at, slots, slot, exists, _sum(product, REDUCED), _sum(total, REDUCED))
    last = _arrive_with_gradients(
        at, counters_ptr, block, entry, entries, width, across, of, lane, exists, blocks, JOINT, CHUNK, CHUNK_ENTRIES,
        B if REDUCED == 0 else A if REDUCED == 1 else 1,
    )  # fmt: skip
    if CHUNK > 0:
        at += 2 * slots
        entries = (entries + CHUNK - 1) // CHUNK
        slots = blocks * entries * width
    if last:
        if JOINT:
            _finish_gradients_of_units(
                at, units_ptr, workspace_ptr, moments_ptr, weight_ptr, channels, set_units, kappa, block, entries,
                width, slots, units, sets, ENTRIES, LANES, SET_ENTRIES, SETS,
            )  # fmt: skip
        else:
            _finish_gradients_of_lanes(
                at, parameters_ptr, workspace_ptr, moments_ptr, weight_ptr, kappa, block, entries, width, slots, units,
                sets, lane, s, channel, exists, ENTRIES, LANES,
            )  # fmt: skip


@triton.jit(do_not_specialize=_sizes)
def input_gradient(
    grad_ptr,  # like the input; before the activation if ACTIVATION is "identity"
    x_ptr,  # like the input
    other_ptr,  # like the input, or None
    dx_ptr,  # like the input
    moments_ptr,  # (5, sets)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    coefficients_ptr,  # (2, sets): what is subtracted times xhat, and what is subtracted; (2, N, C) if JOINT
    parameters_ptr,  # (2, C): gradients of weight and bias, written if JOINT
    samples,
    channels,
    set_units,
    eps,
    negative_slope,
    rows,
    cols,
    tiles_a,
    tiles_b,
    block_stride,
    row_stride,
    PAPER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    JOINT: tl.constexpr,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Second pass of the gradients: ``dx``, exact or as printed (Eq. 11), and in the group form the sums over samples;
    grid: (tiles of all blocks,)."""
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    _, s, channel, exists = _lanes(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    sets = _sets(block, rows, cols, tiles_a, tiles_b, set_units, REDUCED)
    m, r, w, b = _affine(moments_ptr, sets, weight_ptr, bias_ptr, s, channel, exists, eps, REDUCED)
    lower = _of_set(moments_ptr + 2 * sets, s, exists, REDUCED)
    upper = _of_set(moments_ptr + 3 * sets, s, exists, REDUCED)
    slope = _of_set(coefficients_ptr, s, exists, REDUCED)
    shared = _of_set(coefficients_ptr + sets, s, exists, REDUCED)
    for step in tl.static_range(STEPS):
        offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
        v = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        xhat = (v - m) * r
        g = _gradient(g, offsets, inside, xhat, w, b, other_ptr, negative_slope, ACTIVATION, False)
        kept = (v >= lower) & (v <= upper)
        if PAPER:
            d = g * w - shared - tl.where(kept, xhat * slope, 0.0)
        else:
            d = g * w - tl.where(kept, shared + xhat * slope, 0.0)
        tl.store(dx_ptr + offsets, (d * r).to(dx_ptr.dtype.element_ty), mask=inside)
    if JOINT:
        # The first tile of each lane of the first sample.
        TILE_LANES: tl.constexpr = B if REDUCED == 0 else A
        first = ia == 0 if REDUCED == 0 else ib == 0
        if first & (block * set_units < channels if REDUCED == 1 else block == 0):
            units = samples.to(tl.int64) * channels
            p, t = _add_gradients(
                coefficients_ptr + 2 * sets, units, 0, None, samples, channels, 1, channel, exists, 16, TILE_LANES
            )
            _store_gradients(parameters_ptr, channels, channel, exists, p, t)
