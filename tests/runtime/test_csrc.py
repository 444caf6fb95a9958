"""csrc/: Philox and the dropout mask op against independent references, and the builder that compiles them."""

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlora.ops import dropout
from fastlora.runtime import build
from fastlora.runtime import compiled as runtime_compiled

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")

# Random123's known answers (kat_vectors): rounds, counter, key, result.
KNOWN_ANSWERS = [
    (7, [0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        7,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
    (10, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        10,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox(rounds, counter, key):
    """Philox4x32 over arrays of counters, in numpy: counter (4, ...), key (2,), result (4, ...) as uint64."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [int(word) for word in key]
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        product0, product2 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product2 >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            product2 & mask,
            (product0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            product0 & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c)


def keep_mask(seed, M, K, threshold):
    """The documented mapping (kernels/dropout.py), written from its text alone."""
    seed &= 0xFFFFFFFFFFFFFFFF
    rows, columns = np.meshgrid(np.arange(M), np.arange(K), indexing="ij")
    zero = np.zeros_like(rows)
    words = philox(7, [rows, columns // 8, zero, zero], [seed & 0xFFFFFFFF, seed >> 32])
    word = np.take_along_axis(words, (columns % 8 // 2)[None], axis=0)[0]
    bits = (word >> (16 * (columns % 2)).astype(np.uint64)) & np.uint64(0xFFFF)
    return bits >= threshold


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """csrc/philox.h as g++ compiles it, behind a C function."""
    folder = tmp_path_factory.mktemp("philox")
    (folder / "philox.cpp").write_text(
        """
        #include "philox.h"
        extern "C" void philox(int rounds, uint64_t seed, const uint32_t* counter, uint32_t* out) {
          fastlora::Words c{{counter[0], counter[1], counter[2], counter[3]}};
          c = rounds == 7 ? fastlora::philox4x32<7>(seed, c) : fastlora::philox4x32<10>(seed, c);
          for (int i = 0; i < 4; ++i) out[i] = c.w[i];
        }
        """
    )
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*command, str(folder / "philox.cpp"), "-o", str(folder / "philox.so")], check=True)
    return ctypes.CDLL(str(folder / "philox.so"))


@pytest.mark.parametrize("rounds, counter, key, result", KNOWN_ANSWERS)
def test_numpy_reference_gives_the_known_answers(rounds, counter, key, result):
    assert philox(rounds, counter, key).tolist() == result


@needs_gxx
@pytest.mark.parametrize("rounds, counter, key, result", KNOWN_ANSWERS)
def test_header_gives_the_known_answers(header, rounds, counter, key, result):
    out = (ctypes.c_uint32 * 4)()
    header.philox(rounds, ctypes.c_uint64(key[0] | key[1] << 32), (ctypes.c_uint32 * 4)(*counter), out)
    assert list(out) == result


def cpu_only():
    """The toolchain without nvcc: what these tests compile in two seconds instead of ten."""
    return build.Toolchain(str(shutil.which("g++")), None, (), "not wanted here")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The ops, compiled afresh; without a GPU by g++ alone, which takes two seconds where nvcc takes ten or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        if not torch.cuda.is_available():
            patch.setattr(build, "find_toolchain", cpu_only)
        return runtime_compiled.load()


@needs_gxx
@pytest.mark.usefixtures("loaded")
class TestKeepMask:
    @pytest.mark.parametrize("seed", [0, -1, 1234567890123456789, -(1 << 63)])
    @pytest.mark.parametrize("M, K, p", [(5, 64, 0.1), (7, 13, 0.5), (1, 1, 0.3), (0, 9, 0.1), (3, 0, 0.1)])
    def test_equals_numpy(self, seed, M, K, p):
        got = dropout.dropout_keep_mask(torch.tensor([seed]), M, K, p)
        assert got.shape == (M, K)
        assert got.dtype == torch.bool
        assert np.array_equal(got.numpy(), keep_mask(seed, M, K, round(p * 65536)))

    def test_probabilities_zero_and_one(self):
        seed = torch.tensor([7])
        assert dropout.dropout_keep_mask(seed, 9, 33, 0.0).all()
        assert not dropout.dropout_keep_mask(seed, 9, 33, 1.0).any()

    def test_seed_may_be_a_view_into_a_larger_tensor(self):
        seeds = torch.tensor([[1, 2], [3, 4]])
        got = dropout.dropout_keep_mask(seeds[1:, 1:], 4, 16, 0.5)
        assert np.array_equal(got.numpy(), keep_mask(4, 4, 16, 32768))

    def test_opcheck(self):
        op = torch.ops.fastlora.dropout_keep_mask.default
        torch.library.opcheck(op, (torch.tensor([3]), 4, 24, 6554))

    def test_runs_inside_a_compiled_graph(self):
        def drop(x, seed):
            return torch.where(torch.ops.fastlora.dropout_keep_mask(seed, *x.shape, 32768), x, 0.0)

        x, seed = torch.randn(6, 20), torch.tensor([11])
        compiled = torch.compile(drop, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, seed), drop(x, seed))

    @pytest.mark.parametrize(
        "arguments, what",
        [
            ((torch.tensor([1, 2]), 2, 8, 1), "seed has 2 elements"),
            ((torch.tensor([1], dtype=torch.int32), 2, 8, 1), "int64"),
            ((torch.tensor([1]), -1, 8, 1), "M is -1"),
            ((torch.tensor([1]), 2, 1 << 31, 1), "K is 2147483648"),
            ((torch.tensor([1]), 2, 8, 65537), "threshold is 65537"),
        ],
    )
    def test_bad_arguments(self, arguments, what):
        with pytest.raises(RuntimeError, match=re.escape(what)):
            torch.ops.fastlora.dropout_keep_mask(*arguments)

    @pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
    def test_bad_probability(self, p):
        with pytest.raises(ValueError, match="from 0 to 1"):
            dropout.dropout_keep_mask(torch.tensor([1]), 2, 8, p)

    @pytest.mark.gpu
    def test_cuda_equals_cpu(self):
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if build.find_toolchain().nvcc is None:
            pytest.skip("no nvcc")
        for M, K in [(5, 64), (7, 13), (300, 4096), (3, 0)]:
            seed = torch.tensor([99])
            got = dropout.dropout_keep_mask(seed.cuda(), M, K, 0.1)
            assert torch.equal(got.cpu(), dropout.dropout_keep_mask(seed, M, K, 0.1))


@needs_gxx
@pytest.mark.usefixtures("loaded")
class TestPlans:
    """What needs no driver: look-up, allocations, programs that are none (launches: tests/aot/test_host.py)."""

    PROGRAM = (
        1,
        0,
        2,
        6,
        2,
        3,
        5,
        0,
        1,
        64,
        0,
    )  # returns float32 (3, 5); a workspace; no launch

    def test_runs_what_was_kept_for_such_tensors(self):
        x, y = torch.ones(4, 6), torch.ones(4, 6)
        torch.ops.fastlora.plan_keep.default(-7, (x, None, y), self.PROGRAM)
        found = torch.ops.fastlora.plan_run.default(-7, (y, None, x))
        assert [(one.shape, one.dtype) for one in found] == [((3, 5), torch.float32)]
        others = [(-8, (x, None, y)), (-7, (x, y)), (-7, (x, None, x)), (-7, (x.t(), None, y)), (-7, (x[:3], None, y))]
        others += [(-7, (x.int(), None, y)), (-7, (x.flatten()[1:], None, y)), (-7, (x[:0], None, y)), (-7, ())]
        assert [torch.ops.fastlora.plan_run.default(*other) for other in others] == [[]] * len(others)

    @pytest.mark.parametrize("program", [PROGRAM[:-1], (*PROGRAM, 0), (3, *PROGRAM[1:]), ()])
    def test_refuses_what_is_no_program(self, program):
        with pytest.raises(RuntimeError, match="fastlora::plan_keep: "):
            torch.ops.fastlora.plan_keep.default(-9, (torch.ones(2),), program)

    def test_schemas(self):
        """They are called outside graphs: there is nothing to trace."""
        x, ops = torch.ones(4), torch.ops.fastlora
        counters = torch.zeros(4, dtype=torch.int32)
        calls = [(ops.plan_keep.default, (-6, (x,), self.PROGRAM)), (ops.plan_run.default, (-6, (x,)))]
        for op, arguments in (*calls, (ops.plan_counters.default, (counters, -6))):
            torch.library.opcheck(op, arguments, test_utils="test_schema")


def build_and_name(cache_dir, barrier, results):
    os.environ["FASTLORA_CACHE_DIR"] = cache_dir
    build.find_toolchain = cpu_only
    compile_into, compiled = build.compile_into, []
    build.compile_into = lambda *arguments: (compiled.append(1), compile_into(*arguments))
    barrier.wait()
    results.put((str(build.build()), len(compiled)))


@pytest.fixture
def small_sources(tmp_path, monkeypatch):
    """A function in place of csrc/, which takes g++ seconds."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "small.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "_SOURCES", sources)


@needs_gxx
def test_two_processes_building_at_once_compile_once(small_sources, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=build_and_name, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers[0][0] == answers[1][0]
    assert Path(answers[0][0]).is_file()
    assert sorted(compiled for _, compiled in answers) == [0, 1]
    assert sorted(path.name for path in Path(answers[0][0]).parent.iterdir()) == [build.OBJECT_NAME, "lock"]


@needs_gxx
def test_a_build_that_was_killed_is_done_again(small_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "find_toolchain", cpu_only)
    folder = tmp_path / "csrc" / build.key(cpu_only())
    folder.mkdir(parents=True)
    (folder / "lock").write_text("")
    (folder / ".building-xyz").write_text("half an object")
    assert build.find(cpu_only()) is None
    assert build.build() == folder / build.OBJECT_NAME
    assert build.find(cpu_only()) == folder / build.OBJECT_NAME


@needs_gxx
def test_a_compiler_error_is_shown_and_leaves_nothing(tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "broken.cpp").write_text("#error this is what went wrong\n")
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setattr(build, "find_toolchain", cpu_only)
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(build.Unavailable, match="this is what went wrong"):
        build.build()
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_no_compiler_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.Unavailable, match="no-such-compiler is not on PATH"):
        build.find_toolchain()


@needs_gxx
def test_unwritable_cache_says_so(monkeypatch, tmp_path):
    (tmp_path / "csrc").write_text("a file where a folder is wanted")
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "find_toolchain", cpu_only)
    with pytest.raises(build.Unavailable, match="FASTLORA_CACHE_DIR"):
        build.build()


def test_the_key_follows_sources_and_architectures(monkeypatch, tmp_path):
    toolchains = [cpu_only(), build.Toolchain("g++", "nvcc", ("80",)), build.Toolchain("g++", "nvcc", ("90a",))]
    keys = [build.key(toolchain) for toolchain in toolchains]
    assert len(set(keys)) == 3
    sources = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    monkeypatch.setattr(build, "_SOURCES", sources)
    assert [build.key(toolchain) for toolchain in toolchains] == keys
    with (sources / "philox.h").open("a") as file:
        file.write("// changed\n")
    assert all(build.key(toolchain) != old for toolchain, old in zip(toolchains, keys))


@needs_gxx
def test_an_object_in_the_package_is_used_while_it_fits_the_sources(monkeypatch, tmp_path):
    toolchain = build.Toolchain("g++", "nvcc", ("80",))
    monkeypatch.setattr(build, "_PREBUILT", tmp_path)
    (tmp_path / build.OBJECT_NAME).write_text("")
    stamp = {"key": build.key(toolchain), "archs": list(toolchain.archs)}
    (tmp_path / "stamp.json").write_text(json.dumps(stamp))
    assert build.find() == tmp_path / build.OBJECT_NAME
    (tmp_path / "stamp.json").write_text(json.dumps({**stamp, "key": "of other sources"}))
    assert build.find() is None


def test_gencode():
    assert build.gencode(("90a", "100", "80")) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert len(build.gencode(("90a",))) == 1


@pytest.mark.slow
@needs_gxx
def test_nvcc_compiles_for_every_architecture_without_spills(tmp_path):
    toolchain = build.find_toolchain()
    if toolchain.nvcc is None:
        pytest.skip(str(toolchain.why_no_nvcc))
    assert toolchain.archs == ("80", "90a", "100")
    target = tmp_path / build.OBJECT_NAME

    def run(command):
        if any(part.endswith(".cu") for part in command):
            command += ["-Xptxas", "-v"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    *compile_calls, link = build.commands(toolchain, tmp_path, target)
    with ThreadPoolExecutor(2) as pool:
        report = "".join(pool.map(run, compile_calls))
    run(link)
    for arch in toolchain.archs:
        assert f"for 'sm_{arch}'" in report
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(toolchain.archs)
    assert set(spills) == {("0", "0")}
    # The object with CUDA in it loads and runs its CPU kernel without a GPU.
    program = (
        f"import torch; torch.ops.load_library({str(target)!r}); "
        "print(torch.ops.fastlora.dropout_keep_mask(torch.tensor([5]), 3, 10, 32768).int().tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == keep_mask(5, 3, 10, 32768).astype(int).tolist()
