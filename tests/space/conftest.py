"""Tiny models for the page, made on the spot, and the page itself on a free port of this machine, with its service at hand."""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from hf_ewc import BaseModel, EvaluationConfig, FisherConfig, estimate_fisher, evaluate_model
from hf_ewc.compare import CompareConfig, CompareService, Limits, app_folder
from hf_ewc.evaluation import load_results, save_results

ENGLISH, LITHUANIAN = ([text for text in tiny.TEXTS if text.isascii() is ascii_only] for ascii_only in (True, False))


def _save(model: Any, folder: Path, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _trained(model: Any, tokenizer: Any, texts: list[str], steps: int, pull: float = 0.0) -> Any:
    """Adam on all texts at once; `pull` is the spring that holds each weight where it was."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    anchor = [param.detach().clone() for param in model.parameters()]
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = model(**batch).loss
        loss = loss + pull * sum((param - held).square().sum() for param, held in zip(model.parameters(), anchor, strict=True))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval()


@dataclass
class Started:
    """A page that is up: where, what stands behind it, and how to end it."""

    url: str
    service: CompareService
    blocks: Any

    def close(self) -> None:
        self.blocks.close(verbose=False)


def start(models: Path, **settings: Any) -> Started:
    """The page of `models`; `settings` are those of `CompareConfig` and `Limits`; tests may ask as often as they like."""
    if str(app_folder()) not in sys.path:
        sys.path.insert(0, str(app_folder()))
    app = importlib.import_module("app")
    names = {item.name for item in fields(Limits)} - {"slots"}
    limits = {"per_minute": 60_000.0, "burst": 1000} | {name: settings.pop(name) for name in names & settings.keys()}
    config = {name: str(models / name) for name in ("base", "adapted", "plain", "fisher")}
    config |= {"results": str(models / "results.json"), "device": "cpu"}
    service = CompareService(CompareConfig(**{**config, **settings}), Limits(**limits))
    blocks = app.serve(service, server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True)
    return Started(blocks.local_url, service, blocks)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> Path:
    """
    Folder with `base` (it knows English), `adapted` and `plain` (they learned Lithuanian, with and without a spring), `fisher`
    of the base and `results.json`: small, but trained, measured and tied together as the real ones.
    """
    root = tmp_path_factory.mktemp("models")
    fresh = tiny.make_model(len(tokenizer), max_position_embeddings=512, head_dim=16, hidden_size=64)
    base = _save(_trained(fresh, tokenizer, ENGLISH + LITHUANIAN[:1], 80), root / "base", tokenizer)
    for name, texts in (("english", ENGLISH), ("lithuanian", LITHUANIAN)):
        tiny.write_jsonl(root / f"{name}.jsonl", [{"text": text} for text in texts])
    old, new = (str(root / f"{name}.jsonl") for name in ("english", "lithuanian"))
    probe = FisherConfig(probe="text", dataset=old, device="cpu", max_length=32)
    estimate_fisher(str(base), probe, progress=False).save_pretrained(root / "fisher")
    for name, pull in (("adapted", 1.0), ("plain", 0.0)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        _save(_trained(model, tokenizer, LITHUANIAN, 40, pull), root / name, tokenizer)

    tiny.write_jsonl(root / "facts.jsonl", tiny.QUESTIONS)
    questions = {"facts": str(root / "facts.jsonl")}
    evaluation = EvaluationConfig(texts={"english": old, "lithuanian": new}, questions=questions, device="cpu")
    measured = {name: evaluate_model(str(root / name), evaluation) for name in ("base", "adapted", "plain")}
    runs = [("sft", 0.0, "plain"), ("proximal", 10.0, "adapted")]
    results = {
        "schema": 1,
        "base": {"id": "base", "fingerprint": BaseModel.resolve(base).fingerprint},
        "before": measured["base"],
        "runs": [{"mode": mode, "ewc_lambda": strength, "metrics": measured[name]} for mode, strength, name in runs],
        "settings": {"old": "english", "new": "lithuanian"},
        "versions": {},
    }
    load_results(save_results(results, root / "results.json"))
    return root


@pytest.fixture(scope="session")
def page(models) -> Iterator[Started]:
    """The page that most tests share; whoever slows its models or takes its places puts them back."""
    started = start(models)
    started.service.wait(60)
    yield started
    started.close()


@pytest.fixture
def serve(models) -> Iterator[Callable[..., Started]]:
    """`serve(**settings)` of a page of one's own: see [`start`]. Its models may still be loading."""
    running: list[Started] = []

    def make(**settings: Any) -> Started:
        running.append(start(models, **settings))
        return running[-1]

    yield make
    for started in running:
        started.close()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[Any]:
    """One headless browser for this process; installed where it is absent and this may be done."""
    import browser  # here, as only some tests need selenium

    browser.install(tmp_path_factory.getbasetemp().parent / "chromium.lock")
    driver = browser.launch(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, models, request) -> Iterator[Any]:
    """A visitor's browser, see [`browser.Browser`]: judged after each test, and photographed into HF_EWC_SCREENSHOTS."""
    from browser import Browser

    visitor = Browser(chromium)
    yield visitor
    if folder := os.environ.get("HF_EWC_SCREENSHOTS"):
        visitor.photograph(Path(folder, re.sub(r"\W+", "-", request.node.name).strip("-") + ".png"))
    visitor.check(str(models.parent))
