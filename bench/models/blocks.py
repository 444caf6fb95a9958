"""Whole transformer blocks and a whole small model, with random weights and real shapes, as cases to measure.

A block is a model of transformers with one layer, fed with embeddings that need a gradient, as in the middle of a
network: attention, norms, activations and residuals are all in the time. The same frozen weights and the same adapters
serve every contender.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.contenders import Contender, Unavailable
from ..harness.counting import BYTES, Problem, compulsory_bytes, useful_flops
from ..harness.turns import Case, Pair, Work
from ..layers.forms import stack_work

ALPHA_OVER_R = 2
# Between two contenders' values in a whole block. Rounding grows on its way through softmax and seven layers: with
# random weights PEFT's gradients in T5's block, whose attention is not scaled, differ from eager's by 3e-2 in bf16.
MOST_ERROR = 6e-2


@dataclass(frozen=True)
class Settings:
    """What is put into a model, and how much of it: `sequences` of `tokens` each."""

    sequences: int
    tokens: int
    r: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"
    adapter_dtype: str = "bfloat16"


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, its configuration, and which of its linear layers get adapters."""

    kind: str  # of transformers: <kind>Config and the model class
    model_class: str
    sizes: dict[str, Any]
    targets: tuple[str, ...]
    most_tokens: int = 2**20  # of one sequence

    @property
    def hidden(self) -> int:
        return self.sizes.get("hidden_size") or self.sizes["d_model"]


_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _decoder(kind: str, hidden: int, intermediate: int, heads: int, key_value_heads: int, **more: Any) -> Architecture:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    return Architecture(kind, f"{kind}Model", sizes | more, _LLAMA_TARGETS)


BLOCKS = {
    "llama-3-8b": _decoder("Llama", 4096, 14336, 32, 8),
    "qwen3-8b": _decoder("Qwen3", 4096, 12288, 32, 8, head_dim=128),
    "mistral-7b": _decoder("Mistral", 4096, 14336, 32, 8, sliding_window=None),
    "t5-base": Architecture(
        "T5",
        "T5EncoderModel",
        {
            "d_model": 768,
            "d_ff": 3072,
            "d_kv": 64,
            "num_heads": 12,
            "num_layers": 1,
            "vocab_size": 64,
            "dropout_rate": 0.0,
            "use_cache": False,
        },
        ("q", "k", "v", "o", "wi", "wo"),
        most_tokens=512,
    ),
    "vit-l": Architecture(
        "ViT",
        "ViTModel",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        (),  # all: its layers' names differ between versions of transformers
        most_tokens=512,
    ),
    "tiny": _decoder("Llama", 64, 160, 4, 2),
}

_LANGUAGE_MODEL = {"vocab_size": 32000, "num_hidden_layers": 8}
MODELS = {
    "llama-400m": _decoder("Llama", 2048, 5632, 16, 4, **_LANGUAGE_MODEL),
    "llama-small": _decoder("Llama", 256, 688, 4, 4, vocab_size=1000, num_hidden_layers=4),
    "llama-tiny": _decoder("Llama", 64, 160, 4, 2, vocab_size=50, num_hidden_layers=2),
}


def new_model(architecture: Architecture, device: torch.device, dtype: str, head: bool = False) -> nn.Module:
    """With random weights that need no gradient, in training mode."""
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers is not installed: {error}") from None
    config = getattr(transformers, f"{architecture.kind}Config")(**architecture.sizes)
    name = architecture.model_class.replace("Model", "ForCausalLM") if head else architecture.model_class
    options = {"add_pooling_layer": False} if architecture.kind == "ViT" else {}
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config, **options)
    if architecture.kind == "ViT":  # its one way in is an image: let embeddings through instead
        model.embeddings.forward = lambda pixel_values, **_: pixel_values
    return model.to(getattr(torch, dtype)).requires_grad_(False).train()


def targets(model: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name != "lm_head"
        and (not architecture.targets or name.rpartition(".")[2] in architecture.targets)
    }


