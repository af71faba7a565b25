"""The AsFT penalty of LoRA layers, in factored form. Pure maths on tensors.

Every function takes one layer's matrices, or those of several layers of one shape with leading dimensions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PROJECTORS = ("paper", "normalized", "subspace")
NOISE = 1e-5  # of s_1: below it a singular value is the rounding of a difference of lower rank


def projector_eigenvalues(projector: str, singular_values: Tensor, norm: Tensor | float) -> Tensor:
    """Eigenvalues c of the projector C = U diag(c) U^T of one layer.

        paper:       c_i = s_i^2 / ||d||_F      (AsFT, arXiv 2506.08473, as released; the same as Safe LoRA's)
        normalized:  c_i = s_i^2 / s_1^2
        subspace:    c_i = 1, where s_i is more than rounding (`NOISE` of s_1)

    Args:
        projector: one of `PROJECTORS`.
        singular_values: (k,) of the alignment direction d, descending.
        norm: ||d||_F over all of d, not over the k kept directions alone.

    Returns:
        (k,) in fp32 (fp64 if the singular values are). A direction that is zero (d = 0) gets eigenvalue zero.
    """
    s = singular_values if singular_values.dtype == torch.float64 else singular_values.float()
    if projector == "subspace":
        return (s > NOISE * s[:1]).to(s.dtype)
    if projector == "paper":
        scale = torch.as_tensor(norm, dtype=s.dtype, device=s.device)
    elif projector == "normalized":
        scale = s[0] ** 2 if len(s) else s.new_ones(())
    else:
        raise ValueError(f"projector is {projector!r}; expected one of {', '.join(PROJECTORS)}")
    return torch.where(scale > 0, s**2 / scale, torch.zeros_like(s))


def orthogonal_part(B: Tensor, U: Tensor, c: Tensor) -> Tensor:
    """(I - U diag(c) U^T) B, in O(out k r), without forming any out x out matrix.

    Args:
        B: (..., out, r).
        U: (..., out, k) with orthonormal columns.
        c: (..., k) eigenvalues of the projector.
    """
    return B - U @ (c[..., None] * (U.mT @ B)) if U.shape[-1] else B


def squared_norm(B: Tensor, A: Tensor) -> Tensor:
    """||B A||_F^2 = <B^T B, A A^T>, in O((out + in) r^2).

    Args:
        B: (..., out, r).
        A: (..., r, in).

    Returns:
        (...)
    """
    return _inner(B.mT @ B, A @ A.mT)


def lora_penalty(
    A: Tensor,
    B: Tensor,
    U: Tensor,
    c: Tensor,
    scaling: float | Tensor = 1.0,
    X: Tensor | None = None,
    Y: Tensor | None = None,
) -> Tensor:
    """||(I - C) scaling B A||_F^2 with C = U diag(c) U^T: the AsFT penalty of one layer (arXiv 2506.08473).

    With X and Y it is ||Y^T (I - C) scaling B A X||_F^2: not how far the weight moves, but what that does to the
    outputs that Y looks at, on the inputs that X stands for.

    Value and gradient cost O((out (k + r) + in r) r) time and O((out + in) r + out k) memory; no tensor of
    shape out x in or out x out is formed. The computation runs in fp32 whatever the dtype of A and B (in fp64
    if they are fp64), also inside autocast. The orthogonal part Z = (I - C) B is formed before it is squared,
    so that nothing cancels when the update lies almost wholly inside the subspace.

    Args:
        A: (..., r, in), the LoRA down-projection.
        B: (..., out, r), the LoRA up-projection.
        U: (..., out, k), orthonormal columns; k = 0 makes the penalty plain L2, ||scaling B A||_F^2.
        c: (..., k), eigenvalues of the projector.
        scaling: PEFT's factor in dW = scaling B A; a number, or (...) of them.
        X: (..., in, m), the metric on the side of the inputs; adds O(in m r) to the cost. None: the identity.
        Y: (..., out, n), the metric on the side of the outputs; adds O(out n r). None: the identity.

    Returns:
        (...), a scalar for one layer; differentiable once with respect to A and B.
    """
    return _LoraPenalty.apply(A, B, U, c, scaling, X, Y)


def lora_penalty_gradient(
    A: Tensor,
    B: Tensor,
    U: Tensor,
    c: Tensor,
    scaling: float | Tensor = 1.0,
    X: Tensor | None = None,
    Y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value of `lora_penalty` and its gradients in closed form, without autograd.

        Z = Y^T (I - C) B,  A' = A X
        dP/dA = 2 scaling^2 Z^T Z A' X^T            (..., r, in)
        dP/dB = 2 scaling^2 (I - C) Y Z A' A'^T     (..., out, r)

    Cost and arguments as for `lora_penalty`; the results are in fp32, in fp64 where A is.
    """
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        work = torch.float64 if A.dtype == torch.float64 else torch.float32
        a, b, u, eigenvalues = (tensor.to(work) for tensor in (A, B, U, c))
        x, y = (None if factor is None else factor.to(work) for factor in (X, Y))
        a = a if x is None else a @ x
        z = orthogonal_part(b, u, eigenvalues)
        z = z if y is None else y.mT @ z
        # r x r; the factor goes on the small matrices
        factor = scaling**2
        gram_z, gram_a = z.mT @ z, a @ a.mT
        value = factor * _inner(gram_z, gram_a)
        twice = 2 * (factor[..., None, None] if isinstance(factor, Tensor) else factor)
        grad_a = (twice * gram_z) @ a
        grad_a = grad_a if x is None else grad_a @ x.mT
        z = z if y is None else y @ z
        # C is symmetric: the gradient with respect to B is (I - C)^T = (I - C) applied once more
        grad_b = orthogonal_part(z, u, eigenvalues) @ (twice * gram_a)
        return value, grad_a, grad_b


def _inner(P: Tensor, Q: Tensor) -> Tensor:
    return (P * Q).sum(dim=(-2, -1))


class _LoraPenalty(torch.autograd.Function):
    """Computes the gradients in the forward pass, so that only tensors of the size of A and B are kept."""

    @staticmethod
    def forward(ctx, A: Tensor, B: Tensor, U: Tensor, c: Tensor, scaling: float | Tensor, X, Y) -> Tensor:
        value, grad_a, grad_b = lora_penalty_gradient(A, B, U, c, scaling, X, Y)
        ctx.save_for_backward(grad_a, grad_b)
        ctx.dtypes = (A.dtype, B.dtype)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        grad_a, grad_b = ctx.saved_tensors
        dtype_a, dtype_b = ctx.dtypes
        weight = grad_output[..., None, None]
        return (weight * grad_a).to(dtype_a), (weight * grad_b).to(dtype_b), *[None] * 5


def relative_drift(orthogonal: Tensor | float, total: Tensor | float) -> float:
    """||(I - C) dW|| / ||dW||, or over another yardstick, from the two squared norms.

    0 where both are zero; NaN where the yardstick alone is, or is not finite, as after a training that diverged.
    """
    # rounding may leave a little below 0; max keeps a NaN that comes first
    orthogonal, total = max(float(orthogonal), 0.0), max(float(total), 0.0)
    if total == 0:
        return 0.0 if orthogonal == 0 else math.nan
    return math.sqrt(orthogonal / total) if math.isfinite(total) else math.nan


@dataclass(frozen=True)
class LayerDrift:
    """Squared norms of one layer's update dW = scaling B A.

    Attributes:
        orthogonal: ||(I - C) dW||_F^2.
        total: ||dW||_F^2.
        penalty: the layer's part of P: ||Y^T (I - C) dW X||_F^2, without the scaling where that is left out.
        relative: ||Y^T (I - C) dW X||_F / ||Y^T d X||_F: how far off the direction, in units of what alignment did;
            NaN where the layer moved and alignment had left it alone (d = 0), and where it is not finite.
    """

    name: str
    orthogonal: float
    total: float
    penalty: float
    relative: float

    @property
    def drift(self) -> float:
        """||(I - C) dW|| / ||dW||: 0 along the alignment direction, 1 orthogonal to it."""
        return relative_drift(self.orthogonal, self.total)

    @property
    def has_yardstick(self) -> bool:
        """Whether `relative` can be said: not where only fine-tuning moved the layer."""
        return not (math.isnan(self.relative) and math.isfinite(self.penalty))
