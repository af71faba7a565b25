"""Leading directions against a full SVD, and the certificate against the worst update there is."""

import pytest
import torch

from axolotl_asft import subspace
from axolotl_asft.subspace import LowRank, leading_subspace

SPECTRA = {
    "flat": lambda n: torch.ones(n),
    "steep": lambda n: 2.0 ** -torch.arange(n),
    "slow": lambda n: 1.0 / (1 + torch.arange(n)),
    "deficient": lambda n: (torch.arange(n) < 5).float(),
    "tiny": lambda n: 1e-8 / (1 + torch.arange(n)),
    "huge": lambda n: 1e4 / (1 + torch.arange(n)),
    "past two": lambda n: 5.0 / (1 + torch.arange(n)) ** 2,
}


def with_spectrum(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return ((U * values.double()) @ V.T).float()


def worst_error(d: torch.Tensor, found: subspace.Subspace) -> float:
    """The largest | P(C) - P(stored U, S) | over all updates of norm 1: an eigenvalue of the dense difference."""
    d, U, S = d.double(), found.U.double(), found.S.double()
    norm = torch.linalg.matrix_norm(d)
    identity = torch.eye(len(d), dtype=torch.float64)
    full = identity - d @ d.T / norm
    kept = identity - U @ torch.diag(S**2 / norm) @ U.T
    return float(torch.linalg.eigvalsh(full @ full - kept @ kept).abs().max())


@pytest.fixture(params=["exact", "randomized"])
def method(request, monkeypatch):
    if request.param == "randomized":
        monkeypatch.setattr(subspace, "EXACT_UP_TO", 0)
    return request.param


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("shape", [(96, 60), (60, 96)])
def test_the_bound_holds_for_the_worst_update(method, spectrum, dtype, rank, shape):
    d = with_spectrum(SPECTRA[spectrum](60), *shape)
    found = leading_subspace(d, rank, dtype=dtype)
    assert found.method == method
    assert worst_error(d, found) <= found.bound * (1 + 1e-3) + 1e-6
    assert found.rank == rank


@pytest.mark.parametrize("spectrum", ["steep", "slow", "tiny", "huge"])
def test_against_a_full_svd(method, spectrum):
    d = with_spectrum(SPECTRA[spectrum](60), 60, 96)
    found = leading_subspace(d, 5, dtype=torch.float32)
    U, S, Vh = torch.linalg.svd(d.double(), full_matrices=False)
    torch.testing.assert_close(found.S.double(), S[:5], rtol=1e-4, atol=0)
    for got, expected in ((found.U, U[:, :5]), (found.V, Vh[:5].T)):
        torch.testing.assert_close((got.double().T @ expected).abs(), torch.eye(5).double(), rtol=0, atol=2e-3)
    assert float(found.norm) == pytest.approx(float(torch.linalg.matrix_norm(d.double())), rel=1e-6)
    assert found.energy == pytest.approx(float((S[:5] ** 2).sum() / (S**2).sum()), rel=1e-4)


def test_the_exact_bound_is_sharp():
    d = with_spectrum(SPECTRA["slow"](40), 50, 40)
    found = leading_subspace(d, 4, dtype=torch.float32)
    assert found.bound == pytest.approx(worst_error(d, found), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spectrum", ["slow", "steep", "past two"])
def test_the_bound_of_rounding_is_near_the_worst(spectrum, dtype):
    """All directions are kept, so that nothing else is lost; a loose bound would make a tolerance take more of them."""
    d = with_spectrum(SPECTRA[spectrum](40), 400, 40)
    found = leading_subspace(d, 40, dtype=dtype)
    worst = worst_error(d, found)
    assert worst <= found.bound <= 2.5 * worst
    assert found.bound > 1e-5


def test_the_smallest_rank_within_a_tolerance():
    d = with_spectrum(SPECTRA["slow"](40), 50, 40)
    found = leading_subspace(d, None, tolerance=0.05, dtype=torch.float32)
    assert worst_error(d, found) <= 0.05
    assert leading_subspace(d, found.rank - 1, dtype=torch.float32).bound > 0.05


@pytest.mark.parametrize("tolerance", [0.5, 0.05, 0.01])
def test_a_tolerance_is_kept_by_either_method(method, tolerance):
    d = with_spectrum(SPECTRA["slow"](60), 96, 60)
    found = leading_subspace(d, None, tolerance=tolerance, dtype=torch.float32, max_rank=14)
    assert found.method == method
    assert worst_error(d, found) <= found.bound * (1 + 1e-3) + 1e-6
    if found.rank < 14:
        assert found.bound <= tolerance
        assert leading_subspace(d, found.rank - 1, dtype=torch.float32).bound > tolerance if found.rank > 1 else True


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("iterations", [0, 6])
def test_the_certificate_sees_that_the_rest_is_spread(monkeypatch, shape, iterations):
    """Noise in all directions, as rounding to bf16 leaves it: no single one of them is as long as all together."""
    monkeypatch.setattr(subspace, "EXACT_UP_TO", 0)
    monkeypatch.setattr(subspace, "POWER_ITERATIONS", iterations)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    d = with_spectrum(SPECTRA["steep"](40), *shape) + 0.3 * noise / noise.norm()
    found = leading_subspace(d, None, tolerance=0.05, max_rank=20, dtype=torch.float32)
    assert worst_error(d, found) <= found.bound * (1 + 1e-3)
    if iterations:
        assert found.rank < 12
        assert found.bound <= 0.05
        assert leading_subspace(d, found.rank, dtype=torch.float32).bound > 2 * found.bound


def test_factors_are_decomposed_like_their_product():
    generator = torch.Generator().manual_seed(0)
    B, A = 0.05 * torch.randn(50, 5, generator=generator), torch.randn(5, 40, generator=generator)
    for rank, tolerance in ((3, None), (64, None), (None, 0.5)):
        found = leading_subspace(LowRank(B, A), rank, tolerance, dtype=torch.float32)
        dense = leading_subspace(B @ A, rank, tolerance, dtype=torch.float32)
        assert found.method == "factored"
        k = min(found.rank, 5)
        assert k == min(dense.rank, 5)
        torch.testing.assert_close(found.S[:k], dense.S[:k], rtol=1e-4, atol=0)
        torch.testing.assert_close(found.U[:, :k], dense.U[:, :k], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.V[:, :k], dense.V[:, :k], rtol=0, atol=1e-4)
        assert worst_error(B @ A, found) <= found.bound * (1 + 1e-3) + 1e-6
    assert leading_subspace(LowRank(B, A), 64).rank == 5


@pytest.mark.parametrize("shape", [(3, 2), (2, 9)])
def test_factors_of_more_than_the_full_rank(shape):
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    d = LowRank(torch.randn(rows, 6, generator=generator), torch.randn(6, columns, generator=generator))
    found = leading_subspace(d, 6, dtype=torch.float32)
    assert found.rank == 2
    torch.testing.assert_close(found.U * found.S @ found.V.T, d.B @ d.A, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_the_fewest_directions_with_an_energy(method, energy):
    values = SPECTRA["slow"](60)
    shares = (values.double() ** 2).cumsum(0) / (values.double() ** 2).sum()
    expected = min(14, 1 + int((shares < energy).sum()))
    found = leading_subspace(with_spectrum(values, 96, 60), None, energy=energy, max_rank=14, dtype=torch.float32)
    assert (found.method, found.rank) == (method, expected)
    assert found.energy == pytest.approx(float(shares[expected - 1]), rel=1e-3)


def test_one_rule_at_a_time():
    for options in ({}, {"tolerance": 0.1, "energy": 0.5}):
        with pytest.raises(ValueError, match="give either tolerance or energy"):
            leading_subspace(torch.eye(3), None, **options)


def test_a_zero_difference():
    found = leading_subspace(torch.zeros(8, 6), 4)
    assert (found.rank, float(found.norm), found.bound) == (0, 0.0, 0.0)


def test_rank_is_cut_to_the_matrix():
    assert leading_subspace(torch.randn(8, 6), 64).rank == 6


def test_deterministic_and_alone(method):
    d = with_spectrum(SPECTRA["slow"](40), 50, 40)
    state = torch.get_rng_state()
    first = leading_subspace(d, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = leading_subspace(d, 4)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.S, second.S)
    largest = first.U.float().abs().argmax(dim=0)
    assert (first.U.float().gather(0, largest[None]) > 0).all(), "signs are fixed"
