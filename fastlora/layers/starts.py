"""How an adapter starts: drawn at random (A or B zero, or both orthogonal), taken out of the weight (PiSSA, OLoRA), or
set from outside (LoRA-GA).

PiSSA and OLoRA move a part of W0 into the adapter: s·B₀A₀ is the leading part of W0, by singular values (PiSSA) or by
the first r columns (OLoRA), and W0 − s·B₀A₀ stays behind, frozen. docs/details/initialisation.md has the details.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..introspect import sharding

if TYPE_CHECKING:
    from .linear import FusedLoraLinear
    from .state import AdapterState

# PEFT's other initialisations, and what to do for them here.
_ELSEWHERE = {
    "lora_ga": "needs gradients: run backward passes inside fastlora.GradientSketch(model), then call "
    "fastlora.init_lora_ga(model, sketch)",
    "eva": "needs data: initialise with PEFT (initialize_lora_eva_weights), then call fastlora.patch(peft_model)",
    "corda": "needs data: initialise with PEFT (preprocess_corda), then call fastlora.patch(peft_model)",
    "loftq": "quantises the base model: initialise with PEFT (loftq_config), then call fastlora.patch(peft_model)",
    "mica": "freezes lora_B: initialise with PEFT, then call fastlora.patch(peft_model)",
}
_WANTED = 'want True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_<iterations>" or "olora"'
_PISSA = re.compile(r"pissa(?:_niter_(\d+))?")
# Residual of the singular triplets, over the largest singular value, at which "pissa" takes them for exact: float32
# reaches 4e-7 on Gaussian matrices of side 1024.
_CONVERGED = 1e-5


def check_init(init: bool | str, caller: str, r: int | None = None) -> None:
    """Raises ValueError for an initialisation that does not exist, needs data, or does not go with r."""
    where = f"{caller}: init_lora_weights: got {init!r}"
    if isinstance(init, bool):
        return
    if not isinstance(init, str):
        raise ValueError(f"{where}, {_WANTED}")
    name = init.lower()
    for start, advice in _ELSEWHERE.items():
        if name == start or name.startswith(f"{start}_"):
            raise ValueError(f"{where}, which {advice}")
    if name not in ("gaussian", "orthogonal") and not shifts_weight(init):
        raise ValueError(f"{where}, {_WANTED}")
    if name == "orthogonal" and r is not None and r % 2:
        raise ValueError(f"{caller}: r: got {r}, want an even rank for init_lora_weights={init!r}")


def shifts_weight(init: bool | str) -> bool:
    """True for PiSSA and OLoRA, which move a part of the weight into the adapter."""
    return isinstance(init, str) and (init.lower() == "olora" or _PISSA.fullmatch(init.lower()) is not None)


# Starts that leave the weight alone.
def draw(lora_A: Tensor, lora_B: Tensor, init: bool | str) -> None:
    """Fills A (r, in) and B (out, r) in place, from torch's generator, as PEFT does."""
    name = init.lower() if isinstance(init, str) else init
    if name == "orthogonal":
        _draw_orthogonal(lora_A, lora_B)
        return
    if name == "gaussian":
        nn.init.normal_(lora_A, std=1.0 / len(lora_A))
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if name is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


