"""`python -m bench` lists the benchmarks; `python -m bench NAME [--out FILE] [options]` runs one."""

from __future__ import annotations

import sys
from importlib import import_module

CASES = {  # name: (module, what it measures, its first arguments)
    "lora_linear": ("layers.lora_linear", "one LoRA linear layer: eager PyTorch, PEFT, addmm, every backend"),
    "suite": ("models.suite", "groups, MLPs, mixed batches, transformer blocks and a training step"),
    "group": ("models.suite", "layers that share x, one by one and as a group", "--forms", "group"),
    "mlp": ("models.suite", "a gated MLP, one by one and as one op", "--forms", "mlp"),
    "mixed": ("models.suite", "a batch whose sequences use different adapters", "--forms", "mixed"),
    "dora": ("models.suite", "DoRA: eager PyTorch's, PEFT's and ours", "--forms", "dora"),
    "experts": ("models.suite", "a mixture's expert layer: PEFT's target_parameters and ours", "--forms", "experts"),
    "qlora": ("layers.qlora", "layers over a 4-bit weight"),
    "head": ("layers.head", "the output head: LoRA inside its cross-entropy, without the logits"),
    "host": ("layers.host", "the host's time per call, launches included, against a driver that runs nothing"),
    "correctness": ("layers.correctness", "errors of every way against fp64, next to eager PyTorch's"),
    "switching": ("models.switching", "switching, mixing and merging a model's adapters"),
    "distributed": ("models.distributed", "bytes that DDP, FSDP2 and tensor parallelism exchange in a step"),
    "adalora": ("models.adalora", "AdaLoRA's bookkeeping of one step"),
    "galore": ("galore.cost", "GaLore's refreshes and steps, its bases, training with it"),
    "lora_ga": ("starts.lora_ga", "LoRA-GA from sketches: errors, seconds, bytes"),
    "adam_start": ("starts.adam", "starts for Adam's first step, which is a sign"),
    "gpu": ("gpu.session", "the steps of bench/gpu.sh: everything that only a GPU can tell"),
    "smoke": ("gpu.smoke", "each kernel family at its real shape against fp64, ceilings, an eager loop: a line each"),
    "questions": ("gpu.questions", "two questions that only a GPU answers"),
    "summary": ("show.summary", "one line per case of a folder of results"),
    "plot": ("show.plot", "draws the JSON of lora_linear or suite"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, CASES))
        print(f"{__doc__}\n")
        print("\n".join(f"  {name:{width}}  {line}" for name, (_, line, *_) in CASES.items()))
        return 0
    name, *rest = arguments
    if name not in CASES:
        print(f"python -m bench: got {name!r}, want one of {', '.join(CASES)}", file=sys.stderr)
        return 2
    module, _, *first = CASES[name]
    return import_module(f"bench.{module}").main([*first, *rest]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
