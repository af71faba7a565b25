"""Leading singular directions of one weight difference, with a certificate of what was left out."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this size of the smaller side a full SVD is taken; it is exact, and quick enough on a CPU.
EXACT_UP_TO = 1536
OVERSAMPLING = 16
POWER_ITERATIONS = 6
ROWS_AT_ONCE = 256  # of a matrix that is looked at in float64


@dataclass(frozen=True)
class LowRank:
    """d = B A, never multiplied out.

    Attributes:
        B: (out, r) fp32.
        A: (r, in) fp32.
    """

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.B.shape[0], self.A.shape[1]))

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.B @ (self.A @ other)


@dataclass(frozen=True)
class Subspace:
    """d is nearly U diag(S) V^T: the k leading singular triplets of one difference d (out x in).

    Attributes:
        U: (out, k), orthonormal columns (up to the rounding of its dtype).
        S: (k,) fp32, descending.
        V: (in, k), the right singular vectors.
        norm: () fp32, ||d||_F over all of d.
        energy: share of ||d||_F^2 that the k directions carry, 0 to 1.
        bound: | P(C) - P(U, S) | <= bound * ||dW||_F^2 for the `paper` projector and every update dW.
        method: "exact", "randomized", or "factored" for a difference that is given as its factors.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    norm: Tensor
    energy: float
    bound: float
    method: str

    @property
    def rank(self) -> int:
        return self.U.shape[1]


def leading_subspace(
    d: Tensor | LowRank,
    rank: int | None = 64,
    tolerance: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    energy: float | None = None,
    max_rank: int | None = None,
) -> Subspace:
    """The k leading singular triplets of d, with signs fixed and a certified truncation error.

    Args:
        d: (out, in), the difference aligned minus base, fp32; or its factors.
        rank: k, cut to min(out, in); None: as many as `tolerance` or `energy` asks for.
        tolerance: with `rank=None`, the smallest k whose `bound` is at most this.
        energy: with `rank=None`, the smallest k with this share of ||d||_F^2, 0 to 1.
        max_rank: with `rank=None`, k is at most this, whether or not that is enough; None: min(out, in).
        dtype: of the returned U and V; the bound takes its rounding into account.
        seed: of the randomised method; the global generators are left alone.

    A matrix whose smaller side is at most 1536, or of which more than a quarter of the directions is wanted,
    is decomposed exactly; others by randomised subspace iteration (Halko, Martinsson, Tropp 2011, alg. 4.4). Factors
    are decomposed exactly without being multiplied out.

    Raises:
        ValueError: without a rank, neither or both of tolerance and energy.
    """
    smaller = min(d.shape)
    d = d if isinstance(d, LowRank) else d.float()
    norm = frobenius_norm(d)
    if [rank, tolerance, energy].count(None) != 2 and rank is None:
        raise ValueError("rank is None; give either tolerance or energy")
    if norm == 0:
        return _zero_subspace(d, dtype)
    wanted = min(smaller, next(limit for limit in (rank, max_rank, smaller) if limit is not None))
    if isinstance(d, LowRank):
        U, S, V = _factored_svd(d)
        wanted, method = min(wanted, len(S)), "factored"
    elif smaller <= EXACT_UP_TO or 4 * wanted > smaller:
        U, S, Vh = torch.linalg.svd(d, full_matrices=False)
        V, method = Vh.T, "exact"
    else:
        U, S, V = _randomized_svd(d, wanted, seed)
        method = "randomized"
    spectrum = S
    U, S, V = _fix_signs(U[:, :wanted], S[:wanted], V[:, :wanted])
    stored = U.to(dtype)
    if isinstance(d, LowRank) or method == "exact":
        bounds = _exact_bounds(spectrum, U, stored, norm)
    else:
        bounds = _certified_bounds(d, U, S, V, stored, norm, sharp=rank is None and energy is None)
    if rank is not None:
        k = wanted
    elif energy is not None:
        k = _smallest_with_energy(S, norm, energy)
    else:
        k = _smallest_rank(bounds, float(tolerance or 0.0))
    kept = S[:k].float()
    return Subspace(
        U=stored[:, :k].contiguous(),
        S=kept.contiguous(),
        V=V[:, :k].to(dtype).contiguous(),
        norm=norm.float(),
        energy=min(1.0, float((kept.double() ** 2).sum() / norm**2)),
        bound=float(bounds[k]),
        method=method,
    )


