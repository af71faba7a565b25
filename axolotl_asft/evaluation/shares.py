"""Shares with their uncertainty. Standard library alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """k of n, with Wilson's 95 % interval (Wilson 1927), which holds for small n and near 0 and 1.

    Attributes:
        value: k / n, 0 to 1.
        low, high: the ends of the interval.
        n: how many were asked.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, flags: Sequence[bool]) -> "Share":
        """The share of true flags; NaN of none."""
        n, k = len(flags), sum(map(bool, flags))
        if n == 0:
            return cls(math.nan, 0.0, 1.0, 0)
        low, high = wilson_interval(k, n)
        return cls(k / n, low, high, n)

    @classmethod
    def over_repeats(cls, shares: Sequence["Share"]) -> "Share":
        """The mean of shares of the same prompts, asked of several models; the prompts count once in the interval.

        Raises:
            ValueError: the shares are of unlike numbers of prompts, or there is none.
        """
        numbers = {share.n for share in shares}
        if len(numbers) != 1:
            raise ValueError(f"shares of {sorted(numbers)} prompts are not of the same ones")
        n = numbers.pop()
        if n == 0:
            return shares[0]
        value = sum(share.value for share in shares) / len(shares)
        return cls(value, *wilson_interval(round(value * n), n), n)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.0%} to {self.high:.0%})" if self.n else "none asked"


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = k/n: the 95 % interval of a share."""
    p, z = k / n, Z_95
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
