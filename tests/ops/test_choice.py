"""Which backend runs, and why: choices on a CPU and on a pretended GPU, and the self-check that precedes trust."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from typing import Any, cast

import pytest
import torch
from pretended_gpu import PretendedGpu, backend_with
from torch import Tensor

from fastlora.functional import lora_linear
from fastlora.kernels import configs
from fastlora.ops.lora import aten as lora_aten
from fastlora.ops.lora import choice as lora_choice
from fastlora.runtime import env, trust

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    monkeypatch.setattr(lora_choice, "_choices", {})
    monkeypatch.setattr(lora_choice, "_provisional", {})


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, lora_A, lora_B."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 8), (6, 8), (6,), (3, 8), (6, 3))
    x, weight, bias, lora_A, lora_B = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias, lora_A, lora_B


# On the CPU.
@pytest.mark.parametrize("backend, reason", [("auto", "not on a GPU"), ("torch", "asked for")])
def test_the_cpu_takes_torch(backend, reason):
    choice = lora_choice.select(*arguments(), dropout_p=0.0, backend=backend)
    assert (choice.name, choice.module) == ("torch", lora_aten) and reason in choice.reason


@pytest.mark.parametrize("backend", ["triton", "cublas"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_gpu_backend_falls_down_to_torch_with_the_reason(backend, dropout_p):
    choice = lora_choice.select(*arguments(torch.float64), dropout_p=dropout_p, backend=backend)
    assert (choice.name, choice.module) == ("torch", lora_aten)
    reasons = choice.reason.split("; ")
    steps = lora_choice.FALL_DOWN[lora_choice.FALL_DOWN.index(backend) : -1]
    assert [reason.partition(": ")[0] for reason in reasons] == list(steps)
    assert all(len(reason.partition(": ")[2]) > 10 for reason in reasons), reasons


@pytest.mark.parametrize("backend", ["auto", "torch", "triton", "cublas"])
def test_every_name_computes_on_the_cpu(backend):
    x, weight, bias, lora_A, lora_B = arguments(torch.float64)
    y = lora_linear(x, weight, lora_A, lora_B, 2.0, bias, backend=backend)
    torch.testing.assert_close(y, x @ weight.t() + bias + 2 * (x @ lora_A.t()) @ lora_B.t())


def test_the_environment_stands_in_for_auto_only(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "cublas")
    assert lora_choice.select(*arguments(torch.float64), dropout_p=0.0).reason.startswith("cublas: ")
    assert lora_choice.select(*arguments(), dropout_p=0.0, backend="torch").reason == "asked for"
    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    assert lora_choice.select(*arguments(), dropout_p=0.0).reason == "asked for"
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTLORA_BACKEND='cuda': wanted one of auto, torch, cublas, triton"):
        lora_choice.select(*arguments(), dropout_p=0.0)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="backend: got 'cuda', want one of auto, torch, cublas, triton"):
        lora_choice.select(*arguments(), dropout_p=0.0, backend="cuda")


def test_names_and_the_order_of_falling_down_agree():
    assert set(lora_choice.BACKENDS) == {"auto", *lora_choice.FALL_DOWN} == set(env.BACKENDS)
    assert lora_choice.FALL_DOWN[-1] == "torch"


@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError])  # Triton missing, or broken
def test_a_backend_that_cannot_be_imported_falls_down(monkeypatch, error):
    monkeypatch.setattr(lora_choice, "_modules", {})

    def import_module(name):
        raise error(f"No module named {name!r}")

    monkeypatch.setattr(trust.importlib, "import_module", import_module)
    choice = lora_choice.select(*arguments(), dropout_p=0.0, backend="cublas")
    assert choice.name == "torch" and f"cublas: cannot be imported: {error.__name__}: No module named" in choice.reason
    with pytest.raises(RuntimeError, match=f"backend 'cublas' cannot be loaded: {error.__name__}: No module named"):
        lora_choice.load("cublas")


# The self-check: every kind of wrong result is seen.
def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[-1, -1] = float("nan")
    return tensor


def without_mask_in_dx(grads, call):
    dy, _, weight, lora_A, lora_B, _, _, scaling = call
    dx = dy @ weight + scaling / 0.75 * (dy @ lora_B.to(dy.dtype)) @ lora_A.to(dy.dtype)
    return dx, *grads[1:]


def without_mask_in_da(grads, call):
    dy, x, _, lora_A, lora_B, _, _, scaling = call
    ds = scaling / 0.75 * dy @ lora_B.to(dy.dtype)
    return grads[0], (ds.t() @ x).to(lora_A.dtype), grads[2]


WRONG = {
    "output of the base layer only": (lambda y, s, state: (y - y, s, state), None, "output"),
    "output without its last row": (lambda y, s, state: (torch.cat([y[:-9], 0 * y[-9:]]), s, state), None, "output"),
    "output with a NaN": (lambda y, s, state: (with_nan(y), s, state), None, "output"),
    "sign of dx": (None, lambda g, _: (-g[0], g[1], g[2]), "gradient of x"),
    "sign of dA": (None, lambda g, _: (g[0], -g[1], g[2]), "gradient of lora_A"),
    "sign of dB": (None, lambda g, _: (g[0], g[1], -g[2]), "gradient of lora_B"),
    "scale of dB": (None, lambda g, _: (g[0], g[1], 1.5 * g[2]), "gradient of lora_B"),
    "dx with a NaN": (None, lambda g, _: (with_nan(g[0]), g[1], g[2]), "gradient of x"),
    "dA with a NaN": (None, lambda g, _: (g[0], with_nan(g[1]), g[2]), "gradient of lora_A"),
    "dB with a NaN": (None, lambda g, _: (g[0], g[1], with_nan(g[2])), "gradient of lora_B"),
    "S of another order of its columns": (lambda y, s, state: (y, s.flip(1), state), None, "gradient of lora_B"),
}
WRONG_WITH_DROPOUT = {
    "mask ignored in dx": (None, without_mask_in_dx, "gradient of x"),
    "mask ignored in dA": (None, without_mask_in_da, "gradient of lora_A"),
    "another mask in the backward pass": (lambda y, s, keep: (y, s, keep.flip(0)), None, "gradient of x"),
    "nothing dropped": (lambda y, s, keep: (y, torch.ones_like(s), keep), None, "kept fraction is 1.00"),
    "everything dropped": (lambda y, s, keep: (y, 0 * s, keep), None, "kept fraction is 0.00"),
}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize("dtype, adapter_dtype", DTYPES)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_a_right_backend_passes(dtype, adapter_dtype, dropout):
    assert lora_choice.self_check(lora_aten, CPU, dtype, adapter_dtype, dropout) is None
    assert lora_choice.self_check(backend_with(), CPU, dtype, adapter_dtype, dropout) is None


@pytest.mark.parametrize("dtype, adapter_dtype", DTYPES)
@pytest.mark.parametrize("fault", [*WRONG, *WRONG_WITH_DROPOUT])
def test_a_wrong_backend_is_caught(fault, dtype, adapter_dtype):
    forward, backward, where = (WRONG | WRONG_WITH_DROPOUT)[fault]
    module = backend_with(forward, backward)
    for dropout in [True] if fault in WRONG_WITH_DROPOUT else [False, True]:
        if dropout and fault.startswith("S of"):  # then S is where the mask is read
            continue
        failure = lora_choice.self_check(module, CPU, dtype, adapter_dtype, dropout)
        assert failure is not None and where in failure


@pytest.mark.parametrize("dropout", [False, True])
def test_the_self_check_leaves_the_generators_alone(dropout, monkeypatch):
    def refuse(*args):
        raise AssertionError("seeded every GPU")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    torch.default_generator.manual_seed(7)
    before = torch.get_rng_state()
    lora_choice.self_check(lora_aten, CPU, torch.float32, torch.float32, dropout)
    assert torch.equal(torch.get_rng_state(), before)
    module = backend_with(forward=lambda *results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora_choice.self_check(module, CPU, torch.float32, torch.float32, dropout)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_first_call_in_inference_mode_is_checked_like_any_other():
    with torch.inference_mode():
        assert lora_choice.self_check(lora_aten, CPU, torch.float32, torch.float32, False) is None
        assert "gradient of x" in (
            lora_choice.self_check(backend_with(*WRONG["sign of dx"][:2]), CPU, torch.float32, torch.float32, False)
            or ""
        )


# On a pretended GPU: tensors that say "cuda", and self-checks that run on the CPU. Nothing is measured here:
# test_choice_measuring.py.
@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_MEASURE", "off")
    return PretendedGpu(monkeypatch, tmp_path)


def test_a_gpu_takes_cublas_once_it_has_passed(gpu):
    module = gpu.put("cublas", backend_with())
    gpu.put("triton", backend_with())
    choice = gpu.select()
    assert (choice.name, choice.module) == ("cublas", module)
    assert choice.reason == "default on a GPU: measuring is off" and choice.passes == ("cublas", "cublas")
    assert gpu.checks == 1
    gpu.select()
    assert gpu.checks == 1, "checked again"
    gpu.select(dropout_p=0.1)
    gpu.select(dtype=torch.bfloat16)
    gpu.select(dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    gpu.select(device="cuda:1")
    assert gpu.checks == 5, "each device, pair of dtypes and dropout is a check of its own"


def test_triton_is_taken_where_asked_for_and_falls_down_one_step(gpu):
    gpu.put("triton", backend_with())
    cublas = gpu.put("cublas", backend_with())
    assert gpu.select("triton")[::2] == ("triton", "asked for")
    gpu.put("triton", backend_with(unsupported=lambda *call: "rank 1000 is too large"))
    choice = gpu.select("triton")
    assert choice.module is cublas and choice.reason == "asked for; triton: rank 1000 is too large"
    gpu.put("cublas", backend_with(unsupported=lambda *call: "no doubles"))
    choice = gpu.select("triton")
    assert choice[::2] == ("torch", "triton: rank 1000 is too large; cublas: no doubles")


def test_a_gpu_from_before_ampere_takes_torch(gpu):
    gpu.put("cublas", backend_with())
    gpu.capability = (7, 5)
    choice = gpu.select()
    assert choice.name == "torch" and "8.0" in choice.reason and gpu.checks == 0


@pytest.mark.parametrize("fault", ["sign of dA", "output with a NaN"])
def test_a_backend_that_fails_is_not_used_and_warned_of_once(gpu, fault):
    gpu.put("cublas", backend_with(*WRONG[fault][:2]))
    with pytest.warns(RuntimeWarning, match=r"'cublas' failed its self-check on cuda:0.*not used.*doctor") as caught:
        choice = gpu.select()
    assert choice.name == "torch" and WRONG[fault][2] in choice.reason and WRONG[fault][2] in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = gpu.select()
    assert again == choice and gpu.checks == 1


def test_a_backend_that_raises_does_not_take_the_run_with_it(gpu):
    gpu.put("cublas", backend_with(forward=lambda *results: cast(Any, None).no_such_kernel))
    with pytest.warns(RuntimeWarning, match="AttributeError: .*no_such_kernel"):
        choice = gpu.select()
    assert choice.name == "torch" and "no_such_kernel" in choice.reason


def test_nothing_is_checked_during_capture(gpu):
    module = gpu.put("cublas", backend_with())
    gpu.capturing = True
    choice = gpu.select()
    assert choice.name == "torch" and "run one eager step first" in choice.reason and gpu.checks == 0
    gpu.capturing = False
    assert gpu.select().module is module
    gpu.capturing = True
    assert gpu.select().module is module, "what has passed is trusted during capture too"


def test_the_environment_chooses_on_a_gpu(gpu, monkeypatch):
    gpu.put("cublas", backend_with())
    gpu.put("triton", backend_with())
    for name in ("torch", "triton", "cublas"):
        monkeypatch.setenv("FASTLORA_BACKEND", name)
        assert gpu.select()[::2] == (name, "asked for")
        assert gpu.select("triton").name == "triton", "an argument comes before the environment"


def test_a_request_for_triton_takes_the_form_that_the_rule_says_where_that_is_right(gpu):
    """S is made inside the GEMM for a narrow output; the form that makes it there is a kernel of its own, checked
    apart."""
    half = {"dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16}
    triton, inside = gpu.put("triton", backend_with()), gpu.put("triton_s_inside", backend_with())
    choice = gpu.select("triton", **half)
    assert choice[::2] == ("triton", "asked for") and choice.passes == ("triton_s_inside", "triton")
    assert (choice.module.forward, choice.module.backward) == (inside.forward, triton.backward) and gpu.checks == 2
    for how in ({"dropout_p": 0.5}, {"N": 1600}, {"r": 33}, {"adapter_dtype": torch.float32}):
        choice = gpu.select("triton", **(half | how))
        assert choice.module is triton and choice.passes == ("triton", "triton"), how


def test_s_inside_that_fails_leaves_the_rest_of_triton(gpu):
    triton = gpu.put("triton", backend_with())
    gpu.put("triton_s_inside", backend_with(*WRONG["output with a NaN"][:2]))
    with pytest.warns(RuntimeWarning, match="'triton_s_inside' failed its self-check"):
        choice = gpu.select("triton", dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert choice.module is triton and "S inside the GEMM: output differs" in choice.reason


def test_a_warm_choice_is_a_look_up(gpu, monkeypatch):
    """Nothing is resolved again, no backend is asked, the environment is not parsed."""
    gpu.put("cublas", backend_with())
    first = gpu.select()

    def refuse(*_):
        raise AssertionError("asked again")

    for place, name in (
        (lora_choice, "_resolve"),
        (lora_choice, "_import"),
        (env, "get"),
        (lora_choice.measure, "key_of"),
    ):
        monkeypatch.setattr(place, name, refuse)
    assert gpu.select() is first
    call = gpu.call()
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        lora_choice.select(*call)
    finally:
        sys.setprofile(None)
    # Counted, not timed: select itself, the environment, shapes, layout and the dictionary. `unsupported` alone is 20.
    assert len([event for event in events if event in ("call", "c_call")]) <= 16, events


# The first-use check runs the code that real shapes run.
REAL = ((8192, 4096, 4096), (2048, 4096, 4096), (512, 4096, 4096), (8192, 14336, 4096))


def code_of(M: int, N: int, K: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> set[tuple]:
    """What a backend's passes compile to at r = 16: configurations, with the parts of a loop only as one or several."""
    device, wide = torch.device("cuda:0"), adapter_dtype.itemsize > dtype.itemsize
    found: dict[str, list[Any]] = {
        "gemm": [configs.gemm(M, n, 16, dtype, device, wide_adapters=wide) for n in (N, K)],
        "expand": [configs.expand(M, n, 16, dtype, adapter_dtype, device) for n in (N, K)],
        "shrink": [configs.shrink(M, K, 16, dtype, adapter_dtype, device)],
        "weight_grad": [configs.weight_grad(M, K, 16, dtype, device, wide)],
        "ds_db": [configs.ds_db(M, N, 16, dtype, adapter_dtype, device)],
    }
    parts = ("num_splits", "num_chunks")
    return {
        (name, *((key, value > 1 if key in parts else value) for key, value in vars(config).items()))
        for name, several in found.items()
        for config in several
        if config is not None
    }


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target, sms", [((8, 0), 108), ((8, 9), 142), ((9, 0), 132), ((10, 0), 148)])
def test_the_check_compiles_to_the_code_of_real_shapes(monkeypatch, target, sms, adapter_dtype):
    monkeypatch.setattr(configs, "capability", lambda device: target)
    monkeypatch.setattr(configs, "num_sms", lambda device: sms)
    checked = set().union(*(code_of(*size[:3], torch.bfloat16, adapter_dtype) for size in lora_choice.ALIGNED))
    for shape in REAL:
        missing = code_of(*shape, torch.bfloat16, adapter_dtype) - checked
        assert not missing, f"{shape}: {missing}"


