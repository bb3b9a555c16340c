"""What was so over time, in a bounded number of equally wide bins whatever the length of the run.

When the last bin is full, each two become one. Sums are exact; only their place in time is coarse.
"""

from collections.abc import Sequence

MAX_BINS = 512
_FIRST_BIN_S = 1e-3


class Timeline:
    """Integrals over time of a few quantities. A quantity that was *v* for *t* seconds adds v·t."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.bin_s = _FIRST_BIN_S
        self._bins: list[list[float]] = []

    def add(self, start_s: float, end_s: float, values: Sequence[float]) -> None:
        """Each of `values` held from `start_s` to `end_s`, both counted from the beginning."""
        while end_s > MAX_BINS * self.bin_s:
            self._halve()
        first, last = int(start_s / self.bin_s), int(end_s / self.bin_s)
        for index in range(first, min(last, MAX_BINS - 1) + 1):
            low, high = index * self.bin_s, (index + 1) * self.bin_s
            seconds = min(end_s, high) - max(start_s, low)
            if seconds > 0:
                self._add_to(index, seconds, values)

    def means(self, name: str, end_s: float) -> list[float]:
        """The quantity's mean in each bin, up to `end_s`."""
        column = self.names.index(name)
        means = []
        for index, sums in enumerate(self._bins):
            seconds = min(self.bin_s, end_s - index * self.bin_s)
            means.append(sums[column] / seconds if seconds > 0 else 0.0)
        return means

    def total(self, name: str) -> float:
        """The quantity's integral over all time."""
        column = self.names.index(name)
        return sum(sums[column] for sums in self._bins)

    def _add_to(self, index: int, seconds: float, values: Sequence[float]) -> None:
        while len(self._bins) <= index:
            self._bins.append([0.0] * len(self.names))
        sums = self._bins[index]
        for column, value in enumerate(values):
            sums[column] += value * seconds

    def _halve(self) -> None:
        self.bin_s *= 2
        pairs = [self._bins[i : i + 2] for i in range(0, len(self._bins), 2)]
        self._bins = [[sum(column) for column in zip(*pair, strict=True)] for pair in pairs]
