"""One YAML and flags: everything that is wrong is said at once, and what YAML misreads is put right."""

import dataclasses

import pytest
import yaml

from hf_ewc.cli import options, sweep, train
from hf_ewc.cli.evaluate import EvaluateScript
from hf_ewc.cli.fisher import FisherScript
from hf_ewc.cli.options import RENAMED, convert, parse
from hf_ewc.cli.train import TrainScript, parse_training
from hf_ewc.config import EvaluationConfig, EWCConfig, FisherConfig
from hf_ewc.demo import DemoConfig
from hf_ewc.errors import ConfigError

TRAIN = ["--model", "m", "--dataset", "d.jsonl", "--output_dir", "o", "--ewc_lambda", "0"]
COMMANDS = {
    "fisher": (FisherScript, FisherConfig),
    "train": (train.TrainScript, EWCConfig),
    "sweep": (sweep.SweepScript, EWCConfig),
    "evaluate": (EvaluateScript, EvaluationConfig),
    "demo": (DemoConfig,),
}


def problems(argv, *types):
    with pytest.raises(ConfigError) as caught:
        parse("train", argv, *(types or (TrainScript, EWCConfig)), defaults=lambda _: {"bf16": False})
    return str(caught.value)


def test_file_and_flags_meet_and_flags_win(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: base\ndataset: d.jsonl\noutput_dir: o\newc_lambda: 0\nlearning_rate: 2e-4\npacking: true"
    )
    script, args = parse_training("train", ["--config", str(tmp_path / "a.yaml"), "--model=other", "--no-packing"], TrainScript)
    assert (script.model, args.learning_rate, args.packing) == ("other", 2e-4, False)


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_both_forms_of_config_are_read(tmp_path, form):
    # TrlParser ignores the form with "=", and would train with the defaults
    (tmp_path / "a.yaml").write_text("probe: text\ndataset: d.jsonl\nmodel: m\noutput_dir: o")
    script, config = parse("fisher", [part.format(tmp_path / "a.yaml") for part in form], FisherScript, FisherConfig)
    assert (script.model, config.probe) == ("m", "text")


def test_dashes_and_underscores_are_the_same():
    _, args = parse_training("train", [*TRAIN, "--learning-rate", "1e-3", "--max_steps=7"], TrainScript)
    assert (args.learning_rate, args.max_steps) == (1e-3, 7)


def test_all_problems_are_reported_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text("lerning_rate: 1\nwarmup_ratio: 0.1\nmax_steps: many\newc_mode: sideways\newc_lambda: -1")
    found = problems(["stray", "--config", str(tmp_path / "a.yaml"), "--torch_dtype", "x"])
    for part in (
        "`learning_rate`?",
        "`warmup_steps: 0.05`",
        "`max_steps: many`",
        "ewc_mode: sideways",
        "got -1",
        "`dtype`",
        "stray",
    ):
        assert part in found, part
    assert "`model` is missing" in found
    assert "`dataset` is missing" in found


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-4")
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"learning_rate": "2e-4"}
    _, args = parse_training("train", ["--config", str(tmp_path / "a.yaml"), *TRAIN], TrainScript)
    assert args.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("2e-4", float, 2e-4),
        (3, float, 3.0),
        ("1e3", int, 1000),
        ("yes", bool, True),
        ("0", bool, False),
        (None, float | None, None),
        ("null", str | None, None),
        ("8", int | str | None, 8),
        ("auto", int | str | None, "auto"),
        ("0,1,10", list[float], [0.0, 1.0, 10.0]),
        (["0", "1e2"], list[float], [0.0, 100.0]),
        (5, list[float], [5.0]),
        ("a=b.jsonl", dict[str, str], {"a": "b.jsonl"}),
        ("a=b.jsonl", dict[str, str] | str | None, {"a": "b.jsonl"}),
        (["a=b", "c=d=e"], dict[str, str] | str | None, {"a": "b", "c": "d=e"}),
        ("config.json", dict | str | None, "config.json"),
        ("none", None | str | list[str], "none"),
        ("no", str | bool, "no"),
        ('{"a": 1}', dict, {"a": 1}),
        ({"a": 1}, dict | str | None, {"a": 1}),
    ],
)
def test_values_become_what_the_field_asks_for(value, hint, expected):
    found = convert(value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("fast", float),
        (True, float),
        ("nan", float),
        (1.5, int),
        ("maybe", bool),
        (2, bool),
        (12, str),
        (False, str),
        ([1], str),
        (None, float),
        ("x", list[float]),
        ("ab", dict[str, str]),
        ("{broken", dict[str, str]),
        ([1, 2], float),
    ],
)
def test_nonsense_is_refused(value, hint):
    with pytest.raises(ValueError, match=r"."):
        convert(value, hint)


def test_yaml_no_is_the_strategy_no():
    hint = options.typing.get_type_hints(EWCConfig)["save_strategy"]
    assert convert(False, hint) == "no"
    with pytest.raises(ValueError, match="steps"):
        convert("sometimes", hint)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "\x00"])
def test_a_broken_file_is_a_message(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert "a.yaml" in problems(["--config", str(tmp_path / "a.yaml")])
    assert "cannot be read" in problems(["--config", str(tmp_path / "none.yaml")])


def test_the_last_words_of_a_post_init_are_a_problem_too():
    assert "fp16" in problems([*TRAIN, "--fp16", "--bf16", "--use_cpu"])


def test_settings_that_would_be_ignored_are_refused():
    assert "`resume`" in problems([*TRAIN, "--resume_from_checkpoint", "o/checkpoint-5"])
    with pytest.raises(ConfigError, match="hf-ewc evaluate"):
        parse_training("train", [*TRAIN, "--eval_strategy", "steps"], TrainScript)


def test_streaming_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="max_steps"):
        parse_training("train", [*TRAIN, "--streaming"], TrainScript)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_successor_exists_and_no_removed_key_does(command):
    known = {field.name for kind in COMMANDS[command] for field in dataclasses.fields(kind)}
    everywhere = {field.name for kinds in COMMANDS.values() for kind in kinds for field in dataclasses.fields(kind)}
    for old, (new, _) in RENAMED.items():
        assert new is None or new in everywhere
        # the only one that SFTConfig still has: there it is read by scripts, so that here it would be ignored silently
        assert new not in known or old not in known or old == "resume_from_checkpoint"
    assert len(known) == sum(len([f for f in dataclasses.fields(kind) if f.init]) for kind in COMMANDS[command])


def test_model_settings_reach_the_loader():
    script, args = parse_training("train", [*TRAIN, "--revision", "abc", "--attn_implementation", "eager"], TrainScript)
    assert script.model == "m"
    assert args.model_init_kwargs == {"revision": "abc", "dtype": "float32", "attn_implementation": "eager"}
