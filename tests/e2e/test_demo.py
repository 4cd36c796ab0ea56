"""`hf-ewc demo` from start to end at its smallest: real base, real Fisher, real sweep, on shipped and on own files."""

import json
from pathlib import Path

import pytest
import tiny

import hf_ewc.demo.world as world
from hf_ewc import ConfigError, DataError, FisherInformation
from hf_ewc.cli.main import main
from hf_ewc.data import check_question, load_rows
from hf_ewc.demo import DemoConfig, run_demo

SMALLEST = dict(size="tiny", pretrain_steps=5, steps=2, lambdas=[0.0, 10.0], modes=["proximal"])


def _own_files(folder: Path) -> dict[str, str]:
    english = [{"text": f"{text} {i}"} for i, text in enumerate(tiny.TEXTS * 8)]
    long = {"question": "long " * 600, "subject": "none", "choices": ["a", "b", "c", "d"], "answer": 0}
    return {
        "data_en": str(tiny.write_jsonl(folder / "en.jsonl", english)),
        "data_lt": str(tiny.write_jsonl(folder / "lt.jsonl", [{"text": row["text"][::-1]} for row in english])),
        "questions": str(tiny.write_jsonl(folder / "q.jsonl", [*tiny.QUESTIONS, long])),
    }


def test_the_demo_leaves_table_picture_report_and_numbers(tmp_path, capsys):
    out = tmp_path / "out"
    config = DemoConfig(output_dir=str(out), **SMALLEST, **_own_files(tmp_path))
    results = run_demo(config)
    printed = capsys.readouterr().out
    assert "1 of 7 questions exceed" in printed
    assert "Lithuanian" in printed
    assert "proximal" in printed
    assert json.loads((out / "results.json").read_text())["runs"][1]["ewc_lambda"] == 10.0
    assert (out / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in (out / "report.html").read_text()
    assert [(run["mode"], run["ewc_lambda"]) for run in results["runs"]] == [("sft", 0.0), ("proximal", 10.0)]
    fisher = FisherInformation.from_pretrained(out / "fisher")
    assert [probe.kind for probe in fisher.manifest.probes] == ["mmlu", "text"]
    probed, asked = ((out / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("questions_probe", "questions"))
    assert len(probed) == len(asked) == 3
    assert not set(probed) & set(asked)  # what is measured was not probed

    assert run_demo(config)["runs"] == results["runs"]  # a second call finds everything done
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="other settings"):
        run_demo(DemoConfig(**{**vars(config), "pretrain_steps": 6}))


def test_the_shipped_world_is_whole():
    questions = [dict(row) for row in load_rows(world.DATA / "questions.jsonl")]
    for number, row in enumerate(questions, 1):
        check_question(row, number)
    assert len({row["question"] for row in questions}) == len(questions) > 400
    counts = [sum(row["answer"] == letter for row in questions) / len(questions) for letter in range(4)]
    assert max(counts) < 0.32  # no letter is worth guessing
    made = world.make_world(None, None, None, seed=0)
    for name, texts in (("english", made.english), ("lithuanian", made.lithuanian)):
        assert len(set(texts)) == len(texts) > 80
        assert not set(texts) & set(made.held_out[name])


def test_bad_files_of_ones_own_are_refused_before_anything_is_trained(tmp_path, capsys):
    files = _own_files(tmp_path)
    broken = tiny.write_jsonl(tmp_path / "broken.jsonl", [*tiny.QUESTIONS[:3], {**tiny.QUESTIONS[3], "answer": 4}])
    out = tmp_path / "out"
    with pytest.raises(DataError, match="row 4"):
        run_demo(DemoConfig(output_dir=str(out), **SMALLEST, **{**files, "questions": str(broken)}))
    few = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.QUESTIONS[:3])
    with pytest.raises(DataError, match="at least 4"):
        run_demo(DemoConfig(output_dir=str(out), **SMALLEST, **{**files, "questions": str(few)}))
    one = tiny.write_jsonl(tmp_path / "one.jsonl", [{"text": "All in one document."}])
    with pytest.raises(DataError, match="held out"):
        run_demo(DemoConfig(output_dir=str(out), **SMALLEST, **{**files, "data_lt": str(one)}))
    assert main(["demo", "--size", "huge", "--lambdas", "-1", "--output_dir", str(out)]) == 2
    error = capsys.readouterr().err
    assert "huge" in error
    assert "lambdas" in error  # both problems at once
    assert not (out / "base").exists()
