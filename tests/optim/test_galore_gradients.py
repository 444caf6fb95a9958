"""Gradients taken during the backward pass: the plain mode's numbers, for models of every kind, and no more gradients
alive at once than is said."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from galore_problem import (
    PROJECTED,
    RANK,
    Net,
    backward,
    batch,
    difference,
    loss_of,
    net,
    optimizer_of,
    parameters_of,
    train,
)
from plain_models import Net as ConvNet
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.harness.memory import Allocations, allocations_of
from fastlora.linalg import operators
from fastlora.optim import GaLoreAdamW, galore_param_groups
from fastlora.optim.galore import projector
from fastlora.optim.galore.projector import PROJ_TYPES

TAKEN = ("hook", "factored")
MODES = ("plain", *TAKEN)


def trained(kind: Any = Net, steps: int = 12, micro_batches: int = 1, groups: Any = None, **settings: Any) -> Any:
    model = net(kind=kind)
    optimizer = optimizer_of(model, groups, **{"refresh_steps": 1, **settings})
    train(model, optimizer, steps, micro_batches)
    return model


# The numbers of the plain mode.
@pytest.mark.parametrize("gradients", TAKEN)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("refresh_steps", [1, 2])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_streamed_refreshes_give_the_plain_mode_s_numbers(proj_type, refresh_steps, micro_batches, gradients):
    settings: Any = {"groups": {"proj_type": proj_type}, "refresh": "streamed", "refresh_steps": refresh_steps}
    plain = trained(**settings)
    assert difference(trained(micro_batches=micro_batches, gradients=gradients, **settings), plain) < 1e-12
    assert difference(plain, net()) > 0.05


@pytest.mark.parametrize("gradients", TAKEN)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_subspace_refreshes_give_the_plain_mode_s_numbers_without_accumulation(proj_type, gradients):
    settings: Any = {"groups": {"proj_type": proj_type}, "refresh": "subspace"}
    assert difference(trained(gradients=gradients, **settings), trained(**settings)) < 1e-11


def test_svd_refreshes_do_so_too():
    paper: Any = {"refresh": "svd", "moments": "keep", "arithmetic": "official"}
    exact: Any = {"refresh": "svd"}
    for settings in (paper, exact):
        assert difference(trained(gradients="hook", **settings), trained(**settings)) < 1e-11


@pytest.mark.parametrize("gradients, refresh", [("hook", "svd"), ("hook", "subspace"), ("factored", "subspace")])
def test_with_accumulation_the_basis_is_that_of_the_first_micro_batch(gradients, refresh):
    """And R is all of the gradient in it."""
    model, other = net(), net()
    optimizer = optimizer_of(model, gradients=gradients, refresh=refresh)
    tokens, targets = (tensor.chunk(3) for tensor in batch(0))
    for part in zip(tokens, targets):
        loss_of(model, *part).backward()
    first = torch.autograd.grad(loss_of(other, tokens[0], targets[0]), [other.square.weight])[0]
    sum(loss_of(other, *part) for part in zip(tokens, targets)).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = optimizer.state[model.square.weight]
    wanted = torch.linalg.svd(first)[2][:RANK].T
    overlap = torch.linalg.svdvals(wanted.T @ state["basis"])  # the cosines of the angles between the two subspaces
    assert torch.allclose(overlap, torch.ones(RANK).double(), atol=2e-2)
    assert torch.allclose(state["exp_avg"], 0.1 * other.square.weight.grad @ state["basis"], atol=1e-12)


@pytest.mark.parametrize("gradients", TAKEN)
def test_gradients_of_several_passes_add_up_until_they_are_used_or_forgotten(gradients):
    model, other = net(), net()
    settings = {"refresh": "streamed", "gradients": gradients}
    optimizer, plain = optimizer_of(model, **settings), optimizer_of(other, refresh="streamed")
    train(model, optimizer, 3)
    train(other, plain, 3)
    backward(model, 50)
    optimizer.zero_grad()  # forgotten
    for step in (3, 4):
        backward(model, step)
        backward(other, step)
    optimizer.step()
    plain.step()
    assert difference(model, other) < 1e-12
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    optimizer.step()  # used up
    assert difference(model, before) == 0


# Backward passes that are not for the weights.
def attacked(model: Any, tokens: Tensor, targets: Tensor, by: str) -> Tensor:
    """The loss at embeddings moved along the sign of their own gradient, of which the weights see nothing."""
    embedded = model.embedding(tokens).detach().requires_grad_()
    loss = loss_at(model, embedded, targets)
    if by == "grad":
        (gradient,) = torch.autograd.grad(loss, embedded)
    else:
        loss.backward(inputs=[embedded])
        assert embedded.grad is not None
        gradient = embedded.grad
    return loss_at(model, (embedded + 0.1 * gradient.sign()).detach(), targets)


def loss_at(model: Any, embedded: Tensor, targets: Tensor) -> Tensor:
    hidden = torch.tanh(model.up(embedded))
    inner = lambda h: torch.tanh(model.square(model.norm(h)))  # noqa: E731
    deep = checkpoint(inner, hidden, use_reentrant=False) if isinstance(model, Checkpointed) else inner(hidden)
    return nn.functional.cross_entropy(model.down(hidden + deep).flatten(0, 1), targets.flatten())  # type: ignore[operator]


@pytest.mark.parametrize("gradients", TAKEN)
@pytest.mark.parametrize("refresh", ["subspace", "streamed"])
@pytest.mark.parametrize("by", ["grad", "inputs"])
def test_gradients_of_inputs_do_not_count(by, refresh, gradients):
    """Adversarial training, saliency: torch.autograd.grad(loss, inputs), or backward(inputs=...)."""
    for kind in (Net, Checkpointed):
        models = []
        for mode in ("plain", gradients):
            model = net(kind=kind)
            optimizer = optimizer_of(model, gradients=mode, refresh=refresh, refresh_steps=1)
            for step in range(8):
                attacked(model, *batch(step), by).backward()
                optimizer.step()
                optimizer.zero_grad()
            models.append(model)
            optimizer.release()
        assert difference(models[1], models[0]) < 1e-11
        assert difference(models[0], net(kind=kind)) > 0.05


@pytest.mark.parametrize("penalty", ["of the loss", "of a linear function"])
def test_second_derivatives_are_refused_where_they_would_be_wrong(penalty):
    """A gradient penalty uses W in dX = dY W, which no tap of a layer's output sees."""
    models = {}
    for gradients in MODES:
        model = models[gradients] = net()
        optimizer = optimizer_of(model, gradients=gradients, refresh="streamed", refresh_steps=1)
        for step in range(4):
            tokens, targets = batch(step)
            embedded = model.embedding(tokens).detach().requires_grad_()
            of = model.up(embedded).mean() if penalty == "of a linear function" else loss_at(model, embedded, targets)
            (gradient,) = torch.autograd.grad(of, embedded, create_graph=True)
            loss = loss_of(model, tokens, targets) + 100 * gradient.square().mean()
            if gradients == "factored":
                with pytest.raises(RuntimeError, match=r"got a second derivative .* want .*gradients='hook'"):
                    loss.backward()
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert difference(models["hook"], models["plain"]) < 1e-12


