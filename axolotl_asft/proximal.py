"""The proximal step of the penalty: a pull towards less of it that no weight makes unstable. Pure maths on tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Directions with less than this share of the largest eigenvalue of S S^T are left to the rest: rounding is larger.
NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Curvature:
    """K = Q diag(sigma) Q^T + rest (I - Q Q^T), with orthonormal Q = S W: what one factor of dW is measured by.

    Attributes:
        S: (..., size, n), in any dtype.
        W: (..., n, n), which makes the columns of S orthonormal; None: they are.
        sigma: (..., n) eigenvalues.
        rest: (...), the eigenvalue of everything that S does not span.
    """

    S: Tensor
    W: Tensor | None
    sigma: Tensor
    rest: Tensor

    @classmethod
    def of(cls, S: Tensor, rest: Tensor | None = None) -> "Curvature":
        """K = S S^T + rest I, by the eigenvectors of S^T S."""
        wide = S.double()
        values, vectors = torch.linalg.eigh(wide.mT @ wide)
        kept = values > NEGLIGIBLE * values[..., -1:]
        scale = torch.where(kept, values, 1).rsqrt() * kept
        work = torch.float64 if S.dtype == torch.float64 else torch.float32
        rest = values.new_zeros(values.shape[:-1]) if rest is None else rest.double()
        sigma = torch.where(kept, values, 0) + rest[..., None]
        return cls(S, (vectors * scale[..., None, :]).to(work), sigma.to(work), rest.to(work))


def proximal_step(B: Tensor, M: Tensor, curvature: Curvature, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """argmin over Z of ||Z - B||_F^2 / 2 + weight tr(K Z M Z^T): an implicit gradient step, exact whatever the weight.

    Solved in the eigenbasis of K, where every row is a system of its own: q_i^T Z (I + 2 weight sigma_i M) = q_i^T B.
    Costs O((size n + n r^2) r). Nothing waits for the device.

    Args:
        B: (..., size, r).
        M: (..., r, r), symmetric and positive semi-definite.
        curvature: K, (..., size, size) in factored form.
        weight: 0 or more; a number or a scalar.

    Returns:
        Z (..., size, r), and tr(K B M B^T) before the step (...).
    """
    sigma, rest, wide = curvature.sigma, curvature.rest[..., None, None], M.double()
    S = curvature.S.to(B.dtype)
    inside = _times(curvature.W, S.mT @ B, transposed=True)
    moved = _solve(weight * sigma[..., None, None] * wide[..., None, :, :], inside[..., None, :])[..., 0, :]
    outside = _solve(weight * rest * wide, torch.cat([B, inside], dim=-2))
    B_outside, inside_outside = outside.split([B.shape[-2], inside.shape[-2]], dim=-2)
    value = (((sigma[..., None] - rest) * inside) @ M * inside).sum(dim=(-2, -1))
    value = value + curvature.rest * (B @ M * B).sum(dim=(-2, -1))
    return B_outside + S @ _times(curvature.W, moved - inside_outside), value


def _solve(quadratic: Tensor, rows: Tensor) -> Tensor:
    """rows (I + 2 quadratic)^-1, worked out in fp64, since the quadratic may be large."""
    eye = torch.eye(quadratic.shape[-1], dtype=quadratic.dtype, device=quadratic.device)
    factor = torch.linalg.cholesky_ex(eye + 2 * quadratic).L
    return torch.cholesky_solve(rows.mT.double(), factor).mT.to(rows.dtype)


def _times(W: Tensor | None, columns: Tensor, transposed: bool = False) -> Tensor:
    if W is None:
        return columns
    W = W.to(columns.dtype)
    return (W.mT if transposed else W) @ columns
