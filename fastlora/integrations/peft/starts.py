"""Where a start goes in a PEFT layer, quantised or not, and how the layer and PEFT's configuration are put back.

PEFT keeps rank and alpha next to the factors, on the layers and in the configuration: there they are those of the
adapter of rank 2r that is saved. LoRA-GA with an untouched base runs s·(B A − B₀A₀) = s·[B, −B₀][A; A₀]. `begin` makes
that of PEFT's two linear layers, in place, by a change of their class: their `weight` is then the whole factor of rank
2r, so that whatever PEFT does with it (forwards of every kind of base layer, merging, saving, status) is right without
knowing, and one dropout mask serves both halves. Only the trained half is a parameter, and it is the one that was
there: optimisers keep theirs. On disk and in state_dicts there is one `weight` of rank 2r, an ordinary adapter of the
original base.

Nothing of PEFT is imported here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...introspect import names, sharding, targets
from ...introspect.fused import class_name
from ...ops.quant.weights import dequantised, kind_of


class StartedLinear(nn.Linear):
    """A factor of an adapter with a start: `trained` (r rows or columns) and the frozen `start` (as many).

    Never constructed: `begin` turns PEFT's linear layers into such, `end` turns them back.
    """

    trained: nn.Parameter
    start: Tensor
    dim: int  # along which the halves are put together: 0 in lora_A (r, in), 1 in lora_B (out, r)
    beside: bool  # the start runs next to the trained half; otherwise the base weight was shifted by it, and it is kept
    # for the file only
    experts: int  # of a lora_A (E·r, in), whose halves go together expert by expert; 1 elsewhere

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._both_halves(self.trained) if self.beside else self.trained

    def _both_halves(self, trained: Tensor) -> Tensor:
        """FSDP2 shards the trained half, a parameter, and gives it another dtype while its module runs; the frozen
        one, a buffer, it leaves alone."""
        halves = trained, sharding.replicated(self.start.to(trained.dtype), trained)
        if self.experts == 1:
            return torch.cat(halves, self.dim)
        return torch.cat([half.unflatten(0, (self.experts, -1)) for half in halves], 1).flatten(0, 1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        trained = self.trained if keep_vars else self.trained.detach()
        destination[prefix + "weight"] = self._both_halves(trained)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        whole = sharding.whole(own.pop(prefix + "weight", None))
        if whole is not None:
            wanted = list(self.trained.shape)
            wanted[self.dim] *= 2
            if list(whole.shape) != wanted:
                error_msgs.append(
                    f"size mismatch for {prefix}weight: copying a param with shape {tuple(whole.shape)}, the shape in "
                    f"current model is {tuple(wanted)}: a trained half and LoRA-GA's frozen start."
                )
                return
            parts = whole.unflatten(self.dim, (self.experts, -1)).chunk(2, self.dim + 1)
            trained, start = (part.flatten(self.dim, self.dim + 1).clone() for part in parts)
            if not self.beside and not _nearly_equal(start, sharding.whole(self.start)):
                error_msgs.append(
                    f"{prefix}weight has another start than the one that this base weight was shifted by "
                    '(base="offset"): want an adapter of the same start.'
                )
                return
            own |= {prefix + "trained": sharding.spread(trained, self.trained)}
            own |= {prefix + "start": sharding.spread(start, self.start)}
        missing: list[str] = []
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        halves = (prefix + "trained", prefix + "start")
        missing_keys.extend(dict.fromkeys(prefix + "weight" if key in halves else key for key in missing))


def begin(down: nn.Linear, up: nn.Linear, a0: Tensor, minus_b0: Tensor, beside: bool, experts: int = 1) -> None:
    """Gives lora_A and lora_B their frozen halves A₀ (r, in) and −B₀ (out, r), of their own dtypes, in place."""
    for linear, start, dim in ((down, a0, 0), (up, minus_b0, 1)):
        _rename(linear, "weight", "trained")
        linear.__class__ = StartedLinear
        started = cast(StartedLinear, linear)
        started.register_buffer("start", start)
        started.dim, started.beside = dim, beside
        started.experts = 1 if dim else experts  # lora_B (out, r·E) has the expert fastest: its halves just follow
    if beside:
        down.out_features, up.in_features = 2 * a0.shape[0], 2 * a0.shape[0]


def end(down: nn.Linear, up: nn.Linear) -> None:
    """Takes the frozen halves away again; the trained ones stay. Nothing happens where there are none."""
    for linear, dim in ((down, 0), (up, 1)):
        if isinstance(linear, StartedLinear):
            linear._buffers.pop("start", None)
            for attribute in ("dim", "beside", "experts"):
                linear.__dict__.pop(attribute, None)
            cast(nn.Module, linear).__class__ = nn.Linear
            _rename(linear, "trained", "weight")
            down.out_features = up.in_features = linear.weight.shape[dim]


def _rename(module: nn.Module, old: str, new: str) -> None:
    """A parameter's name, at its place in the order."""
    parameters = {new if key == old else key: value for key, value in module._parameters.items()}
    module._parameters.clear()
    module._parameters.update(parameters)


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    """To half precision's rounding, in which an adapter may have been saved."""
    b = b.detach().float()
    return bool((a.to(b) - b).abs().max() <= 2**-7 * b.abs().max())


