"""What the page shows, as HTML: every text of a model, a visitor or a record is escaped here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from texts import Texts, coded

from hf_ewc.compare import Frame, Pane, Reveal, Scores, Side, TokenScore
from hf_ewc.hub import page

DIFFERENCE_STEPS = (0.25, 1.0, 2.0, 4.0)  # nats at which colour and line become stronger
SURPRISE_STEPS = (1.0, 3.0, 6.0, 10.0)

# C0 and C1 controls but tab and line feed, lone surrogates, and what turns the direction of text around
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Text as HTML: nothing in it is interpreted, and control characters are named instead of obeyed."""
    return _UNSEEN.sub(_name_of, escape(text))


def attribute(text: str) -> str:
    """The same for an attribute, in which no element can name a control character."""
    return escape(_UNSEEN.sub(lambda found: f"⟦{ord(found[0]):X}⟧", text))


def _name_of(found: re.Match[str]) -> str:
    code = ord(found[0])
    sign = chr(0x2400 + code) if code < 0x20 else f"⟦{code:X}⟧"
    return f'<span class="control" title="U+{code:04X}">{sign}</span>'


def message(text: str, kind: str = "note") -> str:
    """A line to the visitor; a `problem` is read out at once."""
    role = ' role="alert"' if kind == "problem" else ""
    return f'<p class="{kind}"{role}>{shown(text)}</p>' if text else ""


def name_of(side: Side) -> str:
    """A model's name; on the Hub with a link to its commit."""
    if side.commit is None:
        return shown(side.label)
    return link(side.label, page(side.label.partition("@")[0], "model", side.commit), side.commit)


def link(label: str, url: str, title: str = "") -> str:
    if not url.startswith(("https://", "http://")):
        return shown(label)
    return f'<a href="{attribute(url)}" title="{attribute(title)}" target="_blank" rel="noopener">{shown(label)}</a>'


# Compare and blind: two panes


def panes(frame: Frame | None, prompt: str, titles: Sequence[str], names: Sequence[str], t: Texts) -> str:
    """
    Both texts, one element, so that neither is ever drawn ahead of the other. `names` are HTML, from [`name_of`].
    """
    frame = frame or Frame.empty()
    sides = frame.base, frame.adapted
    begun = any(pane.ids or pane.finished for pane in sides)
    boxes = "".join(
        _pane(pane, prompt, title, name, frame.diverges_at, begun, t)
        for pane, title, name in zip(sides, titles, names, strict=True)
    )
    return f'<div class="panes" role="group" aria-label="{attribute(t("pane.label"))}">{boxes}</div>{_verdict(frame, begun, t)}'


def _pane(pane: Pane, prompt: str, title: str, name: str, parts_at: int | None, begun: bool, t: Texts) -> str:
    if pane.error:
        state = message(coded(t, pane.error_code, pane.error), "problem")
    elif begun:
        state = f'<p class="state">{_tokens(pane.tokens, t)} · {t("reason." + (pane.reason or "none"))}</p>'
    else:
        state = ""
    label = f'<span class="model">{name}</span>' if name else ""
    text = _written(pane, prompt, parts_at, begun, t)
    return (
        f'<section class="pane{"" if pane.finished or not begun else " writing"}" aria-label="{escape(title)}">'
        f'<h3>{shown(title)} {label}</h3><div class="text" dir="auto" tabindex="0">{text}</div>{state}</section>'
    )


def _written(pane: Pane, prompt: str, parts_at: int | None, begun: bool, t: Texts) -> str:
    if not begun:
        return f'<span class="nothing">{t("pane.empty")}</span>'
    before = f'<span class="prompt">{shown(prompt)}</span>' if prompt else ""
    if pane.finished and not pane.text and not pane.error:
        return f'{before} <span class="nothing">{t("pane.none")}</span>'
    if parts_at is None:
        return f'{before}<span class="same">{shown(pane.text)}</span>'
    mark = (
        f'<span class="fork" role="img" aria-label="{attribute(t("pane.parts"))}" title="{attribute(t("pane.parts"))}">◆</span>'
    )
    return (
        f'{before}<span class="same">{shown(pane.text[:parts_at])}</span>{mark}'
        f'<span class="differs">{shown(pane.text[parts_at:])}</span>'
    )