@pytest.mark.parametrize("dropout", [False, True])
def test_on_a_gpu_the_check_takes_the_aligned_problems_too(monkeypatch, dropout):
    asked, original = [], lora_choice._compare_with_reference

    def smaller(module, device, dtype, adapter_dtype, p, narrow, sizes):
        asked.append(sizes)
        of = sizes if sizes is lora_choice.ODD else (64, 32, 48, 16)
        return original(module, CPU, dtype, adapter_dtype, p, narrow, of)

    monkeypatch.setattr(lora_choice, "_compare_with_reference", smaller)
    monkeypatch.setattr(lora_choice, "seeded", lambda device: contextlib.nullcontext())
    gpu = torch.device("cuda:0")
    assert lora_choice.self_check(lora_aten, gpu, torch.bfloat16, torch.float32, dropout) is None
    assert asked == [lora_choice.ODD, *lora_choice.ALIGNED]
    wrong = backend_with(backward=lambda grads, given: (grads[0], grads[1] * (1 + (len(given[0]) == 64)), grads[2]))
    failure = lora_choice.self_check(wrong, gpu, torch.bfloat16, torch.float32, dropout)
    assert str(failure).startswith(f"at {lora_choice.ALIGNED[0]}: gradient of lora_A differs")


def test_a_replayed_launch_that_differs_is_caught():
    """A backend whose first call is right and whose next calls, which plans make, are not."""
    right, calls = lora_choice.load("torch"), []

    def forward(*arguments):
        calls.append(1)
        y, s, state = right.forward(*arguments)
        return (y if len(calls) % 2 else y + 1e-3), s, state

    stale = types.SimpleNamespace(forward=forward, backward=right.backward)
    failure = lora_choice.self_check(stale, CPU, torch.float32, torch.float32, False)  # type: ignore[arg-type]
    assert failure == "a second call with the same arguments gives other bits than the first"
