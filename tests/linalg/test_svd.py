"""truncated_svd and orthonormal against LAPACK in float64, on spectra that are easy and on some that are not."""

import pytest
import torch
from spectra import RANK, SPECTRA, check_against_lapack, matrix_with

from fastlora.linalg import Factored, orthonormal, truncated_svd
from fastlora.linalg.operators import CHUNK

METHODS = ["randomized", "lanczos"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(90, 70), (64, 200), (200, 61)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra(spectrum, shape, dtype, method):
    check_against_lapack(matrix_with(SPECTRA[spectrum], dtype, *shape), RANK, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (7, 5)], ids=str)
def test_small_and_thin(shape, method):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    check_against_lapack(g, min(2, *shape), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_batched_equals_each_alone(method):
    g = torch.randn(3, 80, 60, generator=torch.Generator().manual_seed(2))
    _, s, _, error = truncated_svd(g, 4, method)
    assert error.shape == (3,)
    for i in range(3):
        assert torch.allclose(s[i], torch.linalg.svdvals(g[i].double())[:4].float(), rtol=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_batched_factors_equal_each_pair_alone(method):
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(3, 50, size, generator=generator) for size in (80, 60))
    u, s, vh, error = truncated_svd((x, dy), 4, method, iterations=8)
    assert (u.shape, s.shape, vh.shape, error.shape) == ((3, 60, 4), (3, 4), (3, 4, 80), (3,))
    for i in range(3):
        assert torch.allclose(s[i], torch.linalg.svdvals(dy[i].double().T @ x[i].double())[:4].float(), rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_stand_for_their_product(dtype):
    generator = torch.Generator().manual_seed(3)
    tokens = CHUNK + 37  # more than one chunk, and a ragged one
    x = torch.randn(tokens, 30, generator=generator).to(dtype)
    dy = torch.randn(tokens, 40, generator=generator).to(dtype)
    expected = torch.linalg.svdvals(dy.double().T @ x.double())[:4]
    u, s, vh, _ = truncated_svd((x, dy), 4, iterations=12)
    assert torch.allclose(s.double(), expected, rtol=1e-4)
    product = torch.linalg.multi_dot((u.double().T, dy.double().T, x.double(), vh.double().T))
    assert torch.allclose(product, torch.diag(expected), atol=1e-3 * expected[0].item())


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone():
    g = torch.randn(50, 40, generator=torch.Generator().manual_seed(4))
    state = torch.get_rng_state()
    first, again, other = truncated_svd(g, 3), truncated_svd(g, 3), truncated_svd(g, 3, seed=1)
    assert torch.equal(first.U, again.U) and torch.equal(first.Vh, again.Vh)
    assert not torch.equal(first.U, other.U)
    assert torch.equal(torch.get_rng_state(), state)


def test_any_object_that_multiplies():
    class Diagonal:
        shape, dtype, device = (90, 90), torch.float32, torch.device("cpu")
        values = torch.arange(90, 0, -1.0)

        def matmul(self, v):
            return self.values[:, None] * v

        rmatmul = matmul

    _, s, _, _ = truncated_svd(Diagonal(), 3, iterations=20)
    assert torch.allclose(s, torch.tensor([90.0, 89.0, 88.0]), rtol=1e-3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: truncated_svd(torch.full((4, 4), float("nan")), 2), "NaN or infinite"),
        (lambda: truncated_svd(torch.full((4, 4), float("inf")), 2), "NaN or infinite"),
        (lambda: truncated_svd(torch.zeros(4, 4), 5), r"rank: got 5, want an integer in \[1, 4\]"),
        (lambda: truncated_svd(torch.zeros(4, 4), 0), "rank: got 0"),
        (lambda: truncated_svd(torch.zeros(4, 4), 1, "power"), "method: got 'power', want one of randomized, lanczos"),
        (lambda: truncated_svd(torch.zeros(4), 1), r"of shape \(4,\), want \(..., n, m\), dense"),
        (lambda: truncated_svd(torch.zeros(4, 4, dtype=torch.int64), 1), "got a torch.int64 tensor"),
        (
            lambda: truncated_svd("matrix", 1),  # type: ignore[arg-type]
            "got str, want a tensor",
        ),
        (lambda: Factored(torch.zeros(3, 4), torch.zeros(2, 4)), "with one T"),
        (lambda: truncated_svd((torch.full((3, 4), float("nan")), torch.ones(3, 4)), 1), "NaN or infinite"),
        (
            lambda: truncated_svd((torch.full((3, 99), float("nan")), torch.ones(3, 99)), 1, "lanczos"),
            "NaN or infinite",
        ),
    ],
)
def test_wrong_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call()


