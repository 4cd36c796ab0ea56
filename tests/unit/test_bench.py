"""`hf-ewc bench fisher`: the memory probe is right, and the formula that the report states holds."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch

from hf_ewc.bench import peak_bytes
from hf_ewc.bench.fisher import make_batch, make_model, peak_formula
from hf_ewc.cli.main import main
from hf_ewc.fisher import BatchedSquares, prepared


def test_the_memory_probe_counts_what_lives_at_one_time():
    def work():
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        a[:10].mul_(2)  # in place: nothing new
        del a
        c = b[:500]  # a view: nothing new
        return torch.cat([c, c])  # 8000 again

    assert peak_bytes(work) == 8000
    assert peak_bytes(lambda: None) == 0


@pytest.mark.parametrize("scratch", [1 << 20, 16 << 20])
def test_batched_squares_stay_within_the_stated_peak_and_that_is_no_wild_guess(scratch):
    model = make_model("1M", 64)
    batch = make_batch(model, 4, 64)
    with prepared(model) as sums:
        engine = BatchedSquares(model, scratch)
        peak = peak_bytes(lambda: engine.add(batch, sums)) + 8 * sum(p.numel() for p in model.parameters())
    bound = peak_formula(model, batch, scratch)
    assert bound - scratch - (8 << 20) < peak <= bound


def test_logits_of_a_large_vocabulary_are_never_all_there():
    model = make_model("1M", 256)
    batch = make_batch(model, 8, 256)
    logits = 8 * 255 * model.config.vocab_size * 4
    with prepared(model) as sums:
        engines = [BatchedSquares(model, scratch) for scratch in (1 << 20, 1 << 28)]
        small, large = (peak_bytes(partial(engine.add, batch, sums)) for engine in engines)
    assert small < large - logits


def test_the_report_names_the_machine_and_one_row_per_measurement(capsys, tmp_path):
    assert (
        main(
            [
                "bench",
                "fisher",
                "--sizes",
                "1M",
                "--rounds",
                "1",
                "--batch_size",
                "2",
                "--length",
                "16",
                "--no-sweep",
                "--output",
                str(tmp_path / "report.md"),
            ]
        )
        == 0
    )
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert report.startswith("Machine: ")
    [row] = [line for line in report.splitlines() if line.startswith("| 1M ")]
    assert len(row.split("|")) == len(report.splitlines()[2].split("|"))


def test_wrong_settings_of_a_benchmark_are_reported(capsys):
    assert main(["bench", "fisher", "--sizes", "9T", "--rounds", "0"]) == 2
    said = capsys.readouterr().err
    assert "9T" in said
    assert "`rounds`" in said
    assert main(["bench", "train"]) == 2


def test_the_estimators_are_compared_with_the_exact_one(base_folder, tmp_path, capsys):
    questions = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.QUESTIONS * 3)
    assert main(["bench", "estimators", "--model", str(base_folder), "--dataset", str(questions)]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.split("\n\n")[-2].splitlines()]
    table = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}
    assert table["one square per example"][:4] == ["1.000", "", "1.000", "1.00"]
    # gradients of different examples cancel: the mean's square shrinks with the batch
    shrinking = [float(table[f"one square per batch of {size}"][1]) for size in (2, 4, 16)]
    assert 1 > shrinking[0] > shrinking[1] > shrinking[2]