def _verdict(frame: Frame, begun: bool, t: Texts) -> str:
    if not begun or frame.base.error or frame.adapted.error:
        return ""
    if frame.diverges_at is not None:
        said = "◆ " + t("pane.parts")
    else:
        said = t("pane.same.end" if frame.finished else "pane.same")
    return f'<p class="verdict">{said}</p>'


def _tokens(count: int, t: Texts) -> str:
    return t("tokens.one") if count == 1 else t("tokens", count=t.number(count, 0))


# Which finds it natural: tokens


def natural(scores: Scores | None, view: str, model: str, t: Texts) -> str:
    """Which model finds the text more natural, its tokens, what their look means, and a place for the numbers of one."""
    if scores is None:
        return message(t("natural.empty"), "nothing")
    difference = t.number(abs(scores.difference))
    which = "equal" if abs(scores.difference) < 0.005 else "adapted" if scores.difference < 0 else "base"
    verdict = t(f"natural.{which}", model=model, difference=difference)
    verdict = verdict[:1].upper() + verdict[1:]
    figures = t(
        "natural.figures",
        base=t.number(scores.base_bits_per_byte),
        adapted=t.number(scores.adapted_bits_per_byte),
        model=model,
        tokens=_tokens(scores.tokens, t),
        bytes=t.number(scores.bytes, 0),
    )
    legend = t("legend.difference" if view == "difference" else "legend.surprise", model=model)
    pieces = "".join(_piece(piece, view, model, t) for piece in scores.pieces)
    return (
        f'<p class="verdict strong" role="status">{shown(verdict)}</p><p class="note">{shown(figures)}</p>'
        f'<div class="tokens {view}" dir="auto" role="toolbar" aria-label="{escape(t("natural.label"))}">{pieces}</div>'
        f'<p class="detail" role="status" aria-live="polite">{t("natural.detail")}</p>'
        f'<p class="legend"><strong>{t("legend.name")}:</strong> {shown(legend)}</p>'
    )


def _piece(piece: TokenScore, view: str, model: str, t: Texts) -> str:
    value = {"difference": piece.difference, "base": piece.base_nats, "adapted": piece.adapted_nats}[view]
    steps = DIFFERENCE_STEPS if view == "difference" else SURPRISE_STEPS
    level = sum(abs(value) >= step for step in steps)
    direction = "" if view != "difference" or not level else " lower" if value < 0 else " higher"
    said = t(
        "natural.token",
        text=piece.text.replace("\n", "↵"),
        model=model,
        base=t.number(piece.base_nats),
        adapted=t.number(piece.adapted_nats),
        difference=t.number(piece.difference, signed=True),
    )
    look = shown(piece.text).replace("\n", '<span class="break" aria-hidden="true">↵</span>\n')
    return f'<span class="token s{level}{direction}" role="button" tabindex="-1" data-say="{attribute(said)}">{look}</span>'


# Blind votes


def reveal(found: Reveal, counts: dict[str, int], t: Texts) -> str:
    """Which side was which, after the vote, and all votes so far."""
    names = {name: t(f"blind.side.{name}") for name in ("base", "adapted")}
    said = t("blind.reveal", left=names[found.left], right=names[found.right])
    outcome = message(f"{t(f'blind.outcome.{found.outcome}')} {said}", "verdict strong")
    counted = t("blind.tally", **{name: t.number(count, 0) for name, count in counts.items()})
    return f'<div role="status">{outcome}<p class="note" id="tally">{counted}</p></div>'
