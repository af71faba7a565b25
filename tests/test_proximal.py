"""The proximal step against the minimum that it claims to be, in fp64."""

import pytest
import torch

from axolotl_asft.proximal import Curvature, proximal_step

WEIGHTS = [0.0, 1e-6, 0.3, 1e3, 1e9]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_minimum(B, M, K, weight):
    """Z + 2 weight K Z M = B, by one large linear system."""
    size, r = B.shape
    system = torch.eye(size * r, dtype=B.dtype) + 2 * weight * torch.kron(K, M)
    return torch.linalg.solve(system, B.reshape(-1)).reshape(size, r)


def positive(r, rank, seed):
    half = random(r, rank, seed=seed)
    return half @ half.T


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("n", [1, 4, 12])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("rest", [0.0, 0.2])
def test_against_the_dense_system(weight, n, rank, rest):
    B, M, S = random(12, 3, seed=1), positive(3, rank, 2), random(12, n, seed=3)
    Z, value = proximal_step(B, M, Curvature.of(S, torch.tensor(rest, dtype=B.dtype)), weight)
    K = S @ S.T + rest * torch.eye(12, dtype=B.dtype)
    torch.testing.assert_close(value, torch.trace(K @ B @ M @ B.T), rtol=1e-5, atol=0)
    expected = dense_minimum(B, M, K, weight)
    torch.testing.assert_close(Z, expected, rtol=0, atol=2e-5 * float(B.abs().max()))
    after = torch.trace(K @ Z @ M @ Z.T)
    assert -1e-12 <= after <= value * (1 + 1e-12)
    if weight >= 1e3:
        assert after < 1e-3 * value


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("k", [0, 3, 12])
def test_the_projector_s_curvature(weight, k):
    """(I - C)^2 with C = U diag(c) U^T, whose largest eigenvalue is 1: free."""
    B, M = random(12, 3, seed=1), positive(3, 3, 2)
    U = torch.linalg.qr(random(12, 12, seed=4)).Q[:, :k]
    c = torch.linspace(1, 0.2, k, dtype=torch.float64)
    off = torch.eye(12, dtype=torch.float64) - U @ torch.diag(c) @ U.T
    Z, value = proximal_step(B, M, Curvature(U, None, (1 - c) ** 2, torch.ones((), dtype=c.dtype)), weight)
    torch.testing.assert_close(value, torch.trace(off @ off @ B @ M @ B.T), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Z, dense_minimum(B, M, off @ off, weight), rtol=0, atol=1e-6)
    if k:
        torch.testing.assert_close(U[:, 0] @ Z, U[:, 0] @ B)


def test_several_at_once_are_each_alone():
    B, S = random(2, 12, 3, seed=1), random(2, 12, 5, seed=3)
    M = torch.stack([positive(3, 3, seed) for seed in (5, 6)])
    Z, value = proximal_step(B, M, Curvature.of(S), 0.7)
    for i in range(2):
        alone, one = proximal_step(B[i], M[i], Curvature.of(S[i]), 0.7)
        torch.testing.assert_close(Z[i], alone)
        torch.testing.assert_close(value[i], one)


def test_columns_of_zeros_and_a_metric_without_directions_move_nothing():
    B, M, S = random(12, 3, seed=1), positive(3, 3, 2), random(12, 5, seed=3)
    padded = torch.cat([S, torch.zeros(12, 2, dtype=S.dtype)], dim=1)
    torch.testing.assert_close(
        proximal_step(B, M, Curvature.of(padded), 2.0)[0], proximal_step(B, M, Curvature.of(S), 2.0)[0]
    )
    still, value = proximal_step(B, M, Curvature.of(torch.zeros(12, 4, dtype=S.dtype)), 2.0)
    assert torch.equal(still, B)
    assert value == 0


def test_small_steps_follow_the_gradient():
    B, M, S = random(12, 3, seed=1).requires_grad_(), positive(3, 3, 2), random(12, 5, seed=3)
    (S.T @ B @ torch.linalg.cholesky(M)).square().sum().backward()
    Z, _ = proximal_step(B.detach(), M, Curvature.of(S), 1e-7)
    torch.testing.assert_close((B.detach() - Z) / 1e-7, B.grad, rtol=1e-3, atol=1e-3)


def test_single_precision():
    B, M, S = random(64, 8, seed=1), positive(8, 8, 2), random(64, 20, seed=3)
    Z, _ = proximal_step(B.float(), M.float(), Curvature.of(S.bfloat16()), 1e4)
    expected, _ = proximal_step(B, M, Curvature.of(S.bfloat16().double()), 1e4)
    assert Z.dtype == torch.float32
    torch.testing.assert_close(Z.double(), expected, rtol=0, atol=1e-4)
