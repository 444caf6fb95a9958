"""AdaLoRA's layers: the penalty, cutting them to their ranks, and what else is done with adapters here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adalora_problem import (
    NAMES,
    SIZES,
    TARGET,
    Net,
    R,
    batch,
    loss_of,
    optimizer_of,
    patched,
    plain,
    trained,
    triplets,
)
from model_state import ModelState
from torch import Tensor, nn

import fastlora
from fastlora.ops import call as ops_call
from fastlora.ops.group import group as group_op
from fastlora.variants import RankAllocator, orthogonality_penalty, shrink_to_ranks

X = batch(0)[0]
STEPS = 10


def random_adapters(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = patched(dtype, **settings)
    for factors in triplets(model).values():
        for factor in factors.values():
            nn.init.normal_(factor, std=0.5)
    return model


def allocated(model: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> RankAllocator:
    """After a few steps without the penalty, whose cross terms tie the kept triplets to the masked ones."""
    allocator = RankAllocator(model, TARGET, steps, t_final=1)
    for step in range(steps):
        loss_of(model, step, gamma=0.0).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    return allocator


# The layer.
def test_the_layer_is_the_base_layer_at_first_and_p_lambda_q_then():
    model = patched(torch.float64)
    assert torch.equal(model(X.double()), plain(torch.float64)(X.double()))
    stds = [factor.std().item() for factors in triplets(model).values() for k, factor in factors.items() if k != "e"]
    assert all(0.01 < std < 0.03 for std in stds)
    layer = random_adapters(torch.float64).layers[0]
    p, e, q = layer.lora_B["default"], layer.lora_E["default"], layer.lora_A["default"]
    x = X.double()
    want = x @ layer.weight.t() + layer.bias + 8 / R * (x @ q.t() @ torch.diag(e.flatten()) @ p.t())
    torch.testing.assert_close(layer(x), want)
    assert layer.use_adalora == {"default": True} and "AdaLoRA" in repr(layer)


# The penalty.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_penalty_and_its_gradient(dtype):
    model = random_adapters(dtype, rank_pattern={"layers.1": 3})
    with torch.autocast("cpu", torch.bfloat16):
        penalty = orthogonality_penalty(model, gamma=0.3)
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    penalty.backward()
    want = 0.0
    for factors in triplets(model).values():
        p, q = factors["P"].detach().double(), factors["Q"].detach().double()
        eye = torch.eye(p.shape[1]).double()
        want += 0.3 * ((p.t() @ p - eye).square().sum() + (q @ q.t() - eye).square().sum()).item()
        tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        grads = (0.3 * 4 * p @ (p.t() @ p - eye), 0.3 * 4 * (q @ q.t() - eye) @ q)
        for key, grad in zip("PQ", grads, strict=True):
            torch.testing.assert_close(factors[key].grad.double(), grad, **tolerance)  # type: ignore[union-attr]
        assert factors["e"].grad is None
    assert penalty.item() == pytest.approx(want, rel=1e-6)
    assert orthogonality_penalty(model, gamma=0.0).item() == 0.0


def test_layers_of_one_shape_are_one_product(monkeypatch):
    torch.manual_seed(0)
    model: Any = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)])
    fastlora.patch(model, r=2, use_adalora=True)
    products = []
    original = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: products.append(a.shape) or original(a, b))
    orthogonality_penalty(model).backward()
    assert [shape[0] for shape in products] == [5, 5, 5, 5]


def test_the_penalty_makes_p_and_q_orthonormal():
    model = patched()
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality_penalty(model).backward()
        optimizer.step()
    for name in ("layers.0", "layers.1"):
        q = triplets(model)[name]["Q"]
        torch.testing.assert_close(q @ q.t(), torch.eye(R), atol=1e-2, rtol=0.0)


def test_errors_of_the_penalty():
    model = patched()
    for gamma in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"orthogonality_penalty: gamma: got .*, want a number"):
            orthogonality_penalty(model, gamma)
    with pytest.raises(ValueError, match="orthogonality_penalty: adapter_name: got 'other', and its AdaLoRA adapters"):
        orthogonality_penalty(model, adapter_name="other")


# Cutting to the ranks that are left.
OPTIMISERS: dict[str, Any] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.02),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.02, amsgrad=True),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.02, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "two groups": lambda ps: torch.optim.AdamW([{"params": ps[:2], "lr": 0.01}, {"params": ps[2:]}], lr=0.02),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_a_cut_model_trains_on_as_the_masked_one(kind):
    models = [patched(), patched()]
    optimizers = [OPTIMISERS[kind](trained(model)) for model in models]
    allocators = [allocated(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    want, scales = models[1](X), [layer.scaling["default"] for layer in models[1].layers]
    assert shrink_to_ranks(models[1], allocators[1], optimizers[1]) == allocators[1].ranks == allocators[0].ranks
    torch.testing.assert_close(models[1](X), want, rtol=1e-5, atol=1e-6)
    kept = allocators[0].rank_pattern
    for layer, name, scale in zip(models[1].layers, NAMES, scales, strict=True):
        if sum(kept[name]):
            assert layer.r["default"] == sum(kept[name]) == layer.lora_E["default"].numel()
            assert layer.scaling["default"] == scale == pytest.approx(layer.lora_alpha["default"] / layer.r["default"])
            assert layer.lora_A["default"].requires_grad
    inside = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
    assert inside == {id(p) for p in trained(models[1])} and set(map(id, optimizers[1].state)) == inside
    for step in range(STEPS, STEPS + 5):
        for model, optimizer, allocator in zip(models, optimizers, allocators, strict=True):
            loss_of(model, step, gamma=0.0).backward()
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()
    masked, cut = (triplets(model) for model in models)
    assert allocators[1].steps == STEPS + 5 and allocators[1].rank_pattern == kept
    for name, factors in cut.items():
        index = [i for i, keep in enumerate(kept[name]) if keep]
        for key, dim in (("P", 1), ("e", 0), ("Q", 0)):
            want = masked[name][key].index_select(dim, torch.tensor(index))
            torch.testing.assert_close(factors[key], want, rtol=1e-3, atol=1e-5)


def test_a_layer_that_keeps_nothing_loses_its_adapter():
    model = random_adapters()
    pattern = {NAMES[0]: [True, False, True, False], NAMES[1]: [False] * R}
    for name, kept in pattern.items():
        triplets(model)[name]["e"].data.mul_(torch.tensor(kept).unsqueeze(1))
    optimizer = optimizer_of(model)
    want, saved = model(X), model.layers[2].lora_A["default"]
    loss_of(model, 0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"some ranks of 'layers\.0' that are to go have singular values that are not"):
        shrink_to_ranks(model, pattern, optimizer)
    for name, kept in pattern.items():
        triplets(model)[name]["e"].data.mul_(torch.tensor(kept).unsqueeze(1))
    want = model(X)
    assert shrink_to_ranks(model, pattern, optimizer) == {NAMES[0]: 2, NAMES[1]: 0, NAMES[2]: R}
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-6)
    assert model.layers[1].r == {} and model.layers[1].running_adapters() == []
    assert model.layers[2].lora_A["default"] is saved
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.state) == 6
    fastlora.unpatch(model)
    assert type(model.layers[1]) is nn.Linear


def test_names_of_an_optimiser_s_parameters_go_with_them():
    model = random_adapters()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": named[:2]}, {"params": named[2:]}], lr=0.02)
    for name in NAMES[:2]:
        triplets(model)[name]["e"].data.zero_()
    shrink_to_ranks(model, {NAMES[0]: [False] * R, NAMES[1]: [True, False, False, False]}, optimizer)
    left = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(group["param_names"], [left[id(p)] for p in group["params"]]) for group in optimizer.param_groups]
    assert [names for names, _ in groups] == [found for _, found in groups]
    assert [n for names, _ in groups for n in names] == [name for name, _ in named if NAMES[0] not in name]


def test_cut_in_inference_mode_a_model_can_be_trained():
    model = patched()
    optimizer = optimizer_of(model)
    allocator = allocated(model, optimizer)
    with torch.inference_mode():
        shrink_to_ranks(model, allocator, optimizer)
    loss_of(model, STEPS).backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert not any(tensor.is_inference() for tensor in (*trained(model), *states))


def test_other_optimisers_states_are_reset_which_a_warning_says():
    model = patched()
    optimizer = torch.optim.Adagrad(trained(model), lr=0.1)
    allocator = allocated(model, optimizer)
    with pytest.warns(UserWarning, match="how a Adagrad keeps its state is not known here"):
        shrink_to_ranks(model, allocator, optimizer)
    assert not optimizer.state


def test_what_cannot_be_cut():
    model = patched()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, TARGET, STEPS)
    with pytest.raises(ValueError, match=r"the allocator is at step 0, want it after step 10, when"):
        shrink_to_ranks(model, allocator)
    with pytest.raises(ValueError, match=r"got 'nothing' and 0 other names that are no layers .* these are layers\.0"):
        shrink_to_ranks(model, {"nothing": [True]})
    with pytest.raises(ValueError, match=r"got 1 ranks for 'layers\.0', which has 4"):
        shrink_to_ranks(model, {NAMES[0]: [True]})
    with pytest.raises(ValueError, match="has none of the adapters' parameters"):
        shrink_to_ranks(model, {NAMES[0]: [True] * R}, torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    fastlora.merge(model)
    with pytest.raises(ValueError, match=r"merged into 'layers\.0'"):
        shrink_to_ranks(model, {NAMES[0]: [True] * R})
    fastlora.unmerge(model)
    allocator = allocated(model, optimizer)
    shrink_to_ranks(model, allocator.rank_pattern)  # not the allocator itself: it does not know
    loss_of(model, 0).backward()
    with pytest.raises(
        ValueError, match=r"RankAllocator: model: the adapter of 'layers\.\d' had rank 4 and has \d; want"
    ):
        allocator.step()


# What else is done with adapters.
def test_unpatch_leaves_the_model_as_it_was():
    model = plain()
    state = ModelState(model)
    fastlora.patch(model, r=R, use_adalora=True)
    RankAllocator(model, TARGET, STEPS)
    fastlora.unpatch(model)
    state.assert_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(dtype):
    model = random_adapters(dtype)
    before, want = [layer.weight.clone() for layer in model.layers], model(X.to(dtype))
    fastlora.merge(model)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(X.to(dtype)), want, rtol=tolerance, atol=tolerance)
    assert not torch.equal(model.layers[0].weight, before[0])
    fastlora.unmerge(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model.layers, before, strict=True))


def test_several_adapters_disabling_and_batches_that_mix_them():
    model = random_adapters(lora_dropout=0.0)
    fastlora.patch(model, r=3, adapter_name="plain", init_lora_weights=False)
    fastlora.patch(model, r=2, adapter_name="third", use_adalora=True, init_lora_weights=False)
    base, ones = plain()(X), {}
    for name in ("default", "plain", "third"):
        fastlora.set_adapter(model, name)
        ones[name] = model(X)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if n.endswith(f".{name}")
        }
    with fastlora.disable_adapter(model):
        assert torch.equal(model(X), base)
    x = X[:4].unsqueeze(1)
    names = ["third", "default", "__base__", "plain"]
    with fastlora.adapter_names(model, names):
        rows = model(x)[:, 0]
    for i, name in enumerate(names):
        torch.testing.assert_close(rows[i], (base if name == "__base__" else ones[name])[i], rtol=1e-4, atol=1e-5)
    assert list(RankAllocator(model, 1, 5, adapter_name="third").ranks.values()) == [2] * len(NAMES)


def test_gradients_reach_lambda_in_a_batch_that_mixes_adapters():
    model = random_adapters()
    fastlora.patch(model, r=2, adapter_name="other", use_adalora=True, init_lora_weights=False)
    fastlora.set_adapter(model, ["default", "other"])
    with fastlora.adapter_names(model, ["default", "other"] * 2):
        model(X[:4].unsqueeze(1)).square().sum().backward()
    for layer in model.layers:
        assert all(layer.lora_E[name].grad.abs().sum() > 0 for name in ("default", "other"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)


def test_groups(monkeypatch):
    monkeypatch.setattr(group_op, "SMALL", 0)
    monkeypatch.setattr(ops_call, "SMALL", 0)
    opened = []
    original = group_op.open_group

    def counting(x, members, *rest):
        opened.append(len(members))
        return original(x, members, *rest)

    monkeypatch.setattr(group_op, "open_group", counting)
    outcomes = []
    for group in (None, "auto"):
        torch.manual_seed(0)
        model = Attention()
        report = fastlora.patch(model, r=R, use_adalora=True, init_lora_weights=False, group=group)
        assert len(report.groups) == (group is not None)
        model(X).square().sum().backward()
        outcomes.append([parameter.grad for parameter in trained(model)])
    assert opened == [3]
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_lora_ga_looks_at_them_and_does_not_touch_them():
    model = random_adapters()
    before = copy.deepcopy(model.state_dict())
    with fastlora.GradientSketch(model, r=1) as sketch:
        loss_of(model, 0, gamma=0.0).backward()
    assert all(sketch.has_gradient(name) for name in NAMES)
    for call in (
        lambda: fastlora.init_lora_ga(model, sketch, ranks=dict.fromkeys(NAMES, R)),
        lambda: fastlora.init_lora_ga(model, fastlora.GradientSketch(model, r=R)),
        lambda: fastlora.reinit_lora_ga(model, sketch),
        lambda: fastlora.AlignmentMonitor(model),
        lambda: fastlora.PeriodicReinit(model, None, every=8),
    ):
        with pytest.raises(ValueError):
            call()
    ranked = random_adapters(r=1, target_modules=["layers.0", "layers.1"])
    with fastlora.GradientSketch(ranked, r=1) as sketch:
        loss_of(ranked, 0, gamma=0.0).backward()
    for refused in (fastlora.init_lora_ga, fastlora.reinit_lora_ga):
        with pytest.raises(ValueError, match="'default' is an AdaLoRA adapter, P Λ Q, whose own start is Λ = 0"):
            refused(ranked, sketch)
    with pytest.raises(ValueError, match=r"'layers\.0' has an AdaLoRA adapter P Λ Q, whose steps are not those of B A"):
        fastlora.AlignmentMonitor(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_starts_and_kinds_that_do_not_go_together():
    for settings, message in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa' with use_adalora, want True"),
        ({"use_dora": True}, "use_dora, use_adalora: got True for both"),
        ({"use_adalora": 1}, "use_adalora: got 1, want True or False"),
    ):
        with pytest.raises(ValueError, match=f"patch: {message}"):
            fastlora.patch(Net(), **{"use_adalora": True, **settings})
    layer = random_adapters().layers[0]
    layer.reset_adapter("default")
    assert not layer.lora_E["default"].any() and layer.lora_B["default"].any()
    with pytest.raises(ValueError, match="with use_adalora"):
        layer.reset_adapter("default", "gaussian")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_as_a_plain_adapter(use_rslora):
    layer = random_adapters(use_rslora=use_rslora).layers[0]
    layer.lora_E["default"].data[[0, 2]] = 0.0
    a, b, r, alpha = layer.as_plain_adapter("default")
    assert (a.shape, b.shape, r) == ((2, SIZES[0][0]), (SIZES[0][1], 2), 2)
    scale = alpha / r**0.5 if use_rslora else alpha / r
    torch.testing.assert_close(scale * (b @ a), layer.get_delta_weight("default"))


def test_lora_plus_gives_lambda_the_rate_of_a():
    groups = fastlora.optim.lora_plus_param_groups(patched(), lr=1e-3, ratio=16)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("lora_A", 1e-3, 3),
        ("lora_B", 1.6e-2, 3),
        ("other", 1e-3, 3),
    ]


def test_compilation():
    model = random_adapters()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-6)


def test_training_resumes_after_a_cut():
    """As docs/adalora.md says: the allocator's state, the cut, then the states of the cut sizes."""

    def step(model: Any, optimizer: torch.optim.Optimizer, allocator: RankAllocator, number: int) -> None:
        loss_of(model, number, gamma=0.1).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()

    model = patched()
    optimizer = optimizer_of(model)
    allocator = allocated(model, optimizer)
    shrink_to_ranks(model, allocator, optimizer)
    step(model, optimizer, allocator, STEPS)
    states = copy.deepcopy((allocator.state_dict(), model.state_dict(), optimizer.state_dict()))
    step(model, optimizer, allocator, STEPS + 1)

    again = patched()
    resumed = RankAllocator(again, TARGET, STEPS, t_final=1)
    resumed.load_state_dict(states[0])
    shrink_to_ranks(again, resumed)
    again.load_state_dict(states[1])
    other = optimizer_of(again)
    other.load_state_dict(states[2])
    step(again, other, resumed, STEPS + 1)
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(model.state_dict().values(), again.state_dict().values())
    )


@pytest.mark.parametrize("missing", ["steps", "kept", "importance"])
def test_incomplete_and_other_states_of_an_allocator_are_refused(missing):
    model = patched()
    allocator = RankAllocator(model, TARGET, STEPS)
    loss_of(model, 0, gamma=0.0).backward()
    allocator.step()
    state = allocator.state_dict()
    del state[missing]
    for wrong, words in (
        (state, f"which lacks {missing}"),
        ({"state": {}, "param_groups": []}, "lacks steps, kept, imp"),
    ):
        with pytest.raises(ValueError, match=rf"RankAllocator.load_state_dict: state: got .*{words}"):
            allocator.load_state_dict(wrong)
    part = allocator.state_dict()
    del part["importance"][NAMES[0]]["lora_E"]
    with pytest.raises(ValueError, match=rf"not this model's \({NAMES[0]}\)"):
        allocator.load_state_dict(part)
    assert allocator.steps == 1
