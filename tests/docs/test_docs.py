"""The documentation: its blocks of code run, its pages are reachable, its reference is complete."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import docs_models
import peft
import pytest
import torch
import transformers
from mixtures import mixture

import fastlora

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
PACKAGES = ("trl", "datasets", "bitsandbytes", "torchao")  # a block that needs one is skipped where it is missing


def blocks(text: str, language: str = "python") -> list[tuple[int, str]]:
    """(line of its first statement, code) of every fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


@pytest.fixture
def one_process(monkeypatch):
    """What `torchrun --nproc-per-node=1` sets; the process group goes with the test."""
    import accelerate

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in wanted.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty folder to work in, no network, tiny models, and no progress bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", docs_models.tiny_causal_lm)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", docs_models.tiny_tokenizer)
    torch.manual_seed(0)


def tokens() -> torch.Tensor:
    return torch.arange(3, 23).view(2, 10)


def given(page: str) -> dict[str, object]:
    """What a page's code is about before its first block: a model, how it was loaded, and batches for it."""
    load, batch = docs_models.tiny_causal_lm, {"input_ids": tokens(), "labels": tokens()}
    model, base = load(), None
    if page == "experts.md":
        model, base = mixture("qwen3_moe"), mixture("qwen3_moe", hidden_size=40, moe_intermediate_size=32)
    names = {"__name__": "__main__", "load": load, "model": model, "base": base, "batches": [batch] * 5}
    return names | GIVEN.get(page, {})


GIVEN: dict[str, dict[str, Any]] = {
    "experts.md": {"E": 3, "e": 2, "r": 2, "scaling": 2.0, "lora_A": torch.ones(6, 4), "lora_B": torch.ones(5, 6)},
    "head.md": {"ids": tokens(), "scaling": 2.0, "labels": torch.tensor([1, 3, 0])}
    | {"h": torch.ones(3, 4), "weight": torch.ones(5, 4), "lora_A": torch.ones(2, 4), "lora_B": torch.ones(5, 2)},
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks((DOCS / page).read_text(encoding="utf-8"))])
def test_every_block_runs(page, offline, request):
    if page == "distributed.md":
        request.getfixturevalue("one_process")
    path = DOCS / page
    namespace = given(page)
    for line, code in blocks(path.read_text(encoding="utf-8")):
        for package in PACKAGES:
            if package in code or (package == "bitsandbytes" and "BitsAndBytesConfig" in code):
                pytest.importorskip(package)
        exec(compile("\n" * line + code, str(path), "exec"), namespace)  # a traceback then names the page's line
    check = CHECKS.get(page)
    if check is not None:
        check(namespace)


def _experts(names) -> None:
    assert sum("experts" in name for name in names["report"].patched) == 4 and names["delta"].shape == (5, 4)


def _loop(names) -> None:
    assert names["losses"][-1] < names["losses"][0]
    assert {path.name for path in Path("my-adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(names["report"].patched) == 14
    assert not fastlora.is_patched(names["model"])


def _trainer(names) -> None:
    assert Path("runs/trainer/adapter/adapter_model.safetensors").is_file()
    assert Path("runs/with-peft/checkpoint-4/adapter_model.safetensors").is_file()
    assert not Path("runs/with-peft/checkpoint-4/model.safetensors").exists()
    assert names["trainer"].state.global_step == 4


def _peft(names) -> None:
    assert type(names["merged"]) is transformers.LlamaForCausalLM


def _answers(names) -> None:
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in names["optimizer"].param_groups}
    assert rates == {"lora_A": (1e-4, 14), "lora_B": (1.6e-3, 14), "other": (3e-2, 1)}


def _galore(names) -> None:
    groups = {group["name"]: len(group["params"]) for group in names["optimizer"].param_groups}
    assert groups == {"galore": 10, "other": 6, "other_no_decay": 5}
    before = docs_models.tiny_causal_lm()
    assert not torch.equal(names["model"].lm_head.weight, before.lm_head.weight)
    moved = [a for a, b in zip(names["model"].parameters(), before.parameters()) if not torch.equal(a, b)]
    assert len(moved) == 21


def _chat(names) -> None:
    assert names["trained"].any() and not names["trained"].all()  # the answer, not the question
    assert Path("chat-merged/tokenizer.json").is_file() and Path("chat-adapter/adapter_model.safetensors").is_file()
    assert not fastlora.is_patched(names["model"])


def _qlora(names) -> None:
    assert sum("FusedLinear4bit" in type(module).__name__ for module in names["model"].modules()) == 14
    assert Path("my-adapter/adapter_model.safetensors").is_file()


def _export(names) -> None:
    assert all(0 < one.captured <= 1 for one in names["found"].values())
    config = json.loads(Path("served/adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 4 and not config["use_rslora"]


CHECKS = {
    "answers.md": _answers,
    "experts.md": _experts,
    "galore.md": _galore,
    "chat.md": _chat,
    "export.md": _export,
    "qlora.md": _qlora,
    "quickstart/loop.md": _loop,
    "quickstart/trainer.md": _trainer,
    "peft.md": _peft,
}


def test_the_notebook_is_the_quick_start_and_runs(offline):
    book = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    page = (DOCS / "quickstart" / "loop.md").read_text(encoding="utf-8")
    assert cells == [code.rstrip("\n") for _, code in blocks(page)]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"quickstart.ipynb, code cell {number}", "exec"), namespace)
    _loop(namespace)


def test_every_page_is_reachable_from_the_index():
    seen, waiting = set(), ["index.md"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", (DOCS / name).read_text(encoding="utf-8")):
            waiting.append(os.path.normpath(os.path.join(os.path.dirname(name), target)))
    assert sorted(seen) == PAGES


def test_every_page_is_in_the_navigation_but_details():
    entries = re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(entries) == [name for name in PAGES if not name.startswith(("details/", "kernels/"))]
    assert len(entries) <= 25


def test_the_reference_has_every_public_name():
    described = {
        name.rsplit(".", 1)[1]
        for path in (DOCS / "api").iterdir()
        for name in re.findall(r"^::: (fastlora\.[\w.]+)$", path.read_text(encoding="utf-8"), re.M)
    }
    public = set(fastlora.__all__) - {"functional", "linalg", "optim", "variants"}  # modules, whose own names follow
    assert public <= described
    assert set(fastlora.linalg.__all__) <= described
    assert set(fastlora.optim.__all__) <= described
    assert set(fastlora.variants.__all__) <= described


def test_readme_names_only_files_that_exist():
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    missing = [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()]
    assert targets and not missing


def test_readme_blocks_run(offline):
    """Each with a fresh model, but in one folder: the adapter that the first saves is loaded by the third."""
    tokens = torch.ones(2, 5, dtype=torch.long)
    tensors = {
        "x": torch.ones(3, 4),
        "lora_A": torch.ones(2, 4),
        "lora_B": torch.ones(5, 2),
        "weight": torch.ones(5, 4),
    }
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    for line, code in found:
        base = docs_models.tiny_causal_lm()
        config = peft.LoraConfig(target_modules="all-linear")
        namespace = {
            "fastlora": fastlora,
            "F": torch.nn.functional,
            "model": docs_models.tiny_causal_lm(),
            "peft_model": peft.get_peft_model(base, config),
            "batches": [{"input_ids": tokens, "labels": tokens}],
            **tensors,
            **{"p": 0.5, "training": True, "bias": None, "scaling": 2.0},
        }
        exec(compile("\n" * line + code, "README.md", "exec"), namespace)
    assert len(found) == 3