def test_graphs_of_gradients_are_no_hindrance_where_no_weight_needs_them():
    """create_graph=True alone, and second derivatives by the input, as for its curvature."""
    plain, model = net(), net()
    single, optimizer = optimizer_of(plain, refresh="streamed"), optimizer_of(model, gradients="factored")
    curvatures = []
    for each, run in ((plain, single), (model, optimizer)):
        embedded = each.embedding(batch(9)[0]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(each, embedded, batch(9)[1]), embedded, create_graph=True)
        curvatures += torch.autograd.grad(gradient.square().sum(), embedded)
        for step in range(4):
            loss_of(each, *batch(step)).backward(create_graph=True)
            run.step()
            run.zero_grad()
    assert torch.allclose(*curvatures, atol=1e-15) and curvatures[0].norm() > 0
    assert difference(model, plain) < 1e-12


# Models of every kind.
class Shared(Net):
    """A layer that is called twice, and one that shares its weight with another."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(20, 20)
        self.again.weight = self.square.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens)))
        hidden = hidden + torch.tanh(self.square(torch.tanh(self.square(hidden))))
        return self.down(self.norm(hidden) + torch.tanh(self.again(hidden)))


class TiedHead(Net):
    """The embedding's weight serves a linear layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(12, 11, bias=False)
        self.extra.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.extra(self.embedding(tokens))[..., :9]


