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
from fastlora.functional import lora_linear
from fastlora.kernels import launch
from fastlora.ops.lora import choice, cublas, triton
from fastlora.runtime import compiled

M, N, K, R = 200, 96, 160, 7  # unaligned rows of S, B and dS
BF16, FP32 = torch.bfloat16, torch.float32


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


def _logged(driver, named: dict[str, Any]) -> list[list]:
    names = {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None}

    def name_of(value: int) -> Any:
        # What is no tensor of the call, and no number, is somewhere in a buffer, or a digest of a tensor map.
        return names.get(value, value if abs(value) < 1 << 32 else "other")

    return [[*launch[:4], [name_of(value) for value in launch.params]] for launch in driver.log()]


def by_function(driver) -> dict[str, Any]:
    """What `lora_linear` launches in a kind's first four calls, of which the last need no checks; and what it raises
    for other tensors then."""
    x, weight = torch.empty(2, M // 2, K, dtype=BF16), torch.empty(N, K, dtype=BF16)
    a, b = torch.empty(R, K, dtype=BF16, requires_grad=True), torch.empty(N, R, dtype=BF16, requires_grad=True)
    calls = []
    for _ in range(4):
        driver.clear_log()
        y = lora_linear(x, weight, a, b, 1.5, backend="cublas")
        grads = torch.autograd.grad(y, (a, b), torch.empty_like(y))
        assert y.shape == (2, M // 2, N) and [grad.shape for grad in grads] == [a.shape, b.shape]
        calls.append([list(launch[:4]) for launch in driver.log()])
    known = len(choice.known)
    errors = []
    for wrong in ((x[..., 1:], weight, a, b), (x, weight[1:], a, b), (x.float(), weight, a, b), (x, weight, a[1:], b)):
        try:
            lora_linear(*wrong, 1.5, backend="cublas")
        except ValueError as error:
            errors.append(str(error)[:12])
    choice.reset()
    return {"calls": calls, "known": known, "errors": errors, "after reset": len(choice.known)}


def main(out: str) -> None:
    compiled.load_if_built = lambda: False
    results: dict[str, Any] = {}
    kinds = [(BF16, BF16, 0.0, 0), (BF16, FP32, 0.1, 0), (BF16, BF16, 0.0, 1), (FP32, FP32, 0.1, 0)]
    with host.stubbed() as driver, tempfile.TemporaryDirectory() as folder:
        found = host.rows()
        for kind_of_plan, ops in (("python", None), ("c++", host.compiled_plans(Path(folder)))):
            launch.use_native(ops)
            launches = host.launches_of(driver, found)
            calls = {name: python_calls(row.both) for name, row in found.items()}
            by_plan = [[launched(driver, one, *kind) for _ in range(3)] for one in (cublas, triton) for kind in kinds]
            functions = (cublas._low_rank_output, cublas._low_rank_backward, triton._forward, triton._backward)
            kept = [len(one.plans) - [*one.plans.values()].count(None) for one in functions]
            variants = [len(one.variants) for one in functions]
            results[kind_of_plan] = {"launches": launches, "calls": calls, "by_plan": by_plan}
            results[kind_of_plan] |= {"kept": kept, "variants": variants, "function": by_function(driver)}
        launch.planned.__call__ = lambda self, *args: self.function(*args)  # type: ignore[method-assign]
        results["without"] = [launched(driver, one, *kind) for one in (cublas, triton) for kind in kinds]
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
