"""`hf-ewc demo` from start to end at its smallest: real base, real Fisher, real sweep, on shipped and on own files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

import hf_ewc.demo.world as world
from hf_ewc import ConfigError, DataError, FisherInformation
from hf_ewc.artifact import BaseModel
from hf_ewc.cli.main import main
from hf_ewc.data import check_question, load_rows
from hf_ewc.demo import DemoConfig, run_demo
from hf_ewc.files import STATE_FILE
from hf_ewc.publish import pick_run

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
    trained = [("sft", 0.0), ("proximal", 10.0)]
    merged = [("merge", 0.0)] * 3 + [("interpolate", 0.0)] * 3
    assert [(run["mode"], run["ewc_lambda"]) for run in results["runs"]] == trained + merged
    assert [run.get("merge_lambda") or run.get("interpolate") for run in results["runs"][2:]] == [1, 3, 10, 0.45, 0.58, 0.72]
    for line in ("| merge | 10 |", "| interpolate | 45 % |"):
        assert line in (out / "table.md").read_text()
    fisher = FisherInformation.from_pretrained(out / "fisher")
    assert [probe.kind for probe in fisher.manifest.probes] == ["mmlu", "text"]
    probed, asked = ((out / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("questions_probe", "questions"))
    assert len(probed) == len(asked) == 3
    assert not set(probed) & set(asked)  # what is measured was not probed

    assert run_demo(config)["runs"] == results["runs"]  # a second call finds everything done
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="other settings"):
        run_demo(DemoConfig(**{**vars(config), "pretrain_steps": 6}))
    _each_row_is_of_the_folder_that_it_names(out, results)
    _merges_go_on_where_they_were_stopped(config, capsys)


def _each_row_is_of_the_folder_that_it_names(out: Path, results: dict) -> None:
    rows = dict(
        zip(["merge-1", "merge-3", "merge-10", *(f"interpolate-0.{x}" for x in (45, 58, 72))], results["runs"][2:], strict=True)
    )
    plain, fisher = BaseModel.resolve(out / "runs" / "sft-0"), FisherInformation.from_pretrained(out / "fisher")
    for name, row in rows.items():
        model, state = BaseModel.resolve(out / "runs" / name), json.loads((out / "runs" / name / STATE_FILE).read_text())
        assert row["metrics"]["model"]["fingerprint"] == model.fingerprint
        assert pick_run(results, state, name, model.fingerprint) == row
        assert state["merge"]["adapted"]["fingerprint"] == plain.fingerprint
        if name.startswith("merge"):
            assert (state["merge"]["merge_lambda"], state["merge"]["fisher"]["sha256"]) == (row["merge_lambda"], fisher.sha256)
        else:
            assert state["merge"]["interpolate"] == row["interpolate"]
    state = json.loads((out / "runs" / "sft-0" / STATE_FILE).read_text())
    assert pick_run(results, state, "", plain.fingerprint) == results["runs"][0]
    assert pick_run(results, state) == results["runs"][0]  # the card of the λ = 0 run shows no merge, without hashes either


def _merges_go_on_where_they_were_stopped(config: DemoConfig, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Path(config.output_dir) / "runs"
    before = run_demo(config)["runs"]
    capsys.readouterr()
    (runs / "merge-3" / "result.json").unlink()
    (runs / "merge-3" / "model.safetensors").write_bytes(b"half of i")
    (runs / ".tmp-merge-3-0a1b2c3d").mkdir()
    again = run_demo(config)["runs"]
    printed = capsys.readouterr().out
    assert (printed.count("finished before"), printed.count("measuring")) == (7, 1)
    assert "[4/8] merge, λ = 3: measuring" in printed
    assert [run["metrics"] for run in again] == [run["metrics"] for run in before]
    assert not list(runs.glob(".*"))

    result = json.loads((runs / "sft-0" / "result.json").read_text())
    result["metrics"]["model"]["fingerprint"] = "0" * 64  # as if it had been trained once more
    (runs / "sft-0" / "result.json").write_text(json.dumps(result))
    run_demo(config)
    assert capsys.readouterr().out.count("measuring") == 6

    only = run_demo(replace(config, lambdas=[10.0]))["runs"]
    assert [(run["mode"], run["ewc_lambda"]) for run in only] == [("proximal", 10.0)]  # nothing to merge
    only = run_demo(replace(config, lambdas=[0.0]))["runs"]  # no run with a Fisher, and merges by it all the same
    assert [run["mode"] for run in only] == ["sft", *["merge"] * 3, *["interpolate"] * 3]


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
