"""Open a Fisher on the Hub without downloading it: all checks that do not need its values come first, those of values later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ..errors import FisherFormatError
from ..hub import RemoteFile, fetch_file, remote_files
from .base import pickles_among
from .codec import CODECS, Codec
from .files import Index, Reader, TensorFiles
from .locate import fetch_manifest
from .manifest import Manifest
from .remote import RemoteTensors
from .verify import INDEX, SHARD, _damaged, _header_problems, _index_problems, _stop, read_manifest


def open_streamed(
    repo_id: str, commit: str, token: str | bool | None = None, cache_dir: str | Path | None = None
) -> tuple[Manifest, Reader, Reader | None]:
    """
    Open a Fisher on the Hub without downloading its tensors. What [`open_verified`] checks is checked here, too, except for two
    things that would need all bytes:

    - The hash of each file is the one under which the Hub lists it. That the content has it rests on the Hub, which
      addresses its storage by hash, and in transit on TLS; nothing is hashed on this machine.
    - Values are checked when they are read: a part that is NaN, infinite or negative is refused then.

    Args:
        repo_id (`str`): dataset repository.
        commit (`str`): 40 hex digits; a branch could move between two reads.
        token (`str` or `bool`, *optional*), cache_dir (`str` or `Path`, *optional*): as for `hf_hub_download`. Manifest and
            index are cached.

    Returns:
        `tuple`: the manifest, the function that reads (parts of) values, and the one that reads the anchor, if one is stored.

    Raises:
        [`FisherFormatError`]: with everything that is wrong.
        [`HubError`]: when the Hub refuses, or cannot be reached.
    """
    source = f"{repo_id}@{commit[:7]}"
    listed = remote_files(repo_id, "dataset", commit, token)
    _stop(source, [f"{name} is a pickle, which can run any code when it is read" for name in pickles_among(listed)])
    path = fetch_manifest(repo_id, commit, token, cache_dir)
    manifest, codec = read_manifest(path, source)
    _stop(source, _listing_problems(listed, manifest))
    index = fetch_file(repo_id, "dataset", commit, INDEX, token, cache_dir)
    try:
        files = RemoteTensors(listed[name] for name in manifest.storage.shards)
        stored = manifest.fold and manifest.fold.anchor
        anchor = RemoteTensors(listed[name] for name in stored) if stored else None
    except SafetensorError as error:
        raise _damaged(source, [str(error)]) from None
    problems = _header_problems(manifest, codec, files) + _index_problems(index.parent, files)
    if anchor:  # the same shapes as F has when it is stored in float32
        problems += [f"anchor: {problem}" for problem in _header_problems(manifest, CODECS["float32"], anchor)]
    _stop(source, problems)
    return manifest, _checked(codec, files, source), _finite(anchor, source) if anchor else None


def _listing_problems(listed: Mapping[str, RemoteFile], manifest: Manifest) -> list[str]:
    """Files of the manifest against the files of the commit."""
    recorded = manifest.files
    found = [f"{name} is not a shard's name" for name in recorded if not SHARD.fullmatch(name)]
    if found or not recorded:
        return found or ["storage.shards is empty"]
    for name, shard in recorded.items():
        file = listed.get(name)
        if file is None:
            found.append(f"{name} is missing")
        elif file.size != shard.size:
            found.append(f"{name} has {file.size:,} bytes, recorded are {shard.size:,}; was an upload cut off?")
        elif file.sha256 is None:
            found.append(f"{name} is no LFS or Xet file there, so that its hash is unknown: load it without `streaming=True`")
        elif file.sha256 != shard.sha256:
            found.append(f"{name} has sha256 {file.sha256}, recorded is {shard.sha256}: bytes of it were changed")
    extra = sorted(name for name in listed if name.endswith(".safetensors") and name not in recorded)
    found += [f"{name} is not in the manifest; it may be left over from another Fisher" for name in extra]
    return found + ([] if INDEX in listed else [f"{INDEX} is missing"])


def _checked(codec: Codec, files: TensorFiles, source: str) -> Reader:
    """Decode, and refuse what is no Fisher. The codec judges the same stored parts that the values were decoded from."""

    def read(name: str, index: Index | None = None) -> Tensor:
        parts: dict[str, Tensor] = {}

        def stored(key: str, at: Index | None = None) -> Tensor:
            parts[key] = files.read(key, at)
            return parts[key]

        values = codec.decode(name, stored, index)
        _refuse(source, codec.problem(name, lambda key, _: parts[key]), index)
        return values

    return read


def _finite(anchor: TensorFiles, source: str) -> Reader:
    def read(name: str, index: Index | None = None) -> Tensor:
        values = anchor.read(name, index)
        bad = int((~values.isfinite()).sum())
        _refuse(source, f"the anchor of {name} has {bad} values that are NaN or infinite" if bad else None, index)
        return values

    return read


def _refuse(source: str, problem: str | None, index: Index | None) -> None:
    if problem:
        where = f" in the part {index} that was read" if index else ""
        raise FisherFormatError(
            f"the Fisher '{source}' cannot be used: {problem}{where}. Its files are the ones that its manifest records, so it "
            "was damaged before it was pushed. Take another revision, or estimate it again (`hf-ewc fisher …`)."
        )
