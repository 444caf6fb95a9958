"""`patch(fused_loss=True)`: the models' own losses and gradients, without logits."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fastlora
from bench.harness.memory import allocations_of
from fastlora.layers import head as heads
from fastlora.ops.head import aten, lazy
from fastlora.ops.head.lazy import LazyLogits, Source

transformers = pytest.importorskip("transformers")
V = 99
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def of(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**SMALL | settings)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


FAMILIES = {
    "llama": of("Llama"),
    "qwen2, tied": of("Qwen2", tie_word_embeddings=True),
    "qwen3": of("Qwen3", head_dim=8),
    "mistral": of("Mistral"),
    "gemma2, soft cap": of("Gemma2", head_dim=8),
    "granite, divided": of("Granite", logits_scaling=4.0),
    "cohere, scaled": of("Cohere"),
    "mixtral, router loss": of("Mixtral", num_local_experts=4, output_router_logits=True),
}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, V, (2, 17))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """(what the model returned, the gradients), after a training step's passes."""
    model.train()
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def patched(model: nn.Module, head: bool, **options: Any) -> Any:
    targets = ["q_proj", "v_proj"] + ["lm_head"] * head
    return fastlora.patch(model, r=4, target_modules=targets, init_lora_weights=False, **options)


@pytest.mark.parametrize("head", ["frozen", "lora", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_loss_and_gradients(family, head):
    model: Any = FAMILIES[family]()
    if head == "peft":
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, settings)
        fastlora.patch(model)
    else:
        patched(model, head == "lora")
    inputs = batch()
    want, gradients = step(model, inputs)
    report = (
        patched(model, head == "lora", fused_loss=True) if head != "peft" else fastlora.patch(model, fused_loss=True)
    )
    assert [name.removeprefix("base_model.model.") for name in report.fused_losses] == ["lm_head"]
    got, found = step(model, inputs)
    assert isinstance(got.logits, LazyLogits) and got.logits.made is None
    assert abs(got.loss - want.loss) <= 1e-5 * abs(want.loss)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    torch.testing.assert_close(got.logits + 0.0, want.logits)  # whoever looks at them gets them


def test_accumulation_and_other_calls_are_as_before():
    model: Any = FAMILIES["llama"]()
    patched(model, True, fused_loss=True)
    inputs = batch()
    got, _ = step(model, {**inputs, "num_items_in_batch": 50})
    fastlora.unpatch(model)
    model.train()
    base = model(**inputs, num_items_in_batch=50)
    patched(model, True, fused_loss=True)
    fastlora.delete_adapter(model, "default")
    assert torch.allclose(model(**inputs, num_items_in_batch=50).loss, base.loss)
    assert got.loss.isfinite()
    model.eval()
    assert type(model(**inputs).logits) is Tensor  # metrics need them
    model.train()
    with torch.no_grad():
        assert type(model(**inputs).logits) is Tensor
    assert model.generate(inputs["input_ids"], max_new_tokens=2).shape == (2, 19)


def test_under_autocast_the_loss_is_in_float32():
    h, head = torch.randn(12, 6), nn.Linear(6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        source = Source(head.weight, head.bias, None, head, {})
        got = F.cross_entropy(LazyLogits(h, source, torch.bfloat16), torch.arange(12) % 10)
        want = F.cross_entropy(head(h), torch.arange(12) % 10)
    assert got.dtype == want.dtype == torch.float32 and abs(got - want) < 1e-2


def test_the_logits_are_never_there(monkeypatch):
    monkeypatch.setattr(aten, "CPU_CHUNK_BYTES", 1 << 20)
    build = of("Llama", vocab_size=20_000, num_hidden_layers=1)
    peaks = []
    for fused_loss in (False, True):
        model = build()
        patched(model, True, fused_loss=fused_loss)
        ids = torch.randint(3, 20_000, (4, 64))
        step(model, {"input_ids": ids[:1], "labels": ids[:1]})
        peaks.append(
            allocations_of(lambda model=model, ids=ids: step(model, {"input_ids": ids, "labels": ids}))[1].peak
        )
    logits = 4 * 64 * 20_000 * 4
    assert peaks[0] >= 2 * logits > 4 * peaks[1]


def test_unpatch_copies_and_pickles():
    model: Any = FAMILIES["llama"]()
    inputs = batch()
    want, _ = step(model, inputs)
    for head in (False, True):
        patched(model, head, fused_loss=True)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(step(other, inputs)[0].logits, LazyLogits)
        fastlora.unpatch(model)
        assert type(model.lm_head) is nn.Linear and "loss_trust" not in vars(model.lm_head)
        model.requires_grad_(True)
        assert torch.equal(step(model, inputs)[0].loss, want.loss)


def test_a_loss_that_disagrees_is_not_used(monkeypatch):
    model: Any = FAMILIES["llama"]()
    inputs = batch()
    patched(model, True)
    want, _ = step(model, inputs)
    patched(model, True, fused_loss=True)
    monkeypatch.setattr(lazy, "_loss", lambda *args, real=lazy._loss, **options: 1.5 * real(*args, **options))
    with pytest.warns(RuntimeWarning, match="the loss without logits is not used for this head: it differs"):
        got, _ = step(model, inputs)
    assert torch.allclose(got.loss, want.loss)


class Odd(nn.Module):
    """A model whose head cannot be taken."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), head

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "head, reason",
    [
        (OwnLinear(8, 9), "OwnLinear is not a plain linear layer"),
        (nn.Sequential(nn.Linear(8, 9)), "not a plain tensor"),
    ],
)
def test_a_head_that_cannot_be_taken(head, reason):
    model = Odd(head)
    with pytest.warns(UserWarning, match="fused_loss=True, and the loss needs its logits as before: 'head'"):
        report = fastlora.patch(model, target_modules=["body"], fused_loss=True)
    assert reason in report.losses_left_alone["head"] and not report.fused_losses


def test_a_quantised_head_is_left_alone():
    bnb = pytest.importorskip("bitsandbytes")
    model = Odd(bnb.nn.Linear8bitLt(8, 9, has_fp16_weights=False))
    with pytest.warns(UserWarning, match="its weight is a Int8Params, not a plain tensor"):
        assert not fastlora.patch(model, target_modules=["body"], fused_loss=True).fused_losses


@pytest.mark.parametrize("apart", [False, True])
def test_a_head_sharded_after_patching(one_process, apart):
    """In the model's own group its weight is whole until the backward pass; in a group of its own it is not, and the
    logits are made. A head that is sharded already is left alone."""
    model: Any = FAMILIES["llama"]()
    patched(model, True, fused_loss=True)
    inputs = batch()
    want, gradients = step(model, inputs)
    if apart:
        fully_shard(model.lm_head)
    fully_shard(model)
    got, found = step(model, inputs)
    assert isinstance(got.logits, LazyLogits) != apart
    assert abs(got.loss - want.loss) <= 1e-5 * abs(want.loss)
    for name, gradient in gradients.items():
        sharded: Any = found[name]
        assert (sharded.full_tensor() - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert "its weight is a DTensor" in heads.fuse_losses(model)[1]["lm_head"]


def test_a_model_without_a_head():
    with pytest.warns(UserWarning, match="no module of the model has an output head"):
        fastlora.patch(nn.Sequential(nn.Linear(4, 5)), fused_loss=True)


USES: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda z: z.argmax(-1),
    "softmax": lambda z: z.float().softmax(-1),
    "other arithmetic": lambda z: z + z.mean(),
    "some words": lambda z: z[..., :5],
    "a new axis": lambda z: z[None],
    "two tanhs": lambda z: (z.tanh() * 2.0).tanh(),
    "weighted": lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(12) % 10, weight=torch.arange(10.0)),
    "soft labels": lambda z: F.cross_entropy(z.flatten(0, 1), torch.full((12, 10), 0.1)),
    "transposed": lambda z: F.cross_entropy(z.transpose(1, 2), torch.ones(3, 4, dtype=torch.int64)),
    "kept together": lambda z: F.cross_entropy((z / 2.0).view(-1, 10), torch.ones(12, dtype=torch.int64)),
    "flat": lambda z: F.cross_entropy(z.float().flatten(0, 1), torch.ones(12, dtype=torch.int64), reduction="none"),
    "shifted": lambda z: F.cross_entropy(z[..., :-1, :].contiguous()[1], torch.tensor([1, -100, 3])),
    "masked": lambda z: F.cross_entropy(z[torch.eye(4).bool()[:3]], torch.tensor([0, 1, 2])),
    "negative cap": lambda z: F.cross_entropy((z.tanh() * -2.0).flatten(0, 1), torch.arange(12) % 10),
    "float16": lambda z: z.to(torch.float16),
    "stacked": lambda z: torch.stack([z, z]),
}
LAZY = ("kept together", "flat", "shifted", "masked")


@pytest.mark.parametrize("use", USES)
def test_every_use_gives_what_logits_give(use):
    h, head = torch.randn(3, 4, 6, requires_grad=True), nn.Linear(6, 10)
    runs = []

    def run(h: Tensor) -> Tensor:
        runs.append(h.shape)
        return F.linear(h, head.weight, head.bias)

    lazy = LazyLogits(h, Source(head.weight, head.bias, None, run, {}))
    assert (lazy.shape, lazy.dtype, lazy.dim(), len(lazy)) == ((3, 4, 10), torch.float32, 3, 3) and not runs
    got, want = USES[use](lazy), USES[use](head(h))
    checks = [shape for shape in runs if shape[0] <= 8 and len(shape) == 2]  # of a few tokens, before trust
    assert len(runs) == len(checks) if use in LAZY else len(runs) - len(checks) == 1
    torch.testing.assert_close(got, want)
    if got.is_floating_point():
        grads = [torch.autograd.grad(y.float().sum(), h)[0] for y in (got, want)]
        torch.testing.assert_close(*grads)
    assert repr(lazy).startswith("LazyLogits(")
