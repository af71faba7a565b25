"""Second moments of a stream of vectors, in factored form: E[x x^T] ~ F F^T. Pure maths on tensors."""

from functools import lru_cache

import torch
from torch import Tensor

OVERSAMPLING = 64


class SecondMoment:
    """M = sum over rows x of weight x x^T, kept as M Omega for a random Omega: a single-pass Nystrom sketch.

    Memory is O(size (rank + 64)) and a row costs as much, however many rows come: the size x size matrix is never
    formed. The sketch is kept on the CPU, and Omega, on the device of the rows, is one for all moments of a size:
    hundreds of layers take a device no more than one does. Exact where M has at most rank + 64 directions (Tropp,
    Yurtsever, Udell, Cevher 2017, arXiv 1706.05736).

    Args:
        size: of the vectors.
        rank: directions wanted.
    """

    def __init__(self, size: int, rank: int):
        self.rank = min(rank, size)
        self._drawn = size, min(size, rank + OVERSAMPLING)
        self.sketch = torch.zeros(size, self._drawn[1])
        self.trace = 0.0

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows (n, size), each with a weight of weights (n,), on any device and in any dtype."""
        rows = rows.float()
        weighted = rows if weights is None else rows * weights.float()[:, None]
        self.sketch += (weighted.T @ (rows @ _omega(*self._drawn, rows.device))).cpu()
        self.trace += float((weighted * rows).sum(dtype=torch.float64))

    def factor(self, energy: float = 1.0) -> tuple[Tensor, float]:
        """F (size, k) fp32 on the CPU with F F^T ~ M, columns descending; and the share of M's trace in them.

        k is the smallest number of directions whose share is `energy`, at most rank, and less where M has fewer.
        """
        omega, sketch = _omega(*self._drawn, torch.device("cpu")).double(), self.sketch.double()
        shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(sketch)
        if self.trace <= 0 or shift == 0:
            return omega[:, :0].float(), 1.0
        # M + shift I in place of M: its Cholesky factor exists whatever fp32 did to the sketch
        shifted = sketch + shift * omega
        core = omega.T @ shifted
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > shift / 2
        half = shifted @ (vectors[:, kept] / values[kept].sqrt())
        U, S, _ = torch.linalg.svd(half, full_matrices=False)
        energies = (S.square() - shift).clamp(min=0)[: self.rank]
        energies = energies[energies > shift]
        k = 1 + int((energies.cumsum(0) < energy * self.trace).sum())
        energies = energies[:k]
        F = U[:, : len(energies)] * energies.sqrt()
        return F.float(), min(1.0, float(energies.sum()) / self.trace)


@lru_cache(maxsize=16)  # a model's layers have a handful of sizes
def _omega(size: int, columns: int, device: torch.device) -> Tensor:
    """(size, columns) fp32 with orthonormal columns; not to be written to. The global generators are left alone."""
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(omega)[0].float().to(device)
