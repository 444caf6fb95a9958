"""PEFT's layers on quantised bases in two gloo processes: what FSDP2 and DDP train, and what they cannot."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from quantised_models import quantise
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import (
    TARGETS,
    Net,
    R,
    adapters,
    assert_close,
    loss_of,
    outcome_of,
    own_batch,
    raised,
    train,
    whole_batch,
)

import fastlora
from fastlora.introspect import sharding


def build(bits: int = 4, start: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = quantise(Net(), bits, dtype, **options)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=TARGETS, init_lora_weights=start)
    model = peft.get_peft_model(model, config)
    fastlora.patch(model, strict=True)
    if start:
        with fastlora.GradientSketch(model, r=R, target_modules=TARGETS) as sketch:
            loss_of(model, whole_batch()).backward()
        fastlora.init_lora_ga(model, sketch)
    return model


def shard(model: Any, **options: Any) -> Any:
    for block in model.base_model.model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def four_bits_train_sharded_as_in_one_process(folder: str) -> None:
    for storage, start in ((torch.uint8, False), (torch.float32, True), (torch.bfloat16, False)):
        alone = build(start=start, quant_storage=storage)
        whole = copy.deepcopy(alone)
        model, replicated = shard(copy.deepcopy(alone)), DistributedDataParallel(copy.deepcopy(alone))
        packed = [one.base_model.model.blocks[0].up.base_layer.weight for one in (model, whole)]
        assert packed[0].to_local().numel() < packed[1].numel()
        want = train(alone, whole_batch)
        assert abs(want[-1] - want[0]) > 1e-3
        for trained in (model, replicated):
            assert_close(train(trained, own_batch), want)
            assert not fastlora.fallbacks(trained)
            assert_close(adapters(trained), adapters(alone))
        fastlora.save_adapter(model, Path(folder, str(storage)))
        fastlora.load_adapter(whole, Path(folder, str(storage)), adapter_name="loaded")
        fastlora.set_adapter(whole, "loaded")
        assert_close(whole(own_batch()), alone(own_batch()))


def evaluation_leaves_the_packed_weights_alone(folder: str) -> None:
    """Where a CPU has AVX512-BF16, bitsandbytes' inference packs a weight again and writes that into its state."""
    alone, model = build(), shard(build())
    for block in model.base_model.model.blocks:
        for layer in (block.up, block.down):
            layer.base_layer.support_avx512bf16_for_cpu = True
    for both in (alone, model):
        both.eval()
    with torch.no_grad():
        want = alone(own_batch())
        for _ in range(2):
            assert_close(model(own_batch()), want)
    assert_close(train(model.train(), own_batch), train(alone.train(), whole_batch))


def what_the_libraries_lose_is_refused(folder: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = shard(build(dtype=torch.bfloat16, quant_storage=torch.uint8), mp_policy=policy)
    assert_close(train(model, own_batch), train(build(), whole_batch), atol=3e-2)
    for refused, why in (
        (shard(build(quant_storage=torch.float32), mp_policy=policy), "want quant_storage torch.uint8"),
        (shard(build(bits=8)), "want 4 bits"),
    ):
        before = adapters(refused)
        message = raised(ValueError, lambda: refused(own_batch()))  # noqa: B023
        assert message.startswith("FusedLinear") and why in message
        sharding.reshard(refused)
        assert_close(adapters(refused), before, atol=0.0)
    eight = build(bits=8)
    assert_close(train(DistributedDataParallel(copy.deepcopy(eight)), own_batch), train(eight, whole_batch))


def torchao_cannot_be_sharded(folder: str) -> None:
    """torchao's int8 and int4 tensors have no `split`: they stay whole in every process, the rest is sharded."""
    torchao: Any = importlib.import_module("torchao.quantization")
    alone: Any = Net()
    torchao.quantize_(
        alone, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith(tuple(TARGETS))
    )
    torch.manual_seed(1)
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    alone = peft.get_peft_model(alone, config)
    fastlora.patch(alone, strict=True)
    model = copy.deepcopy(alone)
    assert "split" in raised(NotImplementedError, lambda: shard(copy.deepcopy(model)))
    whole = {p for p in model.parameters() if type(p) is not nn.Parameter}
    assert len(whole) == 4
    shard(model, ignored_params=whole)
    assert_close(train(model, own_batch), train(alone, whole_batch))
    assert not fastlora.fallbacks(model)
    assert_close(adapters(model), adapters(alone))
    dist.barrier()


def test_bitsandbytes():
    checks = [four_bits_train_sharded_as_in_one_process, evaluation_leaves_the_packed_weights_alone]
    failed = {name: why for name, why in outcome_of([*checks, what_the_libraries_lose_is_refused]).items() if why}
    assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())


def test_torchao():
    pytest.importorskip("torchao", reason="torchao is optional, and in an environment of its own")
    assert outcome_of([torchao_cannot_be_sharded]) == {"torchao_cannot_be_sharded": ""}