class EagerLora(nn.Module):
    """A frozen linear layer with an adapter, as one writes it in PyTorch."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = base, dropout
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)

    @property
    def weight(self) -> Tensor:  # T5 asks its layers for their dtype
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout else x
        low_rank = F.linear(F.linear(dropped.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return (self.base(x) + ALPHA_OVER_R * low_rank).to(x.dtype)


class Adapted:
    """Makes each contender's model: the same frozen weights (not copied) and equal adapters."""

    def __init__(self, model: nn.Module, architecture: Architecture, settings: Settings) -> None:
        self.base, self.settings = model, settings
        self.layers = targets(model, architecture)
        generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
        self.factors = {name: self._factors(layer, generator) for name, layer in self.layers.items()}

    def _factors(self, layer: nn.Linear, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dtype, r = getattr(torch, self.settings.adapter_dtype), self.settings.r
        shapes = (r, layer.in_features), (layer.out_features, r)
        a, b = (torch.randn(shape, generator=generator, device=generator.device) for shape in shapes)
        return a.mul_(layer.in_features**-0.5).to(dtype), b.mul_(0.1 * r**-0.5).to(dtype)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.base, {id(tensor): tensor for tensor in self.base.parameters()})

    def frozen(self) -> tuple[nn.Module, list[Tensor]]:
        return self.copy(), []

    def eager(self) -> tuple[nn.Module, list[Tensor]]:
        model, leaves = self.copy(), []
        for name, (a, b) in self.factors.items():
            parent, _, attribute = name.rpartition(".")
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            own = EagerLora(layer, a.clone(), b.clone(), self.settings.dropout)
            setattr(model.get_submodule(parent), attribute, own)
            leaves += [own.lora_a, own.lora_b]
        return model, leaves

    def compiled(self) -> tuple[nn.Module, list[Tensor]]:
        model, leaves = self.eager()
        return torch.compile(model, dynamic=False), leaves  # type: ignore[return-value]

    def peft(self) -> tuple[nn.Module, list[Tensor]]:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise Unavailable(f"peft is not installed: {error}") from None
        model, s = self.copy(), self.settings
        config = LoraConfig(
            r=s.r, lora_alpha=ALPHA_OVER_R * s.r, lora_dropout=s.dropout, target_modules=list(self.layers)
        )
        inject_adapter_in_model(config, model)
        model.train()
        return model, self._set_adapters(model, lambda layer: (layer.lora_A["default"], layer.lora_B["default"]))

    def fastlora(self, **settings: Any) -> tuple[nn.Module, list[Tensor]]:
        import fastlora

        model, s = self.copy(), self.settings
        fastlora.patch(
            model,
            r=s.r,
            lora_alpha=ALPHA_OVER_R * s.r,
            lora_dropout=s.dropout,
            target_modules=list(self.layers),
            strict=True,
            **settings,
        )
        model.train()
        return model, self._set_adapters(model, lambda layer: (layer.lora_A, layer.lora_B))

    def _set_adapters(self, model: nn.Module, holders: Callable[[Any], tuple[Any, Any]]) -> list[Tensor]:
        """Our values in parameters that some library made, each in the holder's `default` or `weight`."""
        leaves = []
        for name, factors in self.factors.items():
            for holder, value in zip(holders(model.get_submodule(name)), factors, strict=True):
                parameter = nn.Parameter(value.clone())
                if isinstance(holder, nn.ParameterDict):
                    holder["default"] = parameter
                else:
                    holder.weight = parameter
                leaves.append(parameter)
        return leaves

    def ways(self) -> dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]]:
        """Each contender's name, and what makes its model and the list of its trained parameters."""
        return {
            "frozen": self.frozen,
            "eager": self.eager,
            "peft": self.peft,
            "compile": self.compiled,
            "fastlora": self.fastlora,
            "fastlora grouped": lambda: self.fastlora(group="auto"),
            "fastlora fused": lambda: self.fastlora(group="auto", mlp=True),
        }


def work(layers: dict[str, nn.Linear], settings: Settings, hidden: int, attention: int) -> dict[str, Work]:
    """Of the linear layers, and of causal or full attention over `attention` features: 4·T FLOPs per token and feature
    forward, twice that backward."""
    m = settings.sequences * settings.tokens
    problems = [
        Problem(m, layer.out_features, layer.in_features, settings.r, settings.dtype, settings.adapter_dtype)
        for layer in layers.values()
    ]
    found = stack_work(problems, m * hidden * BYTES[settings.dtype])
    scores = 4 * m * settings.tokens * attention
    return {"forward": found["forward"] + Work(scores, 0), "both": found["both"] + Work(3 * scores, 0)}


