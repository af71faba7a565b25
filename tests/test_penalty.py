"""The factored penalty against the dense formula in fp64: value and gradient."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_asft.penalty import PROJECTORS, lora_penalty, projector_eigenvalues, relative_drift, squared_norm

SHAPES = [(7, 5), (33, 17), (64, 129), (1, 3)]


def random_layer(out: int, columns: int, rank: int, k: int, seed: int = 0, dtype=torch.float64):
    """A, B, and U, S, norm of a random direction with k kept of min(out, columns)."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    U, S, _ = torch.linalg.svd(d, full_matrices=False)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64).to(dtype)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype)
    return A, B, U[:, :k].to(dtype), S[:k], torch.linalg.matrix_norm(d), d


def dense_penalty(A, B, U, c, scaling, X=None, Y=None):
    """||Y^T (I - C) s B A X||_F^2, written out."""
    C = U @ torch.diag(c) @ U.T
    X = torch.eye(A.shape[1], dtype=A.dtype) if X is None else X
    Y = torch.eye(len(B), dtype=A.dtype) if Y is None else Y
    return torch.linalg.matrix_norm(Y.T @ (torch.eye(len(B), dtype=B.dtype) - C) @ (scaling * B @ A) @ X) ** 2


def value_and_gradients(function, A, B, *rest):
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    value = function(A, B, *rest)
    value.backward()
    return value.detach(), A.grad, B.grad


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("scaling", [1.0, 0.37])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("k", ["none", "few", "full"])
def test_against_the_dense_formula(projector, scaling, shape, rank, k):
    kept = {"none": 0, "few": min(3, min(shape)), "full": min(shape)}[k]
    A, B, U, S, norm, _ = random_layer(*shape, rank, kept)
    c = projector_eigenvalues(projector, S, norm)
    fast = value_and_gradients(lora_penalty, A, B, U, c, scaling)
    dense = value_and_gradients(dense_penalty, A, B, U, c, scaling)
    scale = float(scaling**2 * squared_norm(B, A))
    for got, expected in zip(fast, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12 * scale)
    single = value_and_gradients(lora_penalty, A.float(), B.float(), U.float(), c.float(), scaling)
    for got, expected in zip(single, dense, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [1, 3, 200])
@pytest.mark.parametrize("n", [None, 1, 3, 200])
def test_other_metrics_against_the_dense_formula(projector, shape, m, n):
    A, B, U, S, norm, _ = random_layer(*shape, 2, min(3, min(shape)))
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(shape[1], m, generator=generator, dtype=torch.float64)
    Y = None if n is None else torch.randn(shape[0], n, generator=generator, dtype=torch.float64)
    c = projector_eigenvalues(projector, S, norm)
    fast = value_and_gradients(lora_penalty, A, B, U, c, 0.7, X, Y)
    dense = value_and_gradients(dense_penalty, A, B, U, c, 0.7, X, Y)
    scale = float(squared_norm(B if Y is None else Y.T @ B, A @ X)) + float(squared_norm(B, A))
    for got, expected in zip(fast, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12 * scale)
    factors = (None if factor is None else factor.float() for factor in (X, Y))
    single = value_and_gradients(lora_penalty, A.float(), B.float(), U.float(), c.float(), 0.7, *factors)
    for got, expected in zip(single, dense, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=5e-6 * scale)


