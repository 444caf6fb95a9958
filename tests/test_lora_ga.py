"""init_lora_ga: the output is kept, the first step is the paper's, the files are right, wrong calls change nothing."""

import pytest
import torch
from plain_models import LINEARS, Net

import fastlora

R = 2


def inputs() -> torch.Tensor:
    return torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return (model(inputs()) * torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(2))).mean()


def sketch_of(model: torch.nn.Module, r: int = R, **options) -> fastlora.GradientSketch:
    options = {"exclude_modules": ["head"]} | options
    with fastlora.GradientSketch(model, r=r, **options) as sketch:
        loss_of(model).backward()
    return sketch


@pytest.mark.parametrize("base", ["exact", "offset"])
@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "weight_svd"])
@pytest.mark.parametrize("split", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_first_output_is_the_base_models(split, scale, base):
    model = Net()
    before = model(inputs())
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in LINEARS}
    sizes = fastlora.init_lora_ga(model, sketch_of(model), split, scale, base=base)
    assert list(sizes) == LINEARS[:-1]
    for name, size in sizes.items():
        layer = model.get_submodule(name)
        change = layer.lora_B["default"] @ layer.lora_A["default"] * layer.scaling["default"]
        change = change.t() if layer.fan_in_fan_out else change
        assert (change.norm() / weights[name].norm()).item() == pytest.approx(size, rel=1e-4)
        assert size > 1e-3
        kept = torch.equal(layer.weight, weights[name])
        assert kept == (base == "exact")
    assert torch.allclose(model(inputs()), before, atol=1e-5 * before.abs().max().item())