def _draw_orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    """A and B through the odd and the even rows of one orthogonal matrix (r, r): neither is zero, and B A is.

    Drawn on the host in float32 and in PEFT's order: the same seed gives PEFT's factors.
    """
    r, n, m = lora_A.shape[0], lora_B.shape[0], lora_A.shape[1]
    host: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        q = torch.linalg.qr(torch.randn(r, r, **host))[0]
        a = (torch.randn(m, r // 2, **host) @ q[0::2]).t() / 10
        b = torch.randn(r // 2, n, **host).t() @ q[1::2] / 10
        lora_A.copy_(a)
        lora_B.copy_(b)


# Starts out of the weight.
def from_weight(
    weight: Tensor, r: int, scaling: float, init: str, *, whole: bool = False, caller: str = "FusedLoraLinear"
) -> tuple[Tensor, Tensor]:
    """(A₀ (r, in), B₀ (out, r)) of PiSSA or OLoRA for a weight (out, in).

    In float32, or float64 for a float64 weight, whatever autocast says; nothing is drawn from torch's generator.

    Args:
        whole: by LAPACK's full decomposition, in float64, where "pissa" would stop at float32's own accuracy.

    Raises:
        ValueError: a rank above min(out, in); a weight without values (meta device, sharded), with values that are not
            finite, or all zero; a scale that leaves nothing to learn.
    """
    name = init.lower()
    where = f"{caller}: init_lora_weights={init!r}"
    n, m = weight.shape
    if weight.is_meta:
        raise ValueError(f"{where}: weight: it is on the meta device, want its values: load the model's weights first")
    if type(weight) not in (Tensor, nn.Parameter) or weight.numel() == 0:
        raise ValueError(f"{where}: weight: got a {type(weight).__name__} of {weight.numel()} elements, want all of it")
    if r > min(n, m):
        raise ValueError(f"{where}: r: got {r}, want at most {min(n, m)}, the smaller side of a weight {n}×{m}")
    if scaling == 0 or (scaling < 0 and name != "olora"):
        raise ValueError(f"{where}: lora_alpha: got a scale of {scaling}, want a positive one")
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        weight = weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{where}: weight: it has NaN or infinite entries, want finite ones")
        if not bool(weight.any()):
            raise ValueError(f"{where}: weight: it is zero everywhere, so there is nothing to start from")
        if name == "olora":
            return _olora(weight, r)
        u, s, vh = _pissa_triplets(weight, r, name, whole)
        root = (s / scaling).sqrt()
        return root.unsqueeze(1) * vh, u * root


def _olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r rows of R and columns of Q. They depend on the first r columns of the weight alone, and R = Qᵀ W."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    q = torch.linalg.qr(weight[:, :r].double())[0].to(dtype)
    return (q.t() @ weight.to(dtype)).triu(), q


def _pissa_triplets(weight: Tensor, r: int, name: str, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading triplets; "pissa": to float32's accuracy, by Lanczos steps where those are a small part of the
    full decomposition, else by that one; "pissa_niter_N": after N rounds of subspace iteration."""
    match = _PISSA.fullmatch(name)
    assert match is not None, name
    if match[1] is not None:
        return linalg.truncated_svd(weight, r, iterations=int(match[1]))[:3]
    if not whole:
        steps = _lanczos_steps(weight, r)
        if steps is not None:
            found, residual = _by_lanczos(weight, r, steps)
            if residual <= _CONVERGED:
                return found
        u, s, vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        return u[:, :r], s[:r], vh[:r]
    return linalg.truncated_svd(weight, r, oversampling=min(weight.shape))[:3]


def _by_lanczos(weight: Tensor, r: int, steps: int) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """The triplets after so many steps, and the largest residual ‖W v − σ u‖ over σ₁."""
    u, s, vh, _ = linalg.truncated_svd(weight, r, "lanczos", iterations=steps)
    residual = weight.to(u.dtype) @ vh.t() - u * s
    return (u, s, vh), float(residual.norm(dim=0).amax() / s[0])


def _lanczos_steps(weight: Tensor, r: int) -> int | None:
    """How many steps will do, from the residuals after two and three; None where those alone would take more than a few
    percent of a full decomposition's time (measured at 1024 and 2048), or all of them as long as that."""
    columns, least = 2 * r + 8, min(weight.shape)
    if least < 2048 or 64 * columns > least:
        return None
    second, third = (_by_lanczos(weight, r, steps)[1] for steps in (2, 3))
    if third <= _CONVERGED:
        return 3
    if third >= second:
        return None
    needed = 4 + math.ceil(math.log(third / _CONVERGED) / math.log(second / third))
    return needed if 3 * needed * columns <= least else None


LEAVE_OUT = "leave it out with exclude_modules"


def check_not_shared(model: nn.Module, weights: Mapping[str, Tensor], caller: str, advice: str = LEAVE_OUT) -> None:
    """Raises ValueError where a weight that is to be shifted is some other module's too: that one would change with it.

    `weights`: by the names of their layers. `advice`: what to do instead.
    """
    # A module under two names is one module.
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, weight in weights.items():
        if users[id(weight)] > 1:
            raise ValueError(
                f"{caller}: {name!r}: its weight belongs to another module too (tied weights), which would change with "
                f"it, since this start moves a part of the weight into the adapter; {advice}"
            )


# What a layer remembers of its adapters' starts: functions of a `FusedLoraLinear`, most of them its methods.
def begin(layer: FusedLoraLinear, name: str, init_lora_weights: bool | str) -> None:
    """Starts A and B: see `FusedLoraLinear.reset_adapter`."""
    caller = "FusedLoraLinear.reset_adapter"
    check_init(init_lora_weights, caller, layer.r[name])
    if shifts_weight(init_lora_weights):
        assert isinstance(init_lora_weights, str)
        layer.check_initial_factors(name, exact=False)
        weight, scaling = layer.unshifted_weight(name), layer.scaling[name]
        start = from_weight(weight, layer.r[name], scaling, init_lora_weights, caller=caller)
        layer.set_initial_factors(name, *start, exact=False)
    else:
        layer.forget_initial_factors(name)
        draw(layer.lora_A[name], layer.lora_B[name], init_lora_weights)


def set_initial_factors(layer: AdapterState, name: str, a: Tensor, b: Tensor, exact: bool = True) -> None:
    """Starts an adapter at A₀ = a (r, in), B₀ = b (out, r), leaving the layer's output as it is with B A = 0.

    `exact`: W0 stays, and the adapter runs as s·(B A − B₀A₀), of rank 2r with the second half frozen. Otherwise
    s·B₀A₀ is subtracted from the weight and rounded to its dtype; `unpatch`, `delete_adapter` and `reset_adapter`
    restore its bits.

    Raises ValueError for shapes that do not fit, while adapters are merged, or where another adapter has shifted
    the weight.
    """
    layer._check_names([name], "set_initial_factors")
    wanted = (layer.lora_A[name].shape, layer.lora_B[name].shape)
    if (a.shape, b.shape) != wanted:
        raise ValueError(
            f"FusedLoraLinear.set_initial_factors: a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            f"want {tuple(wanted[0])} and {tuple(wanted[1])}"
        )
    layer.check_initial_factors(name, exact)
    layer.forget_initial_factors(name)
    with torch.no_grad():
        layer.lora_A[name].copy_(a)
        layer.lora_B[name].copy_(b)
        if not exact:
            layer._weight_before_shift = (name, layer.weight.detach().to("cpu", copy=True))
            _mark_shift(layer)
        layer.set_frozen_factors(name, layer.lora_A[name].detach(), layer.lora_B[name].detach().neg())


def set_frozen_factors(layer: AdapterState, name: str, a0: Tensor | None, b0: Tensor | None) -> None:
    """Sets the frozen part of an adapter, s·b0 a0 with a0 (k, in) and b0 (out, k) for any k; None for none.

    It runs next to the trained part, or it is what the weight is shifted by, rounded once from the weight's bits.
    """
    for factors, value in ((layer.lora_A0, a0), (layer.lora_B0, b0)):
        if value is None:
            if name in factors:
                del factors[name]
        elif isinstance(value, nn.Parameter):
            factors[name] = value
        else:
            with torch.inference_mode(False):
                factors[name] = nn.Parameter(value.clone(), requires_grad=False)
    if layer._weight_before_shift and layer._weight_before_shift[0] == name:
        with torch.no_grad():
            bits = layer._weight_before_shift[1]
            layer.weight.copy_(_shifted(layer, bits, product(layer, name, layer.lora_A0[name], layer.lora_B0[name])))


def _shifted(layer: AdapterState, weight: Tensor, product: Tensor) -> Tensor:
    """weight + product, rounded once to the weight's dtype and where the weight is."""
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    return (weight.to(layer.weight).to(wide) + product).to(layer.weight.dtype)


def _mark_shift(layer: AdapterState) -> None:
    """Sets `lora_shift` by `_weight_before_shift`."""
    for name in list(layer.lora_shift):
        del layer.lora_shift[name]
    if (name := layer.shifted_by) is not None:
        with torch.inference_mode(False):
            mark = torch.ones(1, dtype=layer.lora_A[name].dtype, device=layer.weight.device)
            layer.lora_shift[name] = nn.Parameter(mark, requires_grad=False)


def check_initial_factors(layer: AdapterState, name: str, exact: bool) -> None:
    """Raises ValueError where `set_initial_factors` cannot work in the layer's present state."""
    if name in layer.lora_E:
        raise ValueError(
            f"FusedLoraLinear.set_initial_factors: name: {name!r} is an AdaLoRA adapter, P Λ Q, whose own start is "
            "Λ = 0; want one without use_adalora (LoRA-GA sets factors of B A)"
        )
    layer._check_not_merged("set_initial_factors")
    factors = [factors[name] for factors in (layer.lora_A, layer.lora_B) if name in factors]  # none yet while loading
    if any(sharding.is_sharded(p) for p in (layer.weight, *factors)):
        raise ValueError(
            f"FusedLoraLinear.set_initial_factors: the parameters are sharded, want this {sharding.BEFORE}"
        )
    if not exact and layer.shifted_by not in (None, name):
        raise ValueError(
            f"FusedLoraLinear.set_initial_factors: adapter {layer.shifted_by!r} has shifted this weight already; "
            "delete it first (LoRA-GA: or use exact=True for a second one)"
        )
    others = [other for other in layer.lora_B if other != name]
    if not exact and others:
        warnings.warn(
            f"fastlora: adapter {name!r} moves a part of the weight into itself; {others} will run on what is left",
            UserWarning,
            stacklevel=4,
        )


def shifted_by(layer: AdapterState) -> str | None:
    """The adapter whose start was subtracted from the weight, if any."""
    return layer._weight_before_shift[0] if layer._weight_before_shift else None


def holds(layer: AdapterState, name: str) -> bool:
    """Whether the adapter must stay for now: it is merged, or another one is, into a weight that it has shifted."""
    return name in layer.merged_adapters or (layer.shifted_by == name and bool(layer.merged_adapters))


def unshifted_weight(layer: FusedLoraLinear, name: str) -> Tensor:
    """The weight (out, in) as it is without this adapter's shift."""
    weight = layer.weight.detach()
    if layer._weight_before_shift and layer.shifted_by == name:
        weight = layer._weight_before_shift[1].to(weight)
    return weight.t() if layer.fan_in_fan_out else weight


def forget_initial_factors(layer: AdapterState, name: str) -> None:
    """Takes back what `set_initial_factors` did besides setting A and B; a shifted weight gets its bits back.

    Raises ValueError while adapters are merged into a weight that this one has shifted.
    """
    if layer._weight_before_shift and layer.shifted_by == name:
        layer._check_not_merged("forget_initial_factors")
        with torch.no_grad():
            layer.weight.copy_(layer._weight_before_shift[1])
        layer._weight_before_shift = None
        _mark_shift(layer)
    for factors in (layer.lora_A0, layer.lora_B0):
        if name in factors:
            del factors[name]


def as_plain_adapter(layer: FusedLoraLinear, name: str) -> tuple[Tensor, Tensor, int, float]:
    """(A, B, r, alpha) of an ordinary adapter on the original weight: the adapter's own, or, where it did not start
    at zero, [A; A₀] and [B, −B₀] of both ranks' sum, with alpha such that the scale stays what it is. AdaLoRA's
    singular values go into A, and the ranks whose value is zero are left out, but for one where all are."""
    layer._check_names([name], "as_plain_adapter")
    a, b, r, alpha = layer.lora_A[name], layer.lora_B[name], layer.r[name], layer.lora_alpha[name]
    if name in layer.lora_E:
        a, b, values = (sharding.whole(tensor.detach()) for tensor in (a, b, layer.lora_E[name]))
        kept = values.flatten().nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)
        return (a * values)[kept], b[:, kept], len(kept), layer.alpha_at(name, len(kept))
    if name not in layer.lora_A0:
        return a, b, r, alpha
    a, b = torch.cat((a, layer.lora_A0[name])), torch.cat((b, layer.lora_B0[name]), dim=1)
    return a, b, len(a), layer.alpha_at(name, len(a))


def alpha_at(layer: AdapterState, name: str, r: int) -> float:
    """The alpha with which an adapter of rank r has this one's scale."""
    growth = r / layer.r[name]
    return (math.sqrt(growth) if layer.use_rslora[name] else growth) * layer.lora_alpha[name]


def check_weight_to_load(layer: AdapterState, weight: Tensor | None, name: str) -> None:
    """Raises ValueError for another weight than the one into which adapters are merged: `unmerge` would put it out
    again."""
    if weight is not None and layer.merged_adapters and not _same_bits(weight, layer.weight):
        raise ValueError(
            f"{type(layer).__name__}: {name}: adapters {layer.merged_adapters} are merged into the layer's weight, "
            "which is another one; call fastlora.unmerge(model) before load_state_dict"
        )


def before_loading(layer: AdapterState, state_dict: Any, prefix: str) -> dict[str, Any]:
    """What a state dict has of the weight and the adapters' starts, for `after_loading`. Makes room for a frozen part
    of another rank, which a re-initialised adapter has.

    Raises ValueError for another weight than the one into which adapters are merged, which `unmerge` would put out
    again; and where the start of an adapter is in the state's weight and not in the layer's, or the reverse.
    """
    saved = {key: state_dict.get(f"{prefix}{key}") for key in ("weight", *_start_keys(layer))}
    weight = saved["weight"]
    check_weight_to_load(layer, weight, f"{prefix}weight")
    for name in layer.lora_A if weight is not None else ():
        here = layer.shifted_by == name
        if f"{prefix}lora_A.{name}" not in state_dict or (saved[f"lora_shift.{name}"] is not None) == here:
            continue
        in_state = "is not" if here else "is"
        raise ValueError(
            f"FusedLoraLinear: {prefix}weight: the start of adapter {name!r} (PiSSA, OLoRA, LoRA-GA's "
            f"base='offset') {in_state} taken out of the weight in this state_dict, and "
            f"{'is' if here else 'is not'} in the layer; want a model with the same start, or save_adapter and "
            "load_adapter, which save an adapter of the original weight"
        )
    for key, factors, like in (("lora_A0", layer.lora_A0, layer.lora_A), ("lora_B0", layer.lora_B0, layer.lora_B)):
        for name, trained in like.items():
            start = saved[f"{key}.{name}"]
            if start is not None and (name not in factors or factors[name].shape != start.shape):
                if sharding.is_sharded(trained):
                    raise ValueError(
                        f"FusedLoraLinear: {prefix}{key}.{name}: got a start {tuple(start.shape)} for an adapter "
                        f"that has none of that shape, want it loaded {sharding.BEFORE}"
                    )
                room = torch.zeros(start.shape, dtype=trained.dtype, device=trained.device)
                factors[name] = nn.Parameter(room, requires_grad=False)
    return saved


def _start_keys(layer: AdapterState) -> list[str]:
    """What a state dict has of the adapters' starts."""
    return [f"{key}.{name}" for name in layer.lora_A for key in ("lora_A0", "lora_B0", "lora_shift")]


def _saved_product(layer: AdapterState, saved: Mapping[str, Any], name: str) -> Tensor | None:
    """−s·B₀A₀ of a state, or the layer's own where that has none; None where it cannot be computed."""
    factors = []
    for key, own in (("lora_A0", layer.lora_A0), ("lora_B0", layer.lora_B0)):
        value = own[name] if saved[f"{key}.{name}"] is None else saved[f"{key}.{name}"]
        if value.is_meta or sharding.is_sharded(value):
            return None
        factors.append(value.detach().to(own[name]))
    if factors[0].shape[1:] != layer.lora_A[name].shape[1:] or factors[1].shape[:1] != layer.lora_B[name].shape[:1]:
        return None
    return product(layer, name, *factors)


def after_loading(layer: AdapterState, saved: Mapping[str, Any]) -> None:
    """The remembered bits are those from which the weight is shifted, as near as can be told."""
    if layer._weight_before_shift is None or layer.merged_adapters:
        return  # the weight that is merged into is still the one that it was
    if layer.weight.is_meta or sharding.is_sharded(layer.weight):
        return
    name, bits = layer._weight_before_shift
    product = _saved_product(layer, saved, name)
    if product is None or all(value is None for value in saved.values()):
        return
    with torch.no_grad():
        shifted = _shifted(layer, bits, product)
        unshifted = saved[f"lora_shift.{name}"] is None and _same_bits(bits.to(layer.weight), layer.weight)
        if saved["weight"] is None or unshifted:
            layer.weight.copy_(shifted)  # another start, or the base model's own weight
        elif not _same_bits(shifted, layer.weight):
            layer._weight_before_shift = name, _shifted(layer, layer.weight, -product).to("cpu", copy=True)


def runs_beside(layer: AdapterState, name: str) -> bool:
    """Whether −B₀A₀ is part of the adapter rather than of the weight."""
    return name in layer.lora_A0 and layer.shifted_by != name


def product(layer: AdapterState, name: str, a: Tensor, b: Tensor) -> Tensor:
    """s·b a in the weight's layout; of AdaLoRA's own factors s·P Λ Q."""
    if name in layer.lora_E and a is layer.lora_A[name]:
        a = (a * layer.lora_E[name]).detach()
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    device_type = "cpu" if layer.weight.is_meta else layer.weight.device.type  # autocast knows no meta device
    with torch.no_grad(), torch.autocast(device_type, enabled=False):  # which would multiply in its own dtype
        out = torch.mm(b.to(dtype), a.to(dtype)).mul_(layer.scaling[name])
    return out.t() if layer.fan_in_fan_out else out


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal, in dtype too; False where that cannot be told."""
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta or other.is_meta or sharding.is_sharded(one):
        return False
    return torch.equal(one.detach().to(other.device), other.detach())
