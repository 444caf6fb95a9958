"""The kernel of the head's loss on a GPU, at a model's sizes. These tests have not run so far."""

import pytest
import torch
from numerics import assert_close_to_fp64

from fastlora.functional import lora_linear_cross_entropy, lora_linear_log_probs
from fastlora.ops import reference
from fastlora.ops.head import head as head_op

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("words", [50_257, 151_936])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_losses_and_gradients(words, softcap):
    h, weight = torch.randn(300, 256, device="cuda"), torch.randn(words, 256, device="cuda") * 0.1
    a, b = torch.randn(8, 256, device="cuda") * 0.1, torch.randn(words, 8, device="cuda")
    leaves = [leaf.bfloat16().requires_grad_() for leaf in (h, a, b)]
    weight, labels = weight.bfloat16(), torch.randint(words, (300,), device="cuda")
    labels[:7] = -100

    def results(ours: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        x, a, b = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        if ours:
            scores = lora_linear_log_probs(x, weight, a, b, labels, 2.0, softcap=softcap, entropy=True)
            losses = lora_linear_cross_entropy(x, weight, a, b, labels, 2.0, softcap=softcap, reduction="sum")
            total = losses - scores.log_probs.sum() + scores.entropy.sum()
        else:
            z = reference.head_logits(x, weight.to(dtype), None, a, b, 2.0, softcap=softcap or 0.0)
            total = 2 * reference.token_losses(z, labels).sum() + reference.token_scores(z, labels)[0].sum()
        return [total.detach(), *torch.autograd.grad(total, (x, a, b))]

    got, again = results(True, torch.bfloat16), results(True, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    exact, near = results(False, torch.float64), results(False, torch.bfloat16)
    for name, one, want, other in zip(("total", "h", "lora_A", "lora_B"), got, exact, near, strict=True):
        assert_close_to_fp64(one, want, other, name)
    assert list(head_op._trusted.verdicts.values()) == [None]
