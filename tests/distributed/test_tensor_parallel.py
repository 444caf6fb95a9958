"""Tensor parallelism, `fastlora.parallel_plan`, in two and in three gloo processes, whose shards differ in size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from two_processes import (
    KINDS,
    TARGETS,
    Net,
    adapters,
    assert_close,
    build,
    loss_of,
    net,
    outcome_of,
    raised,
    spied,
    train,
    trained,
    whole_batch,
)

import fastlora
from fastlora.adapters.format import CONFIG_NAME, WEIGHTS_NAME

MEGATRON: dict[str, Any] = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
# A row-wise layer with a bias, a column-wise one whose shards are gathered.
OTHER_WAY_ROUND: dict[str, Any] = {
    "blocks.*.up": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.down": ColwiseParallel(output_layouts=Replicate()),
}


def cut(model: Any, plan: Any = MEGATRON) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, fastlora.parallel_plan(model, plan))


def moved(model: Any) -> Any:
    """B away from zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: Any, x: Tensor | None = None) -> dict[str, Tensor]:
    x = whole_batch() if x is None else x
    x.requires_grad_()
    loss_of(model, x).backward()
    assert x.grad is not None
    found: dict[str, Any] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: getattr(grad, "full_tensor", lambda grad=grad: grad)() for n, grad in found.items()} | {"x": x.grad}


def kinds() -> tuple[str, ...]:
    return KINDS if dist.get_world_size() == 2 else KINDS[::2]  # in three processes without importing PEFT


def training_is_that_of_one_process(folder: str) -> None:
    for kind in kinds():
        for plan in (MEGATRON, OTHER_WAY_ROUND):
            alone, model = moved(build(kind)), cut(moved(build(kind)), plan)
            want = gradients(alone)
            with spied() as seen:
                assert_close(gradients(model), want)
                assert_close(train(model, whole_batch), train(alone, whole_batch))
            assert "eager" not in seen, kind
            assert_close(adapters(model), adapters(alone))
            assert all(isinstance(parameter, DTensor) for parameter in trained(model))


def trained_biases(folder: str) -> None:
    """PEFT's, by the plan that the plain model has of its own: a row-wise layer's is added in one process."""
    import peft

    def model(plan: Any) -> Any:
        torch.manual_seed(1)
        made: Any = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=list(TARGETS), bias="all"))
        made.get_base_model().tp_plan = plan
        fastlora.patch(made)
        return moved(made)

    for plan in (MEGATRON, OTHER_WAY_ROUND):
        want, got = gradients(model(plan)), gradients(cut(model(plan), None))
        assert [name for name in want if name.endswith("up.base_layer.bias")]
        assert_close(got, want)


def half_precision(folder: str) -> None:
    """A bfloat16 base with float32 adapters, against float64: as near as one process."""
    models = [moved(half()) for _ in range(3)]
    exact = gradients(models[0].double(), whole_batch().double())
    alone, got = gradients(models[1], whole_batch().bfloat16()), gradients(cut(models[2]), whole_batch().bfloat16())
    for name, want in exact.items():
        assert got[name].dtype == alone[name].dtype
        error, bound = (float((grads[name].double() - want).abs().max()) for grads in (got, alone))
        assert error <= 2 * bound + 2**-8 * float(want.abs().max()), (name, error, bound)


def half() -> Any:
    torch.manual_seed(1)
    model = Net().bfloat16()
    fastlora.patch(model, r=3, target_modules=TARGETS)
    return model


