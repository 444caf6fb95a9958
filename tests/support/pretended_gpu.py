"""A GPU for the dispatcher's tests: tensors that say "cuda", backends put in place of the real ones, checks and clocks
on the CPU."""

from __future__ import annotations

import types
from typing import Any

import torch

from fastlora.kernels.dropout import reference_keep_mask
from fastlora.ops.lora import aten as lora_aten
from fastlora.ops.lora import choice, measure
from fastlora.runtime import cache as tuning_cache

CPU = torch.device("cpu")


def backend_with(forward=None, backward=None, unsupported=None) -> Any:
    """The torch backend, with another function put around its own: it gets the right results and may change them."""
    module = types.ModuleType("pretended_backend")

    def changed_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, dropout_state=None, narrow=False):
        # A seed stands for the kernels' mask, which is what results are compared with.
        dropout_state = _mask(dropout_state, x.shape, dropout_p)
        results = lora_aten.forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, dropout_state, narrow)
        return forward(*results) if forward else results

    def changed_backward(dy, x, weight, lora_A, lora_B, s, state, scaling, dropout_p, needs, narrow=False):
        grads = lora_aten.backward(dy, x, weight, lora_A, lora_B, s, state, scaling, dropout_p, needs, narrow)
        return backward(grads, (dy, x, weight, lora_A, lora_B, s, state, scaling)) if backward else grads

    def _mask(state, shape, dropout_p):
        is_seed = state is not None and state.dtype == torch.int64
        return reference_keep_mask(state, *shape, dropout_p) if is_seed else state

    vars(module).update(
        unsupported=unsupported or lora_aten.unsupported, forward=changed_forward, backward=changed_backward
    )
    return module


class PretendedTensor:
    """What the dispatcher asks a tensor on a GPU."""

    is_cuda = True

    def __init__(
        self, *shape: int, device: str = "cuda:0", dtype: torch.dtype = torch.float32, by_column=False
    ) -> None:
        self.shape, self.device, self.dtype = torch.Size(shape), torch.device(device), dtype
        self.by_column = by_column

    def is_contiguous(self) -> bool:
        return not self.by_column

    def t(self) -> PretendedTensor:
        return PretendedTensor(*reversed(self.shape), dtype=self.dtype, by_column=not self.by_column)


class PretendedGpu:
    """Backends in place of the real ones, and counts of what is run: `checks`, and `measured` keys."""

    def __init__(self, monkeypatch: Any, cache_folder: Any) -> None:
        self.monkeypatch = monkeypatch
        self.checks = 0
        self.measured: list[measure.Key] = []
        self.capturing = False
        self.capability = (8, 0)
        self_check, measure_ = choice.self_check, measure.measure

        def check_on_the_cpu(module, device, *rest):
            self.checks += 1
            return self_check(module, CPU, *rest)

        def measure_on_the_cpu(key, modules, device, clock=None, deadline=float("inf")):
            self.measured.append(key)
            return measure_(key, modules, CPU, clock, deadline)

        choice.reset()
        monkeypatch.setenv("FASTLORA_CACHE_DIR", str(cache_folder))
        monkeypatch.setattr(choice, "self_check", check_on_the_cpu)
        monkeypatch.setattr(measure, "measure", measure_on_the_cpu)
        monkeypatch.setattr(
            tuning_cache, "environment_of", lambda device: {"device": "pretended", "torch": torch.__version__}
        )
        no = "not there"
        fakes = {"torch": lora_aten, "triton": no, "triton_s_inside": no, "cublas": no}
        for name in ("_choices", "_provisional", "_refused"):
            monkeypatch.setattr(choice, name, {})
        for trusted in choice._trusted.values():
            monkeypatch.setattr(trusted, "verdicts", {})
        monkeypatch.setattr(choice, "_modules", fakes)
        monkeypatch.setattr(choice, "_spent_s", 0.0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: self.capability)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def put(self, name: str, module: types.ModuleType) -> types.ModuleType:
        """A backend by this name; what was chosen before it came is forgotten."""
        choice._modules[name] = module
        choice._choices.clear()
        return module

    def call(
        self,
        M=5,
        N=6,
        K=8,
        r=3,
        device="cuda:0",
        dtype=torch.float32,
        adapter_dtype=torch.float32,
        dropout_p=0.0,
        by_column=False,
    ) -> choice.Call:
        x = PretendedTensor(M, K, device=device, dtype=dtype)
        weight = PretendedTensor(N, K, device=device, dtype=dtype, by_column=by_column)
        lora_A = PretendedTensor(r, K, device=device, dtype=adapter_dtype)
        lora_B = PretendedTensor(N, r, device=device, dtype=adapter_dtype)
        call: Any = (x, weight, None, lora_A, lora_B, dropout_p)
        return choice.Call(*call)

    def select(self, backend="auto", **how) -> choice.Choice:
        return choice.select(*self.call(**how), backend)
