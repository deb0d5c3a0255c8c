"""How a tensor is cut for the CUDA kernels: which variant of them, how many blocks share a set, what they keep on the
chip.

A plan follows from the shape and the card by a small cost model, never from timing, as detection brings new shapes at
every step. What the model knows: the kernels are bound by memory (`_BANDWIDTH` a multiprocessor), members of a group
wait for each other (`_WAIT`), and what does not stay on the chip is read again.

The number of members of a group is bounded so that nobody waits for ever (see ``kernels.cu``): the sum over all
launches that run at a time of ``members - 1`` stays below the number of blocks that the card holds, if groups are at
most ``places / launches``. One launch runs at a time on each stream; the number of streams that have launched before
is counted, and four are always reckoned with.
"""

import math
import struct
from typing import NamedTuple

import torch

PLANES, ROWS, LINES, BUNDLES = range(4)  # kernels.cu, LAYOUT
FIRST, FILTERED, APPLY, ALL = 1, 2, 4, 7  # kernels.cu, PHASES

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARAMETER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# The structures of kernels.cu: the fields before Cut, and Cut.
FORWARD = struct.Struct("@11P4df2i4x")
BACKWARD = struct.Struct("@12P2df4i4x")
FINISH = struct.Struct("@5Pd5i")
CUT = struct.Struct("@2q2i2Ii2I9i")

SLOTS = 8  # partial sums of a member, kernels.cu
_FORWARD_LOADS, _BACKWARD_LOADS = 4, 2  # what is kept is a multiple of these
_LINE_THREADS, _LINE_SUMS = (256, 64), 24 << 10
_MOST = 2**31 - 2**16  # vectors in a set: they are counted in 32 bits
_BANDWIDTH = 22e3  # bytes that a multiprocessor moves in a microsecond: 132 of them 2.9 TB/s
_WAIT = 2.5  # microseconds until the last of a group's members has come


class Variant(NamedTuple):
    """What the kernels are compiled for: the macros of ``kernels.cu``."""

    dtype: int
    layout: int
    vector: int
    channels: int = 1
    threads: int = 512
    activation: int = 0
    run_channels: int = 0
    phases: int = ALL
    backward: int = 0

    def defines(self) -> tuple[str, ...]:
        return tuple(f"{name.upper()}={value}" for name, value in zip(self._fields, self))

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor is to hold."""
        return (512 if self.layout == ROWS else 1024) // self.threads

    @property
    def static_shared(self) -> int:
        """Shared memory in bytes that a block needs beside what it keeps, at most."""
        if self.layout == LINES:
            return 0
        if self.layout == BUNDLES:
            return self.threads + 32 * self.channels + 64
        width = self.channels if self.layout == ROWS else 1
        stripes = max(1, self.threads // (4 * width))
        return max(16 * self.threads // 32 * width, 32 * width * stripes) + 80 * width + 64


class Shape(NamedTuple):
    """A tensor as the kernels see it."""

    samples: int
    channels: int
    positions: int
    dtype: torch.dtype
    channels_last: bool
    num_groups: int  # 0 is the batch form
    alignment: int  # bytes that its address is a multiple of, 16 at most

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype is torch.float32 else 2

    @property
    def set_channels(self) -> int:
        return self.channels // self.num_groups if self.num_groups else 1

    @property
    def sets(self) -> int:
        return self.samples * self.num_groups if self.num_groups else self.channels

    @property
    def layout(self) -> int:
        if self.positions == 1:
            return LINES if self.num_groups else ROWS
        return ROWS if self.channels_last else PLANES

    def vector(self, consecutive: int) -> int:
        """Values that are loaded at once where so many are consecutive."""
        return math.gcd(consecutive, min(16, self.alignment) // self.itemsize)


class Cut(NamedTuple):
    """One kernel's part of a plan."""

    variant: Variant
    grid: int
    members: int
    groups: int
    dynamic_shared: int
    packed: bytes  # the structure Cut

    @property
    def partial_floats(self) -> int:
        """Workspace for partial sums."""
        return self.grid * SLOTS * self.variant.channels if self.members > 1 else 0


def refuses(shape: Shape) -> str | None:
    """Why no plan suits a shape; None if one does."""
    if shape.layout == ROWS and shape.num_groups:
        widest = 128 // shape.itemsize
        if shape.set_channels > widest or not any(
            width % shape.set_channels == 0 for width in _widths(shape, shape.vector(shape.channels))
        ):
            return f"groups of {shape.set_channels} channels, channels-last, fit into no block of channels"
    largest = shape.samples * shape.channels * shape.positions // shape.sets
    if largest > _MOST:
        return f"{largest} values with one mean are more than {_MOST}"
    if shape.layout == LINES and 8 * shape.channels * _LINE_THREADS[-1] // 32 > _LINE_SUMS:
        return f"{shape.channels} channels are more than a multiprocessor can add up"
    return None


