"""The settings of a release, and what of them can be judged without the Hub."""

from pathlib import Path

import pytest

from hf_ewc.cli.options import parse
from hf_ewc.config import EvaluationConfig, EWCConfig
from hf_ewc.errors import ConfigError
from hf_ewc.publish import ReleaseConfig
from hf_ewc.publish.release_plan import account_problems

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDERS = ["--fisher", "runs/fisher", "--checkpoint", "runs/train"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/release.yaml")), ids=lambda path: path.parent.name)
def test_the_recipes_release_what_the_others_make(path):
    from hf_ewc.cli.evaluate import EvaluateScript
    from hf_ewc.cli.train import TrainScript, parse_training

    (config,) = parse("push release", ["--config", str(path)], ReleaseConfig)
    _, args = parse_training("train", ["--config", str(path.with_name("train.yaml")), "--use_cpu"], TrainScript)
    script, _ = parse("evaluate", ["--config", str(path.with_name("evaluate.yaml"))], EvaluateScript, EvaluationConfig)
    assert isinstance(args, EWCConfig)
    assert (config.fisher, config.checkpoint) == (args.fisher, args.output_dir)
    assert config.checkpoint in script.model
    assert config.results == script.output
    assert config.private  # nobody publishes by copying a command


def test_private_is_the_default_and_false_is_read():
    assert parse("push release", FOLDERS, ReleaseConfig)[0].private
    for words in (["--private", "false"], ["--no-private"], ["--private=no"]):
        assert not parse("push release", [*FOLDERS, *words], ReleaseConfig)[0].private


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fisher_repo", "two words"),
        ("fisher_repo", "a/b/c"),
        ("checkpoint_repo", "-dash"),
        ("checkpoint_repo", "https://huggingface.co/me/model"),
        ("space_repo", "my space"),
        ("space_repo", "me/space@v1"),
        ("base_repo", "a/b/c@v1"),
        ("namespace", "me/model"),
        ("namespace", ""),
        ("collection", " "),
    ],
)
def test_names_that_no_hub_takes_are_problems(setting, value):
    with pytest.raises(ConfigError, match=f"`{setting}") as caught:
        parse("push release", [*FOLDERS, f"--{setting}={value}"], ReleaseConfig)
    assert value in str(caught.value)


@pytest.mark.parametrize("value", ["model", "me/model", "Model_1.5-x"])
def test_names_with_and_without_their_owner_are_taken(value):
    (config,) = parse("push release", [*FOLDERS, "--checkpoint_repo", value, "--language", "lt", "en"], ReleaseConfig)
    assert (config.checkpoint_repo, config.language) == (value, ["lt", "en"])


def test_the_base_may_be_named_at_a_revision():
    for value in ("base", "me/base", "me/base@v1"):
        assert parse("push release", [*FOLDERS, "--base_repo", value], ReleaseConfig)[0].base_repo == value


def test_a_token_is_no_setting():
    with pytest.raises(ConfigError, match="`token`"):
        parse("push release", [*FOLDERS, "--token", "hf_x"], ReleaseConfig)


def test_what_the_token_may_not_do_is_said_before_anything_is_sent():
    orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
    who = {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": "write"}}}
    assert account_problems(who, ["me", "lab"]) == []
    (club,) = account_problems(who, ["me", "club"])
    assert "'club', but to me, lab" in club
    (role,) = account_problems({**who, "auth": {"accessToken": {"role": "read"}}}, ["me"])
    assert "may only read" in role
    assert account_problems({"name": "me", "auth": {"type": "oauth"}}, ["me"]) == []