# By name, so that PEFT and bitsandbytes need not be there.
EXPERTS = ("peft.tuners.lora.layer.ParamWrapper", "fastlora.integrations.peft.experts.ParamWrapper")
LAYERS = (
    "peft.tuners.lora.layer.Linear",
    "fastlora.integrations.peft.lora.FusedPeftLinear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
    *EXPERTS,
    "fastlora.integrations.peft.bnb.FusedLinear4bit",
    "fastlora.integrations.peft.bnb.FusedLinear8bitLt",
    "fastlora.integrations.peft.quantised.FusedTorchaoLinear",
)

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base weights alone

SHIFT = "_fastlora_weight_before_shift"  # on a PEFT layer: by which adapter, and the weight's bits on the host


def take_back_shift(layer: Any, adapter_name: str) -> None:
    """Puts the bits back that a layer's weight had before this adapter's start was taken out of it."""
    shift = layer.__dict__.get(SHIFT)
    if shift is not None and shift[0] == adapter_name:
        with torch.no_grad():
            layer.base_layer._parameters["weight"].copy_(shift[1])
        delattr(layer, SHIFT)


class PeftStart:
    """One adapter of a PEFT LoRA layer, as `init_lora_ga` sees it."""

    def __init__(self, name: str, layer: Any, adapter_name: str) -> None:
        _check_layer(name, layer, adapter_name)
        self.name, self.layer, self.adapter_name = name, layer, adapter_name
        self.down, self.up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        self.scaling = layer.scaling[adapter_name]
        self.out_features = layer.out_features
        self.num_experts: int = getattr(layer, "num_experts", 1)
        self.base_parameter: Tensor = layer.get_base_layer()._parameters[getattr(layer, "parameter_name", "weight")]
        self.device = self.base_parameter.device
        self.r = len(self.trained()[0]) // self.num_experts  # the trained rank

    def trained(self) -> tuple[Tensor, Tensor]:
        """A and B as they train."""
        a, b = (x.trained if isinstance(x, StartedLinear) else x.weight for x in (self.down, self.up))
        return a, b

    def frozen(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and −B₀, where there are some."""
        down, up = self.down, self.up
        return (down.start, up.start) if isinstance(down, StartedLinear) and isinstance(up, StartedLinear) else None

    def weight(self) -> Tensor:
        """W0 as it is without this adapter's shift, in either layout; a quantised one dequantised, for as long as the
        caller holds it."""
        shift = self.layer.__dict__.get(SHIFT)
        if shift is not None and shift[0] == self.adapter_name:
            return shift[1].to(self.base_parameter)
        return dequantised(self.layer.base_layer)

    def check(self, exact: bool) -> None:
        """Raises ValueError where `set` cannot work in the layer's present state."""
        if self.layer.merged_adapters:
            raise ValueError(
                f"init_lora_ga: model: adapters {list(self.layer.merged_adapters)} are merged into {self.name!r}; call "
                "unmerge_adapter() first"
            )
        if exact:
            return
        if not self.base_parameter.is_floating_point() or kind_of(self.layer.base_layer) is not None:
            raise ValueError(
                f'init_lora_ga: base: got "offset", but the weight of {self.name!r} is a '
                f'{type(self.base_parameter).__name__}, from which nothing can be subtracted; want base="exact"'
            )
        shifted_by = self.layer.__dict__.get(SHIFT, (self.adapter_name,))[0]
        if shifted_by != self.adapter_name:
            raise ValueError(
                f"init_lora_ga: base: adapter {shifted_by!r} has shifted the weight of {self.name!r} already; want "
                'base="exact" for a second one'
            )

    def set(self, a: Tensor, b: Tensor, exact: bool) -> None:
        """Starts the adapter at A₀ = a (r, in), B₀ = b (out, r)."""
        self.forget()
        down, up = self.down, self.up
        with torch.inference_mode(False), torch.no_grad():
            down.weight.copy_(a)
            up.weight.copy_(b)
            if up.bias is not None:  # lora_bias=True
                up.bias.zero_()
            a0, minus_b0 = down.weight.detach().clone(), up.weight.detach().neg()
            if not exact:
                self._shift(a0, minus_b0)
        self._begin(a0, minus_b0, exact)

    def _begin(self, a0: Tensor, minus_b0: Tensor, exact: bool) -> None:
        begin(self.down, self.up, a0, minus_b0, exact, self.num_experts)
        if exact:
            rank, alpha = self.layer.r[self.adapter_name], self.layer.lora_alpha[self.adapter_name]
            self._set_rank(2 * rank, alpha * self._alpha_factor)

    def begin_with_zeros(self) -> None:
        """Frozen halves that take nothing away yet."""
        with torch.inference_mode(False):
            a, b = self.trained()
            self._begin(torch.zeros_like(a.detach()), torch.zeros_like(b.detach()), True)

    def reset(self) -> None:
        """LoRA's ordinary start."""
        self.forget()
        self.layer.reset_lora_parameters(self.adapter_name, True)

    def remember(self) -> Callable[[], None]:
        """What puts the layer back as it is now, to the bit; it holds copies of A and B on the host."""
        layer, down, up = self.layer, self.down, self.up
        rank = layer.r[self.adapter_name], layer.lora_alpha[self.adapter_name]
        parameters = [p for linear in (down, up) for p in linear._parameters.values() if p is not None]
        copies = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]
        starts = (down.start, up.start, down.beside) if isinstance(down, StartedLinear) else None
        shift = layer.__dict__.get(SHIFT)
        shifted_here = shift is not None and shift[0] == self.adapter_name
        shifted = self.base_parameter.detach().to("cpu", copy=True) if shifted_here else None

        def restore() -> None:
            take_back_shift(self.layer, self.adapter_name)
            end(down, up)
            with torch.no_grad():
                for parameter, values in copies:
                    parameter.copy_(values)
                if shifted is not None:
                    self.base_parameter.copy_(shifted)
            if shift is not None:
                setattr(layer, SHIFT, shift)
            if starts is not None:
                begin(down, up, *starts, self.num_experts)
            self._set_rank(*rank)

        return restore

    def forget(self) -> None:
        """Takes back a former start, but for the values of A and B."""
        take_back_shift(self.layer, self.adapter_name)
        if isinstance(self.down, StartedLinear):
            beside = self.down.beside
            end(self.down, self.up)
            if beside:
                self._set_rank(
                    self.layer.r[self.adapter_name] // 2, self.layer.lora_alpha[self.adapter_name] / self._alpha_factor
                )

    def _shift(self, a0: Tensor, minus_b0: Tensor) -> None:
        """W0 − s·B₀A₀, in float32 at least and rounded once."""
        weight = self.base_parameter
        wide = torch.promote_types(weight.dtype, torch.float32)
        start = torch.mm(minus_b0.to(wide), a0.to(wide)).mul_(self.scaling)
        shifted = weight.to(wide) + (start.t() if self.layer.fan_in_fan_out else start)
        setattr(self.layer, SHIFT, (self.adapter_name, weight.detach().to("cpu", copy=True)))
        weight.copy_(shifted)

    def _set_rank(self, r: int, alpha: float) -> None:
        self.layer.r[self.adapter_name] = r
        self.layer.lora_alpha[self.adapter_name] = names.as_integer(alpha)

    @property
    def _alpha_factor(self) -> float:
        return _alpha_factor(self.layer, self.adapter_name)


