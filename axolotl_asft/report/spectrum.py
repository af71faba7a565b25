"""The singular values of an update dW = scaling B A, and how much of each lies in the aligned subspace."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Of one layer.

    Attributes:
        values: singular values of dW, descending, as many as the adapter's rank.
        inside: for each, ||U^T u_i||^2: the share of its left singular vector in the aligned subspace; empty where
            the direction is not at hand.
        chance: the share of a random vector that lies there, k / out.
    """

    values: list[float]
    inside: list[float]
    chance: float

    @property
    def share(self) -> float:
        """||U^T dW||^2 / ||dW||^2: of the whole update; 0 where dW is zero."""
        total = sum(value**2 for value in self.values)
        within = sum(value**2 * part for value, part in zip(self.values, self.inside, strict=True))
        return within / total if total else 0.0


def update_spectrum(A: Tensor, B: Tensor, scaling: float, U: Tensor | None) -> Spectrum:
    """The spectrum of scaling B A, in O((out + in) r^2 + out k r); nothing of the size of dW is formed.

        B = Q_B R_B,  A^T = Q_A R_A,  R_B R_A^T = u diag(s) v^T:  dW = scaling (Q_B u) diag(s) (Q_A v)^T

    Args:
        A: (r, in). B: (out, r).
        scaling: PEFT's factor.
        U: (out, k), orthonormal columns that span the aligned subspace; None: not at hand.
    """
    Q_B, R_B = torch.linalg.qr(B.double())  # in which the product of any two finite factors is finite
    _, R_A = torch.linalg.qr(A.double().T)
    u, s, _ = torch.linalg.svd(R_B @ R_A.T)
    values = (abs(scaling) * s).tolist()
    if U is None:
        return Spectrum(values, [], 0.0)
    left = Q_B @ u[:, : len(s)]
    inside = (U.double().T @ left).square().sum(dim=0).clamp(max=1.0)
    return Spectrum(values, inside.tolist(), U.shape[1] / U.shape[0])
