"""`patch` and `unpatch`: the fused layers swapped into a model and out again, and the report of what was done and why.

A swap changes the class of the module instance and gives it its adapters; the module, its weight and its hooks stay the
same objects, so references held elsewhere (lists, tied modules, optimisers) stay right, and `unpatch` has nothing to
search for. No class and no source is touched.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..integrations import trl
from ..introspect import sharding
from ..introspect.fused import PATCHED, FusedPeftLayer, FusedPeftTuner, rebind_forward
from ..introspect.names import from_pattern, unwrapped
from ..introspect.targets import (
    Selection,
    candidates,
    check_holder,
    expert_weights,
    peft_lora_layers,
    read_by_parents,
    why_not_patchable,
)
from ..layers import group as grouping
from ..layers import head as heads
from ..layers import mlp as mlps
from ..layers.checks import check_adapter_arguments, check_backend
from ..layers.embedding import FusedLoraEmbedding
from ..layers.experts import ExpertWeight
from ..layers.kinds import FROZEN, check_kinds
from ..layers.linear import FusedLoraLinear
from ..layers.starts import check_init, check_not_shared, shifts_weight
from ..layers.state import AdapterState
from ..runtime import progress
from ..runtime.checks import check_module
from ..runtime.messages import by_reason
from . import first_forward, patch_experts
from .report import ModuleReport, PatchReport, refusal
from .switch import follow_ties

_FROZEN = "_fastlora_requires_grad"  # on each module of a patched model: {its own parameter: requires_grad before}
_ORIGINAL_CLASS = "_fastlora_class"  # on a patched layer

logger = logging.getLogger("fastlora")


def patch(
    model: nn.Module,
    *,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    adapter_name: str = "default",
    backend: str = "auto",
    strict: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    group: str | Sequence[Sequence[str]] | None = None,
    mlp: str | bool | None = None,
    use_dora: bool = False,
    use_adalora: bool = False,
    fused_loss: bool = False,
    target_parameters: Sequence[str] | None = None,
    rank_per_token: bool = False,
) -> PatchReport:
    """Swaps fused LoRA layers into a model, in place.

    A plain model: every target (`nn.Linear`, and transformers' `Conv1D`) becomes a `FusedLoraLinear` with a new
    adapter, sharing its weight, and all other parameters are frozen; an `nn.Embedding` that is named becomes a
    `FusedLoraEmbedding` (docs/head.md). A model with PEFT LoRA layers: those run fused
    from now on, nothing is added, and PEFT goes on managing them. Patching again with the same settings does nothing;
    with another `adapter_name` it adds an adapter (inactive until `set_adapter`). Models with other adapters of PEFT's
    (prompts, IA3, LoKr, ...) are refused.

    Args:
        model: the model; changed in place.
        r, lora_alpha, lora_dropout, use_rslora: as in `FusedLoraLinear`.
        target_modules: as in PEFT: "all-linear" (every linear layer but a transformers model's output head), a list of
            names or name endings, or one regular expression that matches whole names.
        exclude_modules: likewise, names to leave out.
        init_lora_weights: as in PEFT: True (A Kaiming, B zero), "gaussian" (A normal, B zero), "orthogonal" (neither
            zero, B A zero; r even), "pissa", `"pissa_niter_<n>"` or "olora" (the adapter takes over the leading
            part of the weight, which `unpatch` restores bit for bit), or False (both random):
            docs/details/initialisation.md.
        adapter_name: the adapter's name.
        backend: "auto", "triton", "cublas" or "torch".
        strict: raise on the first target that would be left alone.
        rank_pattern, alpha_pattern: r or lora_alpha of the layers whose names end in a key, from a dot on, instead; a
            key is a regular expression, the first that matches counts, and "^" makes it match the whole name. As in
            PEFT, and saved as PEFT saves them.
        group: "auto" lets layers that lie side by side and are fed the same tensor, by their usual names (q_proj,
            k_proj, v_proj; gate_proj, up_proj; ...), share their passes over it, PEFT's too; or the sets of names; None
            leaves them as they are. Same numbers, to rounding; without dropout only, on a CPU. docs/performance.md.
        mlp: "auto" lets modules that compute down(act(gate(x)) * up(x)) or down(act(up(x))), which is found out by
            running them, keep less for the backward pass and read it less often; on a CPU only where that is no slower,
            with True there too. Same numbers, to rounding. docs/kernels/mlp.md.
        use_dora: adapters with a learnt length for every row of the weight, as in PEFT. docs/dora.md.
        use_adalora: adapters P Λ Q, whose ranks `fastlora.variants.RankAllocator` deals out while training; r is the
            rank that each begins with.
        fused_loss: in training the model's own cross-entropy is computed in chunks of tokens: its logits, and their
            gradients, never exist as a whole. For heads with and without an adapter; the model's outputs hold
            `LazyLogits`, which become logits when something else than that loss uses them. docs/head.md.
        target_parameters: 3-D weights of a mixture's experts, by PEFT's name and rule: full names or their endings, as
            in ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]. Each expert gets an adapter of rank r. With
            target_modules=[] nothing else does. docs/experts.md.
        rank_per_token: give each expert rank r ÷ top-k (rounded down, at least 1) at the same scale, so that a token's
            experts have r together.

    Returns:
        A `PatchReport`: a line per module, patched or left alone and why.

    Raises:
        ValueError: no target in the model, adapters of PEFT's other than LoRA, a plain model that
            DistributedDataParallel or `fully_shard` has wrapped already (patch first), a setting out of range, other
            settings than an earlier `patch` for the same adapter; an initialisation that needs data, or that a layer's
            weight cannot give; with `strict`, a target that cannot be patched. The model is then as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> fastlora.patch(model, r=4).patched
        ['0', '2']
    """
    check_module("patch", model)
    check_adapter_arguments(adapter_name, r, lora_alpha, lora_dropout, caller="patch")
    check_backend(backend, "patch")
    check_init(init_lora_weights, "patch", r)
    check_kinds(use_dora, use_adalora, init_lora_weights, "patch")
    names_of_groups = grouping.check_names(group, "patch")
    mlps.check_mode(mlp, "patch")
    _check_patterns(rank_pattern, alpha_pattern)
    check_holder(model, "patch")
    selection = Selection(model, target_modules, exclude_modules)
    peft_layers = dict(peft_lora_layers(model))
    settings = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": float(lora_dropout), "use_rslora": use_rslora}
    settings |= {"use_dora": use_dora, "use_adalora": use_adalora}
    patch_experts.check(target_parameters, rank_per_token, settings, init_lora_weights)
    if peft_layers:
        others = {"init_lora_weights": init_lora_weights, "adapter_name": adapter_name}
        others |= {"rank_pattern": rank_pattern or None, "alpha_pattern": alpha_pattern or None}
        others |= {"target_parameters": target_parameters, "rank_per_token": rank_per_token}
        _warn_of_ignored_settings(settings | others)
        from . import patch_peft  # which needs peft, and the model brought it

        report = patch_peft.patch(model, peft_layers, selection, backend, strict)
        _form_pieces(model, report, names_of_groups, mlp, fused_loss)
        if any(line.reason != patch_peft.ALREADY for line in report.modules):
            first_forward.watch(model)
        return report
    if (wrapped := sharding.wrapper(model)) is not None:
        raise ValueError(f"patch: model: got {wrapped}, want patch {sharding.BEFORE}")
    report = PatchReport()
    plan: dict[str, nn.Module] = {}
    settings_of: dict[str, dict] = {}
    read = read_by_parents(model)
    for name, module in candidates(model, selection):
        why_not = selection.why_not(name, module)
        targeted = why_not is None
        if targeted:
            why_not = why_not_patchable(module) or read.get(id(module))
            if isinstance(module, nn.Embedding) and why_not is None and (use_dora or use_adalora):
                why_not = f"an embedding has plain LoRA only, not {'use_dora' if use_dora else 'use_adalora'}"
        if why_not is not None:
            report.modules.append(ModuleReport(name, _original_kind(module), False, why_not, targeted))
            continue
        own = settings_of[name] = settings | {
            "r": from_pattern(rank_pattern, name, r),
            "lora_alpha": from_pattern(alpha_pattern, name, lora_alpha),
        }
        status = _adapter_status(name, module, adapter_name, own)
        if not status:
            plan[name] = module
        reason = status or f"adapter {adapter_name!r}, r={own['r']}"
        if isinstance(module, nn.Embedding) and not status and isinstance(init_lora_weights, str):
            reason += ", started as with init_lora_weights=True, as in PEFT"
        report.modules.append(ModuleReport(name, _original_kind(module), True, reason))
    experts, left = patch_experts.find(model, target_parameters, selection, backend)
    for name, layer in experts.items():
        own = patch_experts.settings_of(name, layer, settings, rank_per_token, rank_pattern, alpha_pattern)
        settings_of[name] = own
        status = _adapter_status(name, layer, adapter_name, own)
        if not status:
            plan[name] = layer
        reason = status or f"adapter {adapter_name!r}, r={own['r']} of each of {layer.num_experts} experts"
        report.modules.append(ModuleReport(name, "Parameter", True, reason))
    report.modules += left
    known = {line.name for line in report.modules}
    for name, why_not, asked in expert_weights(model, selection):
        if name not in known:
            report.modules.append(ModuleReport(name, "Parameter", False, why_not, asked))
    _check_something_matched(model, report, selection, strict)
    if shifts_weight(init_lora_weights):
        shifted = {name: module for name, module in plan.items() if not isinstance(module, nn.Embedding)}
        weights = {name: cast(Tensor, module.weight) for name, module in shifted.items()}
        check_not_shared(model, weights, f"patch: init_lora_weights={init_lora_weights!r}")
    _check_patterns_used(settings_of, {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}, strict)
    _apply(model, plan, adapter_name, settings_of, init_lora_weights, backend)
    root = unwrapped(model).__dict__
    root[PATCHED] = {*root.get(PATCHED, ()), *report.patched}
    _form_pieces(model, report, names_of_groups, mlp, fused_loss)
    if plan:
        first_forward.watch(model)
    return report


def _form_pieces(model: nn.Module, report: PatchReport, groups: Any, mlp: str | bool | None, fused_loss: bool) -> None:
    """What is larger than a layer: groups, MLPs, the head with its loss."""
    trl.answer(model)
    report.groups = grouping.form_groups(model, groups)
    report.mlps, report.mlps_left_alone = mlps.form(model, mlp)
    if fused_loss:
        report.fused_losses, report.losses_left_alone = heads.fuse_losses(model)
        if not report.fused_losses:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in report.losses_left_alone.items())
            warnings.warn(
                "fastlora.patch: fused_loss=True, and the loss needs its logits as before: "
                + (why or "no module of the model has an output head (get_output_embeddings)"),
                UserWarning,
                stacklevel=3,
            )
    _log(model, report)


def _log(model: nn.Module, report: PatchReport) -> None:
    logger.info("patch: %s: %s", type(model).__name__, report.counts.removeprefix("fastlora: "))
    for line in report.modules:
        logger.debug("patch: %s: %s: %s", line.name, "patched" if line.patched else "left alone", line.reason)


def unpatch(model: nn.Module, *, keep_merged: bool = False) -> None:
    """Takes the fused layers out: classes, parameters and `requires_grad` flags are as before `patch`, and the adapters
    are gone.

    Merged adapters are unmerged first, so that the weights' bits are the original ones; with `keep_merged` the merged
    weights stay (what PEFT calls merge_and_unload). PEFT models keep their adapters: only the layers' execution goes
    back to PEFT. A model that is not patched stays as it is. Raises ValueError where something else has changed a
    layer's class since, and for `keep_merged` where no layer is merged, or another adapter than the one that has
    shifted the weight (PiSSA, OLoRA): the adapters would be lost.
    """
    check_module("unpatch", model)
    for name, module in model.named_modules():
        if _ORIGINAL_CLASS in module.__dict__ and type(module) not in (FusedLoraLinear, FusedLoraEmbedding):
            raise ValueError(
                f"unpatch: {name!r} has become a {type(module).__name__} since it was patched, want a FusedLoraLinear: "
                "undo that first (a parametrisation, sharding)"
            )
    adapted = [module for module in model.modules() if isinstance(module, AdapterState) and module.r]
    if keep_merged and adapted and not any(module.merged_adapters for module in adapted):
        raise ValueError(
            "unpatch: keep_merged: no adapter is merged into any weight; call fastlora.merge(model) first, or leave "
            "keep_merged out to drop the adapters"
        )
    for module in adapted if keep_merged else ():
        if module.merged_adapters and module.shifted_by not in (None, *module.merged_adapters):
            raise ValueError(
                f"unpatch: keep_merged: {module.merged_adapters} are merged into weights that {module.shifted_by!r} "
                "has shifted, and the part that it has taken out would be lost; merge it too, or delete it first"
            )
    first_forward.forget(model)
    for module in mlps.fused_mlps(model):
        mlps.release(module)
    heads.release_losses(model)
    trl.forget(model)
    for module in list(model.modules()):
        if isinstance(module, AdapterState) and _is_swapped(module):
            if not (keep_merged and module.merged_adapters):
                module.unmerge()
                for name in module.r:
                    module.forget_initial_factors(name)
            restore_layer(module)
        elif isinstance(module, (FusedPeftLayer, FusedPeftTuner)):
            from ..integrations.peft import adopt, tuner  # loaded: the module is one of theirs

            if isinstance(module, FusedPeftLayer):
                adopt.release(module)
            else:
                tuner.leave(cast(Any, module))
    if not keep_merged:
        follow_ties(model)
    for module in model.modules():
        module.__dict__.pop(PATCHED, None)
        for name, flag in module.__dict__.pop(_FROZEN, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(flag)


def is_patched(model: nn.Module) -> bool:
    """True where `patch` has swapped any layer of the model (or the model itself is such a layer)."""
    check_module("is_patched", model)
    return any(_is_swapped(module) or isinstance(module, FusedPeftLayer) for module in model.modules())


def _is_swapped(module: nn.Module) -> bool:
    """Whether it is a layer that `patch` has put in, rather than one that was made by hand."""
    return _ORIGINAL_CLASS in module.__dict__ or isinstance(module, ExpertWeight)


def _check_patterns(rank_pattern: Any, alpha_pattern: Any) -> None:
    for argument, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if pattern is not None and not isinstance(pattern, Mapping):
            raise ValueError(f"patch: {argument}: got {pattern!r}, want a dict of name patterns and values")
        for key, value in (pattern or {}).items():
            try:
                re.compile(key)
            except (re.error, TypeError) as error:
                raise ValueError(f"patch: {argument}: got {key!r}, want a regular expression: {error}") from None
            r, alpha = (value, 1.0) if argument == "rank_pattern" else (1, value)
            check_adapter_arguments("x", r, alpha, 0.0, caller=f"patch: {argument}[{key!r}]")


def _check_patterns_used(names: Iterable[str], patterns: dict[str, Any], strict: bool) -> None:
    for argument, pattern in patterns.items():
        for key in pattern or {}:
            if any(from_pattern({key: True}, name, False) for name in names):
                continue
            message = f"patch: {argument}: no target matches {key!r}"
            if strict:
                raise ValueError(f"{message} (strict=True)")
            warnings.warn(f"fastlora.{message}", UserWarning, stacklevel=3)


def _warn_of_ignored_settings(settings: dict) -> None:
    defaults = inspect.signature(patch).parameters
    ignored = [f"{key}={value!r}" for key, value in settings.items() if value != defaults[key].default]
    if ignored:
        warnings.warn(
            f"fastlora.patch: this model carries PEFT's LoRA layers, which keep their own adapters; "
            f"{', '.join(ignored)} had no effect. What PEFT knows of it belongs in its LoraConfig",
            UserWarning,
            stacklevel=3,
        )


def _adapter_status(name: str, module: nn.Module, adapter_name: str, settings: dict) -> str:
    """Why nothing is to be done for this adapter; empty where it is to be added. ValueError where it exists with other
    settings."""
    if not isinstance(module, AdapterState) or adapter_name not in module.r:
        return ""
    for key, wanted in settings.items():
        existing = getattr(module, key)[adapter_name]
        if existing != wanted:
            raise ValueError(
                f"patch: {key}: got {wanted!r}, but {name!r} already has an adapter {adapter_name!r} with "
                f"{key}={existing!r}. "
                "Call fastlora.unpatch(model) first, or give another adapter_name"
            )
    return f"adapter {adapter_name!r} was there already"


def _check_something_matched(model: nn.Module, report: PatchReport, selection: Selection, strict: bool) -> None:
    if not report.patched:
        kinds = ("Linear", "Conv1D", FusedLoraLinear.__name__)
        linear = sorted({line.name.rpartition(".")[2] for line in report.modules if line.kind in kinds})
        found = f"its linear layers are called {', '.join(linear)}" if linear else "it has no linear layers"
        reasons = "; ".join(by_reason(report.refused.items()))
        raise ValueError(
            f"patch: target_modules: {selection.targets!r} selects nothing that can be patched in this "
            f"{type(model).__name__}; {found}"
            + (f" ({reasons})" if reasons else "")
            + _hint(selection.targets, {line.name.rpartition(".")[2] for line in report.modules})
        )
    if report.refused and strict:
        raise ValueError(f"patch: strict=True, and {refusal(report.refused)}")
    if selection.unused and not selection.all_linear:
        message = f"patch: target_modules: no module is called {', '.join(map(repr, sorted(selection.unused)))}"
        if strict:
            raise ValueError(f"{message} (strict=True)")
        hint = _hint(selection.unused, {line.name.rpartition(".")[2] for line in report.modules})
        warnings.warn(f"fastlora.{message}; the other targets were patched{hint}", UserWarning, stacklevel=3)
    if report.refused:
        lines = "\n  ".join(by_reason(report.refused.items()))
        warnings.warn(
            f"fastlora.patch: {len(report.refused)} of the targets were left as they were, and will not be trained "
            f"(exclude_modules, where that is meant):\n  {lines}",
            UserWarning,
            stacklevel=3,
        )


def _hint(targets: str | Iterable[str], names: set[str]) -> str:
    """What the user may have meant by targets that select nothing; empty where nothing comes to mind."""
    if isinstance(targets, str):
        meant = [name for name in re.split(r"[\s,|]+", targets) if name in names]
        return f". A string is a regular expression that matches whole names; want a list, {meant}" if meant else ""
    likely = [f"{found!r} for {target!r}" for target in sorted(targets) if (found := _meant(target, names))]
    return f". Did you mean {', '.join(likely)}?" if likely else ""


def _meant(target: str, names: set[str]) -> str | None:
    """The name that a target is a misspelling or a part of; 'o_proj' is no 'down_proj'."""
    last = target.rpartition(".")[2]
    for name in difflib.get_close_matches(last, names, n=3, cutoff=0.7):
        if name != target and (name[:1].lower() == last[:1].lower() or f"_{name}".endswith(f"_{last}")):
            return name
    return None


# The swap.
def _apply(
    model: nn.Module,
    plan: dict[str, nn.Module],
    adapter_name: str,
    settings_of: dict[str, dict],
    init_lora_weights: bool | str,
    backend: str,
) -> None:
    """Swaps the planned layers and freezes the rest; on any failure (memory, Ctrl-C) the model is put back first."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    records = _flags_to_record(model, plan.values())
    active = {name for m in model.modules() if isinstance(m, AdapterState) for name in m.active_adapters}
    done: list[nn.Module] = []
    try:
        for name, module in progress.bar(plan.items(), "patch", len(plan)):
            done.append(module)
            if isinstance(module, ExpertWeight):
                module.attach()
            elif not isinstance(module, AdapterState):
                _swap_class(module, backend)
            assert isinstance(module, AdapterState)
            try:
                module.add_adapter(adapter_name, init_lora_weights=init_lora_weights, **settings_of[name])
            except ValueError as error:
                raise ValueError(f"patch: {name!r}: {error}") from error
            if active and adapter_name not in active and adapter_name in module.active_adapters:
                module.set_adapter([])  # a second adapter waits for `set_adapter` in the layers that it is the first in
        for module, record in records:
            for name in record:
                module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
    except BaseException:
        for module in done:
            if isinstance(module, AdapterState):
                module._forget_adapter(adapter_name)
                if not module.r and _is_swapped(module):
                    restore_layer(module)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for module, record in records:
        module.__dict__[_FROZEN] = record


def _flags_to_record(model: nn.Module, plan: Iterable[nn.Module]) -> list[tuple[nn.Module, dict[str, bool]]]:
    """`requires_grad` of the parameters that are to be frozen: those of every module that no earlier `patch` has seen,
    or, where one has seen the whole model, of the planned layers among these (a new head stays trainable).

    Kept by module, so that a part of a model can be patched before or after the whole, and each unpatched alone.
    """
    planned = {id(module) for module in plan}
    seen_whole = _FROZEN in model.__dict__
    layers = [module for module in model.modules() if isinstance(module, AdapterState)]
    adapters = {id(layer._modules[key]) for layer in layers for key in (*layer.TRAINED, *FROZEN)}
    recorded: dict[int, bool] = {}
    for module in model.modules():
        flags = module.__dict__.get(_FROZEN, {})
        recorded |= {id(module._parameters.get(name)): flag for name, flag in flags.items()}
    return [
        (module, {n: recorded.get(id(p), p.requires_grad) for n, p in module._parameters.items() if p is not None})
        for module in model.modules()
        if _FROZEN not in module.__dict__ and id(module) not in adapters and (id(module) in planned or not seen_whole)
    ]


def _swap_class(module: nn.Module, backend: str) -> None:
    original = type(module)
    module.__dict__[_ORIGINAL_CLASS] = original
    fused = FusedLoraEmbedding if isinstance(module, nn.Embedding) else FusedLoraLinear
    if not isinstance(module, (nn.Linear, nn.Embedding)):  # a Conv1D does not say its sizes in these words
        module.in_features, module.out_features = module.weight.shape  # type: ignore[misc]
    rebind_forward(module, fused)
    cast(nn.Module, module).__class__ = fused
    assert isinstance(module, AdapterState)
    module._init_adapter_state(fan_in_fan_out=original is not nn.Linear, backend=backend)


def restore_layer(layer: AdapterState) -> None:
    if isinstance(layer, ExpertWeight):
        layer.detach()
        return
    for attribute in layer.STATE:
        if attribute in layer._modules:
            del layer._modules[attribute]
        else:
            layer.__dict__.pop(attribute, None)
    original = layer.__dict__.pop(_ORIGINAL_CLASS)
    for size in ("in_features", "out_features") if not issubclass(original, nn.Linear) else ():
        layer.__dict__.pop(size, None)
    rebind_forward(layer, original)
    cast(nn.Module, layer).__class__ = original


def _original_kind(module: nn.Module) -> str:
    return module.__dict__.get(_ORIGINAL_CLASS, type(module)).__name__
