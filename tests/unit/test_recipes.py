"""Every recipe parses with today's settings: no unknown, removed or mistyped key, and no contradiction."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_ewc.cli.evaluate import EvaluateScript
from hf_ewc.cli.fisher import FisherScript, beside_output
from hf_ewc.cli.options import parse
from hf_ewc.cli.sweep import SweepScript
from hf_ewc.cli.train import TrainScript, parse_training
from hf_ewc.config import EvaluationConfig, FisherConfig
from hf_ewc.publish import ReleaseConfig

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate_configs")


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_parses(path):
    argv = ["--config", str(path)]
    if path.stem.startswith("fisher"):
        parse("fisher", argv, FisherScript, FisherConfig, defaults=beside_output)
    elif path.stem == "release":
        parse("push release", argv, ReleaseConfig)
    elif path.stem == "evaluate":
        parse("evaluate", argv, EvaluateScript, EvaluationConfig)
    else:  # `use_cpu`, as transformers refuses `bf16: true` on a machine without GPU
        parse_training(path.stem, [*argv, "--use_cpu"], {"train": TrainScript, "sweep": SweepScript}[path.stem])


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODELS}), ids=lambda folder: folder.name)
def test_recipe_folder_is_complete(folder):
    assert {path.stem for path in folder.glob("*.yaml")} >= {"fisher", "train", "evaluate", "sweep"}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Hardware:")
    for path in folder.glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# Hardware:")
        command = "push release" if path.stem == "release" else path.stem.partition("-")[0]
        assert f"hf-ewc {command} --config recipes/{folder.name}/{path.name}" in readme


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODELS}), ids=lambda folder: folder.name)
def test_the_recipes_of_a_folder_belong_together(folder):
    fisher, train, evaluate, sweep = (
        yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("fisher", "train", "evaluate", "sweep")
    )
    assert train["fisher"] == sweep["fisher"] == fisher["output_dir"]
    assert fisher["model"] == train["model"] == sweep["model"] == evaluate["base"]
    assert fisher.get("revision") == train.get("revision") == sweep.get("revision") == evaluate.get("revision")
    assert train["output_dir"] in evaluate["model"]
    assert evaluate["texts"] == sweep["texts"]
    assert fisher["dataset"] not in evaluate["questions"].values()


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