def _widths(shape: Shape, vector: int) -> list[int]:
    """Channels that a block of threads may handle side by side, channels-last: 128 bytes at most, 16 at least."""
    most = min(128 // shape.itemsize, vector * 32)
    widths = [vector << i for i in range(6) if vector << i <= most]
    needed = max(vector, min(16 // shape.itemsize, most))
    enough = [width for width in widths if width >= needed] or widths[-1:]
    covering = next((width for width in enough if width >= shape.channels), enough[-1])
    return [width for width in reversed(enough) if width <= covering]


def _members(
    card, variant: Variant, groups: int, steps: int, launches: int, copies: int, loads: int
) -> tuple[int, int, int]:
    """Members of a group, the vectors that each thread of them handles, and how many of these it keeps."""
    blocks = max(1, min(variant.blocks, card.threads_per_multiprocessor // variant.threads))
    room = min(card.shared_per_multiprocessor // blocks - card.shared_reserved, card.shared_per_block)
    of_step = variant.threads * variant.vector * (4 if variant.dtype == 0 else 2) * copies
    can_keep = max(0, room - variant.static_shared) // of_step // loads * loads
    if variant.phases == APPLY:  # nothing is added up, nothing is kept
        each = min(steps, 8)
        return -(-steps // each), each, 0
    if variant.phases != ALL:
        can_keep = 0
    places = card.multiprocessors * blocks
    fitting = -(-steps // can_keep) if can_keep else 1
    filling = min(-(-places // groups), -(-steps // 4))
    members = max(1, min(max(fitting, filling), places // launches))
    each = -(-steps // members)
    if members > 1:
        each = -(-each // loads) * loads
        members = -(-steps // each)
    return members, each, min(each, can_keep)


def _time(card, variant: Variant, blocks: int, moved: float, again: float, members: int, rounds: int) -> float:
    """Microseconds that the model expects: ``moved`` and ``again`` in bytes."""
    width = variant.channels * (4 if variant.dtype == 0 else 2) if variant.layout == ROWS else 128
    sectors = 1.0 if width >= 64 else 1.05 if width >= 32 else 1.3
    reach = min(card.multiprocessors, blocks) * _BANDWIDTH
    return (moved + again) * sectors / reach + (_WAIT * rounds if members > 1 else 0)


def _divisor(length: int) -> tuple[int, int]:
    """``i // length == (i + (i * multiplier >> 32)) >> shift`` for ``0 <= i < 2**31``."""
    shift = (length - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - length) // length + 1) & 0xFFFFFFFF, shift


def _threads(vectors: int) -> int:
    """Threads for a set of so many vectors: each is to have four, if there are as many."""
    return 512 if vectors > 1024 else 256 if vectors > 256 else 64


def _planes(shape: Shape, card, launches: int, *, rows: bool, copies: int, loads: int, rounds: int, **variant) -> Cut:
    """Contiguous tensors. ``rows``: each channel of each sample by itself, whatever the form."""
    n, c, s = shape.samples, shape.channels, shape.positions
    vector = shape.vector(s)
    if rows or shape.num_groups:
        inside = 1 if rows else shape.set_channels
        groups, runs, set_stride, run_stride = n * c // inside, inside, inside * s, s
    else:
        inside = 1
        groups, runs, set_stride, run_stride = c, n, s, c * s
    length = s // vector
    vectors = runs * length
    kind = Variant(DTYPES[shape.dtype], PLANES, vector, threads=_threads(vectors), **variant)
    kind = kind._replace(run_channels=int(inside > 1))
    steps = -(-vectors // kind.threads)
    members, each, kept = _members(card, kind, groups, steps, launches, copies, loads)
    packed = CUT.pack(
        set_stride, run_stride, runs, length, *_divisor(length), 0, 0, 0, vectors, groups, members, each, kept, c,
        shape.set_channels if rows or inside > 1 else 1, shape.sets, 1,
    )  # fmt: skip
    dynamic = kept * kind.threads * vector * shape.itemsize * copies
    return Cut(kind, groups * members, members, groups, dynamic, packed)


def _rows(shape: Shape, card, launches: int, *, copies: int, loads: int, rounds: int, **variant) -> Cut:
    """Channels-last tensors: the width of a block of channels is the cheapest by the model."""
    n, c, s = shape.samples, shape.channels, shape.positions
    vector = shape.vector(c)
    samples, rows = (n, s) if shape.num_groups else (1, n * s)
    best = None
    size = shape.samples * c * s * shape.itemsize
    for width in _widths(shape, vector):
        if width % shape.set_channels:
            continue
        kind = Variant(DTYPES[shape.dtype], ROWS, vector, width, 256, **variant)
        per_step = kind.threads * vector // width
        blocks = -(-c // width)
        groups, steps = samples * blocks, -(-rows // per_step)
        members, each, kept = _members(card, kind, groups, steps, launches, copies, loads)
        again = size * copies * (rounds if kind.phases == ALL else 0) * (1 - kept / each)
        time = _time(card, kind, groups * members, size * (copies + 1), again, members, rounds)
        if best is None or time < best[0]:
            best = time, kind, blocks, groups, members, each, kept
    _, kind, blocks, groups, members, each, kept = best
    packed = CUT.pack(
        0, 0, rows, 1, 0, 0, 0, 0, 0, rows, groups, members, each, kept, c, shape.set_channels, shape.sets, blocks
    )  # fmt: skip
    dynamic = kept * kind.threads * vector * shape.itemsize * copies
    return Cut(kind, groups * members, members, groups, dynamic, packed)


def _lines(shape: Shape, card, *, copies: int, backward: bool) -> Cut:
    """One position a sample, group form: a warp for each line. Backward, each warp has sums for all channels."""
    vector = shape.vector(shape.set_channels)
    length = shape.set_channels // vector
    sums = {threads: 8 * shape.channels * (threads // 32) if backward else 0 for threads in _LINE_THREADS}
    threads = next((threads for threads in _LINE_THREADS if sums[threads] <= _LINE_SUMS), _LINE_THREADS[-1])
    kind = Variant(DTYPES[shape.dtype], LINES, vector, threads=threads, backward=int(backward))
    steps, of_step = -(-length // 32), threads * vector * shape.itemsize * copies
    room = min(card.shared_per_multiprocessor // 2 - card.shared_reserved, card.shared_per_block) - sums[threads]
    kept = steps if steps * of_step <= room else 0
    grid = min(-(-shape.sets // (threads // 32)), card.multiprocessors * kind.blocks)
    packed = CUT.pack(
        0, 0, 1, length, 0, 0, 0, 0, 0, length, grid, 1, steps, kept, shape.channels, shape.set_channels, shape.sets, 1
    )
    return Cut(kind, grid, 1, grid, kept * of_step + sums[threads], packed)


def _bundles(shape: Shape, card, *, copies: int, **variant) -> Cut | None:
    """Contiguous tensors whose channels are small and of an odd size: as many channels in a block as are aligned
    together. None if that does not suit the shape."""
    n, c, s, size = shape.samples, shape.channels, shape.positions, shape.itemsize
    vector = min(16, shape.alignment) // size
    channels = vector // math.gcd(s, vector)
    threads = 512 if n * s >= 1024 else 256
    kind = Variant(DTYPES[shape.dtype], BUNDLES, vector, channels, threads, **variant)
    kept = n * channels * s * size
    room = min(card.shared_per_multiprocessor // kind.blocks - card.shared_reserved, card.shared_per_block)
    if shape.num_groups or kind.phases != ALL or channels == 1 or c % channels or s < vector:
        return None
    if kept * copies > room - kind.static_shared:
        return None
    length = channels * s // vector
    packed = CUT.pack(
        0, c * s, n, length, *_divisor(length), s, *_divisor(s), n * length,
        c // channels, 1, 1, 1, c, 1, c, 1,
    )  # fmt: skip
    return Cut(kind, c // channels, 1, c // channels, kept * copies, packed)


class Plan(NamedTuple):
    """The kernels for a shape."""

    forward: Cut
    backward: Cut  # all of it, or the sums alone where ``result`` has the rest
    result: Cut | None
    sum_samples: int  # samples whose sums are added up to gradients of weight and bias; 0: there is nothing to add


def make(shape: Shape, card, launches: int, activation: int = 0, phases: int = ALL) -> Plan:
    """The plan for a shape that :func:`refuses` does not refuse.

    Args:
        shape: of the tensor.
        card: its device, see ``driver.Card``.
        launches: that may run at a time.
        activation: 0 none, 1 ReLU or leaky ReLU, 2 SiLU.
        phases: of the kernels; all of them, or one of the steps of synchronized batch normalization.
    """
    options = {"activation": activation, "phases": phases}
    forward = {"copies": 1, "loads": _FORWARD_LOADS, "rounds": 2, **options}
    backward = {"copies": 2, "loads": _BACKWARD_LOADS, "rounds": 1, "backward": 1, **options}
    if shape.layout == LINES:
        ahead, back = _lines(shape, card, copies=1, backward=False), _lines(shape, card, copies=2, backward=True)
        return Plan(ahead, back, None, back.grid)
    if shape.layout == ROWS:
        samples = shape.samples if shape.num_groups else 0
        return Plan(_rows(shape, card, launches, **forward), _rows(shape, card, launches, **backward), None, samples)
    ahead = _bundles(shape, card, copies=1, **options) or _planes(shape, card, launches, rows=False, **forward)
    samples = shape.samples if shape.num_groups else 0
    if shape.set_channels == 1:
        back = _bundles(shape, card, copies=2, backward=1, **options)
        return Plan(ahead, back or _planes(shape, card, launches, rows=samples > 0, **backward), None, samples)
    # Weights differ within a set: each channel's sums first, then the gradient.
    sums = _planes(shape, card, launches, rows=True, **{**backward, "phases": FIRST})
    return Plan(ahead, sums, _planes(shape, card, launches, rows=True, **{**backward, "phases": APPLY}), samples)
