"""Filtered normalization for GPUs, in Triton; :mod:`fbn_plugin.ops.triton` plans and launches what is here.

A *unit* is one channel of the batch form, or one channel of one sample of the group form; a *set* shares a mean and is
one unit of the batch form, or the ``K`` units of a group. Units are numbered so that those of a set are neighbours. A
*tile* is what one program reads: ``STEPS * A`` rows of ``B`` columns, columns being neighbours in memory. What lies
along its axes, and so which of them a statistic is summed over (``REDUCED``), depends on layout and form:

=========================  =====================  ==================  =================  =======
layout, form               block                  rows (axis 0)       columns (axis 1)   REDUCED
=========================  =====================  ==================  =================  =======
contiguous, batch          a channel              samples             positions          2, both
contiguous, group          a group of a sample    channels            positions          1
channels-last, either      all, or a sample       positions           channels           0
=========================  =====================  ==================  =================  =======

A tile leaves its partial sums in the *slot* of its unit; slots of a unit, hence of a set, are neighbours, and are added
up in double and in order, without atomics, so that results repeat bit for bit. Sums are taken around a value of the
set's bulk, its *shift*, so that a large mean costs no digits.

Pointers are named after the arrays they point to: ``x, y, grad, dx, other`` of the input's shape and layout, ``shift,
mean, var, lower, upper, count`` of one float32 a set, ``weight, bias`` of one value a channel, and ``partial`` of one
float32 a slot in each of its rows.
"""

import triton
import triton.language as tl

# Sizes that the kernels are not compiled anew for; VECTOR tells what matters of them. (Five times ``slots`` may pass
# 2^31, hence the casts.)
_sizes = ["rows", "cols", "tiles_a", "tiles_b", "block_stride", "row_stride", "channels", "samples", "sets", "slots"]
_sizes += ["set_rows", "set_size", "set_slots", "unit_slots"]


