"""The compiled engine of ``csrc/`` where it is there and right, torch elsewhere: sketch updates and small SVDs.

``auto`` (FASTLORA_LINALG) takes the compiled ops for CUDA tensors once ``csrc/`` is built (``python -m fastlora.doctor
--build``; it is never compiled in the middle of a backward pass) and has passed a check against torch on that device;
on a CPU it takes torch, whose GEMMs are faster there. ``native`` compiles at the first use and takes the CPU's ops too.
What the ops cannot take (float64, more than 128 columns) goes to torch in either case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import build, compiled, env
from ..runtime.trust import Trusted
from .operators import Factored, outside_autocast
from .orthogonal import orthonormal as orthonormal_by_torch

MAX_COLUMNS = 128  # csrc/skinny_gemm.h: kMaxColumns
NON_FINITE = 2  # csrc/sketch.h: kNonFinite
NOT_FINITE = "svd: a: it has NaN or infinite entries, want finite ones"
_READABLE = (torch.float32, torch.float16, torch.bfloat16)

_trusted = Trusted("the compiled linear algebra", "torch's runs instead")


def why_not(device: torch.device) -> str | None:
    """None where the compiled ops are taken for tensors on this device, or why not."""
    asked = env.linalg()
    if asked == "torch":
        return "FASTLORA_LINALG=torch"
    if asked == "auto" and device.type != "cuda":
        return "not on a GPU: torch is the path there (FASTLORA_LINALG=native takes the compiled ops all the same)"
    key = (device,)
    if key not in _trusted.verdicts and asked == "auto" and not _built():
        return "csrc/ is not built (python -m fastlora.doctor --build)"
    return _trusted.why_not(key, lambda: check(device))


def _built() -> bool:
    try:
        return build.find(build.find_toolchain()) is not None
    except build.Unavailable:
        return build.find() is not None


@outside_autocast
def sketch_update(q: Tensor, z: Tensor, start: Tensor | None, x: Tensor, dy: Tensor, weight: float) -> bool:
    """Adds weight·dYᵀX to the rank-c sketch Q Zᵀ, in place; False, and nothing changed, where something is not finite.

    Five products with the running sum G⁺ = Q Zᵀ + w dYᵀX, with an orthonormal basis between two of them, beginning with
    G⁺ᵀQ; G is never formed.

    Args:
        q: (n, c) float32, orthonormal columns; c <= min(n, m). Overwritten. Zeros before the first micro-batch.
        z: (m, c) float32, GᵀQ. Overwritten. Zeros before the first micro-batch.
        start: (m, c) float32, columns that span the subspace of rows to begin with, instead of the first product:
            needed where Q has no columns yet. None for G⁺ᵀQ.
        x, dy: (T, m) and (T, n), float32, float16 or bfloat16, any strides; no copy of them is made by the compiled op.
        weight: w.

    The compiled op reads its status back, so that the caller knows: one synchronisation.
    """
    if _takes(q, x, dy) and z.is_contiguous() and why_not(q.device) is None:
        start = None if start is None else start.contiguous()
        status = torch.ops.fastlora.sketch_update(q, z, start, x, dy, weight)
        return not int(status) & NON_FINITE
    return sketch_update_by_torch(q, z, start, x, dy, weight)


def _takes(q: Tensor, x: Tensor, dy: Tensor) -> bool:
    return (
        q.shape[1] <= MAX_COLUMNS
        and q.dtype == torch.float32
        and q.is_contiguous()
        and x.numel() > 0
        and dy.numel() > 0
        and x.dtype in _READABLE
        and dy.dtype in _READABLE
    )


def sketch_update_by_torch(q: Tensor, z: Tensor, start: Tensor | None, x: Tensor, dy: Tensor, weight: float) -> bool:
    """The same in torch: the fallback, and what the compiled op is checked against."""
    batch = Factored(x, dy)

    def forward(v: Tensor) -> Tensor:
        return (batch.matmul(v) * weight).addmm_(q, z.t() @ v)

    def backward(u: Tensor) -> Tensor:
        return (batch.rmatmul(u) * weight).addmm_(z, q.t() @ u)

    product = backward(q) if start is None else start
    if not bool(torch.isfinite(product).all()):  # before LAPACK sees it
        return False
    product = forward(orthonormal_by_torch(product))
    if not bool(torch.isfinite(product).all()):
        return False
    left = orthonormal_by_torch(forward(orthonormal_by_torch(backward(orthonormal_by_torch(product)))))
    product = backward(left)
    if not bool(torch.isfinite(product).all()):
        return False
    q.copy_(left)
    z.copy_(product)
    return True


@outside_autocast
def factored_product(x: Tensor, dy: Tensor, v: Tensor, weight: float) -> Tensor:
    """weight·dYᵀ(X v), (n, c) float32, for x (T, m), dy (T, n) of any float dtype and v (m, c) float32."""
    v = v.contiguous()
    if _takes(v, x, dy) and why_not(v.device) is None:
        return torch.ops.fastlora.factored_product(x, dy, v, weight)
    return Factored(x, dy).matmul(v) * weight


@outside_autocast
def orthonormal(matrix: Tensor) -> Tensor:
    """`linalg.orthonormal` (n, c), by the compiled op where it takes it."""
    takes = matrix.dim() == 2 and matrix.dtype == torch.float32 and 1 <= matrix.shape[1] <= MAX_COLUMNS
    if takes and why_not(matrix.device) is None:
        return torch.ops.fastlora.orthonormal(matrix.contiguous())[0]
    return orthonormal_by_torch(matrix)


@outside_autocast
def lanczos(x: Tensor | None, y: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor] | None:
    """U (n, s·b) and Z = GᵀU (m, s·b) of `steps` steps of block Lanczos from start (m, b), or None where the compiled
    op cannot take them. G = yᵀx for x (T, m) and y (T, n), or y (n, m) itself.

    Raises ValueError where a product is not finite.
    """
    factors = [y] if x is None else [x, y]
    if start.dtype != torch.float32 or not 1 <= start.shape[1] <= MAX_COLUMNS:
        return None
    if any(factor.dtype not in _READABLE or factor.numel() == 0 for factor in factors) or why_not(y.device):
        return None
    n, m, b = y.shape[0 if x is None else 1], start.shape[0], start.shape[1]
    us, zs, vs = (start.new_zeros(rows, steps * b) for rows in (n, m, m))
    v = torch.ops.fastlora.orthonormal(start.contiguous())[0]
    vs[:, :b] = v
    status = [torch.ops.fastlora.lanczos_step(x, y, us, zs, vs, v, step) for step in range(steps)]
    if bool((torch.cat(status) & NON_FINITE).any()):
        raise ValueError("truncated_svd: operator: its products are NaN or infinite, want finite ones")
    return us, zs


class SVD(NamedTuple):
    """A = U diag(S) Vh, thin, S descending."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def svd(a: Tensor) -> SVD:
    """The thin SVD of every matrix of a batch (..., n, m), float32 or float64; by the compiled op in one launch.

    The compiled op takes matrices whose shorter side is at most 128 (one-sided Jacobi), the others go to
    `torch.linalg.svd`. Signs, and the vectors of equal singular values, may differ between the two.

    Raises ValueError where an entry is not finite.
    """
    n, m = a.shape[-2:]
    if not 1 <= min(n, m) <= MAX_COLUMNS or a.dtype not in (torch.float32, torch.float64) or why_not(a.device):
        if not bool(torch.isfinite(a).all()):
            raise ValueError(NOT_FINITE)
        return SVD(*torch.linalg.svd(a, full_matrices=False))
    if n < m:
        u, s, vh = svd(a.mT)
        return SVD(vh.mT, s, u.mT)
    if not bool(torch.isfinite(a).all()):
        raise ValueError(NOT_FINITE)
    # A = Q R: Jacobi on Rᵀ takes half of the sweeps that it takes on A, and is not longer than it is wide.
    q, r = torch.linalg.qr(a)
    u, s, v, info = torch.ops.fastlora.jacobi_svd(r.mT.reshape(-1, m, m).contiguous())
    if bool((info < 0).any()):  # not converged: never seen
        return SVD(*torch.linalg.svd(a, full_matrices=False))
    return SVD(q @ v.reshape(r.shape), s.reshape(r.shape[:-1]), u.reshape(r.shape).mT)