def sequences_are_cut(folder: str) -> None:
    """Inputs and outputs in the layouts of sequence parallelism: gathered before, scattered after the block."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, layers = torch.randn(2, 2 * world, 8, generator=torch.Generator().manual_seed(0)), []
    for _ in range(2):
        block = net(moved(build())).blocks[0]
        layers.append(nn.Sequential(block.up, block.down))  # type: ignore[index, union-attr]
    alone, model = layers
    want = gradients(alone, x.clone())
    down = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    model = cut(model, {"0": ColwiseParallel(input_layouts=Shard(1)), "1": down})
    own = x.chunk(world, 1)[rank].clone().requires_grad_()
    y = model(own)
    assert y.placements == (Shard(1),) and y.to_local().shape[1] == 2
    assert_close(y.full_tensor(), alone(x))
    loss = y.to_local().square().sum() / y.numel()
    loss.backward()
    assert_close(own.grad, want.pop("x").chunk(world, 1)[rank])
    assert_close({n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}, want)


def what_is_sent(folder: str) -> None:
    """Nothing more than the frozen model's forward, and in backward one whole factor's gradient of each layer."""
    plan, counts = {"0": ColwiseParallel(), "2": RowwiseParallel()}, []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # whose size torch's own layers must divide by
    for patched in (False, True):
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).requires_grad_(False)
        if patched:
            fastlora.patch(model, r=3)
        parallelize_module(model, mesh, fastlora.parallel_plan(model, plan) if patched else plan)
        x = whole_batch().requires_grad_()
        with CommDebugMode() as forward:
            loss = loss_of(model, x)
        with CommDebugMode() as backward:
            loss.backward()
        counts.append([{str(op): n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)])
    (want_forward, want_backward), (forward_counts, backward_counts) = counts
    assert forward_counts == want_forward and list(forward_counts.values()) == [1]
    assert list(want_backward.values()) == [1] and {op: n + 2 for op, n in want_backward.items()} == backward_counts


def files(folder: str) -> None:
    for kind in kinds():
        alone, model = moved(build(kind)), cut(moved(build(kind)))
        ours, theirs = Path(folder, kind), Path(folder, f"{kind}-alone-{dist.get_rank()}")
        fastlora.save_adapter(model, ours)
        fastlora.save_adapter(alone, theirs)
        assert (ours / WEIGHTS_NAME).read_bytes() == (theirs / WEIGHTS_NAME).read_bytes(), kind
        configs = [json.loads((place / CONFIG_NAME).read_text()) for place in (ours, theirs)]
        for config in configs:
            config["target_modules"].sort()  # a set of PEFT's, in the order of each process's hashes
        assert configs[0] == configs[1], kind
        before = model(whole_batch())
        with torch.no_grad():
            for parameter in trained(model):
                parameter.zero_()
        assert not torch.equal(model(whole_batch()), before)
        if kind == "plain-ga":
            message = raised(ValueError, lambda: fastlora.load_adapter(model, ours))  # noqa: B023
            assert "load_adapter: lora_A of" in message  # the frozen half has no place to go
            continue
        fastlora.load_adapter(model, ours)
        assert_close(model(whole_batch()), before)


def masks(folder: str) -> None:
    """x = 1, A = B = 1 and W0 = 0: y is s times the mask that was drawn."""

    def model(seed: int, **plan: Any) -> Any:
        net = nn.Sequential(nn.Linear(12, 12, bias=False))
        fastlora.patch(net, r=12, lora_alpha=12, lora_dropout=0.5)
        layer: Any = net[0]
        with torch.no_grad():
            layer.weight.zero_()
            layer.lora_A["default"].copy_(torch.eye(12))
            layer.lora_B["default"].copy_(torch.eye(12))
        made = cut(net, plan) if plan else net
        torch.manual_seed(seed)
        return made

    x, gather = torch.ones(40, 12), ColwiseParallel(output_layouts=Replicate())
    assert torch.equal(model(7, **{"0": gather})(x), model(7)(x))
    rowwise = model(7, **{"0": RowwiseParallel(input_layouts=Replicate())})
    state = torch.get_rng_state()
    y = checkpoint(rowwise, x, use_reentrant=False)
    y.sum().backward()
    drawn = torch.rand(4)
    parts = y.detach().chunk(dist.get_world_size(), 1)
    assert set(y.detach().unique().tolist()) == {0.0, 2.0} and 0.4 < float((y != 0).float().mean()) < 0.6
    assert not any(torch.equal(parts[0], part) for part in parts[1:])
    assert_close(rowwise[0].lora_A["default"].grad.full_tensor(), y.detach().sum(0).expand(12, 12))
    torch.set_rng_state(state)
    torch.randint(2**62, ())
    assert torch.equal(drawn, torch.rand(4))  # all processes' generators go on alike
    for style in (gather, RowwiseParallel(input_layouts=Replicate())):
        unlike = model(dist.get_rank(), **{"0": style})
        assert "want torch.manual_seed with one seed in all" in raised(ValueError, lambda: unlike(x))  # noqa: B023


def a_whole_model(folder: str) -> None:
    """transformers' own plan, a layer that it leaves whole, groups, MLPs, rsLoRA, a second adapter, clipping."""
    import peft
    import transformers

    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, **sizes)
    x = torch.arange(20).reshape(2, 10)

    def build_llama(of_peft: bool) -> Any:
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
        targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        if of_peft:
            settings = peft.LoraConfig(r=2, target_modules=targets, use_rslora=True)
            model = peft.get_peft_model(model, settings)
            fastlora.patch(model, group="auto", mlp=True)
        else:
            fastlora.patch(model, r=2, target_modules=targets, use_rslora=True, group="auto", mlp=True)
            fastlora.patch(model, r=3, target_modules=["q_proj"], adapter_name="second")
        return moved(model)

    for of_peft in (False, True):
        alone, model = build_llama(of_peft), build_llama(of_peft)
        plan = dict((model.get_base_model() if of_peft else model).tp_plan)
        plan.pop("lm_head")
        cut(model, plan if of_peft else None)
        both = alone, model
        for one in both:
            one(input_ids=x, labels=x).loss.backward()
        with spied() as seen:
            norms = [torch.nn.utils.clip_grad_norm_(trained(one), 0.1) for one in both]
            assert_close(norms[1].full_tensor(), norms[0])  # type: ignore[attr-defined]
            for one in both:
                torch.optim.AdamW(trained(one), foreach=True).step()
            assert_close(adapters(model), adapters(alone))
            with torch.no_grad():
                assert_close(model(input_ids=x).logits, alone(input_ids=x).logits)
            if not of_peft:
                assert_close(mixed_logits(model, x), mixed_logits(alone, x))
        assert "eager" not in seen
        with fastlora.disable_adapter(alone), fastlora.disable_adapter(model):
            assert_close(model(input_ids=x).logits, alone(input_ids=x).logits)
        for one in both:
            fastlora.unpatch(one)
        if not of_peft:
            assert_close(model(input_ids=x).logits, alone(input_ids=x).logits)


