"""csrc/'s linear algebra against LAPACK in float64: the algorithms run by simulated CUDA blocks, and the CPU's ops."""

import ctypes
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import spectra
import torch
from torch import Tensor

from fastlora.init.streaming import StreamingSketch, svd_of_each
from fastlora.linalg import Factored, lanczos, native, orthonormal, truncated_svd
from fastlora.runtime import build
from fastlora.runtime import compiled as runtime_compiled

lanczos_by_torch = lanczos.by_torch
ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TEAMS = [(1, 1), (4, 2)]  # groups × lanes: a CPU's one thread, and warps (of two)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


def compile_teams(target: Path, *options: str) -> None:
    source = ROOT / "tests" / "support" / "csrc_teams.cpp"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, *options, str(source), "-o", str(target)], check=True)


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
    target = tmp_path_factory.mktemp("teams") / "teams.so"
    compile_teams(target, "-O1", "-shared", "-fPIC")
    library = ctypes.CDLL(str(target))
    library.part_count.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The ops, compiled afresh, by g++ alone where there is no GPU; a process can load them once only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        if not torch.cuda.is_available():
            patch.setattr(build, "find_toolchain", lambda: build.Toolchain(str(shutil.which("g++")), None, ()))
        runtime_compiled.load()
    return torch.ops.fastlora


