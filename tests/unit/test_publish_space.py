"""The files of a Space that can be judged without the Hub: its requirements, its card, and what of the package goes along."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

import hf_ewc
from hf_ewc.compare import CompareConfig, app_folder
from hf_ewc.publish.compared import Compared, Part
from hf_ewc.publish.space import PACKAGE, space_files
from hf_ewc.publish.space_card import preload_line, render_space_card

ROOT = Path(__file__).parents[2]
COMPARED = Compared(
    Part("google/gemma-2-2b", "a" * 40, files=("config.json", "model.safetensors"), open=False),
    Part("me/gemma-2-2b-lt", "b" * 40, files=("config.json", "model.safetensors")),
    Part("me/gemma-2-2b-fisher", "c" * 40, "dataset"),
)


def required() -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (app_folder() / "requirements.txt").read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def reachable(names: list[str]) -> set[str]:
    """These distributions and all that they depend on, as they are installed here."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            lines = map(Requirement, needs)
            todo += [line.name for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
    return found


def test_the_page_s_code_runs_with_its_requirements_alone():
    there = reachable([line.name for line in required()] + ["gradio"])
    modules = {
        module: {dist.lower().replace("_", "-") for dist in dists}
        for module, dists in importlib.metadata.packages_distributions().items()
    }
    absent = sorted(module for module, dists in modules.items() if not dists & there and "hf-ewc" not in dists)
    assert {"lm_eval", "pytest"} <= set(absent)  # so that leaving things out means something
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "import hf_ewc.compare\n"
        "from hf_ewc.compare import *\n"
        "from hf_ewc.merge import pull_back, scale_of\n"
        "from hf_ewc.artifact import FisherInformation\n"
        "from hf_ewc.evaluation import load_results\n"
        "print('loaded')"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "loaded\n", run.stderr[-3000:]


def test_its_lower_bounds_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [Requirement(line) for line in setup["options"]["install_requires"].splitlines() if line]
    ours = {line.name: str(line.specifier) for line in lines}
    wanted = {line.name: str(line.specifier) for line in required()}
    assert wanted.pop("torch") == ""  # ZeroGPU brings its own, which is older than the one that we are tested with
    assert wanted == {name: ours[name] for name in wanted}
    assert "gradio" not in wanted  # `sdk_version`


def test_every_file_of_the_package_goes_along():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = ["*.py", *setup["options.package_data"]["hf_ewc"].split()]
    package = Path(hf_ewc.__file__).parent
    relative = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    wanted = {f"hf_ewc/{name}" for name in relative if any(fnmatch(name, pattern) for pattern in patterns)}
    files = space_files(COMPARED, "me/space")
    assert {"hf_ewc/py.typed", "hf_ewc/compare/pair.py", "hf_ewc/evaluation/tasks/mmlu_letter.yaml"} <= wanted
    assert wanted <= set(files)
    assert not [name for name in files if "__pycache__" in name]


def test_caches_hidden_files_and_screenshots_stay(tmp_path, monkeypatch):
    for name in ("README.md", "app.py", "strings/lt.json", ".env", ".git/config", "screenshots-1/a.png", "__pycache__/a.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((app_folder() / "README.md").read_bytes() if name == "README.md" else b"x")
    monkeypatch.setattr("hf_ewc.publish.space.app_folder", lambda: tmp_path)
    own = {name for name in space_files(COMPARED, "me/space") if not name.startswith("hf_ewc/")}
    assert own == {"README.md", "app.py", "strings/lt.json", "space.yaml"}


def card(config: CompareConfig | None = None, **options) -> SpaceCard:
    template = (app_folder() / "README.md").read_text(encoding="utf-8")
    return SpaceCard(render_space_card(template, COMPARED, config or CompareConfig(), repo_id="me/space", **options))


@pytest.mark.parametrize("title", ["Before: and after", "'quoted' # title", "žodis – слово 🌱"])
def test_any_title_leaves_the_front_matter_whole(title):
    assert card(title=title).data.title == title
    assert f"# {title}\n" in card(title=title).text


def test_the_card_shows_every_variable_and_where_votes_go():
    config = CompareConfig(base="google/gemma-2-2b", votes_repo="me/votes")
    text = card(config).text
    assert "| `HF_EWC_BASE` | `google/gemma-2-2b` |" in text
    assert "| `HF_EWC_SLOTS` | `2` |" in text
    assert "stored in the dataset [me/votes](" in text
    assert "stored nowhere" in card().text


def test_the_template_names_a_gradio_that_the_code_is_for():
    meta = SpaceCard((app_folder() / "README.md").read_text(encoding="utf-8")).data
    assert tuple(map(int, meta.sdk_version.split("."))) >= (6, 31)
    assert (meta.sdk, meta.python_version, meta.app_file) == ("gradio", "3.12", "app.py")
    assert len(meta.short_description) <= 60


def test_a_preload_line_names_what_the_page_reads_and_nothing_else():
    read = ("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    read += ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "ewc_state.json")
    rest = (
        "README.md",
        ".gitattributes",
        "LICENSE",
        "results.json",
        "model.gguf",
        "onnx/config.json",
        "original/tokenizer.model",
    )
    part = Part("me/model", "a" * 40, files=(*rest, *read))
    repo, files, commit = preload_line(part).split(" ")
    assert (repo, files.split(","), commit) == ("me/model", list(read), "a" * 40)
    assert preload_line(COMPARED.base) is None
    assert json.loads(json.dumps(card().data.to_dict()))["preload_from_hub"] == [preload_line(COMPARED.adapted)]


def test_what_is_installed_holds_the_whole_page():
    """In a checkout the page lies beside the package; an installation has what setup.cfg lists, file by file."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = "\n".join(setup["options.data_files"].values()).split()
    files = [path.relative_to(ROOT) for path in (ROOT / "space_app").rglob("*") if path.is_file()]
    there = [path.as_posix() for path in files if not any(part.startswith(("__", "screenshots")) for part in path.parts)]
    assert sorted(listed) == sorted(there)