def sequences_of(name: str, sequences: int, tokens: int) -> tuple[int, int]:
    """How many sequences of how many tokens make x as large as `sequences` x `tokens` x 4096 does."""
    architecture = BLOCKS[name]
    length = min(tokens, architecture.most_tokens)
    return max(1, sequences * tokens * max(1, 4096 // architecture.hidden) // length), length


def run_block(model: nn.Module, architecture: Architecture, x: Tensor) -> Tensor:
    if architecture.kind == "ViT":
        return model(pixel_values=x).last_hidden_state
    return model(inputs_embeds=x).last_hidden_state


def block_case(name: str, settings: Settings, device: torch.device, inputs: int) -> Case:
    """One block. Raises Unavailable without transformers."""
    architecture = BLOCKS[name]
    model = new_model(architecture, device, settings.dtype)
    adapted = Adapted(model, architecture, settings)

    def builder(make: Callable[[], tuple[nn.Module, list[Tensor]]]) -> Callable[[], Contender]:
        def build() -> Contender:
            own, leaves = make()
            return Contender("", lambda x: run_block(own, architecture, x), tuple(leaves), tuple(model.parameters()))

        return build

    return Case(
        f"block of {name}, {settings.sequences} x {settings.tokens} tokens, r={settings.r} {settings.dtype}, "
        f"{settings.adapter_dtype} adapters, dropout {settings.dropout}",
        facts("block", name, settings),
        work(adapted.layers, settings, architecture.hidden, next(iter(adapted.layers.values())).out_features),
        embeddings(settings, architecture.hidden, device, inputs),
        {way: builder(make) for way, make in adapted.ways().items()},
        random=settings.dropout > 0,
        most_error=MOST_ERROR,
    )


class TrainingStep(Contender):
    """forward: the loss. backward: its gradients, and AdamW's step."""

    def __init__(self, model: nn.Module, leaves: list[Tensor], labels: Tensor) -> None:
        parameters = tuple(model.parameters())
        super().__init__("", lambda x: model(inputs_embeds=x, labels=labels).loss, tuple(leaves), parameters)
        # A learning rate this small leaves the losses of all contenders the same while it costs what any would.
        capturable = labels.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(leaves, lr=1e-8, capturable=capturable) if leaves else None

    def backward(self, y: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(y, (x, *self.leaves))
        if self.optimizer is not None:
            for leaf, grad in zip(self.leaves, grads[1:], strict=True):
                leaf.grad = grad
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return grads


def training_case(name: str, settings: Settings, device: torch.device, inputs: int) -> Case:
    """A step of fine-tuning a small language model: loss, gradients, AdamW. The frozen model's step makes the loss and
    the gradient of the embeddings, as all do."""
    architecture = MODELS[name]
    model = new_model(architecture, device, settings.dtype, head=True)
    adapted = Adapted(model, architecture, settings)
    vocabulary, hidden = architecture.sizes["vocab_size"], architecture.sizes["hidden_size"]
    labels = torch.randint(0, vocabulary, (settings.sequences, settings.tokens), device=device)

    def builder(make: Callable[[], tuple[nn.Module, list[Tensor]]]) -> Callable[[], Contender]:
        return lambda: TrainingStep(*make(), labels)

    total = work(adapted.layers, settings, hidden, hidden * architecture.sizes["num_hidden_layers"])
    head = Problem(settings.sequences * settings.tokens, vocabulary, hidden, 0, settings.dtype)
    return Case(
        f"training step of {name}, {settings.sequences} x {settings.tokens} tokens, r={settings.r} {settings.dtype}, "
        f"{settings.adapter_dtype} adapters, dropout {settings.dropout}",
        facts("training step", name, settings),
        {d: total[d] + Work(useful_flops(head, d), compulsory_bytes(head, d)) for d in total},
        embeddings(settings, hidden, device, inputs),
        {way: builder(make) for way, make in adapted.ways().items() if way != "compile"},
        random=settings.dropout > 0,
        most_error=MOST_ERROR,
    )


def embeddings(settings: Settings, hidden: int, device: torch.device, count: int) -> list[Pair]:
    generator, dtype = torch.Generator(device).manual_seed(2), getattr(torch, settings.dtype)
    shape = (settings.sequences, settings.tokens, hidden)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return [(draw().requires_grad_(), draw()) for _ in range(count)]


def facts(form: str, model: str, settings: Settings) -> dict[str, Any]:
    return {"form": form, "model": model, **settings.__dict__}
