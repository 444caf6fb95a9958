"""`galore_param_groups`: which weights are projected, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from galore_problem import Net, net
from plain_models import Net as ConvNet
from plain_models import Tied
from tiny_models import tiny_model
from torch import nn

import fastlora
from fastlora.optim import GaLoreAdamW, galore_param_groups


def named(model: nn.Module, rank: int = 4, **settings: Any) -> dict[str, set[str]]:
    """The names of the parameters of every group; asserts that the groups are complete and disjoint."""
    groups = galore_param_groups(model, rank, **settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_who_is_where():
    assert named(net()) == {
        "galore": {"up.weight", "square.weight", "down.weight"},
        "other": {"embedding.weight"},
        "other_no_decay": {"up.bias", "norm.weight", "norm.bias", "down.bias"},
    }
    assert named(net(), rank=9)["galore"] == {"up.weight", "square.weight"}  # down has nine rows: nothing to project
    assert named(net(), target_modules=["up"])["other"] == {"embedding.weight", "square.weight", "down.weight"}
    assert named(net(), exclude_modules=["up"])["galore"] == {"square.weight", "down.weight"}
    assert named(net(), target_modules=r".*(up|down)")["galore"] == {"up.weight", "down.weight"}
    frozen = net()
    frozen.up.requires_grad_(False)
    assert named(frozen)["galore"] == {"square.weight", "down.weight"}


def test_groups_say_how():
    groups = galore_param_groups(net(), 4, update_proj_gap=50, scale=0.5, proj_type="left", weight_decay=0.2)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert settings == [
        {
            "name": "galore",
            "rank": 4,
            "update_proj_gap": 50,
            "scale": 0.5,
            "proj_type": "left",
            "weight_decay": 0.2,
        },
        {"name": "other", "weight_decay": 0.2},
        {"name": "other_no_decay", "weight_decay": 0.0},
    ]
    groups = galore_param_groups(net(), 4)
    assert [group.get("weight_decay") for group in groups] == [None, None, 0.0]
    optimizer = GaLoreAdamW(groups, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    (first, *_) = optimizer.param_groups
    assert (first["update_proj_gap"], first["scale"], first["proj_type"]) == (200, 0.25, "std")  # the paper's


def test_models_of_all_kinds():
    llama = named(tiny_model("llama"), rank=8)
    assert len(llama["galore"]) == 14 and llama["other"] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "lm_head.weight" in named(tiny_model("llama"), rank=8, target_modules=["lm_head"])["galore"]
    convolutions = named(ConvNet(), rank=3)["galore"]
    assert {"blocks.0.conv.weight", "blocks.1.down.weight"} < convolutions
    tied = named(Tied(), rank=2)  # a layer of two names once; the embedding's weight is the output's too
    assert tied["galore"] == {"first.weight", "embedding.weight"}
    normed = net()
    nn.utils.parametrizations.weight_norm(normed.square)
    assert named(normed)["galore"] == {"up.weight", "down.weight"}


def test_refused():
    where = "galore_param_groups: "
    with pytest.raises(ValueError, match=where + "model: got str, want a torch.nn.Module"):
        galore_param_groups("llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=where + r"model: got one with 0 trainable parameters"):
        galore_param_groups(net().requires_grad_(False), 4)
    with pytest.raises(ValueError, match=r"with 8 trainable parameters, want some that are weights.*rank=200"):
        galore_param_groups(net(), 200)
    with pytest.raises(ValueError, match=where + "target_modules: no module is called 'gate', 'left'"):
        galore_param_groups(net(), 4, target_modules=["up", "gate", "left"])
    for argument, value, message in (
        ("rank", 0, "rank: got 0, want an integer of at least 1"),
        ("rank", 2.0, "rank: got 2.0, want an integer of at least 1"),
        ("update_proj_gap", True, "update_proj_gap: got True, want an integer"),
        ("scale", float("inf"), "scale: got inf, want a number that is not negative"),
        ("proj_type", "both", "proj_type: got 'both', want one of 'std', 'reverse_std'"),
        ("weight_decay", -0.1, "weight_decay: got -0.1"),
    ):
        with pytest.raises(ValueError, match=where + message):
            galore_param_groups(net(), **{"rank": 4, argument: value})


def test_models_with_lora_layers_are_refused():
    patched = tiny_model("llama")
    fastlora.patch(patched, r=2)
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    for model in (patched, adapted):
        with pytest.raises(ValueError, match="model: got one with LoRA layers, want a plain one"):
            galore_param_groups(model, 2)
    fastlora.unpatch(patched)
    assert galore_param_groups(patched.requires_grad_(True), 2)


def test_the_mode_of_gradients_is_seen_in_the_errors_before_anything_changes():
    model = net()
    with pytest.raises(ValueError, match="gradients='factored'"):
        GaLoreAdamW(galore_param_groups(model, 4), gradients="factored")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model, Net) and not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model.up.weight, net().up.weight)


# States that are loaded.
def trained_galore(**settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 12, bias=False)).double()
    groups = [
        {"params": [model[0].weight, model[1].weight], "rank": 4, **settings},
        {"params": [model[0].bias], "weight_decay": 0.1},
    ]
    optimizer = GaLoreAdamW(groups, lr=torch.tensor(1e-3))
    for _ in range(3):
        step_of(model, optimizer)
    return model, optimizer


def step_of(model: Any, optimizer: Any) -> None:
    model(torch.randn(8, 20, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("missing", ["step", "basis", "bases", "refresh_at", "halves", "exp_avg", "exp_avg_sq"])
def test_incomplete_states_are_refused_when_they_are_loaded(missing):
    model, optimizer = trained_galore()
    state, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    del state["state"][1][missing]
    with pytest.raises(ValueError, match=rf"load_state_dict: .* parameter 1 \(12, 16\) has .* lacks {missing}, want"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][i]["exp_avg"], kept["exp_avg"]) for i, kept in before["state"].items())
    optimizer.load_state_dict(before)
    step_of(model, optimizer)


def test_another_optimisers_state_is_refused_when_it_is_loaded():
    model, optimizer = trained_galore()
    other = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    step_of(model, other)
    with pytest.raises(ValueError, match=r"parameter 0 .* step: got a Tensor, as of another optimiser"):
        optimizer.load_state_dict(other.state_dict())  # its groups have no rank
    state = other.state_dict()
    state["param_groups"] = optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match=r"parameter 0 .* lacks basis, bases, refresh_at, halves, window, want"):
        optimizer.load_state_dict(state)
    two_sided, ours = trained_galore(proj_type="full")[1].state_dict(), optimizer.state_dict()
    with pytest.raises(ValueError, match="lacks basis_right"):
        optimizer.load_state_dict({**ours, "param_groups": two_sided["param_groups"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3), torch.tensor([1e-3])], ids=["float", "scalar", "vector"])
def test_groups_without_a_rank_are_adamws_to_the_bit(dtype, lr):
    models = []
    for kind in (torch.optim.AdamW, GaLoreAdamW):
        torch.manual_seed(0)
        model = nn.Linear(7, 5).to(dtype)
        options: dict[str, Any] = {"foreach": False} if kind is torch.optim.AdamW else {}
        optimizer = kind(model.parameters(), lr=lr, weight_decay=0.1, eps=1e-8, **options)
        for _ in range(5):
            model(torch.randn(9, 7, dtype=dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for mine, theirs in zip(*(model.parameters() for model in models)):
        assert torch.equal(mine, theirs)