def mixed_logits(model: Any, x: Tensor) -> Tensor:
    with fastlora.adapter_names(model, ["second", "default"]):
        return model(input_ids=x).logits


def refused(folder: str) -> None:
    model = cut(build())
    for name, call, message in (
        ("merge", lambda: fastlora.merge(model), "sharded over processes"),
        ("patch", lambda: fastlora.patch(model, adapter_name="late"), "before the model is wrapped"),
        ("sketch", lambda: fastlora.GradientSketch(model).__enter__(), "under tensor parallelism"),
        ("again", lambda: fastlora.parallel_plan(model, MEGATRON), "before the model is wrapped"),
    ):
        assert message in raised(ValueError, call), name
    explained = fastlora.explain(net(model).blocks[0].down, torch.randn(4, 13))  # type: ignore[index, union-attr]
    assert explained.forward == "torch" and f"K{13 // 2 + (dist.get_rank() == 0)} " in explained.call, explained
    of_peft = cut(build("peft-dora"))
    down: Any = net(of_peft).blocks[0].down  # type: ignore[index, union-attr]
    down.lora_A["default"].register_forward_hook(lambda *_: None)
    assert "DoRA with row-wise shards was left to PEFT (hooks on" in raised(ValueError, lambda: of_peft(whole_batch()))
    assert all(isinstance(parameter, DTensor) for parameter in down.parameters())  # as before the call


CHECKS = [
    training_is_that_of_one_process,
    trained_biases,
    half_precision,
    sequences_are_cut,
    what_is_sent,
    files,
    masks,
    a_whole_model,
    refused,
]
IN_THREE = [training_is_that_of_one_process, sequences_are_cut, files, masks]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, int], str]:
    return {
        (name, world): why
        for checks, world in ((CHECKS, 2), (IN_THREE, 3))
        for name, why in outcome_of(checks, world).items()
    }


@pytest.mark.parametrize(
    "name, world",
    [(check.__name__, world) for checks, world in ((CHECKS, 2), (IN_THREE, 3)) for check in checks],
)
def test_tensor_parallel(outcomes: dict[tuple[str, int], str], name: str, world: int) -> None:
    assert not outcomes[name, world], outcomes[name, world]
