"""The machinery itself: it sees what Triton's runtime would see, and finds the faults it looks for."""

import pytest
import torch
from aot.pretend import SHARED_MEMORY_LIMIT, Census, pretend, take_census, take_censuses
from aot.sample_kernels import add_atomically, copy_rows, matmul
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

META = torch.device("meta")


def launch_copy(n: int, stride: int):
    x = torch.empty(4, stride, device=META, dtype=torch.bfloat16)
    copy_rows[(4, 4)](x, x, n, stride, BLOCK=1024, num_warps=2)


def launch_matmul(block_m: int, block_n: int, stages: int, warps: int):
    x, w = (torch.empty(rows, 512, device=META, dtype=torch.bfloat16) for rows in (256, 512))
    y = torch.empty(256, 512, device=META, dtype=torch.bfloat16)
    x_desc = TensorDescriptor.from_tensor(x, [block_m, 64])
    w_desc = TensorDescriptor.from_tensor(w, [block_n, 64])
    grid = (256 // block_m, 512 // block_n)
    matmul[grid](x_desc, w_desc, y, 512, 512, block_m, block_n, 64, num_warps=warps, num_stages=stages)


def test_records_the_launch_and_runs_nothing():
    before = JITFunction.run
    with pretend(90) as launches:
        launch_copy(100, 1024)
    assert JITFunction.run is before
    (launch,) = launches
    assert (launch.name, launch.grid, launch.arch) == ("copy_rows", (4, 4), 90)
    assert launch.constants() == {"BLOCK": 1024}
    assert launch.options["num_warps"] == 2


def test_specialises_as_the_runtime_does():
    with pretend(80) as launches:
        launch_copy(n=160, stride=1024)
        launch_copy(n=161, stride=1024)
        launch_copy(n=1, stride=1024)
    divisible, odd, one = launches
    n = copy_rows.arg_names.index("n")
    assert divisible.signature["x_ptr"] == "*bf16"
    assert divisible.attrs[(n,)] == [["tt.divisibility", 16]]
    assert not odd.attrs.get((n,))
    assert one.signature["n"] == "constexpr"
    assert one.constants()["n"] == 1
    assert len({launch.key for launch in launches}) == 3


def test_alignment_of_a_pointer_counts():
    x = torch.zeros(4096, dtype=torch.bfloat16)
    with pretend(90) as launches:
        for view in (x, x[1:]):
            copy_rows[(1, 1)](view, view, 160, 1024, BLOCK=1024)
    assert launches[0].attrs[(0,)] == [["tt.divisibility", 16]]
    assert not launches[1].attrs.get((0,))
    vector, scalar = (take_census(launch) for launch in launches)
    assert vector.count("LDG") < scalar.count("LDG")


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT)
def test_finds_atomics(arch):
    x = torch.empty(4096, device=META)
    with pretend(arch) as launches:
        add_atomically[(4,)](x, x, 4096, BLOCK=1024)
        launch_copy(100, 1024)
    atomic, plain = (take_census(launch) for launch in launches)
    assert atomic.atomics > 0
    assert plain.atomics == 0


def test_tells_pipelined_wgmma_from_spills_and_from_too_much_shared_memory(tmp_path):
    with pretend(90) as launches:
        launch_matmul(128, 256, stages=3, warps=8)
        launch_matmul(128, 256, stages=3, warps=4)  # a 128x256 fp32 accumulator is 256 registers of each of 128 threads
        launch_matmul(128, 256, stages=6, warps=8)
    assert launches[0].signature["x_desc"].startswith("tensordesc<bf16[128,")
    results = take_censuses(launches, tmp_path)
    good, spilling, large = (results[launch.key] for launch in launches)
    assert isinstance(good, Census) and isinstance(spilling, Census) and isinstance(large, Census)
    assert good.count("HGMMA") > 0
    assert good.count("UTMALDG") > 0
    assert max(good.wgmma_waits) > 0
    assert good.spills == 0
    assert good.shared <= SHARED_MEMORY_LIMIT[90]
    assert spilling.spills > 0
    assert large.shared > SHARED_MEMORY_LIMIT[90]


def test_a_launch_that_does_not_compile_is_reported(tmp_path):
    with pretend(90) as launches:
        launch_matmul(128, 8, stages=3, warps=8)
        copy_rows[(1, 1)](torch.empty(4, device=META), torch.empty(4, device=META), 4, 4, BLOCK=1000)
    results = take_censuses(launches, tmp_path)
    error = results[launches[1].key]
    assert isinstance(error, str)
    assert "power of 2" in error