def _alpha_factor(layer: Any, adapter_name: str) -> float:
    """What twice the rank multiplies alpha with, so that the scale stays the same."""
    return math.sqrt(2) if layer.use_rslora[adapter_name] else 2


def has_start(layer: Any, adapter_name: str) -> bool:
    """Whether an adapter of a PEFT layer has a frozen half."""
    return adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], StartedLinear)


def saved_rank(layer: Any, adapter_name: str) -> tuple[int, float]:
    """(r, alpha) of a PEFT layer's adapter in the file: of both halves, where it has a start."""
    r, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
    if has_start(layer, adapter_name) and not layer.lora_A[adapter_name].beside:
        return 2 * r, names.as_integer(alpha * _alpha_factor(layer, adapter_name))
    return r, alpha


class PeftConfiguration:
    """PEFT's configuration of one adapter, shared by the model and all wrappers around it."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model, self.adapter_name = model, adapter_name
        self.prefix, self.configurations = _find(model, adapter_name)
        config = self.configurations[adapter_name]
        for setting in ("layer_replication", "ensure_weight_tying"):
            if getattr(config, setting, None):
                raise ValueError(
                    f"init_lora_ga: model: the adapter {adapter_name!r} has {setting}="
                    f"{getattr(config, setting)!r}, with which factors are shared: not supported"
                )
        if config.init_lora_weights not in PLAIN_INITS:
            raise ValueError(
                f"init_lora_ga: model: the adapter {adapter_name!r} was made with init_lora_weights="
                f"{config.init_lora_weights!r}, which changes the base weights; want init_lora_weights=True"
            )

    def update(self) -> None:
        """Ranks and alphas as they are in the layers now, those of both halves where an adapter has a start."""
        saved = {
            targets.called(name, layer).removeprefix(self.prefix): saved_rank(layer, self.adapter_name)
            for name, layer in targets.peft_lora_layers(self.model)
            if self.adapter_name in layer.r
        }
        config = copy.copy(self.configurations[self.adapter_name])  # the user's own object stays as it is
        config.r, config.rank_pattern = names.common_and_pattern({name: r for name, (r, _) in saved.items()})
        config.lora_alpha, config.alpha_pattern = names.common_and_pattern({name: a for name, (_, a) in saved.items()})
        config.init_lora_weights = True
        self.configurations[self.adapter_name] = config

    def remember(self) -> Callable[[], None]:
        """What puts the configuration back."""
        config = self.configurations[self.adapter_name]
        return lambda: self.configurations.__setitem__(self.adapter_name, config)


def _find(model: nn.Module, adapter_name: str) -> tuple[str, dict[str, Any]]:
    """The prefix of the module that PEFT was put into, and the configurations."""
    found: tuple[str, dict[str, Any]] | None = None
    for name, module in names.named_modules(model):
        configurations = getattr(module, "peft_config", None)
        if isinstance(configurations, dict) and (found is None or configurations is found[1]):
            found = (f"{name}." if name else "", configurations)  # PeftModel, its LoraModel, and the model in that
    if found is None or adapter_name not in found[1]:
        known = [] if found is None else list(found[1])
        raise ValueError(
            f"init_lora_ga: model: got a {type(model).__name__} with PEFT's LoRA layers, and no peft_config of an "
            f"adapter {adapter_name!r} (there is {known}); want the PeftModel, or the model PEFT was put into"
        )
    return found


def _check_layer(name: str, layer: Any, adapter_name: str) -> None:
    """Raises ValueError where the layer is not plain LoRA on a linear layer of a known kind."""
    kind = class_name(layer)
    if kind not in LAYERS:
        raise ValueError(
            f"init_lora_ga: model: {name!r} is a {kind}, want one of {', '.join(LAYERS)}: sketch again with "
            "exclude_modules for it"
        )
    if adapter_name not in layer.lora_A:
        raise ValueError(f"init_lora_ga: adapter_name: got {adapter_name!r}, but {name!r} has {list(layer.lora_A)}")
    if kind not in EXPERTS and hasattr(layer.base_layer, "base_layer"):
        raise ValueError(
            f"init_lora_ga: model: {name!r} is nested around another PEFT layer ({class_name(layer.base_layer)})"
        )
    if adapter_name in getattr(layer, "lora_variant", {}):
        raise ValueError(
            f"init_lora_ga: model: the adapter {adapter_name!r} of {name!r} is PEFT's "
            f"{type(layer.lora_variant[adapter_name]).__name__}, want plain LoRA"
        )
    for side, linear in (("lora_A", layer.lora_A[adapter_name]), ("lora_B", layer.lora_B[adapter_name])):
        if type(linear) not in (nn.Linear, StartedLinear):
            raise ValueError(f"init_lora_ga: model: {side} of {name!r} is a {class_name(linear)}, want a Linear")
        tensors = [p for p in linear._parameters.values() if p is not None]
        if any(type(t) is not nn.Parameter or t.is_meta or not t.numel() for t in tensors):
            raise ValueError(f"init_lora_ga: model: {side} of {name!r} is sharded, offloaded or not materialised")