def test_an_orthogonal_factor_is_the_weight_metric():
    A, B, U, S, norm, _ = random_layer(9, 6, 2, 3)
    c = projector_eigenvalues("normalized", S, norm)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    for got, expected in zip(
        value_and_gradients(lora_penalty, A, B, U, c, 1.0, Q),
        value_and_gradients(lora_penalty, A, B, U, c),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_no_kept_direction_is_plain_l2():
    A, B, U, S, norm, _ = random_layer(9, 6, 2, 0)
    value = lora_penalty(A, B, U, projector_eigenvalues("paper", S, norm), 0.5)
    torch.testing.assert_close(value, torch.linalg.matrix_norm(0.5 * B @ A) ** 2)


def test_the_literal_formula_of_the_released_code():
    """sum ||(I - d d^T / ||d||_F) B A||_F^2, which is `paper` without scaling at full k."""
    A, B, U, S, norm, d = random_layer(48, 80, 8, 48)

    def literal(A, B):
        return (
            torch.linalg.matrix_norm((torch.eye(48, dtype=B.dtype) - d @ d.T / torch.linalg.matrix_norm(d)) @ B @ A)
            ** 2
        )

    c = projector_eigenvalues("paper", S, norm)
    for got, expected in zip(
        value_and_gradients(lora_penalty, A, B, U, c, 1.0), value_and_gradients(literal, A, B), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_single(dtype):
    A, B, U, S, norm, _ = random_layer(64, 48, 4, 8, dtype=dtype)
    c = projector_eigenvalues("normalized", S, norm)
    half = value_and_gradients(lora_penalty, A, B, U, c, 2.0)
    single = value_and_gradients(lora_penalty, A.float(), B.float(), U.float(), c, 2.0)
    assert half[0].dtype == torch.float32
    assert torch.equal(half[0], single[0])
    for gradient, expected in zip(half[1:], single[1:], strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, expected.to(dtype))


def test_autocast_changes_nothing():
    A, B, U, S, norm, _ = random_layer(64, 48, 4, 8, dtype=torch.float32)
    c = projector_eigenvalues("paper", S, norm).float()
    expected = value_and_gradients(lora_penalty, A, B, U, c, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(lora_penalty, A, B, U, c, 1.0)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_an_untouched_adapter_costs_nothing():
    A, B, U, S, norm, _ = random_layer(20, 10, 4, 5)
    value, gradient_a, gradient_b = value_and_gradients(
        lora_penalty, A, torch.zeros_like(B), U, projector_eigenvalues("paper", S, norm), 1.0
    )
    assert value == 0
    assert not gradient_a.any()
    assert not gradient_b.any()


def test_only_the_product_of_the_factors_counts():
    A, B, U, S, norm, _ = random_layer(20, 10, 4, 5)
    c = projector_eigenvalues("paper", S, norm)
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 4 * torch.eye(4)
    same = lora_penalty(torch.linalg.solve(mix, A), B @ mix, U, c, 1.0)
    torch.testing.assert_close(same, lora_penalty(A, B, U, c, 1.0))


def test_an_update_inside_the_subspace_costs_nothing():
    A, _, U, _, _, _ = random_layer(40, 30, 4, 6, dtype=torch.float32)
    inside = U @ torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    value = lora_penalty(A, inside, U, torch.ones(6), 1.0)
    # nothing cancels: the rest is rounding squared, not rounding
    assert 0 <= value < 1e-11 * squared_norm(inside, A)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_large_is_formed():
    A, B, U, S, norm, _ = random_layer(512, 512, 4, 8, dtype=torch.float32)
    A.requires_grad_()
    B.requires_grad_()
    c = projector_eigenvalues("paper", S, norm).float()
    with LargestTensor() as largest:
        lora_penalty(A, B, U, c, 1.0).backward()
    assert 0 < largest.elements <= 512 * 8
    with LargestTensor() as largest:
        dense_penalty(A, B, U, c, 1.0)
    assert largest.elements >= 512 * 512, "the measure itself"


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("scalings", [0.7, [0.5, 2.0, 1.0]])
def test_several_layers_at_once_are_each_alone(metric, scalings):
    layers = [random_layer(33, 17, 4, 5, seed) for seed in range(3)]
    A, B, U = (torch.stack([layer[i] for layer in layers]) for i in range(3))
    c = torch.stack([projector_eigenvalues("normalized", layer[3], layer[4]) for layer in layers])
    generator = torch.Generator().manual_seed(9)
    factors = [torch.randn(3, rows, 6, generator=generator, dtype=A.dtype) if metric else None for rows in (17, 33)]
    scaling = torch.tensor(scalings, dtype=A.dtype) if isinstance(scalings, list) else scalings
    X, Y = factors
    A.requires_grad_()
    B.requires_grad_()
    values = lora_penalty(A, B, U, c, scaling, X, Y)
    assert values.shape == (3,)
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=A.dtype)
    (weights * values).sum().backward()
    for i in range(3):
        alone = [
            A[i].detach(), B[i].detach(), U[i], c[i], scalings[i] if isinstance(scalings, list) else scalings,
            *(None if factor is None else factor[i] for factor in factors),
        ]  # fmt: skip
        value, grad_A, grad_B = value_and_gradients(dense_penalty, *alone)
        torch.testing.assert_close(values[i], value, rtol=1e-11, atol=0)
        torch.testing.assert_close(A.grad[i], weights[i] * grad_A, rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(B.grad[i], weights[i] * grad_B, rtol=1e-10, atol=1e-9)


def test_eigenvalues():
    S, norm = torch.tensor([2.0, 1.0]), torch.tensor(4.0)
    assert projector_eigenvalues("paper", S, norm).tolist() == [1.0, 0.25]
    assert projector_eigenvalues("normalized", S, norm).tolist() == [1.0, 0.25]
    assert projector_eigenvalues("subspace", S, norm).tolist() == [1.0, 1.0]


def test_a_direction_of_rounding_alone_is_not_free():
    """A difference of rank 2 in fp32: the third value is no direction of it."""
    s = torch.tensor([2.0, 1.0, 1e-6])
    assert projector_eigenvalues("subspace", s, 2.24).tolist() == [1, 1, 0]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_zero_direction_is_plain_l2(projector):
    assert projector_eigenvalues(projector, torch.zeros(3), torch.zeros(())).tolist() == [0, 0, 0]
    assert projector_eigenvalues(projector, torch.zeros(0), torch.zeros(())).tolist() == []


@pytest.mark.parametrize(
    ("orthogonal", "total", "expected"),
    [
        (1.0, 4.0, 0.5),
        (-1e-9, 4.0, 0.0),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, math.nan),
        (math.nan, 4.0, math.nan),
        (1.0, math.nan, math.nan),
        (math.nan, 0.0, math.nan),
        (1.0, math.inf, math.nan),
        (math.inf, math.inf, math.nan),
        (math.inf, 4.0, math.inf),
    ],
)
def test_what_is_not_known_is_not_zero(orthogonal, total, expected):
    assert relative_drift(orthogonal, total) == pytest.approx(expected, nan_ok=True)


def test_unknown_projector():
    with pytest.raises(ValueError, match="'papper'; expected one of paper, normalized, subspace"):
        projector_eigenvalues("papper", torch.ones(1), 1.0)
