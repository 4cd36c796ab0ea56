"""Does a healthy Fisher belong to this model? Every difference is named with both values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import FisherMismatchError
from .base import BaseModel, tokenizer_sha256

if TYPE_CHECKING:
    from .manifest import Manifest

SHOWN = 10
ABSENT = "–"

Row = tuple[str, str, str]  # what, in the Fisher, in the model


def base_rows(own: BaseModel, base: BaseModel, tokenizer: str | None) -> list[Row]:
    """Where two base models differ; `tokenizer` is the hash of the second one's."""
    rows = []
    if not own.same_weights(base):
        labels = [f"{model.label} (sha256 {model.fingerprint[:12]})" for model in (own, base)]
        rows.append(("weights", labels[0], labels[1]))
    if own.architecture != base.architecture:
        rows.append(("architecture", own.architecture, base.architecture))
    if own.vocab_size != base.vocab_size:
        rows.append(("vocabulary", str(own.vocab_size), str(base.vocab_size)))
    if own.tokenizer_sha256 and tokenizer and own.tokenizer_sha256 != tokenizer:
        rows.append(("tokenizer", f"sha256 {own.tokenizer_sha256[:12]}", f"sha256 {tokenizer[:12]}"))
    return rows


def parameter_rows(own: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> list[Row]:
    """Where two sets of parameters differ: first what the Fisher does not cover, then what only the Fisher has."""
    uncovered = [name for name, shape in shapes.items() if own.get(name) != tuple(shape)]
    extra = [name for name in own if name not in shapes]
    return [(name, _shape(own.get(name)), _shape(shapes.get(name))) for name in uncovered + extra]


def check_base(manifest: Manifest, source: str, base: BaseModel, tokenizer: Any = None) -> None:
    """See [`FisherInformation.check_base`]."""
    own = manifest.base_model
    rows = base_rows(own, base, tokenizer_sha256(tokenizer) if tokenizer is not None else base.tokenizer_sha256)
    if not rows:
        return
    if [row[0] for row in rows] == ["tokenizer"]:
        reason = (
            "The weights are the same, but another tokenizer gives other token ids, so the Fisher would protect other text "
            "than it was measured on. Use the base model's own tokenizer, unchanged"
        )
    elif manifest.fold and any(pair.base_sha256 == base.fingerprint for pair in manifest.fold.pairs):
        reason = (
            "It was folded from several Fishers, and this model is the base of an older one. Training goes on from the base of "
            f"the newest, '{own.label}', which comes last: list the Fishers from oldest to newest, or train from that model"
        )
    else:
        reason = (
            "A Fisher says nothing about weights other than those it was measured at, even where the shapes agree. Train "
            f"from '{own.label}', name it as the anchor"
        )
    raise FisherMismatchError(
        f"the Fisher '{source}' was not measured on this model.\n{table(rows)}\n"
        f"{reason}, or estimate the Fisher again (`hf-ewc fisher …`). Nothing was trained."
    )


def check_parameters(manifest: Manifest, source: str, shapes: Mapping[str, tuple[int, ...]], missing: str) -> list[str]:
    """See [`FisherInformation.check_parameters`]."""
    own = manifest.parameters
    rows = parameter_rows(own, shapes)
    uncovered = [name for name, _, model in rows if model != ABSENT]
    extra = len(rows) > len(uncovered)
    if not extra and (missing == "ignore" or not uncovered):
        return uncovered
    resized = any(name in own and own[name][1:] == tuple(shapes[name])[1:] for name in uncovered)
    reason = "The vocabulary was probably resized after the Fisher was estimated. " if resized else ""
    if extra:
        advice = (
            "The Fisher protects tensors that this model does not have: it is another architecture, or its parameters were "
            "renamed by a wrapper. Estimate it again on the model that you train (`hf-ewc fisher …`)."
        )
    else:
        these = "this" if len(uncovered) == 1 else "these"
        advice = (
            f"Estimate it again (`hf-ewc fisher …`), or set\n`ewc_missing: ignore` to leave {these} {len(uncovered)} of "
            f"{len(shapes)} tensors unpenalised."
        )
    raise FisherMismatchError(
        f"the Fisher '{source}' does not fit this model.\n{table(rows)}\n{reason}{advice} Nothing was trained."
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return ABSENT if shape is None else str(tuple(shape))


def table(rows: list[Row], first: str = "fisher", second: str = "model") -> str:
    """Aligned lines, both values in each."""
    shown = rows[:SHOWN]
    names, values = (max(len(row[column]) for row in shown) for column in (0, 1))
    lines = [f"    {name:<{names}}   {first} {a:<{values}}   {second} {b}" for name, a, b in shown]
    return "\n".join(lines + ([f"    … and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []))
