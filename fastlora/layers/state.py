"""What a layer keeps of its named adapters, whatever it computes with them: parameters, settings, which are active and
merged. linear.py and experts.py have the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect.fused import OwnLayer
from . import kinds, starts
from .checks import check_adapter_arguments, keep_off_the_fast_path, scale_of
from .fused import CallCounts, FusedLayer
from .kinds import TRAINED, Magnitudes, check_kinds
from .schedule import Allocation

HALF_DTYPES = (torch.float16, torch.bfloat16)


class AdapterState(OwnLayer, FusedLayer, nn.Module):
    """A layer of fastlora's own, with adapters by name."""

    in_features: int
    out_features: int
    weight: Tensor
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    reset_adapter: Callable[..., None]
    get_delta_weight: Callable[..., Tensor]
    unshifted_weight: Callable[..., Tensor]
    as_plain_adapter: Callable[..., tuple[Tensor, Tensor, int, float]]

    TRAINED = TRAINED  # every `nn.ParameterDict` of what is trained, A's and B's first
    STATE: tuple[str, ...]

    def _init_adapter_state(self, fan_in_fan_out: bool, backend: str) -> None:
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        for key in self.TRAINED[:2]:
            self.add_module(key, nn.ParameterDict())
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

    def factor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        """Of A and B at this rank."""
        return {"lora_A": (r, self.in_features), "lora_B": (self.out_features, r)}

    def _set_weight(self, weight: nn.Parameter) -> None:
        """Puts another Parameter in the weight's place."""
        self.weight = weight

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
        check_kinds(use_dora, use_adalora, init_lora_weights, f"{type(self).__name__}.add_adapter")
        starts.check_init(init_lora_weights, f"{type(self).__name__}.add_adapter", r)
        if name in self.lora_A:
            raise ValueError(
                f"{type(self).__name__}.add_adapter: name: {name!r} is taken; this layer has {list(self.lora_A)}"
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
        shapes = self.factor_shapes(r)
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
                    getattr(self, key)[name] = nn.Parameter(values, requires_grad=active)
            self.reset_adapter(name, init_lora_weights)
        except BaseException:
            self._forget_adapter(name)
            raise
        if active:
            self.active_adapters = [name]

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter. Raises ValueError for an unknown name, or while it is merged, or another one is, into a
        weight that it has shifted."""
        self._check_names([name], "delete_adapter")
        if name in self.merged_adapters:
            raise ValueError(
                f"{type(self).__name__}.delete_adapter: name: {name!r} is merged; call fastlora.unmerge(model) first"
            )
        self._forget_adapter(name)

    def _forget_adapter(self, name: str) -> None:
        """Removes what there is of an adapter: an interrupted `add_adapter` leaves a part of one."""
        self.forget_initial_factors(name)
        settings = (self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.scaling)
        for state in (*settings, self.allocation, *(self._modules[key] for key in self.TRAINED)):
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
                f"{type(self).__name__}.set_adapter: adapters {self.merged_adapters} are merged into the weight; "
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
        for key in self.TRAINED:
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
            raise ValueError(f"{type(self).__name__}.{method}: name: got {unknown}, want one of {list(self.lora_A)}")

    def _check_not_merged(self, method: str) -> None:
        if self.merged_adapters:
            raise ValueError(
                f"{type(self).__name__}.{method}: adapters {self.merged_adapters} are merged; "
                "call fastlora.unmerge(model) first"
            )

    use_dora = property(kinds.use_dora)
    use_adalora = property(kinds.use_adalora)
    trained_parameters = kinds.trained_parameters

    # Starts away from zero.

    shifted_by = property(starts.shifted_by)
    set_initial_factors = starts.set_initial_factors
    set_frozen_factors = starts.set_frozen_factors
    check_initial_factors = starts.check_initial_factors
    forget_initial_factors = starts.forget_initial_factors
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
                f"{type(self).__name__}.merge: adapters {self.merged_adapters} are merged already; "
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
                    f"{type(self).__name__}.merge: merging {self.active_adapters} into a {self.weight.dtype} weight "
                    "would give non-finite values; nothing was changed. Check the adapter for NaN, or merge in a wider "
                    "dtype (model.float())"
                )
            if untie:
                self._base_weight = (self.weight,)
                with torch.inference_mode(False):  # a parameter made in inference mode could never be trained through
                    self._set_weight(nn.Parameter(merged.clone(), requires_grad=False))
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
            self._set_weight(base)
        else:  # the bits as the model has them now: it may have been moved or cast since
            with torch.no_grad():
                self.weight.copy_(base)
        self._base_weight = None
        self.merged_adapters = []

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
