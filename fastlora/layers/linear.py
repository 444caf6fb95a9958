"""`FusedLoraLinear`: an `nn.Linear` with named low-rank adapters. Parameters and adapter state live here; how an
adapter starts is in starts.py, what kinds there are in kinds.py, the maths in ops/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import call
from ..ops import layer as ops_layer
from ..ops.mixed import mixed as mixed_op
from . import batch as layers_batch
from . import kinds, starts
from .checks import check_adapter_arguments, tensors_of
from .fused import Terms
from .head import lazy_logits
from .kinds import FROZEN, TRAINED, check_kinds
from .state import AdapterState


class FusedLoraLinear(AdapterState, nn.Linear):
    """y = x W0ᵀ + b + Σ s·(drop(x) Aᵀ) Bᵀ over the active adapters, with W0 and b frozen.

    It is an `nn.Linear`: `weight` (out_features, in_features) and `bias` keep their keys. Adapters are `lora_A[name]`
    (r, in_features) and `lora_B[name]` (out_features, r); `scaling[name]` is a run-time number (alpha/r, or alpha/√r
    with rsLoRA). A is Kaiming-uniform and B zero, so a new layer's output is the base layer's.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; dtype also holds for the adapter.
        r: rank of the adapter named "default", at least 1.
        lora_alpha: alpha, the numerator of the scale.
        lora_dropout: probability, in [0, 1), of dropping an input element on the low-rank path while training.
        use_rslora: scale by alpha/√r (arXiv 2312.03732) rather than alpha/r.
        init_lora_weights: how the adapter starts: see `reset_adapter`.
        use_dora: give every row a learnt length, `lora_magnitude_vector[name]` (out_features,): see
            `functional.dora_linear`.
        use_adalora: give every rank a learnt singular value, `lora_E[name]` (r, 1), for
            `fastlora.variants.RankAllocator`.

    Raises:
        ValueError: r < 1, a probability outside [0, 1), an adapter name that is taken or cannot name a parameter, an
            initialisation that does not exist or that the weight cannot give; use_dora with use_adalora.

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        use_adalora: bool = False,
    ) -> None:
        check_adapter_arguments("default", r, lora_alpha, lora_dropout)
        check_kinds(use_dora, use_adalora, init_lora_weights, "FusedLoraLinear")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init_adapter_state(fan_in_fan_out=False, backend="auto")
        settings = (r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        self.add_adapter("default", *settings, self.weight.dtype, use_dora, use_adalora)
        self._freeze_base()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        use_adalora: bool = False,
    ) -> FusedLoraLinear:
        """A layer that shares `linear`'s weight and bias, which are frozen by this; `linear` itself stays usable.

        `adapter_dtype` is float32 by default where the weight is bfloat16 or float16, else the weight's dtype. With an
        initialisation that changes the weight ("pissa", "olora") the layer gets a copy of it, and `linear` keeps its
        own.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"FusedLoraLinear.from_linear: linear: got {type(linear).__name__}, want a torch.nn.Linear"
            )
        check_adapter_arguments("default", r, lora_alpha, lora_dropout)
        check_kinds(use_dora, use_adalora, init_lora_weights, "FusedLoraLinear.from_linear")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        if starts.shifts_weight(init_lora_weights):
            layer.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        layer.training = linear.training
        layer._init_adapter_state(fan_in_fan_out=False, backend="auto")
        settings = (r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        layer.add_adapter("default", *settings, adapter_dtype, use_dora, use_adalora)
        layer._freeze_base()
        return layer

    # Adapter state. `STATE` names everything that turns a plain linear layer into this one, so that `unpatch` can
    # take it away again.

    STATE = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "scaling",
        *TRAINED,
        *FROZEN,
        "active_adapters",
        "disable_adapters",
        "merged_adapters",
        "allocation",
        "fan_in_fan_out",
        "backend",
        "calls",
        "group",
        "_base_weight",
        "_weight_before_shift",
    )

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def reset_parameters(self) -> None:
        names = list(self.__dict__.get("r", ()))  # nn.Linear.__init__ calls this before there are adapters
        for name in names:
            self.forget_initial_factors(name)
        super().reset_parameters()
        for name in names:
            self.reset_adapter(name)

    reset_adapter = kinds.reset_adapter
    weight_norm = kinds.weight_norm
    get_delta_weight = kinds.get_delta_weight

    unshifted_weight = starts.unshifted_weight
    as_plain_adapter = starts.as_plain_adapter

    # Running.

    def running_adapters(self) -> list[call.Adapter]:
        """The low-rank terms that `forward` adds now: none while adapters are disabled or merged."""
        if self.disable_adapters or self.merged_adapters:
            return []
        return kinds.adapters_of(self, self.active_adapters)

    def forward(self, input: Tensor) -> Tensor:
        if self.disable_adapters and self.merged_adapters:
            self.unmerge()
        batch = layers_batch.current(self)
        if batch is not None and not self.disable_adapters:
            return self._mixed_forward(input, batch)
        terms = self.terms(input)
        if self.loss_trust is not None and (lazy := lazy_logits(self, input, terms, self.loss_trust)) is not None:
            self.calls.fused += 1
            return lazy
        if not torch.compiler.is_compiling():  # a changing count would be a new graph for every call
            if not terms.adapters:
                self.calls.base += 1
            else:
                self.calls.fused += 1
                if self.group is not None and (y := self.group[0].run(self, input, terms)) is not None:
                    return y
        return ops_layer.run_layer(input, terms.weight, terms.adapters, terms.bias, self.backend, "multi_lora_linear")

    def terms(self, x: Tensor) -> Terms:
        own: Any = self._parameters  # past `nn.Module.__getattr__`, 4 µs cheaper; a replica has none
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None:
            weight, bias = self.weight, self.bias
        return Terms(weight.t() if self.fan_in_fan_out else weight, bias, self.running_adapters())

    def group_sources(self) -> tuple[list[Tensor], tuple]:
        names = self.active_adapters
        parts = [tensors_of(self._modules[part]) for part in ("lora_A", "lora_A0", "lora_E")]
        return [part[name] for part in parts for name in names if name in part], (tuple(names), self.shifted_by)

    def _mixed_forward(self, input: Tensor, batch: layers_batch.MixedBatch) -> Tensor:
        """Every sequence with its own adapter; names that this layer does not have run its base, as in PEFT."""
        if self.merged_adapters:
            raise ValueError(
                f"FusedLoraLinear.forward: adapters {self.merged_adapters} are merged into the weight, which every "
                "sequence of a mixed batch would see; call fastlora.unmerge(model) first"
            )
        names, segments = batch.segments(input, self.r)
        if not torch.compiler.is_compiling():
            self.calls.fused += 1
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return mixed_op.run_segments(input, weight, kinds.adapters_of(self, names), segments, self.bias, self.backend)
