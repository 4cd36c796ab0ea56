"""Find a task of lm-evaluation-harness, load its dataset, and tell its splits apart."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset

from ..data import names_a_test_split, resolve_dataset_revision
from ..errors import DataError

logger = logging.getLogger(__name__)

ROLES = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-evaluation-harness' advice in the log (errors show) and progress bars; random numbers as before."""
    harness, state = logging.getLogger("lm_eval"), random.getstate()
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        harness.setLevel(level)
        random.setstate(state)


@cache
def _bundled() -> Any:
    from lm_eval.tasks import TaskManager  # here: it takes a second, and the index of 15,000 tasks five

    return TaskManager()


def find_task(task: str, folder: str | None) -> tuple[Any, Any]:
    """The manager that knows the task, and the task's entry in its index; tasks of the user's come before those bundled."""
    from lm_eval.tasks import TaskManager

    managers, own = [], ""
    if folder is not None:
        if not Path(folder).is_dir():
            raise DataError(f"`task_folder: {folder}` is no folder; relative paths start at {Path.cwd().name}/.")
        managers.append(TaskManager(include_path=folder, include_defaults=False))
        names = ", ".join(managers[0].all_tasks) or "no task"
        own = f" `task_folder` defines {names} (files that are no valid YAML are passed over)."
    if not managers or task not in managers[0].task_index:
        managers.append(_bundled())
    index = managers[-1].task_index
    if task not in index:
        close = difflib.get_close_matches(task, {name for manager in managers for name in manager.all_tasks}, n=5)
        hint = f" Did you mean {', '.join(f'`{name}`' for name in close)}?" if close else ""
        raise DataError(f"lm-evaluation-harness knows no task `{task}`.{hint}{own} `lm-eval ls tasks` lists all.")
    members = _members(task, index)
    if members != [task]:
        shown = ", ".join(members[:60]) + (f" and {len(members) - 60} more" if len(members) > 60 else "")
        mixture = ", ".join(f"{name}: {{probe: lm_eval:{name}}}" for name in members[:2])
        raise DataError(
            f"`{task}` is a group of {len(members)} tasks, and how much each counts is for you to say. Name one of them, or a "
            f"mixture (`probes: {{{mixture}}}`): {shown}."
        )
    return managers[-1], index[task]


