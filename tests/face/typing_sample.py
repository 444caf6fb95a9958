"""What a type checker says of fastlora in a user's script: nothing of good use, and each mistake where it is.

test_typing.py runs pyright over it, strictly, against the package as pip installs it. An `ignore` that is not
needed is an error there, so that each of them is a mistake found. Nothing here is ever run.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastlora
from fastlora import functional, linalg


def good(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    report = fastlora.patch(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"layers.0": 4},
        group="auto",
    )
    assert_type(report, fastlora.PatchReport)
    assert_type(report.patched, list[str])
    assert_type(report.left_alone, dict[str, str])
    assert_type([line.reason for line in report.modules], list[str])
    assert_type(fastlora.is_patched(model), bool)

    with fastlora.GradientSketch(model, r=8, seed=1) as sketch:
        for batch in batches:
            loss: Tensor = model(batch).sum()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]  # torch's own
    started = fastlora.init_lora_ga(model, sketch, gamma=64)
    assert_type(started["layer"], float)
    assert_type(started.large, list[str])
    assert_type(sketch.report().r, int)

    fastlora.merge(model)
    fastlora.unmerge(model)
    fastlora.set_adapter(model, ["default", "second"])
    with fastlora.disable_adapter(model) as same, fastlora.adapter_names(model, ["default", "__base__"]):
        assert_type(same, nn.Module)
    fastlora.save_adapter(model, "folder", adapter_name="default")
    fastlora.load_adapter(model, "folder")
    fastlora.unpatch(model, keep_merged=True)

    optimizer = fastlora.optim.GaLoreAdamW(fastlora.optim.galore_param_groups(model, rank=8), lr=1e-3, gradients="hook")
    optimizer.step()
    assert_type(optimizer.step(lambda: 0.5), float)
    assert_type(optimizer.grad_norm, Tensor | None)

    layer = fastlora.FusedLoraLinear(64, 32, r=4, dtype=torch.bfloat16)
    again = fastlora.FusedLoraLinear.from_linear(nn.Linear(64, 32), r=4)
    assert_type(again, fastlora.FusedLoraLinear)
    assert_type(layer.in_features, int)
    assert_type(fastlora.explain(layer, torch.ones(2, 64)), fastlora.Explanation)

    x = torch.ones(3, 64)
    y = functional.lora_linear(x, torch.ones(32, 64), torch.ones(4, 64), torch.ones(32, 4), scaling=2.0)
    assert_type(y, Tensor)
    adapter = functional.Adapter(torch.ones(4, 64), torch.ones(32, 4), 2.0)
    assert_type(functional.multi_lora_linear(x, torch.ones(32, 64), [adapter]), Tensor)
    return linalg.truncated_svd(y, 2).S


def mistakes(model: nn.Module, sketch: fastlora.GradientSketch) -> None:
    fastlora.patch(model, 16)  # pyright: ignore[reportCallIssue]  # settings are named
    fastlora.patch(model, rank=16)  # pyright: ignore[reportCallIssue]
    fastlora.patch(model, r="16")  # pyright: ignore[reportArgumentType]
    fastlora.patch("model")  # pyright: ignore[reportArgumentType]
    fastlora.patch(model, target_modules=3)  # pyright: ignore[reportArgumentType]
    assert fastlora.patch(model).layers  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    fastlora.patched(model)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    fastlora.init_lora_ga(model)  # pyright: ignore[reportCallIssue]
    fastlora.init_lora_ga(sketch, model)  # pyright: ignore[reportArgumentType]
    fastlora.set_adapter(model, 1)  # pyright: ignore[reportArgumentType]
    fastlora.save_adapter(model)  # pyright: ignore[reportCallIssue]
    fastlora.FusedLoraLinear(64)  # pyright: ignore[reportCallIssue]
    fastlora.optim.GaLoreAdamW(model)  # pyright: ignore[reportArgumentType]
    fastlora.optim.GaLoreAdamW(model.parameters(), rank=8)  # pyright: ignore[reportCallIssue]
    functional.lora_linear(torch.ones(3), [1.0])  # pyright: ignore[reportCallIssue]
    with sketch as entered:
        entered.backward()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
