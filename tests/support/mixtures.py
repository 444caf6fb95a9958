"""Random mixtures of experts of several families, a few thousand parameters each."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    **{"first_k_dense_replace": 1, "moe_intermediate_size": 16, "intermediate_size": 40},
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
# By transformers' name: the classes, and what the configuration says of experts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "intermediate_size": 40,
            "head_dim": 6,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "gpt_oss": (  # transposed, interleaved, with biases
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 6},
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 16}),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK | _LATENT),
    "glm4_moe": ("Glm4Moe", _DEEPSEEK | {"head_dim": 6}),
    "nemotron_h": (  # without a gate
        "NemotronH",
        {
            **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"moe_shared_expert_intermediate_size": 16, "head_dim": 6, "layers_block_type": ["attention", "moe"]},
        },
    ),
}


def mixture(family: str, seed: int = 0, **settings: Any) -> Any:
    """A model with random weights, in eval mode."""
    name, experts = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(**(_SIZES | experts | settings))
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():  # some families begin with zeros
            if parameter.dim() > 1 or not parameter.any():
                nn.init.normal_(parameter, std=0.15)
        return model


def experts_in(model: nn.Module) -> list[str]:
    """What its experts' weights are called within a layer, for `target_parameters`."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in name]
    return sorted({".".join(name.replace(".base_layer", "").split(".")[-3:]) for name in names})


def peft_mixture(base: nn.Module, r: int = 3, **settings: Any) -> Any:
    """PEFT's adapters, not zero, on a copy of the model."""
    settings = {"lora_alpha": 5, "target_modules": [], "target_parameters": experts_in(base)} | settings
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=r, **settings))
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 3) -> None:
    """Sets every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tokens(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def step(model: Any, x: Tensor) -> Tensor:
    """Logits; gradients are left in the parameters."""
    model.zero_grad()
    out = model(input_ids=x, labels=x)
    out.loss.backward()
    return out.logits.detach()
