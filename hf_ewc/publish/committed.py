"""Cards as data: `model_cards/<artifact>/` holds what a card is rendered from, and the card, which can be made any time."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from huggingface_hub import constants

from ..artifact import Manifest, card, picture
from ..errors import ConfigError
from ..evaluation import load_results
from ..files import STATE_FILE, write_atomically
from ..hub import Licence, is_repo_id
from .checkpoint_card import render_checkpoint_card
from .planned import render_planned_fisher, state_of_recipe

SPEC, CARD, MANIFEST, ROWS, RESULTS, PICTURE = (
    *("card.yaml", "README.md", "fisher_config.json", "params.parquet", "results.json", "trace.png"),
)


@dataclass
class CardSpec:
    """
    `card.yaml`: how a card is rendered.

    Args:
        kind (`str`): `"fisher"` or `"checkpoint"`.
        repo_id (`str`): repository that it is for.
        planned (`bool`, *optional*, defaults to `False`): not run yet: rendered from `recipe`, with marks for figures.
        recipe (`str`, *optional*): YAML of `hf-ewc fisher` or `hf-ewc train`, relative to this file.
        licence (`dict`, *optional*): of the base model: `license`, `license_name`, `license_link`, `gated`.
        language (`str` or list, *optional*): of a checkpoint.
        fingerprint (`str`, *optional*): of a checkpoint's weights, of which the figures must be.
        fisher_repo (`str`, *optional*): of a planned checkpoint: repository that its Fisher is meant for.
    """

    kind: str
    repo_id: str
    planned: bool = False
    recipe: str | None = None
    licence: dict[str, Any] | None = None
    language: str | list[str] | None = None
    fingerprint: str | None = None
    fisher_repo: str | None = None


def check_cards(folder: str | Path) -> list[str]:
    """What differs between the committed cards and those rendered anew: a unified diff per stale card, none if all agree."""
    found = []
    for path in _specs(folder):
        committed = path.parent / CARD
        old = committed.read_text(encoding="utf-8") if committed.is_file() else ""
        name = f"{path.parent.name}/{CARD}"
        diff = difflib.unified_diff(
            old.splitlines(),
            render_committed(path.parent).splitlines(),
            f"{name} (committed)",
            f"{name} (rendered)",
            lineterm="",
        )
        if text := "\n".join(diff):
            found.append(text)
        if (path.parent / ROWS).is_file() and not (path.parent / PICTURE).is_file():
            found.append(f"{path.parent.name}/{PICTURE} is missing, and its card shows it")
    return found


def write_cards(folder: str | Path) -> list[Path]:
    """Render all committed cards in place, and the pictures that are not there yet; returns what changed."""
    changed = []
    for path in _specs(folder):
        text, target, image = render_committed(path.parent), path.parent / CARD, path.parent / PICTURE
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            changed.append(write_atomically(target, text))
        if (path.parent / ROWS).is_file() and not image.is_file():
            changed.append(write_atomically(image, picture.trace_picture(pq.read_table(path.parent / ROWS).to_pylist())))
    return changed


def render_committed(folder: str | Path) -> str:
    """The card of one folder, from `card.yaml` and the data beside it. Its links lead to huggingface.co from everywhere."""
    folder = Path(folder)
    spec = _read_spec(folder / SPEC)
    licence = Licence(**spec.licence) if spec.licence else None
    if spec.planned:
        recipe = _yaml(folder / str(spec.recipe))
        if spec.kind == "fisher":
            text = render_planned_fisher(recipe, repo_id=spec.repo_id, licence=licence)
        else:
            state = state_of_recipe(recipe, spec.fisher_repo)
            text = render_checkpoint_card(state, repo_id=spec.repo_id, licence=licence, language=spec.language, planned=True)
    elif spec.kind == "fisher":
        manifest = Manifest.from_json(_read(folder / MANIFEST), str(folder))
        rows = pq.read_table(folder / ROWS).to_pylist() if (folder / ROWS).is_file() else None
        text = card.render_card(manifest, repo_id=spec.repo_id, licence=licence, picture=rows is not None, rows=rows)
    else:
        state = json.loads(_read(folder / STATE_FILE))
        results = load_results(folder / RESULTS) if (folder / RESULTS).is_file() else None
        text = render_checkpoint_card(
            state,
            repo_id=spec.repo_id,
            results=results,
            licence=licence,
            language=spec.language,
            name=folder.name,
            fingerprint=spec.fingerprint,
        )
    return text.replace(f"{constants.ENDPOINT}/", "https://huggingface.co/")


def _specs(folder: str | Path) -> list[Path]:
    found = sorted(Path(folder).glob(f"*/{SPEC}"))
    if not found:
        raise ConfigError(
            f"'{folder}' holds no cards: no folder in it has a {SPEC}. Run this in the repository, or name the folder with "
            "`--folder`."
        )
    return found


def _read_spec(path: Path) -> CardSpec:
    content, names = _yaml(path), [f.name for f in fields(CardSpec)]
    problems = [f"`{key}` is not one of {', '.join(names)}" for key in content if key not in names]
    if content.get("kind") not in ("fisher", "checkpoint"):
        problems.append(f"`kind: {content.get('kind')}` is neither fisher nor checkpoint")
    if not is_repo_id(str(content.get("repo_id"))):
        problems.append(f"`repo_id: {content.get('repo_id')}` is not of the form user/name")
    if content.get("planned") and not content.get("recipe"):
        problems.append("`planned: true` needs the `recipe` that says what is planned")
    terms = content.get("licence") or {}
    problems += [f"`licence.{key}` is unknown" for key in terms if key not in [f.name for f in fields(Licence)]]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"the card '{path.parent.name}' cannot be rendered from its {SPEC}:\n{listed}")
    return CardSpec(**content)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' must hold `key: value` lines.")
    return content


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the card '{path.parent.name}' is rendered from {path.name}, which cannot be read: {error}"
        ) from None