def frobenius_norm(d: Tensor | LowRank) -> Tensor:
    """() float64, ||d||_F; of a matrix (out, in) without a copy of it in float64."""
    if isinstance(d, LowRank):
        return torch.linalg.matrix_norm(_core(d)[1])
    total = torch.zeros((), dtype=torch.float64, device=d.device)
    for part in d.split(ROWS_AT_ONCE):
        total += (
            part.double().square().sum()
        )  # nothing small is kept between the large blocks: they would not be reused
    return total.sqrt()


def _zero_subspace(d: Tensor | LowRank, dtype: torch.dtype) -> Subspace:
    rows, columns = d.shape
    like = d.A if isinstance(d, LowRank) else d
    return Subspace(
        U=like.new_zeros((rows, 0), dtype=dtype),
        S=like.new_zeros((0,)),
        V=like.new_zeros((columns, 0), dtype=dtype),
        norm=like.new_zeros(()),
        energy=1.0,
        bound=0.0,
        method="exact",
    )


def _randomized_svd(d: Tensor, wanted: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Like `torch.svd_lowrank`, which draws from the global generators: threads would disturb each other's numbers.

    Those drawn here are the CPU's, so that every device starts alike.
    """
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(d.shape[1], min(wanted + OVERSAMPLING, *d.shape), generator=generator)
    Q = torch.linalg.qr(d @ sketch.to(d.device)).Q
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(d @ torch.linalg.qr(d.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ d, full_matrices=False)
    return Q @ U, S, Vh.T


def _core(d: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Q, R, P with B A = Q R P^T, Q and P of orthonormal columns, R at most r x r; float64."""
    Q, R_B = torch.linalg.qr(d.B.double())
    P, R_A = torch.linalg.qr(d.A.double().T)
    return Q, R_B @ R_A.T, P


def _factored_svd(d: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of B A that are not zero, at most r, in O((out + in) r^2)."""
    Q, R, P = _core(d)
    U, S, Vh = torch.linalg.svd(R)
    kept = slice(0, min(R.shape))
    return (Q @ U[:, kept]).float(), S.float(), (P @ Vh[kept].T).float()


def _fix_signs(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the entry of largest magnitude of every column of U positive, so that equal inputs agree."""
    largest = U.abs().argmax(dim=0)
    signs = torch.sign(U.gather(0, largest[None, :])).squeeze(0)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return U * signs, S, V * signs


def _penalty_weight(c: Tensor) -> Tensor:
    """w = c (2 - c): the penalty is ||dW||^2 - sum_i w_i ||u_i^T dW||^2."""
    return c * (2 - c)


def _largest_weight_up_to(c: Tensor) -> Tensor:
    """max over 0 <= x <= c of |x (2 - x)|: rises to 1 at x = 1, and again above 1 + sqrt 2."""
    return torch.where(c <= 1, _penalty_weight(c), torch.maximum(torch.ones_like(c), -_penalty_weight(c)))


def _exact_bounds(spectrum: Tensor, U: Tensor, stored: Tensor, norm: Tensor) -> Tensor:
    """(wanted + 1,): the bound for k = 0, 1, ..., wanted, from the whole spectrum."""
    wanted = U.shape[1]
    c = spectrum.double() ** 2 / norm
    dropped = torch.cat([c, c.new_zeros(1)])[: wanted + 1]
    truncation = _largest_weight_up_to(dropped)
    return truncation + _rounding_bounds(U, stored, c[:wanted])


def _rounding_bounds(U: Tensor, stored: Tensor, c: Tensor) -> Tensor:
    """(k + 1,): how far rounding U to its stored dtype can move the penalty, for the leading 0, 1, ..., k columns.

    With E = stored - U, C moves by D = E c U^T + U c E^T + E c E^T, and (I - C)^2, whose norm is the penalty's, by

        -(A + A^T) + U c (U^T E + E^T U) c U^T - (I - C) E c E^T - E c E^T (I - C) + D^2,    A = E diag(c (2 - c)) U^T

    of which the Frobenius norms of the first two terms are taken as they are, and the others from their factors.
    """
    E = stored.double() - U.double()
    S, squares = U.double().T @ E, (E**2).sum(dim=0)
    w, none = _penalty_weight(c), E.new_zeros(1)
    inner = _leading_sums((c[:, None] * (S + S.T) * c) ** 2)
    outer = 2 * torch.cumsum(w**2 * squares, dim=0) + 2 * _leading_sums(w[:, None] * S * S.T * w)
    second = torch.cumsum(c * squares, dim=0)  # of ||E sqrt(c)||_F^2
    moved = 2 * torch.cumsum(c**2 * squares, dim=0).sqrt() + second
    g = torch.clamp((1 - c[:1]).abs().sum(), min=1.0)
    bounds = torch.clamp(outer, min=0.0).sqrt() + inner.sqrt() + 2 * g * second + moved**2
    return torch.cat([none, bounds])


def _leading_sums(matrix: Tensor) -> Tensor:
    """(k,): the sums over the leading 1 x 1, 2 x 2, ..., k x k blocks."""
    return matrix.cumsum(dim=0).cumsum(dim=1).diagonal()


def _smallest_rank(bounds: Tensor, tolerance: float) -> int:
    within = torch.nonzero(bounds <= tolerance)
    return int(within[0]) if len(within) else int(bounds.argmin())


def _smallest_with_energy(S: Tensor, norm: Tensor, energy: float) -> int:
    shares = torch.cumsum(S.double() ** 2, dim=0) / norm**2
    return min(len(S), 1 + int((shares < energy).sum()))


def _certified_bounds(d: Tensor, U: Tensor, S: Tensor, V: Tensor, stored: Tensor, norm: Tensor, sharp: bool) -> Tensor:
    """(k + 1,): for the leading 0, 1, ..., k triplets, bounds that hold however well the method converged.

    With R = d - U S V^T, of which U^T R or R V vanishes, d d^T = U S^2 U^T + R R^T + (R V S) U^T + its transpose. So
    leaving out the triplets from j on moves C by at most ||R V S||_F + s_j^2 + ||R||_2^2, over ||d||_F. For ||R||_2^2
    stands ||R||_F^2; or, if `sharp`, ||R R^T||_F, which is far less where R is spread over many directions, and costs a
    product of R with itself.
    """
    product = d @ (V * S)
    cross = product - U @ (U.T @ product)
    x = torch.linalg.matrix_norm(cross.double()) / norm
    rest = torch.clamp(norm**2 - (S.double() ** 2).sum(), min=0.0)
    if sharp:
        rest = torch.minimum(rest, _gram_norm(d - (U * S) @ V.T))
    c = S.double() ** 2 / norm
    e = x + torch.cat([c, c.new_zeros(1)]) + rest / norm
    g = torch.clamp((1 - c.max()).abs(), min=1.0)
    return 2 * g * e + e**2 + _rounding_bounds(U, stored, c)


def _gram_norm(R: Tensor) -> Tensor:
    """() float64, ||R R^T||_F: at least ||R||_2^2, at most ||R||_F^2. Of the smaller side, and one half of it."""
    R = R if R.shape[0] <= R.shape[1] else R.T
    total = torch.zeros((), dtype=torch.float64, device=R.device)
    for first in range(0, R.shape[0], ROWS_AT_ONCE):
        rows = R[first : first + ROWS_AT_ONCE]
        total += 2 * (rows @ R[:first].T).double().square().sum() + (rows @ rows.T).double().square().sum()
    return total.sqrt()