def check(device: torch.device) -> str | None:
    """None, or what is wrong with the compiled ops on this device."""
    try:
        compiled.load()
        return _sketch_differs(device) or _svd_differs(device) or _lanczos_differs(device)
    except (RuntimeError, NotImplementedError) as error:  # Unavailable is a RuntimeError
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _sketch_differs(device: torch.device) -> str | None:
    """Two micro-batches that c columns can hold exactly, so that there is one right answer, against torch; then NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n, m = 300, 170
    # With fewer tokens than columns the bases come from Householder QR, otherwise from Cholesky's factor.
    for columns, tokens, dtype in (
        (8, 8, torch.float32),
        (48, 46, torch.bfloat16),
        (90, 90, torch.float32),
        (MAX_COLUMNS, 127, torch.float16),
    ):
        x, dy = normal(tokens, m), normal(tokens, n)
        batches = [(x, dy), (x[:5] * 0.5, dy[:5])]
        start = normal(m, columns)
        results = []
        for place, update in ((device, torch.ops.fastlora.sketch_update), (device, sketch_update_by_torch)):
            q, z = torch.zeros(n, columns, device=place), torch.zeros(m, columns, device=place)
            for index, (a, b) in enumerate(batches):
                first = start.to(place) if index == 0 else None
                update(q, z, first, a.to(place, dtype), b.to(place, dtype), 0.25)
            results.append((q.double() @ z.double().t(), q))
        (got, basis), (expected, _) = results
        error = ((got - expected).norm() / expected.norm()).item()
        skew = (basis.t() @ basis - torch.eye(columns, device=device)).abs().max().item()
        if not (error < 1e-4 and skew < 1e-4):
            return (
                f"a sketch of {columns} columns is {error:.1e} away from torch's, its basis {skew:.1e} from orthonormal"
            )
    x = torch.full((4, m), float("nan"), device=device)
    status = torch.ops.fastlora.sketch_update(q, z, None, x, normal(4, n).to(device), 1.0)
    if not int(status) & NON_FINITE:
        return "NaN goes unnoticed"
    return None


def _lanczos_differs(device: torch.device) -> str | None:
    """Three steps on a matrix and on factors: orthonormal blocks, Z = GᵀU, the leading singular values found."""
    generator = torch.Generator().manual_seed(2)
    n, m, b = 300, 170, 24
    x, dy = (torch.randn(m, size, generator=generator) * 0.9 ** torch.arange(m)[:, None] for size in (m, n))
    x, dy, start = x.to(device), dy.to(device), torch.randn(m, b, generator=generator).to(device)
    g = dy.t().double() @ x.double()
    for factor, y in ((x, dy), (None, g.float())):
        v = torch.ops.fastlora.orthonormal(start)[0]
        us, zs, vs = (v.new_zeros(rows, 3 * b) for rows in (n, m, m))
        vs[:, :b] = v
        for step in range(3):
            torch.ops.fastlora.lanczos_step(factor, y, us, zs, vs, v, step)
        identity, size = torch.eye(3 * b, device=device), torch.linalg.matrix_norm(g, 2)
        leading = torch.linalg.svdvals(zs.double())[:b]
        differences = (
            (us.t() @ us - identity).abs().max(),
            (vs.t() @ vs - identity).abs().max(),
            (zs - g.t() @ us.double()).abs().max() / size,
            (leading - torch.linalg.svdvals(g)[:b]).abs().max() / size,
        )
        worst = max(float(difference) for difference in differences)
        if not worst < 1e-4:
            return f"block Lanczos on {'a matrix' if factor is None else 'factors'} is {worst:.1e} off"
    return None


def _svd_differs(device: torch.device) -> str | None:
    """Square, tall, rank-deficient; in shared and in global memory."""
    generator = torch.Generator().manual_seed(1)
    for n, c, dtype in ((33, 33, torch.float32), (128, 128, torch.float64), (70, 40, torch.float64)):
        a = torch.randn(2, n, c, generator=generator, dtype=torch.float64)
        a[1, :, c // 2 :] = a[1, :, : c - c // 2]
        a = a.to(device, dtype)
        u, s, v, _ = torch.ops.fastlora.jacobi_svd(a)
        allowed = 4 * c * torch.finfo(dtype).eps
        size = torch.linalg.norm(a)
        differences = (
            ((u * s.unsqueeze(-2)) @ v.mT - a).norm() / size,
            (s - torch.linalg.svdvals(a)).abs().max() / size,
            (u.mT @ u - torch.eye(c, device=device, dtype=dtype)).abs().max(),
        )
        worst = max(float(difference) for difference in differences)
        if not worst < allowed:
            return f"the SVD of {n} x {c} matrices in {dtype} is {worst:.1e} off"
    return None
