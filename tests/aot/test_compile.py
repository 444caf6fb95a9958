"""Every shipped configuration compiles for Ampere, Hopper and Blackwell into the code it was chosen for."""

import itertools
import re
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from aot import report, sweep
from aot.pretend import MULTIPROCESSORS, SHARED_MEMORY_LIMIT, Census, pretend
from aot.sweep import ARCHS, BF16, FP32

from fastlora.kernels import configs
from fastlora.ops.lora import cublas


def censuses(compiled: dict[int, list[report.Row]], arch: int) -> list[tuple[report.Row, Census]]:
    return [(row, row.census) for row in compiled[arch] if isinstance(row.census, Census)]


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles(compiled, arch):
    failed = [f"{row.name}: {row.census}" for row in compiled[arch] if not isinstance(row.census, Census)]
    assert not failed, "\n".join(failed)
    assert len(compiled[arch]) > 10 or (arch != 90 and not sweep.is_pinned())


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_fits(compiled, arch):
    too_much = [
        f"{row.name}: {census.shared} B"
        for row, census in censuses(compiled, arch)
        if census.shared > SHARED_MEMORY_LIMIT[arch]
    ]
    assert not too_much, "\n".join(too_much)


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(compiled, arch):
    spilling = [
        f"{row.name}: {census.spills} local loads and stores, {census.stack + census.local} B"
        for row, census in censuses(compiled, arch)
        if census.spills or census.local or census.stack
    ]
    assert not spilling, "\n".join(spilling)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_atomics_but_counters_and_no_memory_that_the_launch_would_have_to_allocate(compiled, arch):
    found = [row.name for row, census in censuses(compiled, arch) if census.atomics or census.scratch]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_program_of_a_block_reads_what_all_have_stored(arch):
    """The order of `tiling.store_sum`, which the interpreter cannot show, since it runs one program after another:
    every thread's part is stored before a barrier, then one thread counts it and acquires the others', and a second
    barrier lies between that and the first thread that reads them."""
    problem = sweep.Problem(2048, 4096, 4096, 16, BF16, FP32, FP32, dropout=False)
    with pretend(arch) as launches:
        for launcher in (sweep.launch_shrink, sweep.launch_weight_grad, sweep.launch_ds_and_db):
            launcher(problem)
    counting = [one for one in launches if not one.name.startswith("_reduce")]
    assert [one.name for one in counting] == ["_shrink_kernel", "_weight_grad_kernel", "_ds_db_kernel"]
    for one in counting:
        ptx = one.compile().asm["ptx"]
        events = re.findall(r"\b(st\.global|ld\.global|bar(?:rier)?\.sync|atom\.[\w.]+|red\.[\w.]+)", ptx)
        (counted,) = [i for i, event in enumerate(events) if event.startswith(("atom", "red"))]
        assert events[counted] == "atom.global.gpu.acq_rel.add.u32", one.name
        before, after = events[:counted], events[counted + 1 :]
        assert before[-1].endswith(".sync") and "st.global" in before, one.name
        assert after[0].endswith(".sync"), one.name
        assert after.index("ld.global") < after.index("st.global"), one.name


@pytest.mark.parametrize("adapter_dtype", [BF16, FP32])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("m", [2048, 8192])
def test_a_layer_takes_six_launches_beside_two_of_cublas(m, dropout_p, adapter_dtype):
    def empty(*shape: int, dtype=BF16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=sweep.META)

    x, weight, dy = empty(m, 4096), empty(4096, 4096), empty(m, 4096)
    a, b = empty(16, 4096, dtype=adapter_dtype), empty(4096, 16, dtype=adapter_dtype)
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    with pretend(90) as launches:
        _, s, state = cublas.forward(x, weight, None, a, b, 2.0, dropout_p, seed)
        cublas.backward(dy, x, weight, a, b, s, state, 2.0, dropout_p, (True, True, True))
    names = [one.name.strip("_").removesuffix("_kernel") for one in launches]
    assert names == ["shrink", "expand", "ds_db", "reduce", "weight_grad", "expand"]


@pytest.mark.parametrize("arch", ARCHS)
def test_products_run_on_the_matrix_units(compiled, arch):
    """wgmma on Hopper, tcgen05 or HMMA on Blackwell, HMMA on Ampere; IEEE fp32 has no matrix unit to run on.

    wgmma takes 64 rows at least: a skinny kernel's blocks may have fewer and use HMMA, a GEMM's may not.
    """
    units = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "HMMA")}[arch]
    scalar = []
    for row, census in censuses(compiled, arch):
        ieee = "fp32" in row.kind.reads[0] and row.kind.special != "tf32"
        unit = units if row.kind.kernel == "lora_gemm" else (*units, "HMMA")
        if row.kind.kernel != "reduce" and not ieee and not census.count(*unit):
            scalar.append(row.name)
    assert not scalar, "\n".join(scalar)


def test_the_gemms_on_hopper_are_pipelined_and_fed_by_bulk_copies(compiled):
    checked, stalled = 0, []
    for row, census in censuses(compiled, 90):
        if row.kind.kernel == "lora_gemm" and row.kind.reads[0].startswith("tensordesc"):
            checked += 1
            if max(census.wgmma_waits, default=0) == 0 or not census.count("UTMALDG"):
                stalled.append(row.name)
    assert checked > 3
    assert not stalled, "\n".join(stalled)


