"""What a page shows beside two models, as plain data: what was kept and learned, where the Fisher lies, the lineage of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from .. import merge
from ..artifact import BaseModel, FisherInformation
from ..config import CompareConfig
from ..errors import ConfigError, DataError, EWCError
from ..evaluation import Row, columns, domain_titles, load_results, rows
from ..publish import pick_run
from .lineage import LayerShare, LineageLink, data_links, fisher_links, layer_shares, model_links
from .sources import Note, Sources, said

_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(frozen=True)
class Heading:
    """A column. `key`, for a translation: `mode`, `lambda`, `old`, `forgetting`, `questions` (any set), `new`, `learning`."""

    key: str
    title: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Point:
    """A model in the picture of learning against forgetting (bits per byte); `strength` is `None` for the base, at (0, 0)."""

    mode: str
    strength: float | None
    label: str
    learning: float
    forgetting: float
    old: float
    new: float
    own: bool
    merged: bool


@dataclass(frozen=True)
class Headline:
    """
    The figures of the base, of the page's own model and of plain fine-tuning (λ = 0), as far as `results.json` has them.

    Parameters:
        forgetting_avoided (`float`, *optional*):
            Share of plain fine-tuning's forgetting that the own model was spared; above 1, it even improved. `None` where there
            is nothing to compare: no such run, or it forgot nothing.
        learning_kept (`float`, *optional*): Own learning as a share of plain fine-tuning's; `None` likewise.
    """

    base: Row
    own: Row | None = None
    plain: Row | None = None
    forgetting_avoided: float | None = None
    learning_kept: float | None = None


@dataclass(frozen=True)
class ResultFacts:
    """`results.json`: names of the old and new texts, table, which of its rows is the page's own, points."""

    old: str
    new: str
    columns: tuple[Heading, ...]
    rows: tuple[tuple[str, ...], ...]
    own_row: int | None
    points: tuple[Point, ...]
    headline: Headline


@dataclass(frozen=True)
class Facts:
    """Each part as far as it could be read; `notes` say what is missing, and why."""

    results: ResultFacts | None = None
    layers: tuple[LayerShare, ...] = ()
    lineage: tuple[LineageLink, ...] = ()
    notes: tuple[Note, ...] = ()


def load_facts(config: CompareConfig) -> Facts:
    """
    Read what is known of a page's models. No weights are downloaded: of models on the Hub, their hashes; of a Fisher, manifest
    and summary. Local weights are hashed, once each. What cannot be read leaves a note and never raises.

    Args:
        config ([`CompareConfig`]): `base`, `adapted`, `fisher`, `results` and their revisions.

    Example:

    ```python
    >>> facts = load_facts(CompareConfig("demo/base", "demo/runs/proximal-1000", results="demo/results.json"))
    >>> facts.results.headline.forgetting_avoided
    0.65
    ```
    """
    known = Sources(config)
    results = known.tried("results", lambda: _results(known)) if config.results else None
    layers = known.tried("layers", lambda: layer_shares(known)) or ()
    links = [
        link for part in (model_links, fisher_links, data_links) for link in known.tried("lineage", partial(part, known)) or ()
    ]
    if constants.is_offline_mode() and known.on_hub:
        known.notes.append(Note("lineage", "offline", "the Hub is not asked here (offline); what is shown of it is cached."))
    return Facts(results, layers, tuple(links), tuple(dict.fromkeys(known.notes)))


def fisher_of(config: CompareConfig) -> tuple[FisherInformation | None, str]:
    """
    The Fisher that a page's models belong to, for [`Between`]: the one in the settings, else the one that the adapted model was
    trained with. It is checked against the base's weights, and downloaded if need be, as the models are.

    Returns:
        `tuple`: the Fisher and `""`; or `None` and why there is none, fit for the page.
    """
    known = Sources(config)
    try:
        if not config.fisher:
            known.named_fisher()  # in the words of a page why there is none
        state, models = known.state, [known.model(role) for role in ("base", "adapted")]
        base, adapted = (BaseModel.resolve(model.folder or model.name, model.commit) for model in models)
        return merge.fisher_of(config.fisher, config.fisher_revision, base, adapted, state), ""
    except Exception as error:
        return None, said(error)


def _results(known: Sources) -> ResultFacts:
    path = Path(known.config.results or "").expanduser()
    try:
        results = load_results(path)
        shown, table = columns(results), rows(results)
        keys = ["mode", "lambda", "old", "forgetting", *["questions"] * (len(shown) - 6), "new", "learning"]
        own = known.tried("headline", lambda: _own(known, results))
        return ResultFacts(
            *domain_titles(results),
            columns=tuple(Heading(key, c.title, c.unit, c.meaning) for key, c in zip(keys, shown, strict=True)),
            rows=tuple(tuple(column.show(row) for column in shown) for row in table),
            own_row=table.index(own) if own else None,
            points=tuple(point for row in table if (point := _point(row, own))),
            headline=_headline(table, own),
        )
    except EWCError:
        raise
    except _MALFORMED as error:
        raise DataError(f"'{path.name}' is no whole results.json ({error!r}). Run the evaluation again.") from error


def _own(known: Sources, results: dict) -> Row:
    """The row of the page's adapted model, told by the hash of its weights."""
    state = known.tried("headline", lambda: known.state) or {}
    name, digest = known.model("adapted").name, known.fingerprint("adapted")
    run = pick_run(results, state, name, digest)
    if state.get("merge") and digest != (run["metrics"].get("model") or {}).get("fingerprint"):
        raise ConfigError(  # λ and mode are those of the training, which the model that it started from has as well
            f"'{name}' was merged after training, and no figures in these results are tied to its weights by their hash. "
            "Measure it: `hf-ewc evaluate --model … --base … --output results.json`."
        )
    return rows({**results, "runs": [run]})[1]


def _point(row: Row, own: Row | None) -> Point | None:
    """`None` for a model whose loss is not finite."""
    base = row.ewc_lambda is None
    learning, forgetting = (0.0, 0.0) if base else (row.learning, row.forgetting)
    if row.old is None or row.new is None or learning is None or forgetting is None:
        return None
    label = "base" if base else row.label if row.interpolate is not None else f"λ = {row.label}"
    return Point(row.mode, row.strength, label, learning, forgetting, row.old, row.new, row == own, row.merged)


def _headline(table: list[Row], own: Row | None) -> Headline:
    base, *runs = table
    plain = next((row for row in sorted(runs, key=lambda row: own is None or row.mode != own.mode) if row.strength == 0), None)
    if own is None or plain is None or own == plain:
        return Headline(base, own, plain)
    forgot, kept = (_share(getattr(own, what), getattr(plain, what)) for what in ("forgetting", "learning"))
    return Headline(base, own, plain, None if forgot is None else 1 - forgot, kept)


def _share(own: float | None, plain: float | None) -> float | None:
    return None if own is None or plain is None or plain <= 0 else own / plain