def pointer(array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def skew(q: Tensor) -> float:
    """How far Q's columns are from orthonormal."""
    return (q.double().t() @ q.double() - torch.eye(q.shape[1], dtype=torch.float64)).abs().max().item()


def spectrum(name: str, c: int) -> Tensor:
    i = torch.arange(c, dtype=torch.float64)
    return {
        "fast": 0.7**i,
        "slow": (1 + i) ** -0.5,
        "flat": torch.ones(c, dtype=torch.float64),
        "clustered": torch.where(i < c // 3, 1.0, torch.where(i < c // 2, 0.99, 0.5)).double(),
        "deficient": (i < c // 2).double(),
        "zero": torch.zeros(c, dtype=torch.float64),
        "tiny": 1e-30 * 0.9**i,
        "huge": 1e30 * 0.9**i,
    }[name]


SPECTRA = ["fast", "slow", "flat", "clustered", "deficient", "zero", "tiny", "huge"]


def tall(name: str, n: int, c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    u = torch.linalg.qr(normal(n, c, seed=1).double())[0]
    v = torch.linalg.qr(normal(c, c, seed=2).double())[0]
    return (u * spectrum(name, c) @ v.t()).to(dtype)


class TestAlgorithmsInTeams:
    @pytest.mark.parametrize("groups, lanes", TEAMS)
    @pytest.mark.parametrize("c", [1, 2, 7, 33])
    def test_inverse_of_the_factor(self, teams, c, groups, lanes):
        a = normal(3 * c, c).double() * torch.logspace(-20, 20, c, dtype=torch.float64)
        gram = (a.t() @ a).contiguous()
        gram[np.tril_indices(c, -1)] = float("nan")  # only the upper triangle is read
        scale, inverse = np.empty(c), np.empty((c, c))
        assert teams.invert_factor(pointer(gram), pointer(scale), c, pointer(inverse), groups, lanes) == 0
        assert np.allclose(scale, 1 / a.norm(dim=0), rtol=1e-13, atol=0)
        assert skew(a @ torch.from_numpy(inverse)) < 1e-12
        assert np.array_equal(inverse, np.triu(inverse))

    @pytest.mark.parametrize("groups, lanes", TEAMS)
    @pytest.mark.parametrize(
        "spoil, kind",
        [
            (lambda a: a[:, 2].zero_(), 1),
            (lambda a: a[:, 2].copy_(a[:, 0] - a[:, 3]), 1),
            (lambda a: a[:, 2].copy_(a[:, 0]).add_(normal(40, seed=9), alpha=1e-6), 1),
            (lambda a: a[:, 2].copy_(a[:, 0]).add_(normal(40, seed=9), alpha=1e-3), 0),
            (lambda a: a[3, 2].fill_(float("nan")), 2),
            (lambda a: a[3, 2].fill_(float("inf")), 2),
        ],
    )
    def test_what_is_no_safe_gram_matrix_is_told(self, teams, spoil, kind, groups, lanes):
        a = normal(40, 5).double()
        spoil(a)
        gram, scale, inverse = (a.t() @ a).contiguous(), np.empty(5), np.empty((5, 5))
        assert teams.invert_factor(pointer(gram), pointer(scale), 5, pointer(inverse), groups, lanes) == kind

    @pytest.mark.parametrize("groups, lanes", TEAMS)
    @pytest.mark.parametrize("n, c", [(1, 1), (5, 5), (40, 13)])
    @pytest.mark.parametrize("name", ["slow", "deficient", "zero"])
    def test_householder(self, teams, name, n, c, groups, lanes):
        a, q, scale = tall(name, n, c), torch.empty(n, c), np.full(c, 1.5)
        teams.householder_q(pointer(a), pointer(q), ctypes.c_int64(n), c, pointer(scale), groups, lanes)
        assert skew(q) < 1e-6
        assert torch.allclose(q @ (q.t() @ a), a, atol=1e-6)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize(
        "rows, depth, columns", [(70, 70, 33), (64, 290, 20), (5, 3, 1), (3, 40, 128), (9, 33, 70)]
    )
    def test_product_by_tiles(self, teams, rows, depth, columns, transposed):
        a = normal(depth, rows).t() if transposed else normal(rows, depth)
        b, parts = normal(depth, columns, seed=1), teams.part_count(*map(ctypes.c_int64, (rows, columns, depth)))
        out = torch.full((parts, rows, columns), float("nan"))
        sizes = [ctypes.c_int64(size) for size in (rows, depth, columns)]
        strides = [ctypes.c_int64(stride) for stride in a.stride()]
        teams.product(pointer(a), *strides, pointer(b), pointer(out), *sizes, ctypes.c_double(0.5))
        assert parts == (1 if depth <= 256 else 2)
        assert torch.allclose(out.sum(0).double(), 0.5 * a.double() @ b.double(), rtol=0, atol=2e-6 * depth)

    @pytest.mark.parametrize("groups, lanes", TEAMS)
    @pytest.mark.parametrize("name", ["slow", "deficient", "zero"])
    @pytest.mark.parametrize("rows, c", [(1, 1), (9, 2), (13, 13), (30, 8)])
    def test_jacobi(self, teams, rows, c, name, groups, lanes):
        a = tall(name, rows, c)
        u, s, v = torch.empty(rows, c), torch.empty(c), torch.empty(c, c)
        size = ctypes.c_int64(rows)
        sweeps = teams.jacobi_svd(pointer(a), pointer(u), pointer(s), pointer(v), size, c, groups, lanes)
        assert 1 <= sweeps <= 15
        assert max(skew(u), skew(v)) < 2e-6
        assert torch.allclose(u * s @ v.t(), a, atol=2e-6)

    @pytest.mark.slow
    def test_no_thread_reads_what_another_writes_without_a_sync(self, tmp_path):
        compile_teams(tmp_path / "teams", "-O1", "-g", "-fsanitize=thread", "-DWITH_MAIN")
        done = subprocess.run([tmp_path / "teams"], capture_output=True, text=True, check=False)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("this kernel's address layout is too random for ThreadSanitizer")
        assert (done.returncode, done.stderr) == (0, "")


class TestOrthonormal:
    @pytest.mark.parametrize("n, c", [(130, 48), (128, 128), (20, 1)])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_spectra(self, loaded, name, n, c):
        a = tall(name, n, c)
        q, status = loaded.orthonormal(a)
        # CholeskyQR's bound; where it is loose, Householder was taken or kMaxCondition keeps it below 1e-5.
        condition = torch.linalg.cond(a.double() / a.double().norm(dim=0)).item() if int(status) == 0 else 0.0
        assert skew(q) < 2e-6 + min(condition**2 * 2**-53, 1e-5)
        scale = max(a.abs().max().item(), 1e-38)
        assert torch.allclose(q.double() @ (q.double().t() @ a.double()) / scale, a.double() / scale, atol=3e-5)
        if name in ("slow", "flat", "clustered"):
            assert int(status) == 0
            assert torch.allclose(q, orthonormal(a), atol=1e-6)  # the same algorithm
        if name in ("deficient", "zero") and c > 1:
            assert int(status) == 1

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite(self, loaded, value):
        a = normal(30, 4)
        a[7, 2] = value
        assert int(loaded.orthonormal(a)[1]) == 2


DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize("x_dtype, dy_dtype", DTYPES)
def test_factored_product(loaded, x_dtype, dy_dtype):
    x, dy, v = normal(90, 40).to(x_dtype), normal(55, 90).t().to(dy_dtype), normal(40, 17)
    expected = 0.3 * (dy.double().t() @ (x.double() @ v.double()))
    got = loaded.factored_product(x, dy, v, 0.3)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    expanded = torch.ones(1, 55).expand(90, 55)  # what the backward of a sum is
    got = loaded.factored_product(x, expanded, v, 1.0)
    assert torch.allclose(got, (x.float() @ v).sum(0).expand(55, 17), atol=1e-3)


class TestSketchUpdate:
    def factors(self, name, tokens=80, n=60, m=50):
        """x, dy with dyᵀx of this spectrum."""
        c = min(n, m)
        x = torch.linalg.qr(normal(tokens, c, seed=3).double())[0] @ tall(name, m, c, torch.float64).t()
        dy = (
            torch.linalg.qr(normal(tokens, c, seed=3).double())[0]
            @ torch.linalg.qr(normal(n, c, seed=4).double())[0].t()
        )
        return x.float(), dy.float()

    @pytest.mark.parametrize("x_dtype, dy_dtype", DTYPES)
    @pytest.mark.parametrize("name", ["fast", "slow", "flat", "clustered", "deficient", "tiny"])
    def test_like_torch_over_two_micro_batches(self, loaded, name, x_dtype, dy_dtype):
        """As near to the best rank-c approximation as torch's sketch is (for a flat spectrum the bases may differ)."""
        c, total = 16, 0
        sketches = [(torch.zeros(60, c), torch.zeros(50, c)) for _ in range(2)]
        x, dy = self.factors(name)
        if name == "tiny" and torch.float16 in (x_dtype, dy_dtype):
            pytest.skip("fp16 has no 1e-30")
        for start, rows in ((normal(50, c), slice(0, 70)), (None, slice(70, 80))):
            a, b = x[rows].to(x_dtype), dy[rows].to(dy_dtype)
            assert not int(loaded.sketch_update(*sketches[0], start, a, b, 0.5)) & 2
            assert native.sketch_update_by_torch(*sketches[1], start, a, b, 0.5)
            total = total + 0.5 * b.double().t() @ a.double()
        size = total.norm()
        got, expected = ((total - q.double() @ z.double().t()).norm() / size for q, z in sketches)
        assert got <= 1.001 * expected + 1e-5
        assert skew(sketches[0][0]) < 2e-6
        if name in ("fast", "deficient", "tiny"):
            products = [q.double() @ z.double().t() for q, z in sketches]
            assert (products[0] - products[1]).norm() < 2e-3 * size

    def test_zero_gradients_leave_an_orthonormal_basis(self, loaded):
        q, z = torch.zeros(30, 4), torch.zeros(20, 4)
        assert int(loaded.sketch_update(q, z, normal(20, 4), torch.zeros(9, 20), torch.zeros(9, 30), 1.0)) == 1
        assert skew(q) < 1e-6
        assert not z.any()

    @pytest.mark.parametrize("where", ["x", "dy", "overflow"])
    def test_non_finite_changes_nothing(self, loaded, where):
        x, dy, q, z = normal(9, 20), normal(9, 30), orthonormal(normal(30, 4)).contiguous(), normal(20, 4)
        if where == "overflow":
            x, dy = x * 1e25, dy * 1e25
        else:
            {"x": x, "dy": dy}[where][3, 3] = float("nan")
        before = q.clone(), z.clone()
        assert int(loaded.sketch_update(q, z, None, x, dy, 1.0)) & 2
        assert torch.equal(q, before[0]) and torch.equal(z, before[1])
        assert not native.sketch_update_by_torch(q, z, None, x, dy, 1.0)
        assert torch.equal(q, before[0]) and torch.equal(z, before[1])


class TestJacobiSvd:
    def check(self, a: Tensor, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Against LAPACK in float64, with each matrix's own size as the unit; every rotation rounds, hence the c."""
        eps, c = torch.finfo(a.dtype).eps, a.shape[1]
        wide = a.double()
        size = torch.linalg.matrix_norm(wide / wide.abs().max().clamp(min=1e-300)) * wide.abs().max()
        expected = torch.linalg.svdvals(wide)
        assert torch.all(s[:-1] >= s[1:]) and torch.all(s >= 0)
        unit = size if size > 0 else torch.ones((), dtype=torch.float64)
        assert ((s.double() - expected) / unit).abs().max() < (8 + c / 2) * eps
        assert ((u.double() * (s.double() / unit)) @ v.double().t() - wide / unit).norm() < (8 + 3 * c) * eps
        assert max(skew(u), skew(v)) < (10 + 4 * c) * eps

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rows, c", [(1, 1), (2, 2), (33, 33), (48, 47), (128, 128), (300, 20)])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_spectra(self, loaded, name, rows, c, dtype):
        a = tall(name, rows, c, dtype)
        u, s, v, info = loaded.jacobi_svd(a.unsqueeze(0))
        assert int(info) >= 1  # converged
        self.check(a, u[0], s[0], v[0])

    @pytest.mark.parametrize("scale", [1e-300, 1e300])
    def test_extreme_scales_in_float64(self, loaded, scale):
        a = tall("fast", 40, 30, torch.float64) * scale
        u, s, v, _ = loaded.jacobi_svd(a.unsqueeze(0))
        assert torch.allclose(s[0] / scale, torch.linalg.svdvals(a / scale), rtol=1e-12, atol=1e-15)
        assert torch.allclose((u[0] * (s[0] / scale)) @ v[0].t(), a / scale, atol=1e-14)

    def test_graded_columns_keep_their_relative_accuracy(self, loaded):
        """What two-sided methods lose (Demmel and Veselić): columns from 1 to 1e-6 in fp32."""
        a = torch.linalg.qr(normal(30, 6).double())[0] + 0.1 * normal(30, 6, seed=5).double()
        a = a * torch.logspace(0, -6, 6, dtype=torch.float64)
        s = loaded.jacobi_svd(a.float().contiguous().unsqueeze(0))[1][0]
        assert torch.allclose(s.double(), torch.linalg.svdvals(a.float().double()), rtol=5e-6, atol=0)

    def test_every_matrix_of_a_batch_as_alone_and_a_bad_one_is_told(self, loaded):
        a = torch.stack([normal(20, 9), tall("zero", 20, 9), normal(20, 9, seed=8), tall("deficient", 20, 9)])
        a[2, 3, 3] = float("inf")
        assert loaded.jacobi_svd(a[:0])[0].shape == (0, 20, 9)
        u, s, v, info = loaded.jacobi_svd(a)
        assert (info == torch.tensor([info[0], 1, -1, info[3]])).all() and info[0] > 1
        assert s[2].isnan().all() and u[2].isnan().all() and v[2].isnan().all()
        for index in (0, 1, 3):
            alone = loaded.jacobi_svd(a[index : index + 1])
            assert all(torch.equal(x[index], y[0]) for x, y in zip((u, s, v), alone))
            self.check(a[index], u[index], s[index], v[index])

    @pytest.mark.parametrize("native_ops", [False, True])
    @pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 40, 7), (2, 2, 7, 40), (150, 140), (0, 5, 4)], ids=str)
    def test_wrapper(self, loaded, monkeypatch, shape, native_ops):
        monkeypatch.setattr(native._trusted, "verdicts", {})
        monkeypatch.setenv("FASTLORA_LINALG", "native" if native_ops else "torch")
        a = normal(*shape).double()
        u, s, vh = native.svd(a)
        expected = torch.linalg.svd(a, full_matrices=False)
        assert (u.shape, s.shape, vh.shape) == tuple(part.shape for part in expected)
        assert torch.allclose(s, expected[1], atol=1e-12)
        assert torch.allclose((u * s.unsqueeze(-2)) @ vh, a, atol=1e-12)
        if a.numel():
            a[..., 0, 0] = float("nan")
            with pytest.raises(ValueError, match="NaN"):
                native.svd(a)


class TestLanczos:
    @pytest.fixture
    def compiled(self, loaded, monkeypatch):
        """truncated_svd and what it calls, through the compiled ops only (TestChoice has their self-check)."""
        monkeypatch.setattr(native._trusted, "verdicts", {(torch.device("cpu"),): None})
        monkeypatch.setenv("FASTLORA_LINALG", "native")
        monkeypatch.setattr(lanczos, "by_torch", lambda *_: pytest.fail("torch was taken"))
        return loaded

    @pytest.mark.parametrize("shape", [(90, 70), (64, 200), (200, 61)], ids=str)
    @pytest.mark.parametrize("name", spectra.SPECTRA)
    def test_spectra(self, compiled, name, shape):
        g = spectra.matrix_with(spectra.SPECTRA[name], torch.float32, *shape)
        spectra.check_against_lapack(g, spectra.RANK, method="lanczos")

    @pytest.mark.parametrize("name", spectra.SPECTRA)
    def test_randomized_with_compiled_small_svds(self, compiled, name):
        g = spectra.matrix_with(spectra.SPECTRA[name], torch.float32, 90, 70)
        spectra.check_against_lapack(g, spectra.RANK, method="randomized")

    @pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (7, 5)], ids=str)
    def test_small_and_thin(self, compiled, shape):
        spectra.check_against_lapack(normal(*shape), min(2, *shape), method="lanczos")

    @pytest.mark.parametrize("x_dtype, dy_dtype", DTYPES)
    def test_factors(self, compiled, x_dtype, dy_dtype):
        x = (normal(80, 90) * 0.9 ** torch.arange(90)).to(x_dtype)
        dy = normal(100, 80, seed=1).t().to(dy_dtype)  # not contiguous
        expected = torch.linalg.svdvals(dy.double().t() @ x.double())[:6]
        u, s, vh, _ = truncated_svd((x, dy), 6, "lanczos")
        assert torch.allclose(s.double(), expected, rtol=1e-4)
        core = torch.linalg.multi_dot((u.double().t(), dy.double().t(), x.double(), vh.double().t()))
        assert torch.allclose(core, torch.diag(expected), atol=1e-3 * expected[0].item())

    def test_every_matrix_of_a_batch_as_alone(self, compiled):
        g, pairs = normal(2, 3, 80, 60), (normal(2, 50, 60), normal(2, 50, 80, seed=1))
        whole, both = truncated_svd(g, 4, "lanczos"), truncated_svd(pairs, 4, "lanczos")
        assert whole.S.shape == (2, 3, 4) and both.U.shape == (2, 80, 4)
        for index in range(2):
            expected = torch.linalg.svdvals(g[index, 2].double())[:4].float()
            assert torch.allclose(whole.S[index, 2], expected, rtol=5e-3)
            product = pairs[1][index].t() @ pairs[0][index]
            assert torch.allclose(both.S[index], torch.linalg.svdvals(product)[:4], rtol=5e-3)

    def test_a_step_as_torch_makes_it(self, compiled):
        x, dy, start = normal(70, 50), normal(70, 60, seed=1), normal(50, 6, seed=2)
        found = native.lanczos(x, dy, start, 4)
        assert found is not None
        us, zs = found
        expected, products = lanczos_by_torch(Factored(x, dy), start, 4)
        assert skew(us) < 1e-5
        for block in range(0, 24, 6):  # a block's basis may be turned; its span may not
            mine, theirs = us[:, block : block + 6], expected[:, block : block + 6]
            assert torch.allclose(mine @ mine.t(), theirs @ theirs.t(), atol=1e-4)
        assert torch.allclose(zs, x.t() @ (dy @ us), atol=1e-3)
        assert torch.allclose(products.norm(), zs.norm(), rtol=1e-4)

    def test_more_steps_than_the_rank_has_room_for(self, compiled):
        x, dy = normal(9, 120), normal(9, 100, seed=1)  # rank 9: the second block is rounding, and the third
        basis, product = lanczos.block_lanczos(Factored(x, dy), normal(120, 8, seed=2), 6)
        assert skew(basis) < 1e-4
        assert torch.allclose(basis @ product.t(), dy.t() @ x, atol=1e-3)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("method", ["lanczos", "randomized"])
    def test_non_finite(self, compiled, method, value):
        x, dy = normal(90, 70), normal(90, 80)
        x[3, 3] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            truncated_svd((x, dy), 4, method)