# None is left out.

SIZES = (1, 17, 64, 200, 512, 1000, 2048, 5000, 8192, 65536)
FEATURES = (1, 64, 100, 768, 1024, 4096, 11008, 14336)
ALL_RANKS = (1, 4, 8, 16, 17, 32, 33, 48, 64, 100, 128, 256, 384, 512)
RUN_TIME_FIELDS = {"num_splits", "num_chunks", "programs_per_sm", "efficiency", "s_inside", "rank_loop"}
FIELDS = {  # of a configuration: the kernel's argument
    "block_m": "BLOCK_M",
    "block_n": "BLOCK_N",
    "block_k": "BLOCK_K",
    "block_r": "BLOCK_R",
    "group_m": "GROUP_M",
    "epilogue_split": "SPLIT",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}


def compile_time_part(config) -> tuple:
    """A configuration without what is decided at run time, as the kernel's arguments."""
    return tuple(sorted((FIELDS[name], value) for name, value in asdict(config).items() if name not in RUN_TIME_FIELDS))


def chosen_parts(arch: int, kernel: str) -> set[tuple]:
    parts = set()
    for kind in sweep.chosen(arch):
        if kind.kernel == kernel:
            options = {name: kind.launch.options[name] for name in ("num_warps", "num_stages")}
            parts.add(
                tuple(sorted({**{k: v for k, v in kind.constants.items() if k in FIELDS.values()}, **options}.items()))
            )
    return parts


def answers(arch: int, kernel: str) -> set[tuple]:
    """Every answer of one rule over a grid of problems much wider than the sweep's."""
    device = torch.device("meta")
    found = set()
    for m, n, r, (dtype, adapter, s_dtype) in itertools.product(SIZES, FEATURES, ALL_RANKS, sweep.DTYPES):
        if kernel == "shrink":
            configured = [configs.shrink(m, n, r, dtype, adapter, device)]
        elif kernel == "expand":
            configured = [configs.expand(m, n, r, dtype, adapter, device)]
        elif kernel == "weight_grad":
            configured = [configs.weight_grad(m, n, r, dtype, device, s_dtype.itemsize > dtype.itemsize)]
        elif kernel == "ds_db":
            configured = [configs.ds_db(m, n, r, dtype, adapter, device)]
        else:
            inside = [False, True] if sweep.may_be_inside(r, dtype, adapter, dropout=False) else [False]
            wide = adapter.itemsize > dtype.itemsize
            configured = [
                configs.gemm(m, n, r, dtype, device, aligned=aligned, compute_s=compute_s, wide_adapters=wide)
                for aligned, compute_s in itertools.product((True, False), inside)
            ]
        found |= {compile_time_part(config) for config in configured if config is not None}
    return found


@pytest.mark.parametrize("kernel", ["shrink", "expand", "weight_grad", "ds_db", "lora_gemm"])
@pytest.mark.parametrize("arch", ARCHS)
def test_no_configuration_is_left_out(arch, kernel):
    with (
        mock.patch.object(configs, "capability", return_value=divmod(arch, 10)),
        mock.patch.object(configs, "num_sms", return_value=MULTIPROCESSORS[arch]),
    ):
        missing = answers(arch, kernel) - chosen_parts(arch, kernel)
    assert not missing, f"{kernel} on sm_{arch}: not compiled: {sorted(missing)}"


def test_every_row_of_the_gemm_tables_is_reached():
    tile = lambda config: (config.block_m, config.block_n, config.block_k, config.num_warps)  # noqa: E731
    reached = {
        tuple(dict(part)[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"))
        for arch in ARCHS
        for part in chosen_parts(arch, "lora_gemm")
    }
    tables = (
        configs._HOPPER,
        configs._BLACKWELL,
        configs._AMPERE,
        configs._UNALIGNED,
        configs._FP32_IEEE,
        configs._FP32_TF32,
    )
    unused = {tile(row) for rows in tables for row in rows} - reached
    assert not unused, f"no problem of the sweep takes the rows {unused}"


def test_the_page_names_what_is_shipped(request):
    if request.config.getoption("--write"):
        pytest.skip("the page is being written")
    named = report.named_in(report.PAGE.read_text())
    for arch in ARCHS:
        expected = [(kind.kernel, kind.describe()) for kind in sweep.chosen(arch)]
        assert sorted(named.get(arch, [])) == sorted(expected), (
            "docs/kernels/compiled.txt is out of date: run `pytest tests/aot --write`"
        )


def test_describing_words_are_unique():
    for arch in ARCHS:
        names = [(kind.kernel, kind.describe()) for kind in sweep.chosen(arch)]
        doubles = {name for name in names if names.count(name) > 1}
        assert not doubles


def test_mixed_adapters_and_every_rank_class_are_swept():
    reads = {kind.reads for kind in sweep.shipped(90)}
    assert {dtype for dtype, *_ in sweep.DTYPES} == {BF16, FP32}
    assert any("*bf16" in types and "*fp32" in types for types in reads)
