"""Task "digits": an MLP that knows scikit-learn's handwritten digits, adapted to the same digits rotated and inverted.

Every image is turned by 90 degrees, and ink becomes paper: the pretrained model does little better than chance. Which
part of the split an image belongs to is decided by a hash of its pixels, and pretraining sees the training part alone,
so that no image to test on was seen in either form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from study.data.docstrings import part_of
from study.data.pretraining import fit, pretrained, weights_hash
from study.settings import Settings
from study.tasks.task import PARTS, Task, shuffled_epochs

PRETRAINING = {"steps": 600, "batch_size": 32, "lr": 1e-3, "seed": 0}
WIDTH, SIDE, CLASSES = 256, 8, 10
BRIGHTEST = 16.0  # a pixel of the data set counts 0 to 16

Images = tuple[torch.Tensor, torch.Tensor]


class DigitsTask(Task):
    """Adapters on all three layers; nothing starts at random."""

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        self.original = {part: (x.to(device), y.to(device)) for part, (x, y) in digits().items()}
        self.shifted = {part: (rotated_and_inverted(x), y) for part, (x, y) in self.original.items()}
        self.weights = pretrain(settings, self.original["train"], device)
        self.facts = {
            **{part: len(labels) for part, (_, labels) in self.shifted.items()},
            "weights": weights_hash(self.weights),
        }

    @property
    def description(self) -> str:
        counts = {part: len(labels) for part, (_, labels) in self.shifted.items()}
        known, unknown = (100 * self.accuracy(images["test"]) for images in (self.original, self.shifted))
        return (
            f"An MLP ({SIDE * SIDE}-{WIDTH}-{WIDTH}-{CLASSES}) pretrained on scikit-learn's digits (test accuracy "
            f"{known:.1f} %), adapted to the digits rotated by 90 degrees and inverted ({unknown:.1f} % before): "
            f"{counts['train']} to train on, {counts['validation']} to validate, {counts['test']} to test."
        )

    @torch.inference_mode()
    def accuracy(self, images: Images) -> float:
        """The pretrained model's."""
        return (self.fresh_model(0)(images[0]).argmax(-1) == images[1]).double().mean().item()

    def fresh_model(self, seed: int) -> nn.Module:
        model = mlp()
        model.load_state_dict(self.weights)
        return model.to(self.device).eval()

    def order(self, seed: int, steps: int) -> Sequence[Sequence[int]]:
        return shuffled_epochs(len(self.shifted["train"][1]), self.settings.batch_size, steps, seed)

    def batch(self, indices: Sequence[int]) -> Images:
        x, y = self.shifted["train"]
        chosen = torch.tensor(indices, device=self.device)
        return x[chosen], y[chosen]

    def loss(self, model: Any, batch: Images) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def _predictions(self, model: Any, part: str) -> Iterable[Images]:
        x, y = self.shifted[part]
        yield model(x), y


def load(settings: Settings, device: torch.device) -> Task:
    return DigitsTask(settings, device)


def digits() -> dict[str, Images]:
    """(x (n, 64) from 0 to 1, y (n,)) of each part of the split; images that occur twice are kept once."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    places: dict[str, list[int]] = {part: [] for part in PARTS}
    seen: set[str] = set()
    for i, pixels in enumerate(bunch.data):
        key = pixels.astype("uint8").tobytes().hex()
        if key not in seen:
            seen.add(key)
            places[part_of(key)].append(i)
    x = torch.from_numpy(bunch.data / BRIGHTEST).float()
    y = torch.from_numpy(bunch.target).long()
    return {part: (x[found], y[found]) for part, found in places.items()}


def rotated_and_inverted(x: torch.Tensor) -> torch.Tensor:
    return 1 - x.unflatten(-1, (SIDE, SIDE)).rot90(1, (-2, -1)).flatten(-2)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(SIDE * SIDE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
    )


def pretrain(settings: Settings, images: Images, device: torch.device) -> dict[str, torch.Tensor]:
    """The pretrained weights, from the file under --out or by pretraining."""
    options: dict[str, Any] = PRETRAINING
    x, y = images
    data = hashlib.sha256(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes()).hexdigest()
    facts = {**options, "width": WIDTH, "device": device.type, "data": data}

    def train() -> nn.Module:
        torch.manual_seed(options["seed"])
        model = mlp().to(device)
        order = shuffled_epochs(len(y), options["batch_size"], options["steps"], options["seed"])

        def losses() -> Iterator[torch.Tensor]:
            for indices in order:
                yield nn.functional.cross_entropy(model(x[indices]), y[indices])

        return fit(model, losses(), options["steps"], options["lr"], "pretraining the MLP")

    return pretrained(settings.pretrained_models / "digits.safetensors", facts, train)