ZEROS = torch.zeros
ARGUMENTS = {  # ones that are right
    "orthonormal": {"a": normal(20, 4)},
    "factored_product": {"x": normal(9, 20), "dy": normal(9, 30), "v": normal(20, 4), "weight": 0.5},
    "sketch_update": {"q": orthonormal(normal(30, 4)).contiguous(), "z": normal(20, 4), "start": None}
    | {"x": normal(9, 20), "dy": normal(9, 30), "weight": 0.5},
    "jacobi_svd": {"a": normal(2, 7, 5)},
    "lanczos_step": {"x": normal(9, 20), "y": normal(9, 30), "us": ZEROS(30, 12), "zs": ZEROS(20, 12)}
    | {"vs": ZEROS(20, 12), "v": orthonormal(normal(20, 4)).contiguous(), "step": 0},
}


@pytest.mark.parametrize(
    "op, change", [*((op, {}) for op in ARGUMENTS), ("lanczos_step", {"x": None, "y": normal(30, 20)})]
)
def test_opcheck(loaded, op, change):
    torch.library.opcheck(getattr(loaded, op).default, tuple((ARGUMENTS[op] | change).values()))


@pytest.mark.parametrize(
    "op, change, what",
    [
        ("orthonormal", {"a": ZEROS(300, 129)}, "129 columns"),
        ("orthonormal", {"a": ZEROS(3, 4)}, "at least as many rows"),
        ("orthonormal", {"a": ZEROS(4, 3, dtype=torch.float64)}, "contiguous float32"),
        ("orthonormal", {"a": ZEROS(3, 4).t()}, "contiguous float32"),
        ("sketch_update", {"q": ZEROS(31, 4)}, "q is 31 x 4"),
        ("sketch_update", {"z": ZEROS(20, 5)}, "z 20 x 5"),
        ("sketch_update", {"x": ZEROS(8, 20)}, "one T"),
        ("sketch_update", {"x": ZEROS(0, 20), "dy": ZEROS(0, 30)}, "at least one token"),
        ("sketch_update", {"dy": ZEROS(9, 30, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ("sketch_update", {"start": ZEROS(19, 4)}, "start is 19 x 4"),
        ("sketch_update", {"q": ZEROS(30, 25), "z": ZEROS(20, 25)}, "min\\(n, m\\) = 20"),
        ("jacobi_svd", {"a": ZEROS(1, 4, 5)}, "4 x 5"),
        ("jacobi_svd", {"a": ZEROS(1, 200, 129)}, "200 x 129"),
        ("jacobi_svd", {"a": ZEROS(4, 4)}, "batch, rows, columns"),
        ("jacobi_svd", {"a": ZEROS(1, 4, 4, dtype=torch.float16)}, "float32 or float64"),
        ("lanczos_step", {"y": ZEROS(9, 31)}, "us: wanted a contiguous float32 matrix of 31 rows"),
        ("lanczos_step", {"x": ZEROS(8, 20)}, "one T"),
        ("lanczos_step", {"x": None}, "v is 20 x 4; wanted 30 rows"),
        ("lanczos_step", {"x": None, "y": ZEROS(30, 20, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ("lanczos_step", {"zs": ZEROS(20, 13)}, "zs: wanted"),
        ("lanczos_step", {"step": 3}, "step 3 of 4 columns does not fit in us's 12"),
        ("lanczos_step", {"v": ZEROS(20, 21)}, "at most 20 columns"),
    ],
)
def test_bad_arguments(loaded, op, change, what):
    with pytest.raises(RuntimeError, match=what):
        getattr(loaded, op)(*(ARGUMENTS[op] | change).values())


@pytest.mark.parametrize("refined", [False, True])
def test_the_svds_of_all_sketches_at_once(loaded, monkeypatch, refined):
    """Several sizes, one of them narrower than the width, one without a gradient: as torch gives them one by one."""
    sketches = [StreamingSketch(n, m, 12, seed) for seed, (n, m) in enumerate([(60, 50), (40, 70), (60, 50), (9, 30)])]
    for sketch in sketches[: 4 if refined else 3]:
        for again in range(1 + refined):
            sketch.update(normal(40, sketch.m) * 0.8 ** torch.arange(sketch.m), normal(40, sketch.n, seed=1), 0.5)
            if refined and not again:
                sketch.start_refining()
    expected = [next(svd_of_each([sketch], 6)) for sketch in sketches]
    launches = []
    monkeypatch.setattr(native._trusted, "verdicts", {(torch.device("cpu"),): None})
    monkeypatch.setenv("FASTLORA_LINALG", "native")
    monkeypatch.setattr(native, "svd", lambda a, svd=native.svd: launches.append(a.shape[0]) or svd(a))
    for sketch, mine, theirs in zip(sketches, svd_of_each(sketches, 6), expected):
        (u, s, vh), size = mine, float(theirs[1][0])
        assert torch.allclose(s, theirs[1], rtol=1e-4, atol=1e-5 * size)
        assert torch.allclose((u * s) @ vh, (theirs[0] * theirs[1]) @ theirs[2], atol=1e-4 * size)
        exact = 0.5 * normal(40, sketch.n, seed=1).t() @ (normal(40, sketch.m) * 0.8 ** torch.arange(sketch.m))
        if size > 0:
            assert skew(u) < 2e-6 and skew(vh.t()) < 2e-6
            assert torch.allclose(s, torch.linalg.svdvals(exact)[:6], rtol=1e-3)
    assert sorted(set(launches)) == [1, 3]  # the narrow one has a core of its own size


class TestChoice:
    @pytest.fixture(autouse=True)
    def forget(self, monkeypatch):
        monkeypatch.delenv("FASTLORA_LINALG", raising=False)
        monkeypatch.setattr(native._trusted, "verdicts", {})

    def test_a_cpu_takes_torch_and_compiles_nothing(self, monkeypatch):
        monkeypatch.setattr(runtime_compiled, "load", lambda: pytest.fail("compiled"))
        assert "not on a GPU" in str(native.why_not(torch.device("cpu")))
        q, z = torch.zeros(30, 4), torch.zeros(20, 4)
        assert native.sketch_update(q, z, normal(20, 4), normal(9, 20), normal(9, 30), 1.0)

    @pytest.mark.usefixtures("loaded")
    def test_by_request_the_ops_of_the_cpu_pass_their_check_and_are_taken(self, monkeypatch):
        monkeypatch.setenv("FASTLORA_LINALG", "native")
        assert native.why_not(torch.device("cpu")) is None
        monkeypatch.setattr(native, "sketch_update_by_torch", lambda *_: pytest.fail("torch was taken"))
        q, z = torch.zeros(30, 4), torch.zeros(20, 4)
        assert native.sketch_update(q, z, normal(20, 4), normal(3, 20), normal(3, 30), 1.0)
        assert torch.allclose(q @ z.t(), normal(3, 30).t() @ normal(3, 20), atol=1e-4)
        assert not native.sketch_update(q, z, None, normal(3, 20) / 0, normal(3, 30), 1.0)

    @pytest.mark.usefixtures("loaded")
    def test_no_tokens_are_an_update_by_nothing(self, monkeypatch):
        monkeypatch.setenv("FASTLORA_LINALG", "native")
        q, z = orthonormal(normal(30, 4)).contiguous(), normal(20, 4)
        before = q @ z.t()
        assert native.sketch_update(q, z, None, torch.zeros(0, 20), torch.zeros(0, 30), 1.0)
        assert torch.allclose(q @ z.t(), before, atol=1e-5)
        assert not native.factored_product(torch.zeros(0, 20), torch.zeros(0, 30), normal(20, 4), 1.0).any()

    @pytest.mark.usefixtures("loaded")
    def test_an_op_that_is_wrong_is_not_taken(self, monkeypatch):
        monkeypatch.setenv("FASTLORA_LINALG", "native")
        right = torch.ops.fastlora.sketch_update

        def wrong(q, z, start, x, dy, weight):
            return right(q, z, start, x, dy, 1.001 * weight)

        monkeypatch.setattr(torch.ops.fastlora, "sketch_update", wrong)
        with pytest.warns(RuntimeWarning, match="away from torch's"):
            assert "away from torch's" in str(native.why_not(torch.device("cpu")))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            q, z = torch.zeros(30, 4), torch.zeros(20, 4)
            assert native.sketch_update(q, z, normal(20, 4), normal(3, 20), normal(3, 30), 1.0)
        assert torch.allclose(q @ z.t(), normal(3, 30).t() @ normal(3, 20), atol=1e-4)

    def test_without_a_compiler_torch_is_taken(self, monkeypatch):
        def load():
            raise build.Unavailable("no compiler here")

        monkeypatch.setenv("FASTLORA_LINALG", "native")
        monkeypatch.setattr(runtime_compiled, "load", load)
        with pytest.warns(RuntimeWarning, match="no compiler here"):
            got = native.factored_product(normal(9, 20), normal(9, 30), normal(20, 3), 2.0)
        assert torch.allclose(got, 2 * normal(9, 30).t() @ (normal(9, 20) @ normal(20, 3)), atol=1e-4)

    @pytest.mark.usefixtures("loaded")
    @pytest.mark.parametrize("columns, dtype", [(129, torch.float32), (4, torch.float64)])
    def test_what_the_ops_cannot_take_goes_to_torch(self, monkeypatch, columns, dtype):
        monkeypatch.setenv("FASTLORA_LINALG", "native")
        x, dy, v = normal(9, 150).to(dtype), normal(9, 140).to(dtype), normal(150, columns)
        got = native.factored_product(x, dy, v.to(dtype), 1.0)
        assert torch.allclose(got.double(), (dy.t() @ (x @ v.to(dtype))).double(), atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_passes_its_check(loaded):
    assert native.check(torch.device("cuda", 0)) is None
    for n, c in [(4096, 48), (300, 128), (77, 1)]:
        for name in SPECTRA:
            q, status = loaded.orthonormal(tall(name, n, c).cuda())
            assert skew(q.cpu()) < 2e-6, (name, n, c, int(status))
