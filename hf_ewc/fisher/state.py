"""The running sums of an estimate on disk, so that a killed run continues bitwise where it stood."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..files import write_atomically

STATE = "estimate.json"


class RunningState:
    """
    Sums of squares after the first `position` examples, which of those were dropped, and what else is followed beside them.

    A save is atomic, `kill -9` and a full disk included: the sums go to a file of a new name, and only then is the small
    `estimate.json`, which names the valid file, replaced in one rename. The file before is deleted last.

    Args:
        folder (`Path`, *optional*):
            Where to write; room for two copies of the model in float32 is needed. `None` keeps nothing on disk, so that a
            rollback starts over at zero.
        identity (`dict[str, Any]`):
            What the sums are of (weights, token ids, settings). A state with another identity is refused.
        resume (`bool`, *optional*, defaults to `False`):
            Continue from `folder`. Without a state in it, the estimate begins; with one and no `resume`, that state is not
            overwritten.

    Raises:
        [`ConfigError`]: when the folder's state belongs to another estimate (both values are shown), is unreadable, or is in
        the way.
    """

    def __init__(self, folder: str | Path | None, identity: Mapping[str, Any], resume: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.identity = dict(identity)
        self.position = 0
        self.dropped: list[int] = []
        self._file: str | None = None
        if self.folder is not None and (self.folder / STATE).exists():
            self._open(self.folder, resume)

    def _open(self, folder: Path, resume: bool) -> None:
        try:
            found = json.loads((folder / STATE).read_text(encoding="utf-8"))
            position, dropped, file, identity = (found[key] for key in ("position", "dropped", "file", "identity"))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"`work_dir` '{folder}' holds a damaged {STATE} ({error}). Delete the folder and begin again."
            ) from error
        if not resume:
            raise ConfigError(
                f"`work_dir` '{folder}' holds an estimate that stands at example {position}. Set `resume: true` to continue "
                "it, or name another folder to begin a new one. Nothing was overwritten."
            )
        changed = [key for key in self.identity if identity.get(key) != self.identity[key]]
        if changed:
            lines = (f"    {key:<12} then {identity.get(key)}   now {self.identity[key]}" for key in changed)
            raise ConfigError(
                f"the estimate in `work_dir` '{folder}' cannot be continued with other settings; the sums would mix both:\n"
                + "\n".join(lines)
                + "\nRestore them, or begin a new estimate in another `work_dir`."
            )
        self.position, self.dropped, self._file = position, dropped, file

    def load(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Set `sums`, in place, to what was last saved, and return the other tensors that were saved with them. Where nothing was:
        zeros, nothing, and `position` 0.
        """
        if self.folder is None or self._file is None:
            self.position, self.dropped = 0, []
            for total in sums.values():
                total.zero_()
            return {}
        try:
            with safe_open(self.folder / self._file, "pt") as file:
                for name, total in sums.items():
                    total.copy_(file.get_tensor(name))
                return {name: file.get_tensor(name) for name in file.keys() if name not in sums}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"the running sums {self._file} in `work_dir` '{self.folder}' cannot be read ({error}). "
                "Delete the folder and begin again."
            ) from error

    def save(
        self,
        sums: Mapping[str, Tensor],
        position: int,
        dropped: list[int],
        beside: Mapping[str, Tensor] | None = None,
        agreed: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Record `sums` as those of the first `position` examples without the `dropped` ones, and other tensors beside them.

        `agreed` is called when the new sums lie on the disk, before they become the valid ones: there, processes whose sums
        belong together wait for each other. Whoever is killed then, `adopt` brings them to one position again.
        """
        self.position, self.dropped = position, list(dropped)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = f"sums-{position}.safetensors"
        path = self.folder / self._file
        save_file({name: tensor.contiguous() for name, tensor in {**(beside or {}), **sums}.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        agreed()
        self._point_to(path)

    def adopt(self, position: int, dropped: list[int]) -> None:
        """Go on from sums that another process made valid when this one, which had written its own, was killed."""
        if self.folder is None or position == self.position:
            return
        self.position, self.dropped, self._file = position, list(dropped), f"sums-{position}.safetensors"
        self._point_to(self.folder / self._file)

    def _point_to(self, path: Path) -> None:
        assert self.folder is not None
        found = {"position": self.position, "dropped": self.dropped, "file": path.name, "identity": self.identity}
        write_atomically(self.folder / STATE, json.dumps(found, indent=2))
        for old in self.folder.glob("sums-*.safetensors"):  # the one before, and what a killed run left behind
            if old != path:
                old.unlink()


def refuse_other_processes(folder: Path, size: int) -> None:
    """Raise a [`ConfigError`] when the sums in `folder` are those of another number of processes than `size`."""
    found = {int(path.parent.name.rsplit("-", 1)[1]) for path in folder.glob(f"process-*-of-*/{STATE}")}
    found |= {1} if (folder / STATE).exists() else set()
    if found and size not in found:
        raise ConfigError(
            f"`work_dir` '{folder}' holds the sums of {min(found)} process{'es' if min(found) > 1 else ''}, and {size} "
            f"{'are' if size > 1 else 'is'} running: they share the examples out in another way. Start as many as before, or "
            "begin a new estimate in another `work_dir`. Nothing was changed."
        )
