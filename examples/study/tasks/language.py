"""Task "language": a causal language model learns to write the first line of a function's docstring.

The prompt is the function's source in the model's chat template; the loss is on the answer and the token that ends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.runtime import progress
from study.data import functions, language_models
from study.data.batches import TokenBatches, training_order
from study.learner import set_training
from study.settings import Settings
from study.tasks.task import PARTS, Metric, Task, dtype_name, dtype_of

REQUEST = "Write the first line of this Python function's docstring.\n\n"
HELD_OUT = 64  # pairs of the validation and of the test part that are used
QUICK_HELD_OUT = 4
EVAL_BATCH_SIZE = 8
SAMPLES, SAMPLE_TOKENS = 3, 32
IGNORED = -100


class LanguageTask(Task):
    """Adapters on every linear layer but the head; nothing starts at random."""

    metric = Metric("held-out nats/token", lambda scores: scores.loss, "{:.3f}")

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        assert settings.model is not None and settings.max_length is not None
        self.source = language_models.find_model(settings.model)
        self.dtype = dtype_of(settings, device)
        self.tokenizer = language_models.load_tokenizer(self.source)
        pairs = functions.load()
        held_out = QUICK_HELD_OUT if settings.quick else HELD_OUT
        self.parts = {
            part: Conversations(pairs[part], self.tokenizer, settings.max_length, None if part == "train" else held_out)
            for part in PARTS
        }
        texts = "\0".join(text for part in PARTS for pair in self.parts[part].pairs for text in pair)
        self.facts = {
            **{part: len(found) for part, found in self.parts.items()},
            "texts": hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        }

    @property
    def description(self) -> str:
        name = {"smollm2": "SmolLM2-135M-Instruct", "random": "A model of SmolLM2-135M's shape with random weights"}
        counts = {part: len(found) for part, found in self.parts.items()}
        model = str(self.settings.model)
        return (
            f"{name.get(model, model)} ({dtype_name(self.dtype)}) learns to write the first line of a "
            f"function's docstring: {counts['train']} functions of the standard library to train on, "
            f"{counts['validation']} to validate, {counts['test']} of other modules held out, of at most "
            f"{self.settings.max_length} tokens."
        )

    def fresh_model(self, seed: int) -> nn.Module:
        return language_models.load_model(self.source, self.dtype, self.device, self.settings.base)

    def order(self, seed: int, steps: int) -> Sequence[Sequence[int]]:
        return training_order(self.parts["train"], self.settings.batch_size, steps, seed)

    def batch(self, indices: Sequence[int]) -> Any:
        return self.parts["train"].batch(indices).to(self.device)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss

    def weight(self, batch: Any) -> int:
        return int((batch.labels != IGNORED).sum())

    def tokens(self, batch: Any) -> int:
        return int(batch.attention_mask.sum())

    def samples(self, model: Any) -> list[str]:
        set_training(model, False)
        questions = self.questions()
        shown = progress.bar(questions, "samples", len(questions), "sample")
        return [self._answer(model, question) for question, _ in shown]

    def questions(self) -> list[tuple[str, str]]:
        return [(pair.source, pair.answer) for pair in self.parts["test"].pairs[:SAMPLES]]

    def _answer(self, model: Any, source: str) -> str:
        prompt = torch.tensor([prompt_of(source, self.tokenizer)], device=self.device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=SAMPLE_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip()

    def _predictions(self, model: Any, part: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for _, batch in self.parts[part].in_order(EVAL_BATCH_SIZE):
            moved = batch.to(self.device)
            logits = model(input_ids=moved.input_ids, attention_mask=moved.attention_mask).logits[:, :-1]
            answer = moved.labels[:, 1:] != IGNORED
            yield logits[answer].float(), moved.labels[:, 1:][answer]


class Conversations(TokenBatches):
    """The first `most` pairs whose prompt and answer have at most `max_length` tokens; those longer are left out."""

    def __init__(self, pairs: Sequence[functions.Pair], tokenizer: Any, max_length: int, most: int | None):
        self.pairs: list[functions.Pair] = []
        self.token_ids, self.prompts = [], []
        self.pad_id = tokenizer.pad_token_id or 0  # often the token that ends an answer too: lengths make the masks
        for pair in pairs:
            if len(self.pairs) == most:
                break
            prompt = prompt_of(pair.source, tokenizer)
            answer = tokenizer(pair.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            if len(prompt) + len(answer) <= max_length:
                self.pairs.append(pair)
                self.token_ids.append([*prompt, *answer])
                self.prompts.append(len(prompt))
        if not self.pairs:
            raise ValueError(f"--max-length {max_length}: none of {len(pairs)} examples is so short")

    def label_rows(self, indices: Sequence[int], width: int) -> torch.Tensor:
        rows = torch.full((len(indices), width), IGNORED)
        for row, i in enumerate(indices):
            answer = self.token_ids[i][self.prompts[i] :]
            rows[row, self.prompts[i] : self.prompts[i] + len(answer)] = torch.tensor(answer)
        return rows


def prompt_of(source: str, tokenizer: Any) -> list[int]:
    messages = [{"role": "user", "content": REQUEST + source}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def load(settings: Settings, device: torch.device) -> Task:
    return LanguageTask(settings, device)
