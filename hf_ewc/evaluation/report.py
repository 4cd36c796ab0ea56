"""A sweep as a table for the terminal, as Markdown, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .figures import retention_figure
from .results import Accuracy, Row, domain_titles, rows, save_results


@dataclass(frozen=True)
class Column:
    """A column of the table: its two-line title, a sentence that explains it, and how a row shows in it."""

    title: str
    unit: str
    meaning: str
    show: Callable[[Row], str]


MODE = "Where the penalty acts. “base” is the model before training."
MERGED = (
    " “merge” and “interpolate” were not trained: they are the λ = 0 model, taken part of the way back to the base, each "
    "weight by its importance in the one and all alike in the other."
)
MERGE_LAMBDA = " In “merge” it is on a scale of its own: at 1 a weight of mean importance goes half of the way back."
SHARE = " Where a per cent sign stands there is no λ: it is the share of the way back, the same for all weights."


def columns(results: dict) -> list[Column]:
    """The table's columns, from left to right; one for each question set of the base."""
    old, new = domain_titles(results)
    kinds = {"λ" if row.interpolate is None else "%" for row in rows(results) if row.merged}
    found = [
        Column("mode", "", MODE + (MERGED if kinds else ""), lambda row: row.mode),
        Column(
            "λ",
            "",
            f"Strength of the penalty. 0 is plain fine-tuning; a larger λ keeps more of {old} and learns less of {new}."
            + (MERGE_LAMBDA if "λ" in kinds else "")
            + (SHARE if "%" in kinds else ""),
            lambda row: row.label,
        ),
        Column(
            old,
            "bits/byte",
            f"Loss on {old} texts that were not trained on, in bits per byte of text: comparable between languages and "
            "tokenizers. Less is better.",
            lambda row: _number(row.old),
        ),
        Column(
            "forgetting",
            "bits/byte",
            f"How much the loss on {old} rose over the base. 0 means that nothing was forgotten.",
            lambda row: _number(row.forgetting, signed=True, missing="–" if row.ewc_lambda is None else "not finite"),
        ),
    ]
    for name in results["before"].get("questions", {}):
        found.append(
            Column(
                name,
                "accuracy",
                f"Share of the questions in “{name}” that are answered right, ± one standard error. {_guessing(results, name)}",
                lambda row, name=name: _accuracy(row.questions.get(name)),  # type: ignore[misc]
            )
        )
    return [
        *found,
        Column(
            new,
            "bits/byte",
            f"Loss on {new} texts that were not trained on. Less is better.",
            lambda row: _number(row.new),
        ),
        Column(
            "learning",
            "bits/byte",
            f"How much the loss on {new} fell below the base's. More is better.",
            lambda row: _number(row.learning, signed=True, missing="–" if row.ewc_lambda is None else "not finite"),
        ),
    ]