@triton.jit
def _place(tiles_a, tiles_b):
    """This program's block, and the place of its tile in it along both axes."""
    program = tl.program_id(0)  # divided in 32 bits, which is many times faster
    row = program // tiles_b
    return (row // tiles_a).to(tl.int64), (row % tiles_a).to(tl.int64), (program % tiles_b).to(tl.int64)


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
def _units(
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
    """The tile's units, (B,), (A,) or one: their sets, channels and slots, and which of them exist; :func:`_spread`
    lays them along the values."""
    if REDUCED == 0:  # of a sample, or of all
        channel = ib * B + tl.arange(0, B)
        exists = channel < cols
        s = block * (cols // set_units) + channel.to(tl.int32) // set_units
        slot = (block * cols + channel) * tiles_a + ia
    elif REDUCED == 1:  # of a group, which is a set
        a = ia * A + tl.arange(0, A)
        exists = a < rows
        s = tl.zeros_like(a) + block
        channel = block % (channels // set_units) * set_units + a
        slot = (block * set_units + a) * tiles_b + ib
    else:  # a channel, which is a set
        s, channel, exists = block, block, block >= 0
        slot = (block * tiles_a + ia) * tiles_b + ib
    return s, channel, slot, exists


@triton.jit
def _spread(v, REDUCED: tl.constexpr):
    """One number a unit, to broadcast against the values."""
    if REDUCED == 0:
        return v[None, :]
    elif REDUCED == 1:
        return v[:, None]
    else:
        return v


@triton.jit
def _sum(v, REDUCED: tl.constexpr):
    if REDUCED == 2:
        return tl.sum(tl.sum(v, 1), 0)
    else:
        return tl.sum(v, REDUCED)


@triton.jit
def _min(v, REDUCED: tl.constexpr):
    if REDUCED == 2:
        return tl.min(tl.min(v, 1), 0)
    else:
        return tl.min(v, REDUCED)


@triton.jit
def _middle(a, b, c):
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    return tl.maximum(low, tl.minimum(high, c))


@triton.jit
def _third(x, first, exists, rows, width, row_stride, i: tl.constexpr):
    """The middle one of the i-th three of nine values that are spread over a set's rows and, in another order, over
    its columns. Without a division, of which every thread would do eighteen."""
    return _middle(
        _sample(x, first, exists, rows, width, row_stride, 3 * i),
        _sample(x, first, exists, rows, width, row_stride, 3 * i + 1),
        _sample(x, first, exists, rows, width, row_stride, 3 * i + 2),
    )


@triton.jit
def _sample(x, first, exists, rows, width, row_stride, i: tl.constexpr):
    """The i-th of nine values, at the same distance from each other along the rows, and in steps of four along the
    columns."""
    row = rows.to(tl.int64) * (7 * i + 4) >> 6
    column = tl.cast(width, tl.int64) * (7 * (4 * i % 9) + 4) >> 6
    return tl.load(x + first + (row * row_stride + column), mask=exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_sizes)
def measure(
    x,
    shift,
    partial,  # (5, slots): sum, sum of squares, dropped values, smallest, largest
    slots,
    channels,
    set_units,
    set_rows,
    set_width,  # neighbours in memory that a row of a set has
    rows,
    cols,
    tiles_a,
    tiles_b,
    block_stride,
    row_stride,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """First pass of the moments: all values."""
    slots = tl.cast(slots, tl.int64)
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    s, channel, slot, exists = _units(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    # Every program finds its shift by itself, as the median of three medians of three.
    first, found = block * block_stride, block >= 0
    if REDUCED == 0:
        found = exists
        first += channel.to(tl.int32) // set_units * set_units
    shifts = _middle(
        _third(x, first, found, set_rows, set_width, row_stride, 0),
        _third(x, first, found, set_rows, set_width, row_stride, 1),
        _third(x, first, found, set_rows, set_width, row_stride, 2),
    )
    k = shifts
    if REDUCED == 0:
        k = _spread(shifts, REDUCED)
    total = tl.zeros([A, B], tl.float32)
    square = tl.zeros([A, B], tl.float32)
    low = tl.zeros([A, B], tl.float32) + k
    high = low
    for step in tl.static_range(STEPS):
        offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, v, k)
        d = v - k
        total += d
        square += d * d
        low = tl.minimum(low, v)
        high = tl.maximum(high, v)
    if REDUCED == 0:  # after the loop, whose loads need not wait for it
        tl.store(shift + s, shifts, mask=exists)
    else:
        tl.store(shift + block, shifts)
    sums = _sum(total, REDUCED)
    tl.store(partial + slot, sums, mask=exists)
    tl.store(partial + slots + slot, _sum(square, REDUCED), mask=exists)
    tl.store(partial + 2 * slots + slot, tl.zeros_like(sums), mask=exists)
    tl.store(partial + 3 * slots + slot, _min(low, REDUCED), mask=exists)
    tl.store(partial + 4 * slots + slot, -_min(-high, REDUCED), mask=exists)


@triton.jit(do_not_specialize=_sizes)
def measure_kept(
    x,
    shift,
    lower,
    upper,
    partial,
    slots,
    channels,
    set_units,
    rows,
    cols,
    tiles_a,
    tiles_b,
    block_stride,
    row_stride,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Second pass: replaces the sums of the tiles that hold a value outside of the band; reads no other."""
    slots = tl.cast(slots, tl.int64)
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    s, _, slot, exists = _units(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    lo = tl.load(lower + s, mask=exists, other=0.0)
    hi = tl.load(upper + s, mask=exists, other=0.0)
    low = tl.load(partial + 3 * slots + slot, mask=exists, other=0.0)
    high = tl.load(partial + 4 * slots + slot, mask=exists, other=0.0)
    outliers = tl.where((low >= lo) & (high <= hi), 0, 1)  # 1 if the band is NaN
    if REDUCED < 2:
        outliers = tl.max(outliers, 0)
    if outliers > 0:
        k = _spread(tl.load(shift + s, mask=exists, other=0.0), REDUCED)
        start, end = _spread(lo, REDUCED), _spread(hi, REDUCED)
        total = tl.zeros([A, B], tl.float32)
        square = tl.zeros([A, B], tl.float32)
        dropped = tl.zeros([A, B], tl.float32)
        for step in tl.static_range(STEPS):
            offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
            v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
            kept = inside & (v >= start) & (v <= end)
            d = tl.where(kept, v - k, 0.0)  # masked after the subtraction
            total += d
            square += d * d
            dropped += tl.where(inside & (kept == 0), 1.0, 0.0)
        tl.store(partial + slot, _sum(total, REDUCED), mask=exists)
        tl.store(partial + slots + slot, _sum(square, REDUCED), mask=exists)
        tl.store(partial + 2 * slots + slot, _sum(dropped, REDUCED), mask=exists)


@triton.jit
def _add_up(partial, s, set_slots, BLOCK: tl.constexpr):
    """The sum over a set's slots, in double."""
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, set_slots, BLOCK):
        j = i + tl.arange(0, BLOCK)
        total += tl.load(partial + s * set_slots + j, mask=j < set_slots, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=_sizes)
def draw_band(shift, lower, upper, partial, slots, set_slots, set_size, t_sigma, eps, BLOCK: tl.constexpr):
    """Lower and upper cut of a set from the sums of all of its values (Eq. 2-5)."""
    slots = tl.cast(slots, tl.int64)
    s = tl.program_id(0).to(tl.int64)
    d = _add_up(partial, s, set_slots, BLOCK) / set_size
    var = _add_up(partial + slots, s, set_slots, BLOCK) / set_size - d * d
    mean = tl.load(shift + s).to(tl.float64) + d
    sigma = tl.sqrt(tl.where(var < 0, 0.0, var) + eps)
    # Wide enough to hold a value even where the deviation is below the rounding of the mean.
    width, least = t_sigma * sigma, sigma + 16 * 1.1920929e-07 * (sigma + tl.abs(mean))
    width = tl.where(width > least, width, least)
    tl.store(lower + s, (mean - width).to(tl.float32))
    tl.store(upper + s, (mean + width).to(tl.float32))


@triton.jit(do_not_specialize=_sizes)
def settle(shift, mean, var, count, partial, slots, set_slots, set_size, kappa, BLOCK: tl.constexpr):
    """Moments of a set from the sums of its kept values (Eq. 6 and 7)."""
    slots = tl.cast(slots, tl.int64)
    s = tl.program_id(0).to(tl.int64)
    kept = set_size - _add_up(partial + 2 * slots, s, set_slots, BLOCK)
    d = _add_up(partial, s, set_slots, BLOCK) / kept
    v = _add_up(partial + slots, s, set_slots, BLOCK) / kept - d * d
    tl.store(mean + s, (tl.load(shift + s).to(tl.float64) + d).to(tl.float32))
    tl.store(var + s, (tl.where(v < 0, 0.0, v) / kappa).to(tl.float32))
    tl.store(count + s, kept.to(tl.float32))


@triton.jit
def _affine(s, channel, exists, mean, var, weight, bias, eps, REDUCED: tl.constexpr):
    """What normalizes a unit: mean, inverse deviation, weight and bias."""
    m = tl.load(mean + s, mask=exists, other=0.0)
    r = tl.rsqrt(tl.load(var + s, mask=exists, other=1.0) + eps)
    w, b = tl.zeros_like(m) + 1, tl.zeros_like(m)
    if weight is not None:
        w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    return _spread(m, REDUCED), _spread(r, REDUCED), _spread(w, REDUCED), _spread(b, REDUCED)


@triton.jit
def _of_set(p, s, exists, REDUCED: tl.constexpr):
    return _spread(tl.load(p + s, mask=exists, other=0.0), REDUCED)


@triton.jit(do_not_specialize=_sizes)
def normalize(
    x,
    y,
    residual,
    mean,
    var,
    weight,
    bias,
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
    """``y = activation(weight (x - mean) / sigma' + bias + residual)`` (Eq. 8)."""
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    s, channel, _, exists = _units(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    m, r, w, b = _affine(s, channel, exists, mean, var, weight, bias, eps, REDUCED)
    for step in tl.static_range(STEPS):
        offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
        z = (tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - m) * r * w + b
        if residual is not None:
            z += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            z = tl.where(z < 0, 0.0, z)  # a NaN stays
        elif ACTIVATION == "leaky_relu":
            z = tl.where(z < 0, z * negative_slope, z)
        elif ACTIVATION == "silu":
            z = z * tl.sigmoid(z)
        tl.store(y + offsets, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(g, offsets, inside, xhat, w, b, other, negative_slope, ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr):
    """The gradient before the activation. ``other`` is the output (``OUTPUT``, whose sign tells enough), the residual,
    or None."""
    if ACTIVATION != "identity":
        if OUTPUT:
            z = tl.load(other + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            z = xhat * w + b
            if other is not None:
                z += tl.load(other + offsets, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            g = tl.where(z <= 0, 0.0, g)
        elif ACTIVATION == "leaky_relu":
            g = tl.where(z <= 0, g * negative_slope, g)
        else:
            sigmoid = tl.sigmoid(z)
            g = g * sigmoid * (1 + z * (1 - sigmoid))
    return g


@triton.jit(do_not_specialize=_sizes)
def measure_gradient(
    grad,
    x,
    other,
    dz,  # where the gradient before the activation goes if it is the residual's, or None
    mean,
    var,
    lower,
    upper,
    weight,
    bias,
    partial,  # (2, slots): sum of the gradient, and of the gradient times xhat
    slots,
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
    OUTPUT: tl.constexpr,
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """First pass of the gradients."""
    slots = tl.cast(slots, tl.int64)
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    s, channel, slot, exists = _units(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    m, r, w, b = _affine(s, channel, exists, mean, var, weight, bias, eps, REDUCED)
    if PAPER:
        lo = _of_set(lower, s, exists, REDUCED)
        hi = _of_set(upper, s, exists, REDUCED)
    total = tl.zeros([A, B], tl.float32)
    product = tl.zeros([A, B], tl.float32)
    for step in tl.static_range(STEPS):
        offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        xhat = (v - m) * r
        g = _gradient(g, offsets, inside, xhat, w, b, other, negative_slope, ACTIVATION, OUTPUT)
        if dz is not None:
            rounded = g.to(dz.dtype.element_ty)
            tl.store(dz + offsets, rounded, mask=inside)
            g = rounded.to(tl.float32)  # what the second pass reads
        if PAPER:
            inside = inside & (v >= lo) & (v <= hi)
        total += tl.where(inside, g, 0.0)
        product += tl.where(inside, g * xhat, 0.0)
    tl.store(partial + slot, _sum(total, REDUCED), mask=exists)
    tl.store(partial + slots + slot, _sum(product, REDUCED), mask=exists)


@triton.jit(do_not_specialize=_sizes)
def settle_gradient(
    weight,
    count,
    coefficients,  # (2, sets): what the second pass subtracts, and subtracts times xhat
    d_weight,
    d_bias,
    partial,
    slots,
    sets,
    samples,  # blocks of units that share their parameters: 1 in the batch form
    channels,
    set_units,
    unit_slots,
    kappa,
    BLOCK: tl.constexpr,
):
    """The first ``sets`` programs add up a set each, the others a channel each."""
    slots = tl.cast(slots, tl.int64)
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    product = tl.zeros([BLOCK], tl.float64)
    if program < sets:
        for i in range(0, set_units * unit_slots, BLOCK):
            j = i + tl.arange(0, BLOCK)
            inside = j < set_units * unit_slots
            w = tl.zeros([BLOCK], tl.float64) + 1
            if weight is not None:
                first = program % (channels // set_units) * set_units
                w = tl.load(weight + first + j // unit_slots, mask=inside, other=0.0).to(tl.float64)
            slot = program * set_units * unit_slots + j
            total += w * tl.load(partial + slot, mask=inside, other=0.0).to(tl.float64)
            product += w * tl.load(partial + slots + slot, mask=inside, other=0.0).to(tl.float64)
        kept = tl.load(count + program).to(tl.float64)
        tl.store(coefficients + program, (tl.sum(total, 0) / kept).to(tl.float32))
        tl.store(coefficients + sets + program, (tl.sum(product, 0) / kappa / kept).to(tl.float32))
    else:
        channel = program - sets
        for i in range(0, samples * unit_slots, BLOCK):
            j = i + tl.arange(0, BLOCK)
            inside = j < samples * unit_slots
            slot = ((j // unit_slots).to(tl.int64) * channels + channel) * unit_slots + j % unit_slots
            total += tl.load(partial + slot, mask=inside, other=0.0).to(tl.float64)
            product += tl.load(partial + slots + slot, mask=inside, other=0.0).to(tl.float64)
        tl.store(d_bias + channel, tl.sum(total, 0).to(tl.float32))
        tl.store(d_weight + channel, tl.sum(product, 0).to(tl.float32))


@triton.jit(do_not_specialize=_sizes)
def input_gradient(
    grad,  # before the activation if ACTIVATION is "identity"
    x,
    other,
    dx,
    mean,
    var,
    lower,
    upper,
    weight,
    bias,
    coefficients,
    sets,
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
    VECTOR: tl.constexpr,
    REDUCED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Second pass of the gradients: ``dx``, exact or as printed (Eq. 11)."""
    cols, block_stride, row_stride = _aligned(cols, block_stride, row_stride, VECTOR)
    block, ia, ib = _place(tiles_a, tiles_b)
    s, channel, _, exists = _units(block, ia, ib, rows, cols, tiles_a, tiles_b, channels, set_units, REDUCED, A, B)
    m, r, w, b = _affine(s, channel, exists, mean, var, weight, bias, eps, REDUCED)
    lo = _of_set(lower, s, exists, REDUCED)
    hi = _of_set(upper, s, exists, REDUCED)
    shared = _of_set(coefficients, s, exists, REDUCED)
    slope = _of_set(coefficients + sets, s, exists, REDUCED)
    for step in tl.static_range(STEPS):
        offsets, inside = _values(block, ia, ib, step, rows, cols, block_stride, row_stride, A, B, STEPS)
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        xhat = (v - m) * r
        g = _gradient(g, offsets, inside, xhat, w, b, other, negative_slope, ACTIVATION, False)
        kept = (v >= lo) & (v <= hi)
        if PAPER:
            d = g * w - shared - tl.where(kept, xhat * slope, 0.0)
        else:
            d = g * w - tl.where(kept, shared + xhat * slope, 0.0)
        tl.store(dx + offsets, (d * r).to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_sizes)
def update_running(running_mean, running_var, mean, var, count, momentum, channels, BLOCK: tl.constexpr):
    """Moving averages of the mean and the unbiased variance, where both are finite."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    m = tl.load(mean + c, mask=inside, other=0.0)
    n = tl.load(count + c, mask=inside, other=1.0)
    unbiased = tl.load(var + c, mask=inside, other=0.0) * (n / tl.maximum(n - 1, 1.0))
    finite = inside & (tl.abs(m) < float("inf")) & (tl.abs(unbiased) < float("inf"))
    old = tl.load(running_mean + c, mask=finite, other=0.0).to(tl.float32)
    new = (1 - momentum) * old + momentum * m
    tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=finite)
    old = tl.load(running_var + c, mask=finite, other=0.0).to(tl.float32)
    new = (1 - momentum) * old + momentum * unbiased
    tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=finite)
