"""Fine-tune a real language model on real text, with PEFT's LoRA and with fastlora's, and compare.

    python examples/finetune.py                    # about five minutes on two idle cores; docs/details/finetuning.md
    python examples/finetune.py --task docstrings  # a sentence encoder learns to classify instead
    torchrun --nproc-per-node 2 examples/finetune.py --shard fsdp2 --base nf4  # docs/distributed.md
    python examples/finetune.py --help

SmolLM2-135M-Instruct learns to write the first line of a function's docstring, from the functions of Python's standard
library. Every method starts from the same weights, sees the same batches in the same order, and is timed on its own
steps, in turns; "frozen" is the floor, forward and backward without adapters. The results go to --out: the table and
what the model writes before and after (results.md), everything measured (results.json), the loss curves (loss.png), and
fastlora's adapter (adapter/), which PEFT then loads into a fresh model, and merges, to show that all three agree.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from study.contestants import CONTESTANTS, Contestant
from study.settings import (
    INTERRUPTED,
    ORDINARY_INITS,
    PACKAGES,
    FineTuning,
    choose_device,
    parse_fine_tuning,
    run_program,
)

if TYPE_CHECKING:
    import torch
    from study.learner import Learner
    from study.tasks.task import Task
    from study.training import Run


def main(argv: list[str] | None = None) -> int:
    settings = parse_fine_tuning(argv)
    libraries = ["peft", "fastlora"] if {"peft", "fastlora", "fused_loss"} & {*settings.methods} else []
    packages = [*PACKAGES[settings.task], *libraries, *["bitsandbytes"] * (settings.base != "full")]
    kept = f"what was written before is under {settings.out}"
    return run_program("finetune.py", lambda: finetune(settings), packages, settings.plot, settings.out, kept)


def finetune(settings: FineTuning) -> int:
    """The whole run; returns the exit status."""
    from study.processes import together

    device = choose_device(settings.device)
    with together(settings, device):
        return finetune_on(device, settings)


def finetune_on(device: torch.device, settings: FineTuning) -> int:
    """The run in this process, which may be one of several."""
    from study import fine_tuning_report as report
    from study import processes
    from study.tasks.task import load_task
    from study.training import CtrlC, train

    start = time.perf_counter()
    task = load_task(settings, device)
    print(task.description, flush=True)
    facts, checkpoint = processes.checkpoint_of(settings, task)
    runs = runs_of(task, settings)
    results = report.Results(task, settings, runs)
    print("Before training: the held-out examples", flush=True)
    results.before = task.metric.of(task.scores(runs[0].learner.model, "test"))
    results.written["before"] = task.samples(runs[0].learner.model)
    print(f"{task.metric.name} before: {task.metric.form.format(results.before)}{task.metric.unit}. "
          f"{settings.steps} steps of {settings.batch_size} on {device}: {', '.join(settings.methods)}, "
          f"{'in turns' if settings.interleave else 'one after another'}", flush=True)  # fmt: skip
    done = 0 if checkpoint is None else processes.load_checkpoint(checkpoint, runs)

    def after(made: int, now: bool = False) -> None:
        nonlocal done
        done = made
        if settings.save_every and (now or made % (settings.save_every * len(runs)) == 0):
            processes.save_checkpoint(settings.out / "checkpoint", made, runs, facts)

    with CtrlC() as stop:
        results.complete = train(
            task,
            runs,
            settings.steps,
            settings.seed,
            eval_every=settings.eval_every,
            interleave=settings.interleave,
            stop=stop,
            done=done,
            after=after,
        )
    if not results.complete:
        after(done, now=True)
    for run in runs:
        if results.complete and run.learner.trainable == 0:
            results.after[run.name] = results.before
        elif results.complete:
            print(f"After training: the held-out examples, {run.title}", flush=True)
            results.after[run.name] = task.metric.of(task.scores(run.learner.model, "test"))
            results.written[run.name] = task.samples(run.learner.model)
        if run.name == "fastlora":
            results.agreement = save_and_check(task, run.learner, settings, results.written.get(run.name))
    if results.complete:
        order = task.order(settings.seed, settings.steps)
        widest = task.shares(max(order, key=lambda indices: task.tokens(task.batch(indices)) or 0))
        results.peaks = {run.name: run.learner.peak_bytes(widest) for run in runs}  # takes a step: comes last
    else:
        counts = ", ".join(f"{run.name} {len(run.losses)}" for run in runs)
        print(f"Interrupted ({counts} of {settings.steps} steps): saving what there is, without the test.", flush=True)
    results.seconds = time.perf_counter() - start
    if not processes.FIRST:
        return 0 if results.complete else INTERRUPTED
    files = report.save(results)
    print("\n" + (settings.out / "results.md").read_text(encoding="utf-8"))
    print(f"Wrote {', '.join(map(str, files))}")
    return 0 if results.complete else INTERRUPTED


def runs_of(task: Task, settings: FineTuning) -> list[Run]:
    """A run per method, the LoRA ones with the same initial adapter weights where --init is an ordinary one."""
    from study.learner import Learner, copy_adapters
    from study.training import Run

    runs: list[Run] = []
    for method in settings.methods:
        entry = entry_of(method, settings)
        lr = settings.full_lr if method == "full" else settings.lr
        runs.append(Run(method, entry.title, Learner(task, entry, lr, settings.seed, settings.steps)))
    adapted = {run.name: run.learner.adapted for run in runs}
    alike = [adapted[name] for name in ("fastlora", "fused_loss", "peft") if name in adapted]
    for other in alike[1:] if settings.init in ORDINARY_INITS else ():
        copy_adapters(alike[0], other)
    return runs


def entry_of(method: str, settings: FineTuning) -> Contestant:
    """What one of --methods trains."""
    if method == "frozen":
        return Contestant("frozen (the floor)", adapter=None, library="none")
    if method == "full":
        return CONTESTANTS["full"]
    entry = CONTESTANTS[settings.method]
    if method == "peft":
        return replace(entry, title=f"{entry.title}, PEFT (eager)", library="peft")
    origin = "" if settings.init == "kaiming" else f" from {settings.init}"
    adapter = dict(entry.adapter or {})
    if settings.init not in ("kaiming", "lora_ga"):
        adapter["init_lora_weights"] = settings.init
    options: dict[str, Any] = {name: value for name in ("group", "mlp") if (value := getattr(settings, name))}
    how = "".join(f", {name} {value}" for name, value in options.items())
    if method == "fused_loss":
        how, options = f"{how}, fused loss", options | {"fused_loss": True}
    start = {"start": "lora_ga", "numbers": {**entry.numbers, "gamma": settings.gamma}}
    return replace(
        entry,
        title=f"{entry.title}{origin}, fastlora{how}",
        adapter=adapter,
        patch=options,
        **(start if settings.init == "lora_ga" else {}),
    )


def save_and_check(
    task: Task, learner: Learner, settings: FineTuning, written: list[str] | None
) -> dict[str, Any] | None:
    """Saves fastlora's adapter. Given what the trained model writes (None: the run is not complete), compares a fresh
    model with the files loaded by PEFT, and merged, with the trained one: {"loaded": ..., "merged": ...}.
    """
    from peft import PeftModel
    from study.processes import FIRST

    import fastlora

    directory = settings.out / "adapter"
    if FIRST or settings.shard == "fsdp2":
        fastlora.save_adapter(learner.adapted, directory)
    if FIRST:
        task.save_rest(learner.model, directory)
    if written is None:
        return None
    logits = task.outputs(learner.model)
    if not FIRST:
        return None

    def beside(model: Any) -> dict[str, Any]:
        theirs = task.outputs(model)
        return {
            "max_logit_difference": (theirs - logits).abs().max().item(),
            "largest_logit": logits.abs().max().item(),
            "same_class": (theirs.argmax(-1) == logits.argmax(-1)).double().mean().item(),
            "same_text": task.samples(model) == written,
        }

    print("The adapter's files, loaded by PEFT into a fresh model, and merged", flush=True)
    fresh = task.fresh_model(settings.seed)
    loaded: Any = PeftModel.from_pretrained(task.adapted(fresh), str(directory))  # type: ignore[arg-type]
    model = task.with_adapted(fresh, loaded)
    task.load_rest(model, directory)
    found = {"loaded": beside(model)}
    if settings.base != "full":  # merging would round to 4 bits again
        return found
    return {**found, "merged": beside(task.with_adapted(model, loaded.merge_and_unload()))}


if __name__ == "__main__":
    sys.exit(main())