def table_text(results: dict) -> str:
    """The table in aligned columns, for a terminal."""
    cells = _cells(results)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["   ".join(_aligned(line, widths)).rstrip() for line in cells]
    lines.insert(2, "─" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(lines)


def table_markdown(results: dict) -> str:
    """The table in Markdown, for cards and READMEs."""
    titles, units, *body = _cells(results)
    heads = [f"{title} ({unit})" if unit else title for title, unit in zip(titles, units, strict=True)]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def metrics_text(metrics: dict) -> str:
    """What `evaluate_model` measured on one model, for a terminal."""
    lines = []
    for name, score in metrics["texts"].items():
        lines.append(
            f"{name}: {score['bits_per_byte']:.3f} bits per byte "
            f"(token perplexity {score['token_perplexity']:.2f}; {score['documents']} documents, {score['bytes']} bytes)"
        )
    for name, score in metrics["questions"].items():
        accuracy = _accuracy(Accuracy(score["accuracy"], score["stderr"], score["chance"]))
        lines.append(f"{name}: {accuracy} right of {score['n']} questions (guessing: {100 * score['chance']:.0f} %)")
    return "\n".join(lines)


def html_report(results: dict, picture: bytes | None = None, title: str = "What was kept, what was learned") -> str:
    """
    One self-contained page: the picture, the table, what each column means, and the settings. No scripts, no outside requests.

    Args:
        results (`dict`): Results of a sweep.
        picture (`bytes`, *optional*): The PNG of [`retention_figure`].
        title (`str`, *optional*): Heading of the page.
    """
    old, new = domain_titles(results)
    figure = ""
    if picture:
        source = base64.b64encode(picture).decode()
        dashed = " (dashed: made after training)" if any(row.merged for row in rows(results)) else ""
        figure = f"""<figure>
<img alt="Bits per byte of {escape(old)} against {escape(new)}, and question accuracy, for each λ"
 src="data:image/png;base64,{source}">
<figcaption>Left: each line is one mode, each point one λ{dashed}; further down is kept more of {escape(old)}, further left is
learned more of {escape(new)}, so the lower left is best. Right: questions answered right, ± one standard error.</figcaption>
</figure>"""
    shown = columns(results)
    head = "".join(f"<th>{escape(c.title)}<small>{escape(c.unit)}</small></th>" for c in shown)
    body = "\n".join(
        f"<tr{_row_class(row)}>" + "".join(f"<td>{escape(c.show(row))}</td>" for c in shown) + "</tr>" for row in rows(results)
    )
    meanings = "\n".join(f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in shown)
    facts = [
        ("base", results.get("base", {})),
        ("settings", results["settings"]),
        ("versions", results.get("versions", {})),
    ]
    details = "\n".join(f"<dt>{name}</dt><dd>{_pairs(values)}</dd>" for name, values in facts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>Elastic Weight Consolidation: a model that knew {escape(old)} was trained on {escape(new)}, once for each strength λ of the
penalty that holds the weights which {escape(old)} needs. Every row of the table is one model, measured on texts that it did not
see in training.</p>
{figure}
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<h2>What the columns mean</h2>
<dl>
{meanings}
</dl>
<details><summary>Base model, settings and versions</summary>
<dl>
{details}
</dl></details>
</main>
</body>
</html>
"""


def write_report(results: dict, folder: str | Path) -> dict[str, Path]:
    """Write `results.json`, `retention.png`, `table.md` and `report.html` into `folder`; returns name → path."""
    folder = Path(folder)
    figure = retention_figure(results, folder / "retention.png")
    return {
        "results": save_results(results, folder / "results.json"),
        "figure": figure,
        "table": write_atomically(folder / "table.md", table_markdown(results) + "\n"),
        "report": write_atomically(folder / "report.html", html_report(results, figure.read_bytes())),
    }


def _cells(results: dict) -> list[list[str]]:
    shown = columns(results)
    return [
        [column.title for column in shown],
        [column.unit for column in shown],
        *([column.show(row) for column in shown] for row in rows(results)),
    ]


def _aligned(line: list[str], widths: list[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def _number(value: float | None, signed: bool = False, missing: str = "not finite") -> str:
    if value is None:
        return missing
    return f"{value:+.3f}".replace("-", "−") if signed else f"{value:.3f}"


def _accuracy(score: Accuracy | None) -> str:
    if score is None or score.value is None:
        return "–"
    return f"{100 * score.value:.1f} %" if score.stderr is None else f"{100 * score.value:.1f} ± {100 * score.stderr:.1f} %"


def _guessing(results: dict, name: str) -> str:
    chance = results["before"]["questions"][name].get("chance")
    return "" if chance is None else f"Guessing gets {100 * chance:.1f} %."


def _row_class(row: Row) -> str:
    return ' class="base"' if row.ewc_lambda is None else ""


def _pairs(values: Any) -> str:
    return "<br>".join(f"{escape(str(key))}: {escape(str(value))}" for key, value in values.items()) or "–"


STYLE = """
:root { --ink: #1d1d1f; --soft: #5d5d63; --line: #d9d9de; --back: #ffffff; --band: #f4f4f6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --soft: #a9a9b0; --line: #3b3b41; --back: #161618; --band: #212125 }
}
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.5rem }
p, dl, figcaption { max-width: 46rem }
figure { margin: 2rem 0 } figcaption { color: var(--soft); font-size: .9rem; margin-top: .6rem }
img { display: block; box-sizing: border-box; width: 100%; background: #ffffff }
img { border: 1px solid var(--line); border-radius: 8px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { text-align: right; padding: .4rem .9rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
th small { display: block; font-weight: normal; color: var(--soft) } th { vertical-align: top }
.base { background: var(--band) }
dt { font-weight: 600; margin-top: .7rem } dd { margin: 0; color: var(--soft) }
details { margin-top: 2.5rem } summary { cursor: pointer; font-weight: 600 }
"""
