"""How a tensor is cut for the CUDA kernels: which variant of them, how many blocks share a set, what they keep on the
chip.

A plan follows from the shape and the card by a small cost model, never from timing, as detection brings new shapes at
every step. What the model knows: the kernels are bound by memory (`_BANDWIDTH` a multiprocessor), members of a group
wait for each other (`_WAIT`), and what does not stay on the chip is read again.

The number of members of a group is bounded so that nobody waits for ever (see ``kernels.cu``): the sum over all
launches that run at a time of ``members - 1`` stays below the number of blocks that the card holds, if groups are at
most ``places / launches``. One launch runs at a time on each stream; the number of streams that have launched before
is counted, and four are always reckoned with. Not reckoned with: more than four graphs that were captured on one stream
and are replayed on as many at a time, and launches in a part of the card (a green context) that is smaller than a
group.
"""

import functools
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
_LOADS = 4, 2  # forward and backward: what is kept is a multiple of these
_ROUNDS = 2, 1  # forward and backward: how often members wait
_LINE_THREADS, _LINE_SUMS = (256, 64), 24 << 10
_MOST = 2**30  # values in a set, channels of samples: they are counted in 32 bits, and past the end by what blocks
# have too many
# Fitted to times of 400 plans on an H200.
_BANDWIDTH = 42e3  # bytes that a multiprocessor moves in a microsecond, were there nothing else
_START, _STEP = 8.5, 0.35  # microseconds of a block, and of each of its loads, besides
_WAIT = 5.0  # microseconds until a group's members know their sums
_AGAIN = 0.8  # of a byte that is read again
_NEXT = 0.4  # of a block's microseconds that the next in its place cannot hide behind others'


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
    wide: int = 0

    def defines(self) -> tuple[str, ...]:
        return tuple(f"{name.upper()}={value}" for name, value in zip(self._fields, self))

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype else 4

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor is to hold."""
        return 512 // self.threads if self.layout == ROWS else min(8, 1024 // self.threads)

    @property
    def step_bytes(self) -> int:
        """Bytes of one tensor that a block's threads load at once."""
        return self.threads * self.vector * self.itemsize

    @property
    def step_shared(self) -> int:
        """Shared memory in bytes for what each thread of a block keeps of one load: x, and backward the gradient."""
        return self.step_bytes * (2 if self.backward else 1)

    @property
    def static_shared(self) -> int:
        """Shared memory in bytes that a block needs beside what it keeps, at most."""
        if self.layout == LINES:
            return 0
        if self.layout == BUNDLES:
            return self.threads + 32 * self.channels + 64
        width = self.channels if self.layout == ROWS else 1
        stripes = max(1, self.threads // width) if self.layout == ROWS else 1
        return max(16 * self.threads // 32 * width, 32 * width * stripes) + 72 * width + 64


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


class Room(NamedTuple):
    """What a card has for a variant of the kernels."""

    variant: Variant
    places: int  # blocks that the whole card holds, each with all the shared memory that it may have
    can_keep: int  # loads of each thread that find room there
    shared: int  # bytes that a block may have for what it keeps
    reach: float  # bytes that a block's multiprocessor moves in a microsecond
    multiprocessors: int


@functools.lru_cache(maxsize=2048)
def room_for(card, variant: Variant) -> Room:
    """What ``card``, a ``driver.Card``, has for ``variant``."""
    blocks = max(1, min(variant.blocks, card.threads_per_multiprocessor // variant.threads))
    shared = card.shared_per_multiprocessor // blocks // 128 * 128 - card.shared_reserved  # given out by 128 bytes
    shared = min(shared, card.shared_per_block)
    shared = max(0, shared - variant.static_shared)
    loads = _LOADS[variant.backward]
    can_keep = shared // variant.step_shared // loads * loads if variant.phases == ALL else 0
    width = variant.channels * variant.itemsize if variant.layout == ROWS else 128
    # Rows of few bytes: parts of sectors, and of what memory delivers at once, are wasted.
    reach = _BANDWIDTH / (1.0 if width >= 128 else 1.6 if width >= 64 else 2.2 if width >= 32 else 4.0)
    return Room(variant, card.multiprocessors * blocks, can_keep, shared, reach, card.multiprocessors)


def refuses(shape: Shape) -> str | None:
    """Why no plan suits a shape; None if one does."""
    if shape.num_groups:
        layout = shape.layout
        if layout == ROWS and not _widths(
            shape.itemsize, shape.vector(shape.channels), shape.channels, shape.set_channels
        ):
            return f"groups of {shape.set_channels} channels, channels-last, fit into no block of channels"
        if layout == LINES and 8 * shape.channels * _LINE_THREADS[-1] // 32 > _LINE_SUMS:
            return f"{shape.channels} channels are more than a multiprocessor can add up"
        channels = shape.sets if layout == LINES else shape.samples * shape.channels
        if channels > _MOST:
            return f"{channels} channels of samples are more than {_MOST}"
    largest = shape.samples * shape.channels * shape.positions // shape.sets
    if largest > _MOST:
        return f"{largest} values with one mean are more than {_MOST}"
    return None


@functools.lru_cache(maxsize=2048)
def _widths(itemsize: int, vector: int, channels: int, set_channels: int) -> tuple[int, ...]:
    """Channels that a block of threads may handle side by side, channels-last, the most first: of 32 to 128 bytes, if
    there are so many, and whole sets."""
    most = min(128 // itemsize, vector * 32)
    widths = [vector << i for i in range(6) if vector << i <= most]
    needed = max(vector, min(32 // itemsize, most))
    enough = [width for width in widths if width >= needed] or widths[-1:]
    covering = next((width for width in enough if width >= channels), enough[-1])
    return tuple(width for width in reversed(enough) if width <= covering and width % set_channels == 0)


@functools.lru_cache(maxsize=2048)
def _rooms(card, itemsize: int, channels: int, set_channels: int, variant: Variant) -> tuple[Room, ...]:
    """``variant`` with each width that suits, on ``card``."""
    widths = _widths(itemsize, variant.vector, channels, set_channels)
    return tuple(room_for(card, variant._replace(channels=width)) for width in widths)


def _spread(room: Room, groups: int, steps: int, launches: int) -> tuple[float, int, int, int]:
    """How a group whose sets take ``steps`` loads of a block is shared out: microseconds of the launch by the model,
    members of the group, the loads of each member, and how many of these it keeps."""
    variant = room.variant
    if variant.phases == APPLY:  # nothing is added up, nothing is kept
        each = min(steps, 8)
        return 0.0, -(-steps // each), each, 0
    can_keep, places, loads, tensors = room.can_keep, room.places, _LOADS[variant.backward], 1 + variant.backward
    most = max(1, min(places // launches, -(-steps // loads)))
    fitting = -(-steps // can_keep) if can_keep else 1
    best = (math.inf, 1, steps, 0)
    for wanted in {min(fitting, most), min(max(1, places // groups), most), min(-(-places // groups), most)}:
        members, each = wanted, -(-steps // wanted)
        if members > 1:
            each = -(-each // loads) * loads
            members = -(-steps // each)
        kept = min(each, can_keep)
        grid = groups * members
        waves = grid / places
        waves = math.ceil(waves) if waves < 4 else waves + 0.5
        beside = -(-min(grid, places) // room.multiprocessors)  # blocks on one multiprocessor
        moved = ((tensors + 1) * each + _AGAIN * tensors * (each - kept)) * variant.step_bytes
        waits = _START + _STEP * each + (_WAIT * _ROUNDS[variant.backward] if members > 1 else 0.0)
        time = waves * moved * beside / room.reach + waits * (1 + _NEXT * (waves - 1))
        if time < best[0]:
            best = time, members, each, kept
    return best


def _divisor(length: int) -> tuple[int, int]:
    """``i // length == (i + (i * multiplier >> 32)) >> shift`` for ``0 <= i < 2**31``."""
    shift = (length - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - length) // length + 1) & 0xFFFFFFFF, shift


def _threads(vectors: int) -> tuple[int, ...]:
    """Threads that a block may have for a set of so many vectors: each is to have four or more, if there are as
    many."""
    return tuple(
        threads
        for threads in (64, 128, 256, 512)
        if (threads == 64 or vectors > 3 * threads) and (threads >= 256 or vectors <= 32 * threads)
    )


def _planes(shape: Shape, card, launches: int, variant: Variant, rows: bool) -> Cut:
    """Contiguous tensors. ``rows``: each channel of each sample by itself, whatever the form."""
    n, c, s, _, _, num_groups, _ = shape
    set_channels = c // num_groups if num_groups else 1
    inside = 1 if rows else set_channels  # channels of what is one set here
    if rows or num_groups:
        groups, runs, set_stride, run_stride = n * c // inside, inside, inside * s, s
    else:
        groups, runs, set_stride, run_stride = c, n, s, c * s
    vector = shape.vector(s)
    length = s // vector
    vectors = runs * length
    least = math.inf
    for threads in _threads(vectors):
        each_way = variant._replace(vector=vector, threads=threads, run_channels=int(inside > 1))
        found = _spread(room_for(card, each_way), groups, -(-vectors // threads), launches)
        if found[0] < least:
            least, chosen, best = found[0], each_way, found
    variant, (_, members, each, kept) = chosen, best
    packed = CUT.pack(
        set_stride, run_stride, runs, length, *_divisor(length), 0, 0, 0, vectors, groups, members, each, kept, c,
        set_channels, shape.sets, 1,
    )  # fmt: skip
    return Cut(variant, groups * members, members, groups, kept * variant.step_shared, packed)


def _rows(shape: Shape, card, launches: int, variant: Variant) -> Cut:
    """Channels-last tensors: the width of a block of channels is the cheapest by the model."""
    n, c, s, _, _, num_groups, _ = shape
    set_channels = c // num_groups if num_groups else 1
    samples, rows = (n, s) if num_groups else (1, n * s)
    variant = variant._replace(vector=shape.vector(c), threads=256)
    least = math.inf
    for room in _rooms(card, variant.itemsize, c, set_channels, variant):
        width = room.variant.channels
        blocks = -(-c // width)
        groups, steps = samples * blocks, -(-rows * width // (256 * variant.vector))
        time, members, each, kept = _spread(room, groups, steps, launches)
        if time < least:
            least, best = time, (room.variant, blocks, groups, members, each, kept)
    variant, blocks, groups, members, each, kept = best
    packed = CUT.pack(
        0, 0, rows, 1, 0, 0, 0, 0, 0, rows, groups, members, each, kept, c, set_channels, shape.sets, blocks
    )
    return Cut(variant, groups * members, members, groups, kept * variant.step_shared, packed)


def _lines(shape: Shape, card, variant: Variant) -> Cut:
    """One position a sample, group form: a warp for each line. Backward, each warp has sums for all channels."""
    vector = shape.vector(shape.set_channels)
    length = shape.set_channels // vector
    for threads in _LINE_THREADS:
        sums = 8 * shape.channels * (threads // 32) if variant.backward else 0
        if sums <= _LINE_SUMS:
            break
    variant = variant._replace(vector=vector, threads=threads)
    room = room_for(card, variant)
    steps = -(-length // 32)
    kept = steps if steps * variant.step_shared + sums <= room.shared else 0
    grid = min(-(-shape.sets // (threads // 32)), room.places)
    packed = CUT.pack(
        0, 0, 1, length, 0, 0, 0, 0, 0, length, grid, 1, steps, kept, shape.channels, shape.set_channels, shape.sets, 1
    )
    return Cut(variant, grid, 1, grid, kept * variant.step_shared + sums, packed)


def _bundles(shape: Shape, card, variant: Variant) -> Cut | None:
    """Contiguous tensors whose channels are small and of an odd size: as many channels in a block as are aligned
    together. None if that does not suit the shape."""
    n, c, s, _, _, num_groups, alignment = shape
    vector = min(16, alignment) // variant.itemsize
    channels = vector // math.gcd(s, vector)
    if num_groups or shape.vector(s) > 1 or channels == 1 or c % channels or s < vector or variant.phases != ALL:
        return None
    variant = variant._replace(layout=BUNDLES, vector=vector, channels=channels, threads=512 if n * s >= 1024 else 256)
    kept = n * channels * s * variant.itemsize * (2 if variant.backward else 1)
    if kept > room_for(card, variant).shared:
        return None
    length, groups = channels * s // vector, c // channels
    packed = CUT.pack(0, c * s, n, length, *_divisor(length), s, *_divisor(s), n * length, groups, 1, 1, 1, c, 1, c, 1)
    return Cut(variant, groups, 1, groups, kept, packed)


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
    layout, samples = shape.layout, shape.samples if shape.num_groups else 0
    wide = int(shape.samples * shape.channels * shape.positions >= 2**31)
    forward = Variant(DTYPES[shape.dtype], layout, 1, 1, 256, activation, 0, phases, wide=wide)
    backward = forward._replace(backward=1)
    if layout == LINES:
        back = _lines(shape, card, backward)
        return Plan(_lines(shape, card, forward), back, None, back.grid)
    if layout == ROWS:
        return Plan(_rows(shape, card, launches, forward), _rows(shape, card, launches, backward), None, samples)
    ahead = _bundles(shape, card, forward) or _planes(shape, card, launches, forward, rows=False)
    if shape.set_channels == 1:
        back = _bundles(shape, card, backward) or _planes(shape, card, launches, backward, rows=samples > 0)
        return Plan(ahead, back, None, samples)
    # Weights differ within a set: each channel's sums first, then the gradient.
    sums, result = (
        _planes(shape, card, launches, backward._replace(phases=phase), rows=True) for phase in (FIRST, APPLY)
    )
    return Plan(ahead, sums, result, samples)
