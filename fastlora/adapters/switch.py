"""The adapters of a whole model: which are active, disabled, merged. Works on fastlora's layers and on PEFT's LoRA
layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..integrations.peft.family import adapted
from ..integrations.peft.wrappers import Beside
from ..introspect import sharding
from ..introspect.names import peeled
from ..introspect.targets import lora_layers
from ..layers import batch
from ..layers.embedding import FusedLoraEmbedding
from ..layers.fused import Adapted
from ..runtime import progress
from ..runtime.checks import check_integer, check_module

_TIED = "_fastlora_tied"  # on a model whose head a merge has untied: the configurations that said it is tied


def merge(model: nn.Module) -> None:
    """Adds the active adapters to the weights they adapt, so that inference costs what the base model costs.

    Sums in float32, rounds once, and keeps the former bits in host memory: `unmerge` restores them exactly. A quantised
    weight (PEFT's layers on 4 and 8 bits) is quantised again, and its packed bits stay where they are, for `unmerge`.
    A weight that several modules of the model use is untied until then, and so is `config.tie_word_embeddings`; one
    that a module outside it uses too is not, so merge the whole model there, not a part. Raises ValueError where a
    merged weight would not be finite, or where adapters are merged already, or for a model that is sharded over
    processes; the model is then as it was.
    """
    layers = _adapted(model, "merge")
    if sharding.has_shards(model):
        raise ValueError(
            "merge: model: its parameters are sharded over processes, and merging would be lost with the next step; "
            "save_adapter, then load_adapter and merge in a model that is not"
        )
    for name, layer in layers:
        if layer.merged_adapters:
            raise ValueError(
                f"merge: {name!r}: adapters {list(layer.merged_adapters)} are merged already; call "
                "fastlora.unmerge(model) first"
            )
    _merge(model, [(name, layer, None) for name, layer in layers])


def _merge(model: nn.Module, layers: list[tuple[str, Adapted, list[str] | None]]) -> None:
    """Merges into layers in which nothing is merged, (name, layer, which adapters or None for the active ones); all or
    nothing."""
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    done = []
    try:
        for name, layer, adapters in progress.bar(layers, "merge", len(layers)):
            done.append(layer)
            try:
                layer.merge_adapters(adapters, untie=users[id(layer.base_weight())] > 1)
            except ValueError as error:
                raise ValueError(f"merge: {name!r}: {error}") from error
    except BaseException:
        for layer in done:
            if layer.merged_adapters:
                layer.unmerge()
        raise
    if max(users.values(), default=0) > 1:
        follow_ties(model)


def follow_ties(model: nn.Module) -> None:
    """transformers ties a head to the embedding again, in `tie_weights` or when the model is loaded, where the model's
    configuration says so. It says so only while they are tied."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if not hasattr(config, "tie_word_embeddings") or not callable(getattr(module, "get_output_embeddings", None)):
            continue
        owner: Any = module
        with peeled(model):  # transformers looks for them by names
            ends = owner.get_input_embeddings(), owner.get_output_embeddings()
        if any(not hasattr(end, "weight") for end in ends):
            continue
        configs = {id(one): one for one in (config, config.get_text_config())}.values()
        if ends[0].weight is not ends[1].weight and (said := [one for one in configs if one.tie_word_embeddings]):
            module.__dict__[_TIED] = said
        elif ends[0].weight is ends[1].weight:
            said = module.__dict__.pop(_TIED, [])
        else:
            continue
        for one in said:
            one.tie_word_embeddings = ends[0].weight is ends[1].weight


def unmerge(model: nn.Module) -> None:
    """Takes merged adapters out of the weights again, bit for bit. Layers that are not merged stay as they are."""
    layers = _adapted(model, "unmerge")
    for _, layer in progress.bar(layers, "unmerge", len(layers)):
        if layer.merged_adapters:
            layer.unmerge()
    follow_ties(model)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], *, trainable: bool = True) -> None:
    """Makes one adapter, or several together, active in every layer that has it. No weight is touched.

    A layer without the adapter then runs its base weight alone. In PEFT models this does what their own `set_adapter`
    does: `modules_to_save`, trained tokens and `active_adapter` follow.

    Args:
        model: patched, with fastlora's own layers or PEFT's.
        adapter_name: a name, or several.
        trainable: make these adapters trainable too and freeze the others; with False every `requires_grad` stays as it
            is, which takes less than half of the time: what serving several tasks wants.

    Raises:
        ValueError: a name that no layer has, or adapters that are merged; several that each have their own of PEFT's
            `modules_to_save`.
    """
    several = isinstance(adapter_name, Iterable) and not isinstance(adapter_name, str)
    names: list[Any] = list(dict.fromkeys(adapter_name)) if several else [adapter_name]
    layers = require_layers(model, "set_adapter")
    beside = Beside(model, layers)
    known: set[str] = set().union(*(layer.r for _, layer in layers), beside.adapters)
    if not names or not known.issuperset(names):
        raise ValueError(f"set_adapter: adapter_name: got {adapter_name!r}, want one or several of {sorted(known)}")
    merged = [name for name, layer in (*layers, *beside.token_layers) if layer.merged_adapters]
    if merged:
        raise ValueError(f"set_adapter: adapters are merged into {merged[0]!r}; call fastlora.unmerge(model) first")
    beside.check(names, "set_adapter")
    for _, layer in layers:
        adapted(layer).activate(names, trainable)
    beside.activate(names, trainable)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Removes an adapter from every layer that has it; a layer without any other runs its base weight alone.

    A weight that the adapter has shifted (PiSSA, OLoRA, LoRA-GA's `base="offset"`) gets its former bits back. In PEFT
    models this does what their own `delete_adapter` does: the configuration goes too, and where the adapter was the
    active one, PEFT activates another.

    Raises:
        ValueError: a name that no layer has, an adapter that is merged, or one that has shifted a weight into which
            another is merged. Nothing is removed then.
    """
    layers = require_layers(model, "delete_adapter")
    known: set[str] = set().union(*(layer.r for _, layer in layers))
    if adapter_name not in known:
        raise ValueError(f"delete_adapter: adapter_name: got {adapter_name!r}, want one of {sorted(known)}")
    chosen = [(name, adapted(layer)) for name, layer in layers if adapter_name in layer.r]
    for name, layer in chosen:
        if layer.holds(adapter_name):
            raise ValueError(
                f"delete_adapter: {list(layer.merged_adapters)} merged into {name!r}; call fastlora.unmerge(model) "
                "first"
            )
    for _, layer in chosen:
        layer.delete_adapter(adapter_name)
    Beside(model, layers).delete(adapter_name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model computes what the base model does; afterwards adapters are as before, merged ones merged
    again.

    Nests, and undoes itself on an exception too. Example: the reference log-probabilities of DPO.
    """
    layers = require_layers(model, "disable_adapter")
    beside = Beside(model, layers)
    merging = [(name, adapted(layer)) for name, layer in (*layers, *beside.token_layers)]
    merged = [(name, one, list(one.merged_adapters), list(one.active_adapters)) for name, one in merging]
    merged = [found for found in merged if found[2]]
    for _, one, _, _ in merged:
        one.unmerge()
    follow_ties(model)
    enabling = [one.disable() for _, one in merging] + [adapted(one).disable() for one in beside.wrappers.values()]
    try:
        yield model
    finally:
        for enable in enabling:
            enable()
        # What was merged, unless others were chosen meanwhile: then those.
        again = [
            (name, one, names if list(one.active_adapters) == active else None)
            for name, one, names, active in merged
            if not one.merged_adapters
        ]
        _merge(model, again)


@contextmanager
def adapter_names(model: nn.Module, names: Sequence[str], num_beams: int = 1) -> Iterator[nn.Module]:
    """Within it every sequence of a batch runs the adapter named for it: several tenants in one forward, or several
    adapters trained at once. The frozen layers run once for the whole batch.

    Args:
        model: patched, with fastlora's own layers or PEFT's.
        names: one for each sequence of the batch, "__base__" for none. A layer that does not have an adapter runs its
            base for those sequences, as in PEFT; which adapters are active does not matter.
        num_beams: how many rows follow each other for a sequence where `generate` repeats its input: its `num_beams`,
            or `num_return_sequences` when sampling. Parts that see the batch as it came (an encoder) may.

    Works in training too: gradients reach the adapters that are trainable (`set_adapter(model, ["a", "b"])`) and have a
    sequence. Activation checkpointing may recompute after the block is over; only a reentrant checkpoint within a
    reentrant one needs the backward pass to be within it. Blocks may be nested, the inner one counts; they belong to
    the model, not to a thread. Disabled adapters stay disabled.

    Raises:
        ValueError: a name that no layer has, a num_beams below 1, LoRA layers of PEFT that fastlora does not run
            (`patch`'s report says why: pass PEFT's own `adapter_names=` instead), or its `modules_to_save` or trained
            tokens (likewise); at a layer's call, an input of another number of sequences, or merged adapters.

    Examples:
        >>> with fastlora.adapter_names(model, ["french", "__base__", "german"]):
        ...     model(**batch_of_three)
    """
    layers = require_layers(model, "adapter_names")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names: names: got {names!r}, want a list with a name for each sequence")
    known = sorted({name for _, layer in layers for name in layer.r})
    unknown = sorted(set(names) - {*known, batch.BASE_NAME})
    if unknown:
        raise ValueError(f"adapter_names: names: got {unknown}, want some of {known} or {batch.BASE_NAME!r}")
    check_integer("adapter_names", "num_beams", num_beams)
    if wrapped := list(Beside(model, layers).wrappers):
        raise ValueError(
            f"adapter_names: model: {wrapped[0]!r} is another module in each adapter (modules_to_save, "
            "trainable_token_indices), one for the whole batch; pass PEFT's adapter_names= to the model's call instead"
        )
    mixing = [
        name for name, one in layers if getattr(one, "shares_input", False) or isinstance(one, FusedLoraEmbedding)
    ]
    if experts := [name for name, layer in layers if hasattr(layer, "num_experts")]:
        raise ValueError(
            f"adapter_names: model: {experts[0]!r} is a weight of experts, which get the tokens of all sequences "
            "together; want a call for each adapter (set_adapter)"
        )
    foreign = [name for name, _ in layers if name not in mixing]
    if foreign:
        raise ValueError(
            f"adapter_names: model: {foreign[0]!r} and {len(foreign) - 1} other LoRA layers are PEFT's own: call "
            "fastlora.patch(model) first, or, where its report leaves them alone, pass PEFT's adapter_names= instead"
        )
    with batch.running([layer for _, layer in layers], batch.MixedBatch(names, num_beams)):
        yield model


def _adapted(model: nn.Module, caller: str) -> list[tuple[str, Adapted]]:
    return [(name, adapted(layer)) for name, layer in require_layers(model, caller)]


def require_layers(model: nn.Module, caller: str) -> list[tuple[str, Any]]:
    check_module(caller, model)
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(f"{caller}: this {type(model).__name__} has no LoRA layers; call fastlora.patch(model) first")
    return layers
