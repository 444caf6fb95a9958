"""What a call does on the host once its kind is known, counted: `python -m aot.count_host_work OUT`.

Run by test_host.py in a process of its own, since the stub takes Triton over. Writes JSON: of each row of `python -m
bench host` the launches and the Python-level calls of a forward and backward pass, by plans in Python and in C++; and
of each backend what it launched by a plan of either kind and without one, with the calls' own tensors named.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.layers import host
from fastlora.functional import Adapter, GroupLayer, lora_group, lora_linear
from fastlora.kernels import launch
from fastlora.ops.group import group
from fastlora.ops.group import triton as group_kernels
from fastlora.ops.lora import choice, cublas, triton
from fastlora.runtime import compiled

M, N, K, R = 200, 96, 160, 7  # unaligned rows of S, B and dS
BF16, FP32 = torch.bfloat16, torch.float32
GROUPS = [(BF16, 0.0), (FP32, 0.1)]


def python_calls(function) -> int:
    """Calls of Python functions within `function`."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count - 1


def launched(driver, backend, dtype, adapter_dtype, dropout_p, offset) -> list[list]:
    """What a forward and backward pass launches: kernel, grid, threads, shared memory, and parameters, with the call's
    own tensors by name. `offset`: x begins so many elements into its storage."""
    x = torch.empty(M * K + offset, dtype=dtype)[offset:].view(M, K)
    weight, bias, dy = (torch.empty(shape, dtype=dtype) for shape in ((N, K), (N,), (M, N)))
    a, b = torch.empty(R, K, dtype=adapter_dtype), torch.empty(N, R, dtype=adapter_dtype)
    state = torch.empty(1, dtype=torch.int64) if dropout_p else None
    named = {"x": x, "weight": weight, "bias": bias, "dy": dy, "a": a, "b": b, "seed": state}
    driver.clear_log()
    y, s, _ = backend.forward(x, weight, bias, a, b, 1.5, dropout_p, state)
    named |= {"y": y, "s": s}
    found = _logged(driver, named)  # now: what forward has freed, backward may be given
    driver.clear_log()
    grads = backend.backward(dy, x, weight, a, b, s, state, 1.5, dropout_p, (True, True, True))
    return found + _logged(driver, named | dict(zip(("dx", "da", "db"), grads, strict=True)))


def launched_by_a_group(driver, adapter_dtype, dropout_p) -> list[list]:
    """`launched` of two members that run together, the second by the Triton GEMM, and a third that shares S."""
    sizes, x = (N, 80, N), torch.empty(M, K, dtype=BF16)
    weights, dys = (
        [torch.empty(n, K, dtype=BF16) for n in sizes[:2]],
        [torch.empty(M, n, dtype=BF16) for n in sizes[:2]],
    )
    lora_As = [torch.empty(r, K, dtype=adapter_dtype) for r in (R, 16, 4)]
    lora_Bs = [torch.empty(n, r, dtype=adapter_dtype) for n, r in zip(sizes, (R, 16))]
    settings = group.Settings(group_kernels, ("cublas", "triton"), (1.5, 0.5), (dropout_p,) * 3)
    named = {"x": x} | {f"a{i}": a for i, a in enumerate(lora_As)} | {f"b{i}": b for i, b in enumerate(lora_Bs)}
    driver.clear_log()
    ys, ss, states = group_kernels.forward(x, lora_As, weights, (None, None), lora_Bs, settings)
    for i in range(3):
        named |= {f"s{i}": ss[i], f"seed{i}": states[i]} | ({f"w{i}": weights[i], f"y{i}": ys[i]} if i < 2 else {})
    found = _logged(driver, named)
    driver.clear_log()
    needs, last = (True, (True,) * 3, (True,) * 2), torch.empty_like(ss[2])
    dx, grad_as, grad_bs = group_kernels.backward(
        None, x, dys, [last], lora_As, weights, lora_Bs, ss[:2], states, settings, needs
    )
    named |= {"dx": dx, "ds2": last} | {f"dy{i}": dy for i, dy in enumerate(dys)}
    named |= {f"da{i}": grad for i, grad in enumerate(grad_as)} | {f"db{i}": grad for i, grad in enumerate(grad_bs)}
    return found + _logged(driver, named)


