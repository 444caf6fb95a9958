"""The kernel of the head's loss against fp64: every statistic, the gradient in place, and the ops that run on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import assert_close_to_fp64, poisoned_empty

from fastlora.functional import lora_linear_cross_entropy, lora_linear_log_probs
from fastlora.kernels.head import BLOCK, head
from fastlora.ops import reference
from fastlora.ops.head import head as head_op
from fastlora.ops.head import triton as head_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPTIONS: list[dict[str, float]] = [
    {},
    {"scale": 0.3, "softcap": 3.0, "temperature": 0.7},
    {"smoothing": 0.1, "z_loss": 0.02},
    {"scale": 2.0, "softcap": 30.0, "smoothing": 0.2, "z_loss": 0.1},
]
SCORES = ("loss", "entropy", "mean_logits", "log_sum_sq")


def eager(z: torch.Tensor, labels: torch.Tensor, options: dict[str, float], grads: torch.Tensor) -> list[torch.Tensor]:
    """The losses, the scores in the order of SCORES, top-1, and dz of Σ g·ℓ + g_H·H and of Σ ℓ; in z's precision or
    float32's."""
    z = z.detach().requires_grad_()
    scaled = reference.scaled_logits(
        z, options.get("scale", 1.0), options.get("softcap", 0.0), options.get("temperature", 1.0)
    )
    losses = reference.token_losses(scaled, labels, -100, options.get("smoothing", 0.0), options.get("z_loss", 0.0))
    entropy, top1, mean, squares = reference.token_scores(scaled, labels)
    (dz,) = torch.autograd.grad([losses, entropy], z, [g.to(losses.dtype) for g in grads], retain_graph=True)
    (plain,) = torch.autograd.grad(losses.sum(), z)
    return [t.detach() for t in (losses, entropy, mean, squares, top1, dz, plain)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype, words", [(BF16, BLOCK + 1), (FP16, 4201), (FP32, BLOCK + 1)])
def test_dtypes_and_vocabularies_that_divide_nothing(dtype, words, options):
    check(dtype, words, options, tokens=32 if dtype == FP32 else 16)


@pytest.mark.parametrize("words", [1, 2, 7, BLOCK, 2 * BLOCK])
def test_small_and_whole_vocabularies(words):
    check(FP32, words, {}, tokens=64 if words < 8 else 16)


def check(dtype: torch.dtype, words: int, options: dict[str, float], tokens: int = 16) -> None:
    z = (3 * torch.randn(tokens, words)).to(dtype)
    labels, grads = torch.randint(words, (tokens,)), torch.randn(2, tokens)
    labels[:2] = z[:2].argmax(1)
    z[2, -2:] = z.max()  # a tie, which the first word wins
    *exact, top1, exact_dz, exact_plain = eager(z.double(), labels, options, grads)
    *near, _, near_dz, near_plain = eager(z, labels, options, grads)

    made = {name: poisoned_empty(1, tokens, dtype=FP32)[0] for name in SCORES}
    got_top1 = torch.ones(tokens, dtype=torch.bool)
    rows = poisoned_empty(tokens, words, dtype=dtype).copy_(z)
    lse = poisoned_empty(tokens, 2, dtype=FP32)
    head(rows, labels, **made, lse=lse, top1=got_top1, **options)
    assert torch.equal(rows, z)
    for name, want, other in zip(SCORES, exact, near, strict=True):
        assert_close_to_fp64(made[name], want, other, name)
    assert torch.equal(got_top1, top1)

    head(rows, labels, lse=lse, entropy=made["entropy"], gradient=True, grad=grads[0], grad_entropy=grads[1],
         **options)  # fmt: skip
    assert_close_to_fp64(rows, exact_dz, near_dz, "dz")

    losses, rows = poisoned_empty(1, tokens, dtype=FP32)[0], z.clone()
    head(rows, labels, loss=losses, lse=torch.empty(tokens, 2), gradient=True, **options)
    assert torch.equal(losses, made["loss"])
    assert_close_to_fp64(rows, exact_plain, near_plain, "dz of a sum")


def test_rows_that_lie_apart_and_none_at_all():
    wide = torch.full((3, 120), float("nan"))
    z, labels, lse = wide[:, 5:106], torch.tensor([0, 100, 7]), torch.empty(3, 2)
    z.copy_(torch.randn(3, 101))
    want = torch.autograd.functional.jacobian(lambda x: torch.nn.functional.cross_entropy(x, labels) * 3, z)
    head(z, labels, loss=torch.empty(3), lse=lse, gradient=True)
    torch.testing.assert_close(z, want)
    assert wide[:, :5].isnan().all() and wide[:, 106:].isnan().all()
    head(z[:0], labels[:0], loss=torch.empty(0), lse=lse[:0], gradient=True)


def test_large_logits_and_what_is_not_finite():
    z = torch.tensor([[1e30, 0.0, -1e30], [-2e4, -2e4, -2e4], [float("nan"), 0.0, 1.0], [float("-inf"), 0.0, 1.0]])
    labels, losses, lse = torch.tensor([0, 1, 1, 2]), torch.empty(4), torch.empty(4, 2)
    head(z.clone(), labels, loss=losses, lse=lse)
    want = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(losses, want, equal_nan=True)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_ops_on_the_kernel(monkeypatch, dtype):
    """Some tokens do not count; several chunks; dropout aside, all that a head has."""
    monkeypatch.setattr(head_op, "_backend", lambda *_: head_triton)
    monkeypatch.setattr(head_op.aten, "CPU_CHUNK_BYTES", 101 * 4 * 20)
    h, weight, bias = torch.randn(2, 17, 24), torch.randn(101, 24) * 0.2, torch.randn(101)
    lora_A, lora_B = torch.randn(4, 24) * 0.2, torch.randn(101, 4)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (h, weight, bias, lora_A, lora_B)]
    labels = torch.randint(101, (2, 17))
    labels[0, :5] = -100
    numbers = (1.5, 0.0, 0.5, 3.0, 1.0)

    def results(of: str, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        h, weight, bias, lora_A, lora_B = leaves
        if of == "ours":
            arguments: Any = (h, weight, lora_A, lora_B, labels, 1.5, bias)
            options: dict[str, Any] = {"logit_scale": 0.5, "softcap": 3.0}
            loss = lora_linear_cross_entropy(*arguments, label_smoothing=0.1, z_loss=0.01, **options)
            scores = lora_linear_log_probs(*arguments, entropy=True, **options)
            tokens = scores.log_probs.sum() + 0.5 * scores.entropy.sum()
        else:
            z = reference.head_logits(h, weight, bias, lora_A, lora_B, *numbers).flatten(0, 1)
            flat, count = labels.flatten(), (labels != -100).sum()
            loss = reference.token_losses(z, flat, -100, 0.1, 0.01).sum() / count
            tokens = 0.5 * reference.token_scores(z, flat)[0].sum() - reference.token_losses(z, flat).sum()
        return [loss.detach(), tokens.detach(), *torch.autograd.grad(loss + tokens, leaves)]

    exact = results("reference", [leaf.detach().double().requires_grad_() for leaf in leaves])
    near, got = results("reference", leaves), results("ours", leaves)
    for name, one, want, other in zip(
        ("loss", "tokens", "h", "weight", "bias", "A", "B"), got, exact, near, strict=True
    ):
        assert_close_to_fp64(one, want, other, name)


def test_the_self_check_finds_a_wrong_kernel():
    cpu = torch.device("cpu")
    assert head_op.self_check(head_triton, cpu) is None

    def without_entropy(chunk, head, loss, lse, grad, grad_entropy=None, entropy=None):
        head_triton.gradient_(chunk, head, loss, lse, grad)

    wrong: Any = SimpleNamespace(**{**vars(head_triton), "gradient_": without_entropy})
    assert "dz differs from the reference" in (head_op.self_check(wrong, cpu) or "")
