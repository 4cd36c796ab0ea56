"""[`CompareConfig`]: what a page compares, from flags, from a file (`space.yaml`) or from the variables of a Space."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .checks import DTYPES, is_repo_id

SPACE_FILE = "space.yaml"
VARIABLE = "HF_EWC_"
"""A Space's variable `HF_EWC_ADAPTED` is the setting `adapted`."""


@dataclass
class CompareConfig:
    """
    What a page compares, and what it may cost.

    Args:
        base, adapted (`str`): folders, or ids on the Hub.
        base_revision, adapted_revision (`str`, *optional*): branch, tag or commit on the Hub.
        plain, plain_revision (`str`, *optional*):
            The same training without EWC (λ = 0), where it is at hand: visitors can put it beside the base instead of the
            adapted model, and see what EWC spared.
        fisher (`str`, *optional*):
            Folder or id on the Hub, for the λ slider and the picture by layer; by default what the adapted model's
            `ewc_state.json` names, where that can be found.
        fisher_revision (`str`, *optional*): branch, tag or commit of the Fisher on the Hub.
        results (`str`, *optional*): `results.json` of `hf-ewc evaluate --base … --output`, a sweep or the demo.
        examples (`str`, *optional*): JSON of the prompts that are offered; see `space_app/examples.json`.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights in memory.
        device (`str`, *optional*): the accelerator if there is one, else the CPU.
        slots (`int`, *optional*, defaults to 2): visitors whose texts are written at the same time; others wait.
        votes_repo (`str`, *optional*): dataset repository that stores blind votes; without it they are only counted.
    """

    base: str | None = field(default=None, metadata={"help": "The model before training: a folder or an id on the Hub."})
    adapted: str | None = field(default=None, metadata={"help": "The model after training."})
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base on the Hub."})
    adapted_revision: str | None = field(default=None, metadata={"help": "The same for the adapted model."})
    plain: str | None = field(default=None, metadata={"help": "The same training without EWC, to show what EWC spared."})
    plain_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    fisher: str | None = field(default=None, metadata={"help": "The Fisher; default: what the adapted model's state names."})
    fisher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Fisher on the Hub."})
    results: str | None = field(default=None, metadata={"help": "results.json, for the table and the front."})
    examples: str | None = field(default=None, metadata={"help": "JSON of the prompts that are offered."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights in memory: float32 or bfloat16."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda or mps; default: what is there."})
    slots: int = field(default=2, metadata={"help": "Visitors whose texts are written at the same time."})
    votes_repo: str | None = field(default=None, metadata={"help": "Dataset repository that stores blind votes."})

    def problems(self) -> list[str]:
        """
        Everything that is wrong by itself, without a look at files or the Hub. That neither model is named is left to the
        caller: a page on this machine then shows the demo's.
        """
        found = []
        if bool(self.base) != bool(self.adapted):
            found.append(f"`{'adapted' if self.base else 'base'}` is missing: a folder, or an id on the Hub.")
        if self.dtype not in DTYPES:
            found.append(f"`dtype: {self.dtype}` is not one of {', '.join(DTYPES)}.")
        if isinstance(self.slots, bool) or not isinstance(self.slots, int) or self.slots < 1:
            found.append(f"`slots: {self.slots}` must be a whole number from 1.")
        if self.votes_repo and not is_repo_id(self.votes_repo):
            found.append(f"`votes_repo: {self.votes_repo}` is no dataset repository on the Hub (`user/name`).")
        for item in fields(self):
            if item.name != "slots" and not isinstance(value := getattr(self, item.name), str | None):
                found.append(f"`{item.name}: {value}` is read as {type(value).__name__}. Put it in quotes.")
                return found
        for name in ("base", "adapted", "plain", "fisher"):
            given = getattr(self, name)
            if getattr(self, f"{name}_revision") and given and Path(given).expanduser().is_dir():
                found.append(f"`{name}_revision` is for models on the Hub, and `{name}: {given}` is a folder. Leave it out.")
        return found

    @classmethod
    def of_space(cls, folder: str | Path, environment: Mapping[str, str] | None = None) -> CompareConfig:
        """
        The settings of a Space: `space.yaml` beside the app, which was committed with it, and over it the Space's variables.

        Raises:
            ConfigError: Unknown settings; no YAML, or no mapping. See [`CompareConfig.problems`] for the rest.
        """
        environment = os.environ if environment is None else environment
        path = Path(folder) / SPACE_FILE
        try:
            given: Any = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"'{SPACE_FILE}' is no YAML that can be read: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict):
            raise ConfigError(f"'{SPACE_FILE}' must be a mapping of settings, and it is a {type(given).__name__}.")
        known = {item.name for item in fields(cls)}
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(
                f"'{SPACE_FILE}' has no setting {', '.join(map(repr, unknown))}. Known: {', '.join(sorted(known))}."
            )
        over = {name: environment[VARIABLE + name.upper()] for name in known if environment.get(VARIABLE + name.upper())}
        if (slots := over.get("slots")) is not None:
            if not slots.isdecimal():
                raise ConfigError(f"the variable {VARIABLE}SLOTS must be a whole number from 1, and it is '{slots}'.")
            over["slots"] = int(slots)  # type: ignore[assignment]
        return cls(**{**given, **over})


def app_folder() -> Path:
    """
    Folder of the page (`app.py` and what belongs to it): in a checkout beside the package, where it was installed otherwise.

    Raises:
        ConfigError: It is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package.parent / "space_app", Path(sysconfig.get_path("data")) / "share" / "hf_ewc" / "space_app"]
    for place in places:
        if (place / "app.py").is_file():
            return place
    searched = " nor ".join(f"'{place}'" for place in places)
    raise ConfigError(f"the page's files are neither in {searched}. Install hf_ewc again, or run this in a checkout of it.")