class Attention(Net):
    """nn.MultiheadAttention reads the weight of its out_proj without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens)))
        return self.down(self.norm(hidden + self.attention(hidden, hidden, hidden)[0] + self.square(hidden)))


class Custom(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.tanh(), self.bias)


class Subclassed(Net):
    """A linear layer that computes something else: dYᵀX is not its weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.square = Custom(20, 20, bias=False)


class Checkpointed(Net):
    reentrant = False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens)))
        inner = lambda h: torch.tanh(self.square(self.norm(h)))  # noqa: E731
        return self.down(hidden + checkpoint(inner, hidden, use_reentrant=self.reentrant))  # type: ignore[operator]


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("gradients", TAKEN)
@pytest.mark.parametrize("kind", [Shared, TiedHead, Attention, Subclassed, Checkpointed, Reentrant])
def test_models(kind, gradients, micro_batches):
    settings: dict[str, Any] = {"refresh": "streamed", "kind": kind}
    plain = trained(**settings)
    taken = trained(micro_batches=micro_batches, gradients=gradients, **settings)
    assert difference(taken, plain) < 1e-12
    assert difference(plain, net(kind=kind)) > 0.05


@pytest.mark.parametrize(
    "kind, unseen",
    [
        (TiedHead, {"embedding.weight"}),
        (Attention, {"attention.out_proj.weight"}),
        (Subclassed, {"square.weight"}),
    ],
)
def test_weights_whose_gradient_is_more_than_what_a_layer_shows_are_taken_by_a_hook(kind, unseen):
    model = net(kind=kind)
    optimizer = optimizer_of(model, gradients="factored")
    groups = galore_param_groups(net(kind=kind), RANK)
    projected = {name for name, p in net(kind=kind).named_parameters() if p.dim() == 2 and min(p.shape) > RANK}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == projected - unseen - {"attention.in_proj_weight"} - ({"embedding.weight"} - unseen)
    assert len(frozen) + len(unseen) == len(groups[0]["params"])
    optimizer.release()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("gradients", TAKEN)
