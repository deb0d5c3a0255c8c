"""Quantiles of streams of tensors in constant memory: counts in logarithmic bins.

A bin is the beginning of a float32: sign, exponent and the upper nine bits of the mantissa. So the bins of an octave
are 512 of equal width, a value's bin is a shift of its bits, and the middle of a bin is within 2**-10, 0.098 %, of all
that is in it. The bound is that of Masson, Rim and Lee, "DDSketch" (2019), whose bins are exactly logarithmic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["QuantileSketch"]

_SHIFT = 23 - 9  # mantissa bits of a float32 that a bin does not see
_OCTAVE = 2**9  # bins of an exponent
_NONFINITE = 255 * _OCTAVE  # the key of an infinity; those above are NaN
# Values that are looked at together: on a CPU what its cache holds, which is ten times faster than tensors in memory.
_CHUNK, _CHUNK_OF_CPU = 2**24, 2**15


class QuantileSketch:
    """Quantiles of all values that it was ever shown, with a relative error below 0.1 %, and exact ends.

    Its memory depends on how many powers of two the values span, not on their number: 8 kB for each power and row,
    2 MB at most. NaN and infinities are counted apart and are in no quantile. Values below 1.2e-38, which float32 has
    no full precision for, count as zeros.

    Args:
        rows: how many distributions are kept apart, such as one for each channel.
        device: where the counts are; those of values on another device are brought there.

    Attributes:
        count: finite values, int64 (rows,).
        nan, infinite: values that are not, int64 (rows,) each.
        minimum, maximum: of the finite values, float64 (rows,); infinity and its negative where there is none.

    Examples::

        >>> sketch = fbn_plugin.QuantileSketch()
        >>> for batch in torch.arange(1.0, 1001.0).split(100):
        ...     sketch.update(batch)
        >>> [round(value) for value in sketch.quantile([0.0, 0.25, 1.0])[0].tolist()]
        [1, 250, 1000]
    """

    def __init__(self, rows: int = 1, device: torch.device | str | None = None):
        if rows < 1:
            raise ValueError(f"rows must be 1 or more, got {rows}")
        self.rows = rows
        self.count, self.nan, self.infinite = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.minimum = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
        self.maximum = -self.minimum
        # Of each row: zeros, then positive values by their size, then negative ones; from exponent `_low` on.
        self._low, self._octaves = 127, 0
        self._counts = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def update(self, values: Tensor, dim: int | None = None) -> None:
        """Add values.

        Args:
            values: any shape, any real dtype; no values are as good as some. float64 is rounded to float32 in all but
                the ends.
            dim: the dimension whose index is the row; without, all values are of one row.

        Raises:
            ValueError: the dimension is not of the size that there are rows.
        """
        values = values.detach()
        if dim is not None:
            values = values.movedim(dim, 0)
        size = 1 if dim is None else len(values)
        if size != self.rows:
            raise ValueError(f"values of {self.rows} rows are wanted, got {size}")
        if values.numel():
            chunk = _CHUNK_OF_CPU if values.device.type == "cpu" else _CHUNK
            for part in values.reshape(self.rows, -1).split(max(1, chunk // self.rows), 1):
                self._add(part)

    def _add(self, values: Tensor) -> None:
        """Values (rows, n)."""
        if not values.is_floating_point() or values.dtype == torch.float64:
            values = values.double()
            odd = ~values.isfinite()
            self._add_ends(values, odd)
            most = torch.finfo(torch.float32).max
            values = torch.where(odd, values, values.clamp(-most, most)).float()
        else:
            values = values.float()
            odd = ~values.isfinite()
            self._add_ends(values, odd)
        bits = values.contiguous().view(torch.int32)
        keys = (bits & 0x7FFFFFFF) >> _SHIFT
        zero = keys < _OCTAVE
        self._reach(keys, zero | odd)
        width = self._octaves * _OCTAVE
        places = keys - (self._low * _OCTAVE - 1) + (bits < 0) * width
        places = places.masked_fill_(zero, 0).long()
        if self.rows > 1:
            places += torch.arange(self.rows, device=places.device)[:, None] * (2 * width + 1)
        if odd.any():
            places = places[~odd]
        places = places.flatten().to(self._counts.device)
        self._counts.view(-1).index_add_(0, places, torch.ones_like(places))

    def _add_ends(self, values: Tensor, odd: Tensor) -> None:
        """Count values and those that are not finite, which ``odd`` marks, and move the ends."""
        least, most = values.aminmax(dim=1)
        if odd.any():
            self.nan += values.isnan().sum(1).to(self.nan.device)
            self.infinite += values.isinf().sum(1).to(self.nan.device)
            self.count -= odd.sum(1).to(self.nan.device)
            least = values.masked_fill(odd, torch.inf).amin(1)
            most = values.masked_fill(odd, -torch.inf).amax(1)
        self.count += values.shape[1]
        self.minimum = torch.minimum(self.minimum, least.to(self.minimum))
        self.maximum = torch.maximum(self.maximum, most.to(self.maximum))

    def _reach(self, keys: Tensor, without: Tensor) -> None:
        """Make room for the bins of keys, but for some."""
        low = keys.masked_fill(without, _NONFINITE).amin().item() // _OCTAVE
        high = keys.masked_fill(without, 0).amax().item() // _OCTAVE
        if high:
            self._widen(low, high + 1)

    def _widen(self, low: int, end: int) -> None:
        """Let the bins begin at exponent ``low`` or below, and end before ``end`` or above."""
        if self._octaves:
            low, end = min(low, self._low), max(end, self._low + self._octaves)
        if (low, end) == (self._low, self._low + self._octaves):
            return
        grown = self._counts.new_zeros(self.rows, 2, end - low, _OCTAVE)
        if self._octaves:
            start = self._low - low
            old = self._counts[:, 1:].view(self.rows, 2, self._octaves, _OCTAVE)
            grown[:, :, start : start + self._octaves] = old
        self._counts = torch.cat([self._counts[:, :1], grown.flatten(1)], 1)
        self._low, self._octaves = low, end - low

    def merge(self, other: QuantileSketch) -> None:
        """Add all values that another sketch of as many rows was shown; that one stays as it is.

        Raises:
            ValueError: it has another number of rows.
        """
        if other.rows != self.rows:
            raise ValueError(f"a sketch of {self.rows} rows is wanted, got one of {other.rows}")
        device = self.count.device
        for name in ("count", "nan", "infinite"):
            setattr(self, name, getattr(self, name) + getattr(other, name).to(device))
        self.minimum = torch.minimum(self.minimum, other.minimum.to(device))
        self.maximum = torch.maximum(self.maximum, other.maximum.to(device))
        if other._octaves:
            self._widen(other._low, other._low + other._octaves)
            start = other._low - self._low
            ours = self._counts[:, 1:].view(self.rows, 2, self._octaves, _OCTAVE)
            theirs = other._counts[:, 1:].view(self.rows, 2, other._octaves, _OCTAVE)
            ours[:, :, start : start + other._octaves] += theirs.to(device)
        self._counts[:, 0] += other._counts[:, 0].to(device)

    def quantile(self, q: Sequence[float]) -> Tensor:
        """Quantiles, float64 (rows, len(q)): of n values the one in place ceil(q n) by size, as NumPy's method
        ``"inverted_cdf"``; NaN for a row without a finite value.

        Args:
            q: from 0, the minimum, to 1, the maximum; both ends are exact.

        Raises:
            ValueError: one is not from 0 to 1.
        """
        if wrong := [each for each in q if not 0 <= each <= 1]:
            raise ValueError(f"quantiles must be from 0 to 1, got {wrong[0]!r}")
        counts, middles = self._in_order()
        q = torch.tensor([*q], dtype=torch.float64, device=counts.device)
        # A product such as 0.15 * 60 is not to be rounded up over a whole number.
        place = (q * self.count[:, None] * (1 - 1e-12)).ceil().long()
        place = place.clamp(min=1).minimum(self.count[:, None])
        found = middles[torch.searchsorted(counts.cumsum(1), place).clamp(max=len(middles) - 1)]
        least, most = self.minimum[:, None], self.maximum[:, None]
        found = torch.where(place == 1, least, torch.where(place == self.count[:, None], most, found))
        found = found.maximum(least).minimum(most)
        return found.masked_fill(self.count[:, None] == 0, torch.nan)

    def histogram(self, edges: Tensor) -> Tensor:
        """Number of values between edges, int64 (rows, len(edges) - 1): each interval has its left edge, the last one
        its right one too. A value near an edge may count on the other side of it, within 0.1 %.

        Args:
            edges: increasing, (E,) with two or more.
        """
        counts, middles = self._in_order()
        edges = edges.to(middles)
        found = counts.new_zeros(self.rows, len(edges) + 1)
        for row in range(self.rows if counts.any() else 0):
            inside = middles.clamp(self.minimum[row], self.maximum[row])
            places = torch.bucketize(inside, edges, right=True)
            found[row].index_add_(0, places.masked_fill(inside == edges[-1], len(edges) - 1), counts[row])
        return found[:, 1:-1]

    def _in_order(self) -> tuple[Tensor, Tensor]:
        """The counts of all bins by size (rows, bins), and the middle of each (bins,)."""
        sides = self._counts[:, 1:].view(self.rows, 2, self._octaves * _OCTAVE)
        counts = torch.cat([sides[:, 1].flip(1), self._counts[:, :1], sides[:, 0]], 1)
        keys = torch.arange(self._low * _OCTAVE, (self._low + self._octaves) * _OCTAVE, dtype=torch.int32)
        middles = ((keys << _SHIFT) + (1 << (_SHIFT - 1))).view(torch.float32).double().to(counts.device)
        return counts, torch.cat([-middles.flip(0), middles.new_zeros(1), middles])
