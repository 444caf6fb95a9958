"""`FusedLoraLinear`: an `nn.Linear` with named low-rank adapters. Parameters and adapter state live here; how an
adapter starts is in starts.py, what kinds there are in kinds.py, the maths in ops/."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect.fused import OwnLayer
from ..ops import call
from ..ops import layer as ops_layer
from ..ops.mixed import mixed as mixed_op
from . import batch as layers_batch
from . import kinds, starts
from .checks import check_adapter_arguments, keep_off_the_fast_path, scale_of
from .fused import CallCounts, FusedLayer, Terms
from .head import lazy_logits
from .kinds import FROZEN, TRAINED, Magnitudes, check_kinds
from .schedule import Allocation

HALF_DTYPES = (torch.float16, torch.bfloat16)


class FusedLoraLinear(OwnLayer, FusedLayer, nn.Linear):
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

    def _init_adapter_state(self, fan_in_fan_out: bool, backend: str) -> None:
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_E = nn.ParameterDict()  # AdaLoRA's singular values
        self.lora_magnitude_vector = Magnitudes()  # DoRA's
        # Frozen: where an adapter did not start at zero, what takes its start away again (see `set_initial_factors`).
        self.lora_A0 = nn.ParameterDict()
        self.lora_B0 = nn.ParameterDict()
        self.lora_shift = nn.ParameterDict()  # by whose start the weight is shifted
        # In eval mode nn.TransformerEncoderLayer reads its linear layers' weights itself, past their adapters, unless
        # some module in it has a forward hook. One on a container, which is never called, costs nothing.
        self.lora_A.register_forward_pre_hook(keep_off_the_fast_path)
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self.merged_adapters: list[str] = []
        self.allocation: dict[str, Allocation] = {}  # of AdaLoRA's ranks
        self.fan_in_fan_out = fan_in_fan_out  # True: weight is (in, out), as in transformers' Conv1D
        self.backend = backend
        self.calls = CallCounts()
        # While merged, what undoes it: a copy of the weight's bits, or the tied Parameter itself. In a tuple, so that
        # it does not become a parameter.
        self._base_weight: tuple[Tensor] | None = None
        self.group = None
        self._weight_before_shift: tuple[str, Tensor] | None = None  # by which adapter, and the bits on the host

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def add_adapter(
        self,
        name: str,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        dtype: torch.dtype | None = None,
        use_dora: bool = False,
        use_adalora: bool = False,
    ) -> None:
        """Adds an adapter; it is active (and trainable) only where it is the layer's only one.

        `init_lora_weights`: see `reset_adapter`. `dtype` is float32 by default where the weight is bfloat16 or float16,
            else the weight's. `use_dora`, `use_adalora`: as in `FusedLoraLinear`.

        Raises ValueError, with nothing changed, for r < 1, a probability outside [0, 1), a name that is taken or cannot
        name a parameter, an initialisation that does not exist or that the weight cannot give; both kinds at once.
        """
        check_adapter_arguments(name, r, lora_alpha, lora_dropout)
        check_kinds(use_dora, use_adalora, init_lora_weights, "FusedLoraLinear.add_adapter")
        starts.check_init(init_lora_weights, "FusedLoraLinear.add_adapter", r)
        if name in self.lora_A:
            raise ValueError(
                f"FusedLoraLinear.add_adapter: name: {name!r} is taken; this layer has {list(self.lora_A)}"
            )
        if self.shifted_by is not None:
            warnings.warn(
                f"fastlora: adapter {self.shifted_by!r} has moved a part of the weight into itself; "
                f"{name!r} will run on what is left",
                UserWarning,
                stacklevel=2,
            )
        if dtype is None:
            dtype = torch.float32 if self.weight.dtype in HALF_DTYPES else self.weight.dtype
        active = len(self.lora_A) == 0
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (r, self.in_features), "lora_B": (self.out_features, r)}
        shapes |= {"lora_E": (r, 1)} if use_adalora else {}
        shapes |= {"lora_magnitude_vector": (self.out_features,)} if use_dora else {}
        self.r[name] = r
        self.lora_alpha[name] = lora_alpha
        self.lora_dropout[name] = float(lora_dropout)
        self.use_rslora[name] = use_rslora
        self.scaling[name] = scale_of(lora_alpha, r, use_rslora)
        try:
            with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
                for key, shape in shapes.items():
                    # A magnitude in half precision would not be the norm that it is divided by.
                    kind = torch.promote_types(dtype, torch.float32) if len(shape) == 1 else dtype
                    values = torch.empty(shape, device=self.weight.device, dtype=kind)
                    self._modules[key][name] = nn.Parameter(values, requires_grad=active)  # type: ignore[index]
            self.reset_adapter(name, init_lora_weights)
        except BaseException:
            self._forget_adapter(name)
            raise
        if active:
            self.active_adapters = [name]

    def reset_parameters(self) -> None:
        names = list(self.__dict__.get("r", ()))  # nn.Linear.__init__ calls this before there are adapters
        for name in names:
            self.forget_initial_factors(name)
        super().reset_parameters()
        for name in names:
            self.reset_adapter(name)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter. Raises ValueError for an unknown name, or while it is merged, or another one is, into a
        weight that it has shifted."""
        self._check_names([name], "delete_adapter")
        if name in self.merged_adapters:
            raise ValueError(
                f"FusedLoraLinear.delete_adapter: name: {name!r} is merged; call fastlora.unmerge(model) first"
            )
        self._forget_adapter(name)

    def _forget_adapter(self, name: str) -> None:
        """Removes what there is of an adapter: an interrupted `add_adapter` leaves a part of one."""
        self.forget_initial_factors(name)
        settings = (self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.scaling)
        for state in (*settings, self.allocation, *(self._modules[key] for key in TRAINED)):
            if name in state:  # type: ignore[operator]
                del state[name]  # type: ignore[index, attr-defined]
        self.active_adapters = [active for active in self.active_adapters if active != name]

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Makes these adapters the active, trainable ones, and freezes the others.

        Raises ValueError for an unknown name, or while adapters are merged.
        """
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        self._check_names(names, "set_adapter")
        if self.merged_adapters:
            raise ValueError(
                f"FusedLoraLinear.set_adapter: adapters {self.merged_adapters} are merged into the weight; "
                "call fastlora.unmerge(model) first"
            )
        self.activate(names, trainable=True)

    def activate(self, names: list[str], trainable: bool) -> None:
        """`set_adapter` of those names that the layer has, where nothing is merged. A model has hundreds of layers, and
        serving switches them between requests."""
        names = [name for name in names if name in self.r]
        self.__dict__["active_adapters"] = names
        if not trainable:
            return
        modules = self._modules
        for key in TRAINED:
            parameters: Any = modules[key]._parameters  # type: ignore[union-attr]
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    if name not in names:
                        parameter.requires_grad = False
                elif name in names:
                    parameter.requires_grad = True

    def disable(self) -> Callable[[], None]:
        """Disables the adapters, and returns what sets the flag back."""
        before, self.disable_adapters = self.disable_adapters, True
        return lambda: setattr(self, "disable_adapters", before)

    def _check_names(self, names: Iterable[str], method: str) -> None:
        unknown = [name for name in names if name not in self.lora_A]
        if unknown:
            raise ValueError(f"FusedLoraLinear.{method}: name: got {unknown}, want one of {list(self.lora_A)}")

    def _check_not_merged(self, method: str) -> None:
        if self.merged_adapters:
            raise ValueError(
                f"FusedLoraLinear.{method}: adapters {self.merged_adapters} are merged; "
                "call fastlora.unmerge(model) first"
            )

    use_dora = property(kinds.use_dora)
    use_adalora = property(kinds.use_adalora)
    trained_parameters = kinds.trained_parameters
    reset_adapter = kinds.reset_adapter
    weight_norm = kinds.weight_norm
    get_delta_weight = kinds.get_delta_weight

    # Starts away from zero.

    shifted_by = property(starts.shifted_by)
    set_initial_factors = starts.set_initial_factors
    set_frozen_factors = starts.set_frozen_factors
    check_initial_factors = starts.check_initial_factors
    forget_initial_factors = starts.forget_initial_factors
    unshifted_weight = starts.unshifted_weight
    as_plain_adapter = starts.as_plain_adapter
    alpha_at = starts.alpha_at
    holds = starts.holds

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = starts.before_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        starts.after_loading(self, saved)

    # Merging.

    def base_weight(self) -> Tensor:
        return self.weight

    def merge_adapters(self, names: list[str] | None, untie: bool) -> None:
        self.merge(untie)

    def merge(self, untie: bool = False) -> None:
        """Adds the active adapters to the weight: summed in float32, rounded once to the weight's dtype.

        The weight's former bits are kept (in host memory), so that `unmerge` restores them exactly. With `untie` the
        layer gets a new weight and the old Parameter is set aside: for a weight that other modules use too.

        Raises ValueError, with nothing changed, where the merged weight would not be finite, or adapters are merged
        already.
        """
        if self.merged_adapters:
            raise ValueError(
                f"FusedLoraLinear.merge: adapters {self.merged_adapters} are merged already; "
                "call fastlora.unmerge(model) first"
            )
        if not self.active_adapters:
            return
        with torch.no_grad():
            dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            merged = self.weight.to(dtype, copy=True)
            for name in self.active_adapters:
                merged += self.get_delta_weight(name)
            merged = merged.to(self.weight.dtype)
            if not torch.isfinite(merged).all():
                raise ValueError(
                    f"FusedLoraLinear.merge: merging {self.active_adapters} into a {self.weight.dtype} weight "
                    "would give non-finite values; nothing was changed. Check the adapter for NaN, or merge in a wider "
                    "dtype (model.float())"
                )
            if untie:
                self._base_weight = (self.weight,)
                with torch.inference_mode(False):  # a parameter made in inference mode could never be trained through
                    self.weight = nn.Parameter(merged.clone(), requires_grad=False)
            else:
                self._base_weight = (self.weight.detach().to("cpu", copy=True),)
                self.weight.copy_(merged)  # not through .data: a backward pass that has saved the weight must notice
        self.merged_adapters = list(self.active_adapters)

    def unmerge(self) -> None:
        """Puts the weight's former bits back; nothing happens where nothing is merged."""
        if not self.merged_adapters:
            return
        assert self._base_weight is not None
        (base,) = self._base_weight
        if isinstance(base, nn.Parameter) and base.device == self.weight.device and base.dtype == self.weight.dtype:
            self.weight = base
        else:  # the bits as the model has them now: it may have been moved or cast since
            with torch.no_grad():
                self.weight.copy_(base)
        self._base_weight = None
        self.merged_adapters = []

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
        return ops_layer.multi_lora_linear(input, terms.weight, terms.adapters, terms.bias, backend=self.backend)

    def terms(self, x: Tensor) -> Terms:
        own: Any = self._parameters  # past `nn.Module.__getattr__`, 4 µs cheaper; a replica has none
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None:
            weight, bias = self.weight, self.bias
        return Terms(weight.t() if self.fan_in_fan_out else weight, bias, self.running_adapters())

    def group_sources(self) -> tuple[list[Tensor], tuple]:
        names = self.active_adapters
        parts = (self.lora_A, self.lora_A0, self.lora_E)
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

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}{'' if name in self.active_adapters else ' (inactive)'}: r={self.r[name]}, "
            f"scaling={self.scaling[name]:g}"
            + (f", dropout={self.lora_dropout[name]:g}" if self.lora_dropout[name] else "")
            + (", DoRA" if name in self.lora_magnitude_vector else ", AdaLoRA" if name in self.lora_E else "")
            for name in self.r
        )
        merged = f", merged={self.merged_adapters}" if self.merged_adapters else ""
        return f"{super().extra_repr()}, {adapters}{merged}"
