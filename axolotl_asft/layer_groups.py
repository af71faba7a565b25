"""LoRA layers of one shape as batched products: their directions stacked once, their penalty a few calls for all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_asft.lora import FoundLayer
from axolotl_asft.penalty import (
    lora_penalty,
    lora_penalty_gradient,
    orthogonal_part,
    squared_norm,
)
from axolotl_asft.sharding import add_to_gradients, overwrite, whole

# What one group's products may take beside the directions, in bytes: the layers of a large model are taken in turns.
TEMPORARY_BYTES = 24 * 2**20
# On a GPU launches take longer than the arithmetic, and what the backward pass took is free again by then.
TEMPORARY_BYTES_ON_GPU = 128 * 2**20


@contextmanager
def in_full_precision() -> Iterator[None]:
    """fp32 products in fp32, where a run allows TF32: (I - C) B is a difference, often of nearly equal numbers."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"  # torch 2.8 has the latter alone
    before = getattr(matmul, name)
    setattr(matmul, name, "ieee" if name == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@dataclass(frozen=True)
class ConstrainedLayer:
    """One LoRA layer and the projector of its alignment direction.

    Attributes:
        found: the layer; its A and B are looked up at every call, since engines replace them.
        U: (out, k), in its stored dtype.
        c: (k,), eigenvalues of the projector.
        size: ||Y^T d X||_F, the size of what alignment did to the layer, in the metric.
        X, Y: (in, m) and (out, n), the factors of the metric; None: the identity.
        initial: A0 and B0 where the initialisation took scaling B0 A0 out of the base weight.
    """

    found: FoundLayer
    U: Tensor
    c: Tensor
    size: float
    X: Tensor | None = None
    Y: Tensor | None = None
    initial: tuple[Tensor, Tensor] | None = None

    def bytes_at_work(self) -> int:
        """What the penalty of this layer takes for a moment: its factors in fp32, and A- and B-shaped results."""
        (r, columns), out = self.found.A.shape, self.found.B.shape[0]
        m, n = (0 if factor is None else factor.shape[1] for factor in (self.X, self.Y))
        return 4 * (out * (self.U.shape[1] + n + 4 * r) + columns * (m + 3 * r))


class LayerGroup:
    """g LoRA layers of one shape on one device.

    Attributes:
        found: the layers.
        U, c, sizes, X, Y: (g, out, k), (g, k), (g,), (g, in, m) and (g, out, n) or None: their directions and metric,
            stacked. Where layers keep different numbers of columns, the missing ones are zero, which adds nothing.
        bytes_at_work: what the penalty of all of them takes for a moment, estimated.
    """

    def __init__(self, layers: list[ConstrainedLayer], device: torch.device):
        self.found = [layer.found for layer in layers]
        self.bytes_at_work = len(layers) * max(layer.bytes_at_work() for layer in layers)
        self.U = _stacked([layer.U for layer in layers], device)
        self.c = _stacked([layer.c[None] for layer in layers], device)[:, 0]
        self.sizes = torch.tensor([layer.size for layer in layers], device=device)
        self.X, self.Y = (
            None if any(factor is None for factor in factors) else _stacked(factors, device)
            for factors in ([layer.X for layer in layers], [layer.Y for layer in layers])
        )
        self.initial: tuple[Tensor, Tensor] | None = None
        if all(layer.initial is not None for layer in layers):
            A0, B0 = zip(*(layer.initial for layer in layers if layer.initial is not None), strict=True)
            self.initial = torch.stack(A0), torch.stack(B0)

    @property
    def scaling(self) -> float | Tensor:
        """PEFT's factor of every layer: a number where it is one for all."""
        scalings = [found.scaling for found in self.found]
        return scalings[0] if len(set(scalings)) == 1 else torch.tensor(scalings, device=self.U.device)

    def update(self) -> tuple[Tensor, Tensor]:
        """The factors of the change from the aligned weight, dW = scaling B A: A (g, r, in), B (g, out, r).

        B A - B0 A0 is written as [B - B0, B0] [A; A - A0], of rank 2 r, in which nothing cancels.
        """
        A = torch.stack([whole(found.A) for found in self.found])
        B = torch.stack([whole(found.B) for found in self.found])
        if self.U.device != A.device:
            self._move(A.device)
        if self.initial is None:
            return A, B
        A0, B0 = self.initial
        return torch.cat([A, A - A0], dim=1), torch.cat([B - B0, B0], dim=2)

    def penalty(self, scaled: bool) -> Tensor:
        """P of these layers, with gradients; without PEFT's scaling where not `scaled`."""
        A, B = self.update()  # moves the direction to where the factors are
        return lora_penalty(A, B, self.U, self.c, self.scaling if scaled else 1.0, self.X, self.Y).sum()

    @torch.no_grad()
    @in_full_precision()
    def add_gradient(self, scaled: bool, weight: Tensor | float) -> Tensor:
        """Add weight dP/dA and weight dP/dB to the gradients of every A and B; returns P."""
        A, B = self.update()
        scaling = self.scaling if scaled else 1.0
        value, grad_A, grad_B = lora_penalty_gradient(A, B, self.U, self.c, scaling, self.X, self.Y)
        if self.initial is not None:
            r = grad_B.shape[-1] // 2
            # A stands in both halves of [A; A - A0], B in the first half of [B - B0, B0]
            grad_A, grad_B = grad_A[:, :r] + grad_A[:, r:], grad_B[..., :r]
        for parameters, gradients in (([f.A for f in self.found], grad_A), ([f.B for f in self.found], grad_B)):
            # a loss scale is a scalar of the first device, and a model may lie on several
            own = weight.to(gradients.device) if isinstance(weight, Tensor) else weight
            add_to_gradients(parameters, own * gradients)
        return value.sum()

    @in_full_precision()
    def squared_norms(self) -> Tensor:
        """(g, 3): ||(I - C) dW||^2, ||dW||^2 and ||Y^T (I - C) dW X||^2 of every layer."""
        A, B = (factor.float() for factor in self.update())
        off = squared_norm(orthogonal_part(B, self.U.float(), self.c), A)
        measured = off if self.X is None and self.Y is None else self._orthogonal(A, B)
        scaling = self.scaling
        squared = scaling[:, None] ** 2 if isinstance(scaling, Tensor) else scaling**2
        return squared * torch.stack([off, squared_norm(B, A), measured], dim=1)

    @in_full_precision()
    def shorten(self, max_drift: float) -> Tensor:
        """Bring ||Y^T (I - C) dW X|| down to max_drift ||Y^T d X||; (g,) factors, 1 where it is below already.

        B <- f B + (1 - f) U_1 U_1^T B, with U_1 the columns of U whose eigenvalue is 1: what lies wholly along the
        direction is free and stays, all else shrinks by f, and so does (I - C) B, up to the rounding of U.
        """
        A, B = (factor.float() for factor in self.update())
        # of factors that cancel, as orthogonal initialisation's do, the product of squares may round below 0
        length = self.scaling * self._orthogonal(A, B).clamp(min=0).sqrt()
        factors = torch.clamp(max_drift * self.sizes / torch.clamp(length, min=1e-30), max=1.0)
        free = self.U.float() * (self.c == 1)[:, None]
        f, inside = factors[:, None, None], free.mT @ B
        inside = 2 * inside - (free.mT @ free) @ inside  # rounded columns are not orthonormal, and steps add up
        overwrite([found.B for found in self.found], f * B + (1 - f) * (free @ inside))
        return factors

    def _orthogonal(self, A: Tensor, B: Tensor) -> Tensor:
        """(g,): ||Y^T (I - C) B A X||_F^2 in fp32, without the scaling."""
        Z = orthogonal_part(B, self.U.float(), self.c)
        return squared_norm(Z if self.Y is None else self.Y.float().mT @ Z, A if self.X is None else A @ self.X.float())

    def _move(self, device: torch.device) -> None:
        self.U, self.c, self.sizes = self.U.to(device), self.c.to(device), self.sizes.to(device)
        self.X, self.Y = (None if factor is None else factor.to(device) for factor in (self.X, self.Y))
        if self.initial is not None:
            self.initial = self.initial[0].to(device), self.initial[1].to(device)


def grouped(layers: Iterable[ConstrainedLayer]) -> list[LayerGroup]:
    """The layers in groups of one shape, device and scaling, none larger than `may_take` allows."""
    kinds: dict[tuple, list[ConstrainedLayer]] = {}
    for layer in layers:
        A, B = layer.found.A, layer.found.B
        kind = (A.shape, B.shape, A.dtype, B.dtype, A.device, B.device, A.requires_grad, B.requires_grad)
        given = (layer.X is None, layer.Y is None, layer.initial is None, layer.found.scaling)
        kinds.setdefault((*kind, *given), []).append(layer)
    groups = []
    for kind, alike in kinds.items():
        # a meta device has nothing on it yet: the directions follow A when it is first used
        device = torch.device("cpu") if kind[4].type == "meta" else kind[4]
        groups += [LayerGroup(chunk, device) for chunk in _chunks(alike, may_take())]
    return groups


def may_take() -> int:
    """What a group's products may take, in bytes. By the machine and not by where the weights are now: the processes of
    a run, of which one may have them on its CPU and others nowhere yet, have to gather the same layers together."""
    return TEMPORARY_BYTES_ON_GPU if torch.cuda.is_available() else TEMPORARY_BYTES


def _chunks(alike: list[ConstrainedLayer], most: int) -> Iterator[list[ConstrainedLayer]]:
    """In turns of at most `most` bytes at work; neighbours keep nearly as many columns: little is filled up."""
    alike = sorted(alike, key=ConstrainedLayer.bytes_at_work, reverse=True)
    while alike:
        count = max(1, most // alike[0].bytes_at_work())
        yield alike[:count]
        alike = alike[count:]


def _stacked(matrices: list[Tensor | None], device: torch.device) -> Tensor:
    """(g, rows, most columns), filled up with zeros."""
    given = [matrix for matrix in matrices if matrix is not None]
    columns = max(matrix.shape[1] for matrix in given)
    stack = torch.zeros((len(given), len(given[0]), columns), dtype=given[0].dtype, device=device)
    for place, matrix in zip(stack, given, strict=True):
        place[:, : matrix.shape[1]] = matrix
    return stack