def test_conv1d_layers_hold_their_weight_the_other_way(gradients):
    plain, taken = ConvNet().double(), ConvNet().double()
    for model, mode in ((plain, "plain"), (taken, gradients)):
        groups = galore_param_groups(model, 3, update_proj_gap=3, scale=1.0)
        assert len(groups[0]["params"]) == 5  # two convs, two downs, one up that is not frozen
        optimizer = GaLoreAdamW(groups, lr=1e-2, gradients=mode, model=model, refresh="streamed", refresh_steps=1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(9):
            model(torch.randn(5, 6, generator=generator, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert difference(taken, plain) < 1e-12
    start = ConvNet().double()
    assert torch.equal(plain.blocks[1].up.weight, start.blocks[1].up.weight)  # type: ignore[union-attr]
    assert not torch.equal(plain.blocks[0].conv.weight, start.blocks[0].conv.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("gradients", TAKEN)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_transformers(architecture, gradients):
    """In float64, with gradient checkpointing, and an input that needs no gradient (frozen embeddings)."""
    models = []
    for mode in ("plain", gradients):
        model = tiny_model(architecture).double().train()
        model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
        if mode != "plain":
            model.gradient_checkpointing_enable({"use_reentrant": architecture == "llama"})  # type: ignore[operator]
        groups = galore_param_groups(model, 8, update_proj_gap=4)
        optimizer = GaLoreAdamW(groups, lr=1e-2, gradients=mode, model=model, refresh="streamed", refresh_steps=1)
        for _ in range(6):
            model(**tiny_batch(architecture)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert difference(models[1], models[0]) < 1e-9
    assert difference(models[0], tiny_model(architecture).double()) > 1e-2


def test_frozen_layers_stay():
    for gradients in MODES:
        model = net()
        model.square.weight.requires_grad_(False)
        optimizer = GaLoreAdamW(
            [{"params": [p for p in model.parameters() if p.dim() == 2], "rank": RANK}],
            lr=1e-2, gradients=gradients, model=model,
        )  # fmt: skip
        train(model, optimizer, 4)
        assert torch.equal(model.square.weight, net().square.weight)
        assert not torch.equal(model.up.weight, net().up.weight)
        optimizer.release()
        assert not model.square.weight.requires_grad and model.up.weight.requires_grad


class Hooked(Net):
    """Layers whose hooks change what they are given and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_pre_hook(doubled)
        self.up.register_forward_hook(scaled)
        self.square.register_forward_hook(scaled)


def doubled(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2,)


def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * torch.linspace(0.1, 3.0, 20, dtype=output.dtype)


class Masked(Net):
    """A hook changes the weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.square.weight.register_hook(lambda gradient: gradient.tril())


class Replaced(Net):
    """As accelerate's hooks do: another forward on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.square.forward = lambda input: nn.functional.linear(input, self.square.weight.tanh())


@pytest.mark.parametrize("gradients", TAKEN)
@pytest.mark.parametrize("kind", [Hooked, Masked, Replaced])
def test_what_was_hung_on_a_layer_before(kind, gradients):
    plain = trained(kind=kind, refresh="streamed")
    assert difference(trained(kind=kind, refresh="streamed", gradients=gradients), plain) < 1e-12
    assert difference(trained(kind=Net, refresh="streamed"), plain) > 1e-3


@pytest.mark.parametrize("gradients", TAKEN)
def test_hooks_that_come_later(gradients):
    models = []
    for mode in ("plain", gradients):
        model = net()
        optimizer = optimizer_of(model, gradients=mode, refresh="streamed", refresh_steps=1)
        model.up.register_forward_hook(lambda module, args, output: output * 3)
        train(model, optimizer, 6)
        models.append(model)
        optimizer.release()
    assert difference(models[1], models[0]) < 1e-12


def test_a_compiled_model():
    """Its graph breaks at the tapped layers. With gradients of something else in between."""
    plain, model = net(), net()
    single, optimizer = optimizer_of(plain, refresh="streamed"), optimizer_of(model, gradients="factored")
    compiled: Any = torch.compile(model, backend="aot_eager")
    for step in range(5):
        torch.autograd.grad(loss_of(compiled, *batch(50)), model.embedding.weight)
        train(compiled, optimizer, 1, start=step)
        train(plain, single, 1, start=step)
    assert difference(model, plain) < 1e-12


def test_under_autocast_factors_are_no_worse_than_the_gradient():
    """The gradient of a bfloat16 product is rounded to float32's weights; the factors are multiplied in float32."""
    exact = trained(refresh="streamed", steps=5)
    errors = {}
    for gradients in MODES:
        model = net(torch.float32)
        optimizer = optimizer_of(model, gradients=gradients, refresh="streamed", refresh_steps=1)
        for step in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, *batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        errors[gradients] = difference(model.double(), exact)
    assert errors["factored"] < 0.1 and errors["hook"] == errors["plain"] < 0.1


# What is done to the model, and undone.
def test_what_is_left_of_gradients_and_what_release_puts_back():
    for gradients in TAKEN:
        model = net()
        optimizer = optimizer_of(model, gradients=gradients)
        backward(model, 0)
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (name in PROJECTED)
            assert parameter.requires_grad == (gradients == "hook" or name not in PROJECTED)
        optimizer.release()
        assert optimizer.gradients == "plain" and all(p.requires_grad for p in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        optimizer.zero_grad()
        backward(model, 0)
        assert all(parameter.grad is not None for parameter in model.parameters())
        before = model.up.weight.detach().clone()
        for _ in range(3):
            optimizer.step()
        assert not torch.equal(model.up.weight, before)


@pytest.mark.parametrize("gradients", TAKEN)
def test_release_forgets_what_was_taken(gradients):
    model, other = net(), net()
    optimizer, plain = optimizer_of(model, gradients=gradients, refresh="streamed"), optimizer_of(other)
    plain.param_groups[0]["refresh"] = "streamed"
    backward(model, 7)
    optimizer.release()
    model.zero_grad()
    train(model, optimizer, 5)
    train(other, plain, 5)
    assert difference(model, other) < 1e-12


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("gradients", TAKEN)
def test_copies_of_the_model_train_nothing(gradients, way):
    model = net()
    optimizer = optimizer_of(model, gradients=gradients)
    train(model, optimizer, 3)
    other = way(model)
    assert other.up.weight.requires_grad == (gradients == "hook")  # as in the model
    before = parameters_of(model).clone()
    backward(other, 3)
    assert other.down.bias.grad is not None and not optimizer._held
    optimizer.step()
    assert torch.equal(parameters_of(model), before)
    optimizer.release()
    other.requires_grad_(True).zero_grad()
    start = copy.deepcopy(other)
    train(other, optimizer_of(other, gradients=gradients), 3)
    assert torch.equal(parameters_of(model), before) and not torch.equal(other.up.weight, start.up.weight)


@pytest.mark.parametrize("gradients", MODES)
def test_layers_are_frozen_and_unfrozen_during_a_run(gradients):
    model, plain = net(), net()
    optimizer, other = optimizer_of(model, gradients=gradients, refresh="streamed"), optimizer_of(plain)
    other.param_groups[0]["refresh"] = "streamed"
    train(model, optimizer, 4)
    train(plain, other, 4)
    backward(model, 4)
    optimizer.freeze([model.square.weight, model.norm.weight])
    plain.square.weight.requires_grad_(False)
    plain.norm.weight.requires_grad_(False)
    backward(plain, 4)
    for each in (optimizer, other):
        each.step()
        each.zero_grad()
    kept = model.square.weight.detach().clone(), model.norm.weight.detach().clone()
    train(model, optimizer, 4, start=5)
    train(plain, other, 4, start=5)
    assert torch.equal(model.square.weight, kept[0]) and torch.equal(model.norm.weight, kept[1])
    assert difference(model, plain) < 1e-12
    optimizer.unfreeze([model.square.weight, model.norm.weight])
    plain.requires_grad_(True)
    train(model, optimizer, 4, start=9)
    train(plain, other, 4, start=9)
    assert difference(model, plain) < 1e-12 and not torch.equal(model.square.weight, kept[0])
    optimizer.freeze(model.square.parameters())
    copied = copy.deepcopy((model, optimizer))[0]
    optimizer.release()
    for each in (model, copied):
        assert [name for name, p in each.named_parameters() if not p.requires_grad] == ["square.weight"]


@pytest.mark.parametrize("gradients", TAKEN)
def test_one_optimiser_at_a_time(gradients):
    """A second one would see no gradients, and say nothing."""
    model = net()
    first = optimizer_of(model, gradients=gradients)
    for mode in MODES:
        groups = [{"params": [model.norm.weight]}, {"params": [model.up.weight], "rank": RANK}]
        with pytest.raises(ValueError, match=r"params: another GaLoreAdamW takes the gradients of a weight \(20, 12\)"):
            GaLoreAdamW(groups, gradients=mode, model=model)
    train(model, first, 3)
    assert not torch.equal(model.up.weight, net().up.weight)
    del first
    gc.collect()  # with it go its hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    before = model.up.weight.detach().clone()
    train(model, optimizer_of(model, gradients=gradients), 3)
    assert not torch.equal(model.up.weight, before)


@pytest.mark.parametrize("gradients", TAKEN)
def test_a_refused_group_leaves_the_model_as_it_was(gradients):
    model = net()
    groups = [{"params": [model.up.weight], "rank": RANK}, {"params": [model.square.weight], "rank": 99}]
    with pytest.raises(ValueError, match="rank: got 99"):
        GaLoreAdamW(groups, gradients=gradients, model=model)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    optimizer_of(model, gradients=gradients)


def test_a_gradient_that_was_taken_and_is_there_too_is_an_error():
    model = net()
    optimizer = optimizer_of(model, gradients="factored")
    train(model, optimizer, 1)
    model.requires_grad_(True)
    backward(model, 1)
    with pytest.raises(
        ValueError, match=r"step: params: the gradient of a weight \(20, 12\) was taken in the backward pass"
    ):
        optimizer.step()


# Memory.
SIDE, LAYERS, TOKENS = 96, 6, 40


class Deep(nn.Module):
    """Layers of one size, so that each tensor of that size is a gradient, an update or a copy of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))
        self.scale = nn.Parameter(torch.ones(SIDE))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x * self.scale))
        return x


def without_scratch(seen: Allocations) -> Allocations:
    """Without what was freed as soon as it was allocated: oneDNN packs a bfloat16 weight for the time of a product."""
    kept: list[int] = []
    for change in seen.changes:
        if kept and kept[-1] > 0 and kept[-1] == -change:
            kept.pop()
        else:
            kept.append(change)
    return Allocations(seen.peak, seen.held, tuple(kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", MODES)
def test_full_gradients_alive_at_once(gradients, dtype, monkeypatch):
    """All of them, one, none; and nothing else of the weights' size is ever allocated, refreshes included."""
    for module in (
        operators,
        projector,
    ):  # rows at a time: the layers here have fewer than would be cast at once
        monkeypatch.setattr(module, "CHUNK", 16)
    model = net(dtype, kind=Deep)
    groups = galore_param_groups(model, 8, update_proj_gap=4)
    optimizer = GaLoreAdamW(groups, gradients=gradients, model=model, refresh_steps=1)
    x = torch.randn(TOKENS, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)

    def steps(count: int = 8) -> None:
        for _ in range(count):
            for part in x.chunk(2):
                model(part).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    _, seen = allocations_of(steps)
    seen = without_scratch(seen)
    # A gradient may be summed by autograd out of place, once a micro-batch: two of one layer's for a moment.
    allowed = {"plain": LAYERS + 1, "hook": 1, "factored": 0}[gradients]
    alive = seen.most_alive(SIDE * SIDE * dtype.itemsize)
    assert alive <= allowed and (alive > 0) == (allowed > 0)
    if gradients == "plain":
        assert alive >= LAYERS
    if dtype == torch.bfloat16:
        assert seen.most_alive(SIDE * SIDE * 4) == 0  # no float32 copy of a gradient, no float32 update


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_bytes(dtype, gradients):
    """kr + 2lr float32 numbers a projected weight: for the shorter side k the paper's mr + 2nr."""
    model = net(dtype)
    optimizer = optimizer_of(model, gradients=gradients, refresh_steps=1, refresh_iterations=1)
    train(model, optimizer, 7)  # streamed: the first two steps, then five, in which a refresh may be under way
    for name in PROJECTED:
        weight = model.get_parameter(name)
        state = optimizer.state[weight]
        short, long = sorted(weight.shape)
        numbers = {key: value.numel() for key, value in state.items() if isinstance(value, Tensor)}
        extra = sum(numbers.pop(key, 0) for key in ("probe", "product"))
        assert extra <= (short + long) * RANK and (gradients != "plain" or extra == 0)
        assert numbers == {"basis": short * RANK, "exp_avg": long * RANK, "exp_avg_sq": long * RANK}
        assert all(value.dtype == torch.float32 for value in state.values() if isinstance(value, Tensor))
        full = 2 * weight.numel()
        assert sum(numbers.values()) < full
