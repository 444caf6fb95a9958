"""The group's kernels compile for Ampere, Hopper and Blackwell: no spills, no atomics, shared memory within limits."""

import pytest
import torch
from aot.pretend import SHARED_MEMORY_LIMIT, Census, pretend, take_censuses
from aot.sweep import BF16, FP32, META

from fastlora.kernels import group

# K, ranks, dtype of x, dtype of the adapters, dropout. The first is the headline's q, k and v; then what holds most in
# registers: masks with wide ranks, casts, and rows that are not aligned.
CASES = {
    "qkv": (4096, (16, 16, 16), BF16, BF16, 0.0),
    "qkv, dropout, fp32 adapters": (4096, (16, 16, 16), BF16, FP32, 0.1),
    "gate and up, r = 64, dropout": (4096, (64, 64), BF16, FP32, 0.1),
    "three of r = 64, dropout": (4096, (64, 64, 64), BF16, FP32, 0.1),
    "fp32, dropout": (4096, (64, 64, 64), FP32, FP32, 0.1),
    "unaligned, dropout": (1003, (64, 64, 64), BF16, FP32, 0.1),
}


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device=META)


def workspace(size):
    return tensor(size, dtype=FP32) if size else None


def launch(k, ranks, dtype, adapter_dtype, p, m=8192):
    x, lora_As = tensor(m, k, dtype=dtype), [tensor(r, k, dtype=adapter_dtype) for r in ranks]
    s = [tensor(m, r, dtype=adapter_dtype) for r in ranks]
    dropout = {"seeds": [tensor(1, dtype=torch.int64) if p else None for _ in ranks], "dropout_ps": [p for _ in ranks]}
    group.group_shrink(x, lora_As, s, workspace(group.shrink_workspace(x, lora_As)), **dropout)
    outs = [tensor(*a.shape, dtype=adapter_dtype).t() for a in lora_As]
    group.group_weight_grad(x, s, outs, workspace(group.weight_grad_workspace(x, ranks)), **dropout)
    group.group_expand(s, [a.t() for a in lora_As], tensor(m, k, dtype=dtype), accumulate=True, **dropout)


@pytest.fixture(scope="module")
def censuses(tmp_path_factory):
    named = {}
    for arch in SHARED_MEMORY_LIMIT:
        for name, case in CASES.items():
            with pretend(arch) as launches:
                launch(*case)
            for one in launches:
                if one.name.startswith("_group"):
                    named[arch, name, one.name] = one
    results = take_censuses(list(named.values()), tmp_path_factory.mktemp("triton"))
    return {key: results[one.key] for key, one in named.items()}


@pytest.mark.slow
def test_the_kernels_compile_into_what_they_were_chosen_for(censuses):
    assert len(censuses) == 3 * 3 * len(CASES)
    wrong = []
    for (arch, name, kernel), census in censuses.items():
        right = (
            isinstance(census, Census)
            and not (census.spills or census.local or census.atomics or census.scratch)
            and census.shared <= SHARED_MEMORY_LIMIT[arch]
            and (name == "fp32, dropout" or census.matrix_instructions)
        )
        if not right:
            wrong.append(f"sm_{arch} {kernel}, {name}: {census}")
    assert not wrong, "\n".join(wrong)


def test_the_headline_compiles_for_hopper(tmp_path):
    with pretend(90) as launches:
        launch(*CASES["qkv"])
    kernels = [one for one in launches if one.name.startswith("_group")]
    for census in take_censuses(kernels, tmp_path).values():
        assert isinstance(census, Census) and census.spills == 0 and census.count("HGMMA")