def _logged(driver, named: dict[str, Any]) -> list[list]:
    names = {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None}

    def name_of(value: int) -> Any:
        # What is no tensor of the call, and no number, is somewhere in a buffer, or a digest of a tensor map.
        return names.get(value, value if abs(value) < 1 << 32 else "other")

    return [[*launch[:4], [name_of(value) for value in launch.params]] for launch in driver.log()]


def one_layer(x, weight, a, b):
    return [lora_linear(x, weight, a, b, 1.5, backend="cublas")]


def two_layers(x, weight, a, b):
    return lora_group(x, [GroupLayer(weight, [Adapter(a, b, s)]) for s in (1.5, 0.5)], backend="cublas")


def by_function(driver, run) -> dict[str, Any]:
    """What a kind's first four calls launch, of which the last need no checks; and what is raised for other tensors
    then."""
    x, weight = torch.empty(2, M // 2, K, dtype=BF16), torch.empty(N, K, dtype=BF16)
    a, b = torch.empty(R, K, dtype=BF16, requires_grad=True), torch.empty(N, R, dtype=BF16, requires_grad=True)
    calls = []
    for _ in range(4):
        driver.clear_log()
        ys = run(x, weight, a, b)
        grads = torch.autograd.grad(ys, (a, b), [torch.empty_like(y) for y in ys])
        assert {y.shape for y in ys} == {(2, M // 2, N)} and [grad.shape for grad in grads] == [a.shape, b.shape]
        calls.append([list(launch[:4]) for launch in driver.log()])
    known = len(choice.known)
    errors = []
    for wrong in ((x[..., 1:], weight, a, b), (x, weight[1:], a, b), (x.float(), weight, a, b), (x, weight, a[1:], b)):
        try:
            run(*wrong)
        except ValueError as error:
            errors.append(str(error).partition(":")[0])
    choice.reset()
    return {"calls": calls, "known": known, "errors": errors, "after reset": len(choice.known)}


def main(out: str) -> None:
    compiled.load_if_built = lambda: False
    group.SMALL = 0
    results: dict[str, Any] = {}
    kinds = [(BF16, BF16, 0.0, 0), (BF16, FP32, 0.1, 0), (BF16, BF16, 0.0, 1), (FP32, FP32, 0.1, 0)]
    with host.stubbed() as driver, tempfile.TemporaryDirectory() as folder:
        found = host.rows()
        for kind_of_plan, ops in (("python", None), ("c++", host.compiled_plans(Path(folder)))):
            launch.use_native(ops)
            launches = host.launches_of(driver, found)
            calls = {name: python_calls(row.both) for name, row in found.items()}
            by_plan = [[launched(driver, one, *kind) for _ in range(3)] for one in (cublas, triton) for kind in kinds]
            by_plan += [[launched_by_a_group(driver, *kind) for _ in range(3)] for kind in GROUPS]
            functions = (cublas._low_rank_output, cublas._low_rank_backward, triton._forward, triton._backward)
            functions += (group_kernels._forward, group_kernels._backward)
            kept = [len(one.plans) - [*one.plans.values()].count(None) for one in functions]
            variants = [len(one.variants) for one in functions]
            results[kind_of_plan] = {"launches": launches, "calls": calls, "by_plan": by_plan}
            results[kind_of_plan] |= {
                "kept": kept,
                "variants": variants,
                "functions": [by_function(driver, one) for one in (one_layer, two_layers)],
            }
        launch.planned.__call__ = lambda self, *args: self.function(*args)  # type: ignore[method-assign]
        results["without"] = [launched(driver, one, *kind) for one in (cublas, triton) for kind in kinds]
        results["without"] += [launched_by_a_group(driver, *kind) for kind in GROUPS]
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
