"""Fine-tune a real sentence encoder on real text, with PEFT's LoRA and with fastlora's, and compare.

    python examples/finetune.py                  # a few minutes on two idle cores; docs/finetuning.md
    python examples/finetune.py --help

The encoder is MiniLM-L6 (encoder.py), the task is to tell which module of Python's standard library a docstring came
from (docstrings.py). Every method starts from the same weights, sees the same batches in the same order, and is timed
on its own steps. The results go to --out: the table (results.md), everything measured (results.json), the loss curves
(loss.png), and fastlora's adapter with its head (adapter/), which is then loaded with PEFT into a fresh encoder to show
that the predictions agree.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from study.settings import ORDINARY_INITS, Settings, UsageError, parse, require_packages, require_writable

if TYPE_CHECKING:
    import torch
    from study.data.batches import TokenizedExamples
    from study.data.docstrings import Dataset
    from study.training import Run

INTERRUPTED = 130


@dataclass(frozen=True)
class Agreement:
    """How the adapter's predictions after a round trip through PEFT compare with the trained model's, over the test
    set.
    """

    max_logit_difference: float
    largest_logit: float
    same_class: float

    def __str__(self) -> str:
        return (
            f"fastlora's adapter, loaded with PEFT into a fresh encoder: {100 * self.same_class:.1f} % of the test "
            f"predictions are the same, logits differ by at most {self.max_logit_difference:.1e} "
            f"(the largest is {self.largest_logit:.1f})."
        )


def main(argv: list[str] | None = None) -> int:
    settings = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler would announce itself
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        require_packages(settings)
        require_writable(settings.out)
        return finetune(settings)
    except (UsageError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfinetune.py: interrupted; what was written before is under", settings.out, file=sys.stderr)
        return INTERRUPTED


def finetune(settings: Settings) -> int:
    """The whole run; returns the exit status."""
    from study.data import docstrings, encoder
    from study.data.batches import TokenizedExamples, training_order
    from study.training import Run, train

    start = time.perf_counter()
    device = choose_device(settings.device)
    source = encoder.find_model(settings.model)
    tokenizer = encoder.load_tokenizer(source)
    dataset = docstrings.load()
    describe(dataset)
    parts = {
        part: TokenizedExamples(getattr(dataset, part), tokenizer, settings.max_length)
        for part in ("train", "validation", "test")
    }
    order = training_order(parts["train"], settings.batch_size, settings.steps, settings.seed)
    models = fresh_models(source, dataset, parts["train"], settings, device)
    runs = [Run(method, classifier, settings) for method, classifier in models]
    print(
        f"Training {', '.join(settings.methods)} on {device}: {settings.steps} steps of {settings.batch_size}",
        flush=True,
    )
    complete = train(runs, parts["train"], parts["validation"], order, settings, device)
    if not complete:
        done = ", ".join(f"{run.method} {len(run.losses)}" for run in runs)
        print(f"Interrupted ({done} of {settings.steps} steps): saving what there is, without the test.", flush=True)
    conclude(runs, source, dataset, parts, settings, device, complete, start)
    return 0 if complete else INTERRUPTED


def choose_device(name: str) -> torch.device:
    """The device called `name`; raises UsageError where there is none such."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch raises each of them for some absent device
        available = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UsageError(
            f"--device {name}: not a device of this machine; want one of {', '.join(available)}"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda can be measured here")
    return device


def describe(dataset: Dataset) -> None:
    print(
        f"{len(dataset)} docstrings of {len(dataset.labels)} modules: {len(dataset.train)} to train on, "
        f"{len(dataset.validation)} to validate, {len(dataset.test)} to test "
        f"(always answering the commonest: {100 * dataset.majority_accuracy():.1f} %)",
        flush=True,
    )


def fresh_models(
    source: str, dataset: Dataset, train: TokenizedExamples, settings: Settings, device: torch.device
) -> list[tuple[str, Any]]:
    """A classifier per method, the LoRA ones with the same initial adapter weights where --init is an ordinary one."""
    from study import methods
    from study.data.batches import sketch_batches

    batches = [
        batch.to(device) for batch in sketch_batches(train, settings.batch_size, settings.sketch_batches, settings.seed)
    ]
    models: list[tuple[str, Any]] = []
    first_lora: Any = None
    for method in settings.methods:
        classifier = methods.build(method, source, len(dataset.labels), settings, device, batches)
        if method in ("peft", "fastlora") and settings.init in ORDINARY_INITS:
            if first_lora is None:
                first_lora = classifier
            else:
                methods.copy_adapters(first_lora.encoder, classifier.encoder)
        models.append((method, classifier))
    return models


def conclude(
    runs: list[Run],
    source: str,
    dataset: Dataset,
    parts: dict[str, TokenizedExamples],
    settings: Settings,
    device: torch.device,
    complete: bool,
    start: float,
) -> None:
    """Tests (only after a complete run), saves the adapter, checks it with PEFT, and writes the report."""
    from study import finetune_report as report
    from study.training import accuracy, predict

    test_accuracy: dict[str, float] = {}
    agreement: Agreement | None = None
    for run in runs:
        logits = predict(run.classifier, parts["test"], device) if complete else None
        if logits is not None:
            test_accuracy[run.method] = accuracy(logits, parts["test"])
        if run.method == "fastlora":
            agreement = save_and_check(run, logits, source, dataset, parts["test"], settings, device)
    rows = report.summarise(runs, test_accuracy)
    seconds = time.perf_counter() - start
    machine = report.machine(device)
    facts = {
        "complete": complete,
        "seconds": round(seconds, 1),
        "machine": machine,
        "data": {"labels": dataset.labels, **{part: len(examples) for part, examples in parts.items()}},
        "adapter_in_peft": asdict(agreement) if agreement else None,
    }
    caption = report.caption(settings, facts)
    written = report.save_results(settings, rows, runs, facts, caption)
    if settings.plot:
        written.append(report.plot_losses(runs, settings.out / "loss.png"))
    print(f"\n{report.markdown_table(rows)}\n\n{caption}")
    if agreement:
        print(agreement)
    print(
        "Wrote",
        ", ".join(map(str, written)),
        *(["and", settings.out / "adapter"] if "fastlora" in settings.methods else []),
    )


def save_and_check(
    run: Run,
    logits: torch.Tensor | None,
    source: str,
    dataset: Dataset,
    test: TokenizedExamples,
    settings: Settings,
    device: torch.device,
) -> Agreement | None:
    """Saves fastlora's adapter and head; given the trained model's logits, compares those of a fresh encoder with the
    files loaded by PEFT.
    """
    import torch
    from peft import PeftModel
    from study.data import encoder
    from study.training import predict

    import fastlora

    directory = settings.out / "adapter"
    fastlora.save_adapter(run.classifier.encoder, directory)
    encoder.save_head(run.classifier, dataset.labels, directory)
    if logits is None:
        return None
    fresh: Any = encoder.load_encoder(source, getattr(torch, settings.dtype), device)
    hidden_size = fresh.config.hidden_size
    loaded = encoder.SentenceClassifier(
        PeftModel.from_pretrained(fresh, str(directory)), hidden_size, len(dataset.labels)
    )
    encoder.load_head(loaded, directory)
    reloaded = predict(loaded.to(device), test, device)
    return Agreement(
        max_logit_difference=(reloaded - logits).abs().max().item(),
        largest_logit=logits.abs().max().item(),
        same_class=(reloaded.argmax(-1) == logits.argmax(-1)).double().mean().item(),
    )


if __name__ == "__main__":
    sys.exit(main())
