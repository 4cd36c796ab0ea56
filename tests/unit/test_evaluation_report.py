"""Results survive the disk; tables, pages and pictures are faithful and readable views of them."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re

import numpy as np
import pytest

from hf_ewc.errors import DataError
from hf_ewc.evaluation import (
    html_report,
    load_results,
    metrics_text,
    retention_figure,
    save_results,
    table_markdown,
    table_text,
    write_report,
)
from hf_ewc.evaluation.figures import draw
from hf_ewc.evaluation.results import fronts, rows


def metrics(old: float, new: float, accuracy: float, sets: tuple[str, ...] = ("facts",)) -> dict:
    texts = {
        name: {"bits_per_byte": b, "token_perplexity": 9.0, "documents": 5, "bytes": 900}
        for name, b in (("english", old), ("lithuanian", new))
    }
    stderr = math.sqrt(accuracy * (1 - accuracy) / 119)
    questions = {name: {"accuracy": accuracy, "stderr": stderr, "chance": 0.25, "n": 120} for name in sets}
    return {"texts": texts, "questions": questions, "samples": {}, "model": {}}


def sweep(modes: int, strengths: int, sets: tuple[str, ...] = ("facts",), seed: int = 0) -> dict:
    """A made-up sweep of the usual shape; one λ = 0 run serves all modes."""
    draw_ = random.Random(seed)
    runs = [{"mode": "loss", "ewc_lambda": 0.0, "metrics": metrics(3.05, 1.71, 0.31, sets)}]
    for k, mode in enumerate(["proximal", "loss", "decoupled"][:modes]):
        for strength in [1000.0, 0.1, 1.0, 10.0, 100.0, 3.0][:strengths]:
            share = (1 + strength * (1 + k / 2)) ** -0.5
            old = 1.62 + 1.43 * share + draw_.uniform(-0.03, 0.03)
            new = 2.45 - 0.74 * share**0.6 + 0.03 * k + draw_.uniform(-0.03, 0.03)
            runs.append({"mode": mode, "ewc_lambda": strength, "metrics": metrics(old, new, 0.67 - 0.36 * share, sets)})
    settings = {"old": "english", "new": "lithuanian"}
    return {
        "schema": 1,
        "base": {"id": "demo"},
        "before": metrics(1.6, 3.21, 0.68, sets),
        "runs": runs,
        "settings": settings,
        "versions": {},
    }


def with_merges(results: dict, *modes: str) -> dict:
    """The same sweep, with models that were made of its λ = 0 run; strengths in no order."""
    sets, fields = tuple(results["before"]["questions"]), {"merge": "merge_lambda", "interpolate": "interpolate"}
    strengths = {"merge": [10.0, 1.0, 3.0], "interpolate": [0.5, 0.25, 0.75]}
    for mode in modes:
        for strength, share in zip(strengths[mode], (0.45, 0.8, 0.15), strict=True):
            figures = metrics(1.62 + 1.43 * share, 2.9 - 1.19 * share**0.5, 0.67 - 0.36 * share, sets)
            results["runs"].append({"mode": mode, "ewc_lambda": 0.0, fields[mode]: strength, "metrics": figures})
    return results


def test_forgetting_and_learning_are_differences_from_the_base():
    table = rows(sweep(1, 1))
    assert [(row.mode, row.ewc_lambda) for row in table] == [("base", None), ("loss", 0), ("proximal", 1000)]
    assert table[0].forgetting is None
    assert table[1].forgetting == pytest.approx(3.05 - 1.6)
    assert table[1].learning == pytest.approx(3.21 - 1.71)


def test_every_mode_starts_from_plain_fine_tuning():
    lines = fronts(rows(sweep(3, 3)))
    assert list(lines) == ["loss", "proximal", "decoupled"]
    assert all([row.ewc_lambda for row in line] == [0, 0.1, 1, 1000] for line in lines.values())


def test_a_model_made_after_training_shows_its_own_strength_and_a_share_is_no_lambda():
    results = with_merges(sweep(1, 1), "merge", "interpolate")
    table = rows(results)
    assert [row.label for row in table] == ["–", "0", "1000", "1", "3", "10", "25 %", "50 %", "75 %"]
    assert {row.ewc_lambda for row in table if row.merged} == {0.0}  # trained without a penalty
    assert [[row.label for row in line] for line in fronts(table).values()] == [
        ["0", "1000"], ["0", "1", "3", "10"], ["0", "25 %", "50 %", "75 %"]]  # fmt: skip
    assert "| interpolate | 50 % |" in table_markdown(results)
    assert re.split(r" {2,}", table_text(results).splitlines()[-2])[:2] == ["interpolate", "50 %"]
    page, plain = html_report(results, b"png"), html_report(sweep(1, 1), b"png")
    for words in ("” were not trained", "half of the way back", "it is the share", "dashed: made after training"):
        assert words in page
        assert words not in plain  # a sweep without them is not burdened with words about them
    half = next(run for run in results["runs"] if run.get("interpolate") == 0.5)
    half["metrics"]["texts"]["english"]["bits_per_byte"] = math.inf
    assert draw(results).get_suptitle() == "not drawn, loss not finite: interpolate 50 %"


def test_the_terminal_table_is_aligned_and_says_everything():
    lines = table_text(sweep(2, 3)).splitlines()
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines}) == 1  # right edges meet
    assert lines[0].split() == ["mode", "λ", "English", "forgetting", "facts", "Lithuanian", "learning"]
    assert re.split(r" {2,}", lines[4]) == ["loss", "0", "3.050", "+1.450", "31.0 ± 4.2 %", "1.710", "+1.500"]
    assert len(lines) == 3 + 1 + 1 + 6


def test_markdown_and_metrics_hold_the_same_figures():
    assert "| loss | 0 | 3.050 | +1.450 | 31.0 ± 4.2 % | 1.710 | +1.500 |" in table_markdown(sweep(1, 3))
    assert "facts: 68.0 ± 4.3 % right of 120 questions (guessing: 25 %)" in metrics_text(sweep(1, 1)["before"])


def test_results_survive_the_disk(tmp_path):
    results = sweep(3, 6)
    assert load_results(save_results(results, tmp_path / "new" / "results.json")) == results


def test_a_diverged_run_is_saved_as_null_and_shown_as_not_finite(tmp_path):
    results = sweep(2, 3)
    results["runs"][2]["metrics"]["texts"]["english"]["bits_per_byte"] = math.nan
    loaded = load_results(save_results(results, tmp_path / "results.json"))
    assert "NaN" not in (tmp_path / "results.json").read_text()
    for version in (results, loaded):
        assert table_text(version).count("not finite") == 2  # the loss and the forgetting
        retention_figure(version, tmp_path / "retention.png")


def test_a_crash_while_saving_leaves_the_old_results(tmp_path, monkeypatch):
    path = save_results(sweep(1, 1), tmp_path / "results.json")
    before = path.read_bytes()

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_results(sweep(3, 6), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_broken_results_are_refused_with_the_reason(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match=r"cannot read results from .*results\.json"):
        load_results(path)
    path.write_text('{"schema": 1, "bef')
    with pytest.raises(DataError, match="cannot read"):
        load_results(path)
    for other in ({"models": {}, "versions": {}}, [1]):
        path.write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"is no results\.json of `hf-ewc evaluate --base … --output` or of a sweep"):
            load_results(path)
    path.write_text(json.dumps(sweep(1, 1) | {"schema": 2}))
    with pytest.raises(DataError, match="schema 2, but this version of hf_ewc reads schema 1"):
        load_results(path)
    path.write_text(json.dumps(sweep(1, 1) | {"settings": {"old": "english"}}))
    with pytest.raises(DataError, match=r"settings\.new missing"):
        load_results(path)
    path.write_text(json.dumps(sweep(1, 1) | {"settings": {"old": "english", "new": "latvian"}}))
    with pytest.raises(DataError, match="not measured on 'latvian', only on english, lithuanian"):
        load_results(path)


def test_the_page_needs_nothing_beside_it_and_explains_each_column():
    page = html_report(sweep(3, 3), picture=b"png", title="<b> & so on")
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert 'src="data:image/png;base64,cG5n"' in page
    assert "<h1>&lt;b&gt; &amp; so on</h1>" in page
    for title in ("mode", "λ", "English", "forgetting", "facts", "Lithuanian", "learning"):
        assert re.search(rf"<dt>{title}</dt><dd>[A-Z].+\.</dd>", page), title
    assert "Guessing gets 25.0 %." in page
    assert "prefers-color-scheme: dark" in page


def test_write_report_writes_four_files(tmp_path):
    written = write_report(sweep(2, 3), tmp_path / "report")
    assert {name: path.name for name, path in written.items()} == {
        "results": "results.json", "figure": "retention.png", "table": "table.md", "report": "report.html"}  # fmt: skip
    assert {path.name for path in (tmp_path / "report").iterdir()} == {path.name for path in written.values()}
    assert written["figure"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("modes", "strengths", "merges", "sets"),
    [
        (0, 0, (), ()),
        (0, 0, ("interpolate",), ("facts",)),
        (1, 3, (), ("facts",)),
        (2, 4, (), ("facts", "mmlu")),
        (3, 6, (), ("facts",)),
        (3, 3, ("merge", "interpolate"), ("facts",)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_labels_cover_neither_each_other_nor_lines_nor_points(modes, strengths, merges, sets, seed):
    figure = draw(with_merges(sweep(modes, strengths, sets, seed), *merges))
    axes = figure.axes[0]
    labels = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    assert len(labels) == 2 + modes * strengths + 3 * len(merges)  # base, λ = 0, and one per run
    for (one, box), (other, its) in itertools.combinations(labels, 2):
        assert not box.overlaps(its), f"{one} and {other} overlap"
    for text, box in labels:
        assert all(axes.bbox.contains(*corner) for corner in box.corners()), f"{text} leaves the panel"
        for line in axes.lines:
            if line.get_linewidth() < 1:  # the base's dashed level, and the thin lines that join labels to points
                continue
            points = axes.transData.transform(line.get_xydata())
            dense = [
                start + (end - start) * share for start, end in itertools.pairwise(points) for share in np.linspace(0, 1, 200)
            ]
            assert not any(box.contains(x, y) for x, y in [*points, *dense]), f"{text} lies on a line"


def test_each_question_set_has_its_panel_with_a_level_of_guessing():
    figure = draw(sweep(2, 3, ("facts", "mmlu")))
    assert len(figure.axes) == 3
    for axes in figure.axes[1:]:
        assert any(line.get_linestyle() == ":" and np.allclose(line.get_ydata(), 0.25) for line in axes.lines)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["base", "0", "0.1", "1", "1000"]


def test_shares_of_the_way_back_stand_beside_the_lambdas_and_names_under_the_panels_stay_apart():
    results = with_merges(sweep(3, 3), "merge", "interpolate")
    results["runs"].append({"mode": "decoupled", "ewc_lambda": 1e5, "metrics": metrics(2.0, 2.0, 0.5)})
    panel = draw(results).axes[1]
    ticks = panel.get_xticklabels()
    names = [tick.get_text() for tick in ticks]
    assert names == ["base", "0", "0.1", "1", "3", "10", "1000", "$10^5$", "25%", "50%", "75%"]
    for one, other in itertools.pairwise(tick.get_window_extent() for tick in ticks):
        assert one.x1 < other.x0
    shares = next(line for line in panel.lines if line.get_marker() == "X" and len(line.get_xdata()) == 3)
    assert shares.get_xdata() == pytest.approx(panel.get_xticks()[-3:])
    assert shares.get_linestyle() != "-"