def _members(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks that a name stands for: itself, or all those of a tag or of a group of groups."""
    entry = index.get(name)
    if entry is None or entry.kind.name not in ("GROUP", "TAG"):
        return [name]
    inside = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg.get("task") or []
    names = [one if isinstance(one, str) else one.get("task", one.get("group")) for one in inside]
    return [leaf for one in names for leaf in (one if isinstance(one, list) else _members(one, index))]


def refuse_unfit(task: str, settings: Mapping[str, Any]) -> None:
    reasons = {
        "class": "it is a Python class that words its own requests",
        "custom_dataset": "it makes its documents in Python instead of reading a dataset",
        "doc_to_image": "it shows images",
        "doc_to_audio": "it plays sounds",
    }
    for key, reason in reasons.items():
        if settings.get(key) is not None:
            raise DataError(
                f"`{task}` cannot be a probe: {reason} (`{key}`). Write its rows for the `completion` probe instead."
            )
    if settings.get("dataset_path") is None:
        raise DataError(f"`{task}` names no `dataset_path`. Correct the task.")


def load_task_dataset(task: str, settings: Mapping[str, Any]) -> tuple[DatasetDict, str | None]:
    """The task's dataset, as lm-evaluation-harness loads it, and its commit on the Hub."""
    path, name, options = settings["dataset_path"], settings.get("dataset_name"), dict(settings.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)  # scripts are gone from `datasets`
    if not {"data_files", "data_dir"} & set(options):
        options["revision"] = resolve_dataset_revision(path, options.get("revision"))
    try:
        return load_dataset(path=path, name=name, **options), options.get("revision")
    except Exception as error:  # an empty file is a StopIteration
        said = error.__cause__ or error
        local = "data_files" in options or Path(path).exists()
        way = (
            f"Check the file; relative paths start at {Path.cwd().name}/."
            if local
            else "With a connection (and without HF_HUB_OFFLINE and HF_DATASETS_OFFLINE) it is fetched once and kept: "
            f"`python -c \"import datasets; datasets.load_dataset('{path}', {name!r})\"`. Or write a task of your own over "
            "local files (`dataset_path: json`, `dataset_kwargs: {data_files: …}`) into `task_folder`."
        )
        what = f"'{path}'" + (f" ({name})" if name else "")
        raise DataError(f"the dataset {what} of `{task}` cannot be loaded: {type(said).__name__}: {said}. {way}") from error


def shown_name(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path


class Splits:
    """Which split of a task's dataset is what; `there` are the names of those that exist."""

    def __init__(self, task: str, settings: Mapping[str, Any], there: Sequence[str]) -> None:
        self.task, self.there = task, there
        self.roles = {role: settings.get(key) for role, key in ROLES.items()}
        files = (settings.get("dataset_kwargs") or {}).get("data_files") or {}
        files = files if isinstance(files, dict) else {"train": files}
        self.files = {split: [one] if isinstance(one, str) else list(one) for split, one in files.items()}

    def choose(self, wanted: str | None, allow_test: bool) -> str:
        """The split of the documents: as it is named, else as the task uses it, else training, else validation."""
        if wanted is not None:
            split = wanted if wanted in self.there else self.roles.get(wanted) or wanted
        else:
            own = [split for split in (self.roles["train"], self.roles["validation"]) if split is not None]
            fit = [split for split in own if not self.is_test(split)]
            split = next(iter(fit or own or filter(None, [self.roles["test"]])), None) or "train"
        if split not in self.there:
            raise DataError(
                f"{self._dataset} has no split '{split}'; its splits are {', '.join(self.there)}. Set `dataset_split`."
            )
        if allow_test:
            return split
        if self.is_test(split):
            others = [name for name in self.there if not self.is_test(name)]
            raise DataError(
                f"'{split}' of {self._dataset} is a test split. What is measured on it is used for training, so a benchmark "
                f"that is then reported on the same rows would be flattered. Its other splits: {', '.join(others) or 'none'} "
                "(`dataset_split`). Set `allow_test_split: true` if nothing will be reported on it."
            )
        reported = self.roles["test"] or self.roles["validation"]
        if reported is not None and self.same(split, reported):
            logger.warning(
                "lm-evaluation-harness measures `%s` on '%s', the rows of this probe; do not report it afterwards.",
                self.task,
                split,
            )
        for file in filter(names_a_test_split, self.files.get(split, [])):
            logger.warning("By its name, '%s' is a test split; report nothing on it afterwards.", Path(file).name)
        return split

    def of_worked_examples(self, settings: Mapping[str, Any]) -> str | None:
        """The split that the harness draws worked examples from; `None` where the task holds them itself."""
        own = settings.get("fewshot_config") or {}
        split = own.get("split", settings.get("fewshot_split"))
        if split is None and own.get("samples") is None:
            split = next(filter(None, self.roles.values()), None)
        if split is not None and split not in self.there:
            raise DataError(
                f"{self._dataset} has no split '{split}' for worked examples; its splits are {', '.join(self.there)}. Correct "
                "the task's `fewshot_split`."
            )
        return split

    def is_test(self, split: str) -> bool:
        return "test" in split.lower() or (self.roles["test"] is not None and self.same(split, self.roles["test"]))

    def same(self, one: str, other: str) -> bool:
        """Whether two splits are the same rows: by name, or read from one file."""
        ours, theirs = ({Path(file).resolve() for file in self.files.get(split, [])} for split in (one, other))
        return one == other or bool(ours & theirs)

    def files_named(self, split: str) -> str:
        return ", ".join(shown_name(file) for file in self.files.get(split, []))

    @property
    def _dataset(self) -> str:
        return f"the dataset of `{self.task}`"
