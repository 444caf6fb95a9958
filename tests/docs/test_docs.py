"""The documentation: its blocks of code run, its pages are reachable, its reference is complete, its site builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import docs_models
import peft
import pytest
import torch
import transformers

import fastlora

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
EXECUTED = [name for name in PAGES if name.startswith("quickstart/")] + [
    "adalora.md",
    "answers.md",
    "galore.md",
    "lora_plus.md",
    "migration.md",
    "messages.md",
]


def blocks(text: str, language: str = "python") -> list[tuple[int, str]]:
    """(line of its first statement, code) of every fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty folder to work in, no network, tiny models, and no progress bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", docs_models.tiny_causal_lm)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", docs_models.tiny_tokenizer)
    torch.manual_seed(0)


@pytest.mark.parametrize("page", EXECUTED)
def test_every_block_runs(page, offline):
    path = DOCS / page
    namespace: dict[str, object] = {"__name__": "__main__"}
    if page in ("answers.md", "lora_plus.md"):  # their blocks are about a model that is there already
        namespace |= {"torch": torch, "model": docs_models.tiny_causal_lm()}
        fastlora.patch(namespace["model"])  # type: ignore[arg-type]
    if page in ("adalora.md", "galore.md"):
        tokens = torch.arange(3, 23).view(2, 10)
        namespace |= {"model": docs_models.tiny_causal_lm(), "batches": [{"input_ids": tokens, "labels": tokens}] * 5}
    found = blocks(path.read_text(encoding="utf-8"))
    assert found
    for line, code in found:
        exec(compile("\n" * line + code, str(path), "exec"), namespace)  # a traceback then names the page's line
    check = CHECKS.get(page)
    if check is not None:
        check(namespace)


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
    assert names["layer"].calls.fused == 3


def _lora_plus(names) -> None:
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in names["optimizer"].param_groups}
    assert rates == {"lora_A": (1e-4, 14), "lora_B": (1.6e-3, 14), "other": (3e-2, 1)}


def _galore(names) -> None:
    groups = {group["name"]: len(group["params"]) for group in names["optimizer"].param_groups}
    assert groups == {"galore": 10, "other": 6, "other_no_decay": 5}
    before = docs_models.tiny_causal_lm()
    assert not torch.equal(names["model"].lm_head.weight, before.lm_head.weight)
    moved = [a for a, b in zip(names["model"].parameters(), before.parameters()) if not torch.equal(a, b)]
    assert len(moved) == 21


def _answers(names) -> None:
    rates = {group["lr"]: len(group["params"]) for group in names["optimizer"].param_groups}
    assert rates == {1e-4: 14, 1.6e-3: 14}


CHECKS = {
    "answers.md": _answers,
    "galore.md": _galore,
    "lora_plus.md": _lora_plus,
    "quickstart/loop.md": _loop,
    "quickstart/trainer.md": _trainer,
    "quickstart/peft.md": _peft,
}


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


def test_every_page_is_in_the_navigation():
    entries = re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(entries) == PAGES


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


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None, reason="no zensical here (the docs extra has it)")
def test_the_site_builds_without_a_word(tmp_path):
    """--strict stops at broken links and unknown names, but lets complaints about docstrings pass."""
    for name in ("docs", "fastlora"):  # copies, so that the site and its cache are not written into the checkout
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 0, words
    assert sorted(line.split()[0] for line in words) == ["Build", "Build", "No"], words  # started, finished; no issues
    patch = (tmp_path / "runs" / "docs" / "api" / "models" / "index.html").read_text(encoding="utf-8")
    assert "pissa_niter_&lt;" in patch  # a docstring's <words> are not taken for tags
    loaded = re.compile(r'<(?:script|img|iframe)[^>]*src="?https?:|<link[^>]*rel="?(?:stylesheet|preload)[^>]*https?:')
    assert not [page for page in (tmp_path / "runs").rglob("*.html") if loaded.search(page.read_text(encoding="utf-8"))]
