"""Run-length codes of masks in COCO's two forms, checked before pycocotools gets them: it reads one whose runs do not
add up to the image's pixels from memory that is not its own, and may never end.

A code is the lengths of runs of 0 and 1 in turn, the first of 0, over the pixels column by column. The compressed form
writes each length as its difference to the last but one, from the fourth on, in groups of 5 bits, the lowest first: a
character is 48 + group, + 32 where another group follows; the highest bit of the last group is the sign
(pycocotools' ``maskApi.c``, rleFrString).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from pycocotools import mask as mask_utils

__all__ = ["CodeError", "check_codes", "compressed", "without_empty_runs"]

# Characters of one length: six groups are 30 bits with a sign, and masks have 2**28 pixels at most. A seventh would
# leave the 32 bits that pycocotools computes in.
_MOST_CHARACTERS = 6

# Characters, or lengths, that are decoded at once: bounds the memory, by 100 bytes each.
_AT_ONCE = 200_000


class CodeError(ValueError):
    """A code that is none.

    Args:
        index: which of those that were given.
        reason: what it has, as the end of a sentence.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index = index
        self.reason = reason


def check_codes(codes: Sequence[bytes | list], pixels: Sequence[int]) -> np.ndarray:
    """Check many codes at once.

    Args:
        codes: compressed ones as bytes, others as lists.
        pixels: (N) height x width of each one's image, at most 2**28.

    Returns:
        (N) bool: which codes have an empty run in their middle, see ``without_empty_runs``.

    Raises:
        CodeError: one is damaged, or its runs do not add up to the pixels.
    """
    found = np.zeros(len(codes), bool)
    for start, stop in _chunks(codes):
        part = codes[start:stop]
        kinds = np.array([isinstance(each, list) for each in part])
        for kind, lengths_of in ((False, _decoded), (True, _listed)):
            chosen = np.flatnonzero(kinds == kind)
            if not chosen.size:
                continue
            try:
                lengths, ends = lengths_of([part[i] for i in chosen])
                found[start + chosen] = _check_lengths(lengths, ends, np.asarray(pixels)[start + chosen])
            except CodeError as error:
                raise CodeError(start + int(chosen[error.index]), error.reason) from None
    return found


def without_empty_runs(code: bytes | list) -> list[int]:
    """The lengths of a code that ``check_codes`` has found sound, with the runs around an empty one put together:
    where two codes have one at the same place, pycocotools ends their comparison there."""
    lengths = list(code) if isinstance(code, list) else _decoded([code])[0].tolist()
    merged: list[int] = []
    value = 0
    for number, length in enumerate(lengths):
        if length == 0 and number > 0:
            continue
        if merged and value == number % 2:
            merged[-1] += length
        else:
            merged.append(length)
            value = number % 2
    return merged


def compressed(lengths: list[int], size: Sequence[int]) -> str:
    """The compressed form of a code of an image's size (height, width)."""
    return mask_utils.frPyObjects({"size": list(size), "counts": lengths}, *size)["counts"].decode("ascii")


def _chunks(codes: Sequence[bytes | list]) -> Iterator[tuple[int, int]]:
    start = total = 0
    for number, code in enumerate(codes):
        total += len(code)
        if total >= _AT_ONCE:
            yield start, number + 1
            start, total = number + 1, 0
    if start < len(codes):
        yield start, len(codes)


def _check_lengths(lengths: np.ndarray, ends: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Check lengths (M) of runs, those of code i before ``ends[i]``; which codes have an empty run in their middle."""
    starts = np.concatenate([[0], ends[:-1]])
    owner = np.repeat(np.arange(len(ends)), ends - starts)
    for wrong, what in ((lengths < 0, "a run of negative length"), (lengths > pixels[owner], "a run longer than that")):
        if wrong.any():
            index = int(owner[wrong.argmax()])
            reason = f"{what}, {lengths[wrong.argmax()]}" if what.endswith("length") else what
            raise CodeError(index, reason)
    sums = np.add.reduceat(lengths, starts)
    if (sums != pixels).any():
        index = int((sums != pixels).argmax())
        raise CodeError(index, f"runs that add up to {sums[index]}")
    empty = lengths == 0
    empty[starts] = False
    return np.bincount(owner[empty], minlength=len(ends)) > 0


def _listed(codes: list[list]) -> tuple[np.ndarray, np.ndarray]:
    flat = [length for code in codes for length in code]
    ends = np.cumsum([len(code) for code in codes])
    _refuse_empty(ends)
    if set(map(type, flat)) == {int}:
        try:
            return np.array(flat, np.int64), ends
        except OverflowError:
            pass
    index = next(i for i, length in enumerate(flat) if type(length) is not int or not -(2**63) <= length < 2**63)
    raise CodeError(int(np.searchsorted(ends, index, "right")), "a run whose length is no whole number")


def _decoded(codes: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of all codes, one after another, and where those of each end."""
    ends = np.cumsum([len(code) for code in codes])
    _refuse_empty(ends)
    groups = np.frombuffer(b"".join(codes), np.uint8) - np.uint8(48)  # below 48, it wraps around to more than 63
    if (wrong := groups > 63).any():
        raise CodeError(int(np.searchsorted(ends, wrong.argmax(), "right")), "a character that no code has")
    goes_on = groups >= 32
    if (cut := goes_on[ends - 1]).any():
        raise CodeError(int(cut.argmax()), "an end in the middle of a run")
    last = np.flatnonzero(~goes_on)  # the last group of each length
    first = np.concatenate([[0], last[:-1] + 1])
    count = last - first + 1
    if (count > _MOST_CHARACTERS).any():
        place = last[(count > _MOST_CHARACTERS).argmax()]
        raise CodeError(int(np.searchsorted(ends, place, "right")), "a run of more than 30 bits")
    values = (groups[first] & 31).astype(np.int64)
    longer = np.arange(len(values))
    for number in range(1, _MOST_CHARACTERS):
        longer = longer[count[longer] > number]
        values[longer] += (groups[first[longer] + number] & 31).astype(np.int64) << (5 * number)
    negative = np.flatnonzero(groups[last] & 16)
    values[negative] -= np.int64(1) << (5 * count[negative])
    return _undone(values, np.searchsorted(last, ends, "left"))


def _undone(differences: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths from what a code writes: the first as it is, the others, in turn, sums along two columns."""
    numbers = np.diff(ends, prepend=0)
    starts = ends - numbers
    place = np.arange(len(differences)) - np.repeat(starts, numbers)
    rows = numbers // 2  # of two columns, for all but the first
    row_starts = np.cumsum(rows) - rows
    cell = np.repeat(2 * row_starts, numbers) + place + 1  # below a row of zeros
    table = np.zeros(2 * (rows.sum() + 1), np.int64)
    later = np.flatnonzero(place)
    cell = cell[later]
    table[cell] = differences[later]
    sums = table.reshape(-1, 2).cumsum(axis=0)
    sums[1:] -= np.repeat(sums[row_starts], rows, axis=0)
    lengths = differences.copy()
    lengths[later] = sums.ravel()[cell]
    return lengths, ends


def _refuse_empty(ends: np.ndarray) -> None:
    empty = np.diff(ends, prepend=0) == 0
    if empty.any():
        raise CodeError(int(empty.argmax()), "no run")
