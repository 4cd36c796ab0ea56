"""What a page compares: flags, `space.yaml` and a Space's variables, and what is wrong with them, in plain words."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hf_ewc.compare import SPACE_FILE, CompareConfig, app_folder
from hf_ewc.errors import ConfigError

NAMES = [item.name for item in fields(CompareConfig)]


def of_space(folder, text=None, **variables):
    if text is not None:
        (folder / SPACE_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    return CompareConfig.of_space(folder, variables)


def test_the_file_holds_the_settings(tmp_path):
    config = of_space(tmp_path, "base: ona/base\nadapted: ona/lt\nadapted_revision: v1\nslots: 3\n")
    assert config == CompareConfig("ona/base", "ona/lt", adapted_revision="v1", slots=3)
    assert config.problems() == []


def test_without_a_file_variables_are_enough(tmp_path):
    config = of_space(tmp_path, HF_EWC_BASE="ona/base", HF_EWC_ADAPTED="ona/lt")
    assert config == CompareConfig("ona/base", "ona/lt")
    assert of_space(tmp_path) == CompareConfig()


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_goes_over_each_setting_of_the_file(tmp_path, name):
    value, other = (2, 7) if name == "slots" else ("of the file", "of the variable")
    config = of_space(tmp_path, f"{name}: {value}\n", **{f"HF_EWC_{name.upper()}": str(other)})
    assert getattr(config, name) == other
    assert getattr(of_space(tmp_path, HF_EWC_SOMETHING="else", BASE="mine"), name) == value
    assert getattr(of_space(tmp_path, **{f"HF_EWC_{name.upper()}": ""}), name) == value  # an empty one is none


def test_the_environment_is_asked_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EWC_BASE", "ona/from-the-environment")
    assert CompareConfig.of_space(tmp_path).base == "ona/from-the-environment"
    assert CompareConfig.of_space(tmp_path, {}).base is None


def test_unknown_settings_are_named_with_those_that_are_known(tmp_path):
    with pytest.raises(ConfigError, match=r"no setting 'adaptd', 'token'\. Known: .*adapted.*votes_repo"):
        of_space(tmp_path, "base: ona/base\nadaptd: ona/lt\ntoken: hf_x\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- base\n- adapted\n", "list"),
        ("base", "str"),
        ("42", "int"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=f"'space.yaml' must be a mapping of settings, and it is a {said}"):
        of_space(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("base: [ona/base\nadapted: x", id="no end"),
        pytest.param("base: 'ona\n", id="no quote"),
        pytest.param("base: a\n\tadapted: b", id="tab"),
        pytest.param(b"base: \xff\xfe", id="not UTF-8"),
        pytest.param("base: \0", id="NUL"),
    ],
)
def test_a_broken_file_is_told_in_words(tmp_path, text):
    with pytest.raises(ConfigError, match=r"^'space\.yaml' is no YAML that can be read: \S[^\n]+$"):
        of_space(tmp_path, text)


def test_an_empty_file_is_like_none(tmp_path):
    assert of_space(tmp_path, "# nothing yet\n", HF_EWC_BASE="ona/base") == CompareConfig("ona/base")


@pytest.mark.parametrize("slots", ["many", "-1", "2.5", "1e3", " "])
def test_a_variable_of_slots_that_is_no_number_is_refused(tmp_path, slots):
    with pytest.raises(ConfigError, match=rf"HF_EWC_SLOTS must be a whole number from 1, and it is '{slots}'"):
        of_space(tmp_path, HF_EWC_SLOTS=slots)


@pytest.mark.parametrize("slots", [0, -3, True, 2.5, "2", None])
def test_slots_that_serve_nobody_are_a_problem(slots):
    (problem,) = CompareConfig("ona/base", "ona/lt", slots=slots).problems()
    assert problem == f"`slots: {slots}` must be a whole number from 1."


def test_slots_of_zero_in_the_variable_are_a_problem(tmp_path):
    (problem,) = of_space(tmp_path, HF_EWC_BASE="a/b", HF_EWC_ADAPTED="a/c", HF_EWC_SLOTS="0").problems()
    assert "`slots: 0`" in problem


@pytest.mark.parametrize(
    ("base", "adapted", "missing"),
    [("", "ona/lt", ["base"]), (None, "ona/lt", ["base"]), ("ona/base", None, ["adapted"]), ("ona/base", "ona/lt", [])],
)
def test_one_model_without_the_other_is_a_problem(base, adapted, missing):
    problems = CompareConfig(base, adapted).problems()
    assert [problem.split("`")[1] for problem in problems] == missing
    assert all("missing" in problem for problem in problems)
    assert CompareConfig().problems() == []  # a page on this machine shows the demo's models


@pytest.mark.parametrize("dtype", ["int8", "float64x", "", "nn", None])
def test_a_dtype_that_weights_do_not_have_is_a_problem(dtype):
    (problem,) = CompareConfig("ona/base", "ona/lt", dtype=dtype).problems()
    assert f"`dtype: {dtype}`" in problem
    assert "bfloat16" in problem


@pytest.mark.parametrize("name", ["votes", "a/b/c", "https://huggingface.co/datasets/a/b", "a/b ", "-a/b", "../b"])
def test_a_votes_repo_that_is_none_is_a_problem(name):
    (problem,) = CompareConfig("ona/base", "ona/lt", votes_repo=name).problems()
    assert f"`votes_repo: {name}`" in problem


@pytest.mark.parametrize("name", ["base", "adapted", "plain", "fisher"])
def test_a_revision_of_a_folder_is_a_problem(tmp_path, name):
    given = {"base": "ona/base", "adapted": "ona/lt", name: str(tmp_path), f"{name}_revision": "main"}
    (problem,) = CompareConfig(**given).problems()
    assert problem.startswith(f"`{name}_revision` is for models on the Hub")
    assert CompareConfig(**{**given, f"{name}_revision": None}).problems() == []
    assert CompareConfig(**{**given, name: "ona/other"}).problems() == []


def test_all_problems_come_together(tmp_path):
    config = CompareConfig(None, str(tmp_path), adapted_revision="main", slots=0, votes_repo="votes")
    assert len(config.problems()) == 4


def test_every_setting_has_a_line_for_the_help():
    assert all(item.metadata.get("help") for item in fields(CompareConfig))


def test_the_page_is_beside_the_package():
    assert (app_folder() / "app.py").is_file()
    assert (app_folder() / "strings" / "lt.json").is_file()


@pytest.mark.parametrize("text", ["adapted_revision: 20261121", "adapted: [ona/lt]", "base: {id: ona/base}", "fisher: true"])
def test_what_yaml_reads_as_something_else_than_text_is_a_problem(tmp_path, text):
    config = of_space(tmp_path, f"{text}\n")
    config.base, config.adapted = config.base or "ona/base", config.adapted or "ona/lt"
    (problem,) = config.problems()
    assert f"`{text.partition(':')[0]}" in problem
