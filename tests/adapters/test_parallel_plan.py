"""What `parallel_plan` makes of a plan, and what it refuses; tests/distributed/ runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from mixtures import experts_in, mixture
from plain_models import Net
from tiny_models import tiny_model
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

import fastlora
from fastlora.layers.parallel import LoraParallel


def patched(model: Any = None, targets: Any = ("up", "down"), **settings: Any) -> Any:
    model = Net() if model is None else model
    fastlora.patch(model, target_modules=list(targets), r=2, **settings)
    return model


def test_a_plan_names_what_the_patched_model_has():
    up, moved = ColwiseParallel(), PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    given = {"blocks.*": moved, "blocks.0.up": up, "blocks.*.down": "rowwise", "head": "colwise_gather_output"}
    of_peft = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up", "down"]))
    fastlora.patch(of_peft)
    for model, prefix in ((patched(), ""), (of_peft, "base_model.model.")):
        plan: dict[str, Any] = fastlora.parallel_plan(model, given)
        assert all(name.startswith(prefix) for name in plan)
        plan = {name.removeprefix(prefix): style for name, style in plan.items()}
        assert plan["blocks.0"] is moved and type(plan["head"]) is ColwiseParallel
        assert plan["head"].output_layouts == (Replicate(),)
        adapted = {name: style.style for name, style in plan.items() if isinstance(style, LoraParallel)}
        assert adapted["blocks.0.up"] is up and adapted["blocks.1.up"] is None  # the plan leaves it whole
        assert type(adapted["blocks.1.down"]) is RowwiseParallel and len(adapted) == 4 and len(plan) == 7


def quantised() -> Any:
    from quantised_models import qlora

    model = qlora(4)
    fastlora.patch(model)
    return model


def merged() -> Any:
    model = patched()
    fastlora.merge(model)
    return model


def expert_weights() -> Any:
    model = mixture("qwen3_moe")
    return patched(model, ["o_proj"], target_parameters=experts_in(model))


UP: dict[str, Any] = {"blocks.*.up": "colwise"}
REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "no module": (lambda: "model", UP, "model: got str, want a torch.nn.Module"),
    "not patched": (Net, UP, "has no fused layers; want fastlora.patch first"),
    "wrapped": (lambda: nn.DataParallel(patched()), None, "plan: got None, and DataParallel has no tp_plan"),
    "no plan": (patched, "colwise", "want a dict of names and styles"),
    "word": (patched, {"blocks.*.up": "sideways"}, "'blocks.*.up': got 'sideways', want a ParallelStyle or one of"),
    "trained": (patched, {"blocks.0.up": "replicated_with_grad_allreduce"}, "of trained parameters, want frozen ones"),
    "style": (patched, {"blocks.0.up": SequenceParallel()}, "takes ColwiseParallel or RowwiseParallel"),
    "AdaLoRA": (lambda: patched(use_adalora=True), UP, "AdaLoRA deals out ranks in one process only"),
    "merged": (merged, UP, "are merged into its weight; call fastlora.unmerge"),
    "Conv1D": (lambda: patched(targets=["conv"]), {"blocks.*.conv": "colwise"}, "a Conv1D"),
    "head": (
        lambda: patched(tiny_model("llama"), ["lm_head"], fused_loss=True),
        {"lm_head": "colwise"},
        "its loss is fused, which needs the head whole",
    ),
    "embedding": (
        lambda: patched(tiny_model("llama"), ["embed_tokens"]),
        {"model.embed_tokens": "embedding_rowwise"},
        "those of experts, an embedding",
    ),
    "experts": (expert_weights, {"model.layers.*.mlp.experts": ColwiseParallel()}, "those of experts"),
    "weight of experts": (expert_weights, {"model.layers.*.mlp.experts.*": RowwiseParallel()}, "those of experts"),
    "quantised": (quantised, {"model.layers.*.mlp.up_proj": "colwise"}, "a quantised layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str):
    build, plan, message = REFUSED[name]
    model = build()
    with pytest.raises(ValueError, match=r"^parallel_plan: ") as error:
        fastlora.parallel_plan(model, plan)
    assert message in str(error.value)


def test_a_key_that_names_nothing_is_named():
    with pytest.warns(UserWarning, match=r"parallel_plan: plan: no module is called 'blocks.\*.upp'"):
        fastlora.parallel_plan(patched(), {"blocks.*.upp": "colwise"})