class Products:
    """An operator of somebody else's, of any dtype and shape."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.shape, self.dtype, self.device = matrix, tuple(matrix.shape), matrix.dtype, matrix.device

    def matmul(self, v: torch.Tensor) -> torch.Tensor:
        return self.matrix @ v

    def rmatmul(self, u: torch.Tensor) -> torch.Tensor:
        return self.matrix.mT @ u


@pytest.mark.parametrize("kind", ["matrix", "batch", "factors", "half factors", "operator", "whole"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_it(dtype, method, kind):
    generator = torch.Generator().manual_seed(4)
    x, dy = torch.randn(90, 120, generator=generator), torch.randn(90, 100, generator=generator)
    g = dy.t() @ x
    given = {
        "matrix": g, "batch": torch.stack((g, 2 * g)), "factors": (x, dy),
        "half factors": (x.bfloat16(), dy.bfloat16()), "operator": Products(g), "whole": g[:20],
    }[kind]  # fmt: skip
    outside = truncated_svd(given, 8, method)
    with torch.autocast("cpu", dtype=dtype):
        inside = truncated_svd(given, 8, method)
        basis = orthonormal(g[:, :30])
    assert all(torch.equal(one, other) for one, other in zip(outside, inside))
    assert all(part.dtype == torch.float32 for part in inside)
    for rows in (basis.t(), inside.Vh.reshape(-1, *inside.Vh.shape[-2:])[0]):
        assert torch.allclose(rows @ rows.t(), torch.eye(len(rows)), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"oversampling": -3}, "oversampling: got -3, want an integer of at least 0"),
        ({"oversampling": 2.5}, "oversampling: got 2.5"),
        ({"iterations": -1}, "iterations: got -1"),
        ({"iterations": True}, "iterations: got True"),
        ({"iterations": 0, "method": "lanczos"}, "iterations: got 0, want an integer of at least 1"),
        ({"seed": 1.5}, "seed: got 1.5, want an integer"),
        ({"rank": 3.0}, "rank: got 3.0"),
    ],
    ids=str,
)
def test_numbers_that_are_none(options, message):
    with pytest.raises(ValueError, match=f"truncated_svd: {message}"):
        truncated_svd(torch.randn(90, 80), **{"rank": 5, **options})


@pytest.mark.parametrize("wrap", [truncated_svd, Factored, orthonormal], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(5, 0), torch.zeros(0, 4, 5), torch.zeros(7), torch.eye(6).to_sparse(),
        torch.eye(6).to_sparse_csr(), torch.eye(6).to(torch.float8_e4m3fn), torch.eye(6, dtype=torch.int64),
        torch.eye(6, dtype=torch.complex64),
    ],
    ids=lambda m: f"{m.layout}-{m.dtype}-{tuple(m.shape)}",
)  # fmt: skip
def test_tensors_that_cannot_be_decomposed(matrix, wrap):
    calls = {truncated_svd: (matrix, 1), Factored: (matrix, torch.zeros(6, 6)), orthonormal: (matrix,)}
    with pytest.raises(ValueError, match=rf"got a .*{matrix.dtype} tensor of shape .* dense, float64, float32"):
        wrap(*calls[wrap])


def test_factors_without_tokens_are_a_zero_matrix_that_has_no_triplets():
    empty = torch.zeros(0, 6), torch.zeros(0, 5)
    assert torch.equal(Factored(*empty).matmul(torch.ones(6, 2)), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"truncated_svd: operator: got .* shape \(0, 6\), want factors"):
        truncated_svd(empty, 1)


def test_operators_and_pairs_that_cannot_be_decomposed():
    for operator in (Products(torch.eye(6).bfloat16()), Products(torch.zeros(0, 6))):
        with pytest.raises(
            ValueError, match=r"truncated_svd: operator: got torch.* of shape .*, want float32 or float64"
        ):
            truncated_svd(operator, 1)
    with pytest.raises(ValueError, match="truncated_svd: operator: got tuple, want a tensor, factors"):
        truncated_svd((torch.eye(6),), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="orthonormal: matrix: got 3×5, want no more columns than rows"):
        orthonormal(torch.randn(3, 5))


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e6, 1e9])
def test_orthonormal_keeps_the_span(condition):
    u = torch.linalg.qr(torch.randn(80, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    mixing = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    matrix = (u * torch.logspace(0, -torch.tensor(condition).log10().item(), 12, dtype=torch.float64) @ mixing).float()
    q = orthonormal(matrix).double()
    assert torch.allclose(q.T @ q, torch.eye(12, dtype=torch.float64), atol=1e-5)
    missed = matrix.double() - q @ (q.T @ matrix.double())
    assert missed.norm() <= 1e-6 * matrix.double().norm()


@pytest.mark.parametrize("rank", [0, 3])
def test_orthonormal_completes_dependent_columns(rank):
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(30, rank, generator=generator) @ torch.randn(rank, 6, generator=generator)
    q = orthonormal(matrix)
    assert torch.allclose(q.T @ q, torch.eye(6), atol=1e-5)
    assert torch.allclose(q @ (q.T @ matrix), matrix, atol=1e-4)
