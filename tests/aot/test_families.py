"""The kernels of DoRA, groups, importance, MLPs, NF4 and mixed batches compile for Ampere, Hopper and Blackwell into
what they were written as: no spills, no atomics, memory that the launch would have to allocate or more than there is.

The problems are those that hold most in registers for each configuration that the rules have; the headline is first.
Most are marked slow: all of them for Hopper, and with --full for the others too. Another Triton than the pinned one
compiles the headlines alone, for Hopper.
"""

from __future__ import annotations

import itertools
import re

import pytest
from aot import sweep
from aot.families import FAMILIES, launches_of
from aot.pretend import SHARED_MEMORY_LIMIT, Census, Launch, take_censuses
from aot.sweep import is_pinned

ARCHS = sweep.ARCHS if is_pinned() else (90,)
Compiled = dict[tuple[str, int], list[tuple[Launch, Census]]]


@pytest.fixture(scope="module", params=["usual", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, tmp_path_factory) -> Compiled:
    launches = {}
    full = request.config.getoption("--full")
    for (name, family), arch in itertools.product(FAMILIES.items(), ARCHS):
        number = family.usual if is_pinned() else 1
        if request.param == "all" and (full or arch == 90):
            number = len(family.problems)
        launches[name, arch] = launches_of(family, arch, family.problems[:number])
    every = [one for several in launches.values() for one in several]
    results = take_censuses(every, tmp_path_factory.mktemp("triton"))
    failed = {key: why for key, why in results.items() if not isinstance(why, Census)}
    assert not failed, failed
    return {key: [(one, results[one.key]) for one in several] for key, several in launches.items()}  # type: ignore[misc]


def at_every_one(test):
    return pytest.mark.parametrize("arch", ARCHS)(pytest.mark.parametrize("family", FAMILIES)(test))


@at_every_one
def test_compiles_into_what_was_meant(compiled, family, arch):
    if is_pinned():  # on others the headlines alone
        assert {one.name for one, _ in compiled[family, arch]} == {
            one.name for one in launches_of(FAMILIES[family], arch, FAMILIES[family].problems)
        }
    registers = {"importance": 80, "nf4": 128}.get(family, 256)  # so that six programs fit, or four
    for one, census in compiled[family, arch]:
        about = f"{one.name} {one.constants()}: {census}"
        assert not (census.spills or census.local or census.stack or census.atomics or census.scratch), about
        assert census.shared <= SHARED_MEMORY_LIMIT[arch] and census.registers <= registers, about


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", ["dora", "group", "mlp", "segments"])
def test_products_run_on_the_matrix_units(compiled, family, arch):
    """DoRA's fp32 factors too, as tf32 in three products: on the plain units r = 128 would take four times W0's time.
    Elsewhere IEEE fp32 has no matrix unit."""
    headline = {one.key for one in launches_of(FAMILIES[family], arch, FAMILIES[family].problems[:1])}
    checked = 0
    for one, census in compiled[family, arch]:
        of_norms, half = one.name == "_dora_norm_kernel", "bf16" in str(one.signature)
        if of_norms or (half and family != "dora" and (family != "segments" or one.key in headline)):
            checked += 1
            assert census.matrix_instructions, f"{one.name} {one.constants()}"
            if family == "group" and arch == 90 and one.key in headline:
                assert census.count("HGMMA")
    assert checked >= {"dora": 1, "group": 3, "mlp": 2, "segments": 5}[family]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", ["dora", "experts", "group", "mlp", "segments"])
@pytest.mark.skipif(not is_pinned(), reason="how many stages another Triton keeps is not ours to say")
def test_loops_over_a_long_side_keep_their_stages_of_asynchronous_copies(compiled, family, arch):
    """As many before the loop as in its other stages: Triton drops stages for an address that it has to wait for, and
    loads through registers what it takes to be unaligned. On sm_80 dY, of which two layouts are wanted."""
    headline = {one.key for one in launches_of(FAMILIES[family], arch, FAMILIES[family].problems[:1])}
    checked = 0
    for one, census in compiled[family, arch]:
        if one.key in headline and re.search("shrink|weight_grad|ds_db|norm|activate", one.name):
            checked += 1
            about = f"{one.name}: {census.loop_copies} in the loop, {census.count('LDGSTS')} in all"
            assert census.loop_copies >= (1 if (arch, one.name) == (80, "_segment_ds_db_kernel") else 2), about
            assert census.count("LDGSTS") >= one.options["num_stages"] * census.loop_copies, about
    assert checked == {"dora": 1, "group": 2, "mlp": 2}.get(family, 3)


@pytest.mark.parametrize("arch", ARCHS)
def test_nf4_rounds_as_bitsandbytes_does_and_moves_16_bytes_at_a_time(compiled, arch):
    """code2 · absmax2 + offset in two roundings, not in one fused multiply-add; wide pieces at 4096², blocks of 64."""
    for _, census in compiled["nf4", arch]:
        assert census.count("FMUL", "FMUL2") > 0 and census.count("FFMA", "FFMA2") == 0
    ptx = compiled["nf4", arch][0][0].compile().asm["ptx"]
    assert "st.global.v4.b32" in ptx and "ld.global.v4.b32" in ptx


def test_short_segments_get_short_tiles():
    """One token a sequence: sixteen rows, what `tl.dot` asks for, rather than 64 that are mostly empty."""
    recorded = launches_of(FAMILIES["segments"], 90, [(1, (16, 8))])
    tiles = {one.name: one.constants()["BLOCK_M"] for one in recorded if "BLOCK_M" in one.constants()}
    assert tiles["_segment_shrink_kernel"] == tiles["_segment_expand_kernel"] == 16
