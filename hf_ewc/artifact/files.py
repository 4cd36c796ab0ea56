"""Files that are either whole or absent, and tensors that are read from them slice by slice."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import EWCError

Index = tuple[slice, ...]
Reader = Callable[[str, "Index | None"], Tensor]


def reader_of(tensors: Mapping[str, Tensor]) -> Reader:
    """Read from memory as from files: in whole or in part, and never an alias of what is held."""
    return lambda name, index: (tensors[name][index] if index else tensors[name]).detach().clone()


def sha256_file(path: Path) -> str:
    """Hash a file in pieces of 8 MiB, whatever its size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """
    Yield a new empty sibling of `folder` to write into; on success it takes the place of `folder`, in one rename.

    Whatever fails inside the block (a full disk, an exception, Ctrl-C), `folder` keeps its old state and the
    half-written sibling is deleted. A power cut leaves at most a sibling whose name starts with a dot. Siblings,
    because a rename is atomic only within one file system.
    """
    folder = folder.resolve()  # a symlink stays, what it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    suffix = f"{folder.name}-{secrets.token_hex(4)}"
    fresh, old = folder.with_name(f".tmp-{suffix}"), folder.with_name(f".old-{suffix}")
    fresh.mkdir()  # not `mkdtemp`, whose 0700 would hide the artifact from colleagues
    try:
        yield fresh
        _sync_tree(fresh)
        try:
            if folder.exists():
                os.rename(folder, old)
            os.rename(fresh, folder)
        except BaseException:
            if old.exists():
                os.rename(old, folder)
            raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for root, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(root, name), 0o666 & ~umask)  # safetensors creates its files with 0600
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TensorFiles:
    """
    The tensors of several safetensors files under one roof, read lazily; nothing but the headers is held.

    A file that changes after the headers were read is refused, because what was checked is then no longer what would
    be read. Every `read` returns memory of its own: safetensors hands out views into a mapping of the file, and an
    anchor that is held for a whole training would change (or crash the process) when the file is overwritten in place.

    Args:
        paths (`Iterable[Path]`): the files.

    Raises:
        [`~safetensors.SafetensorError`]: for a damaged or oversized header.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.headers: dict[str, tuple[str, tuple[int, ...]]] = {}  # key -> ("F32" | "BF16" | …, shape)
        self.home: dict[str, Path] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}
        for path in paths:
            self._stamps[path] = _stamp(path)
            try:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                        view = file.get_slice(key)
                        self.headers[key] = (view.get_dtype(), tuple(view.get_shape()))
                        self.home[key] = path
            except SafetensorError as error:
                raise SafetensorError(f"{path.name} is not a whole safetensors file ({error})") from None

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """Return tensor `key`, or its part `index` (slices of the leading dimensions), in the file's dtype."""
        path = self.home[key]
        if not path.exists() or _stamp(path) != self._stamps[path]:
            raise EWCError(
                f"{path.name} in '{path.parent}' was changed or removed after it had been checked, so what it holds now is "
                "unknown. Load it again, and write new results to another folder."
            )
        with safe_open(path, "pt") as file:
            return (file.get_slice(key)[index] if index else file.get_tensor(key)).clone()


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
