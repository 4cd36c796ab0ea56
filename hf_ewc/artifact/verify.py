"""Every check of a Fisher folder before a single value is used: all of it is right, or nothing is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError

from ..errors import FisherFormatError
from .anchor import anchor_problems
from .base import SINGLE, pickles_in
from .codec import CODECS, Codec
from .files import TensorFiles, sha256_file
from .manifest import Manifest

MANIFEST, INDEX, CARD, SUMMARY = "fisher_config.json", "fisher.safetensors.index.json", "README.md", "summary/params.parquet"
SHARD = re.compile(r"(fisher|anchor)-\d{5}-of-\d{5}\.safetensors")


def open_verified(folder: Path, source: str) -> tuple[Manifest, TensorFiles]:
    """
    Check a folder from the outside in: manifest, files, hashes, headers, values. Each stage reports all of its
    problems at once; a failed one ends the check, as the next could only repeat it. Values are read tensor by tensor,
    never the whole.

    Args:
        folder (`Path`): where it lies.
        source (`str`): how the user called it, for messages.

    Raises:
        [`FisherFormatError`]: with everything that is wrong.
    """
    if not (folder / MANIFEST).exists():
        model = (folder / SINGLE).exists() or (folder / "config.json").exists()
        hint = "It is a model: name the folder that `hf-ewc fisher` wrote for it." if model else ""
        raise FisherFormatError(
            f"'{source}' holds no {MANIFEST}, so it is not a Fisher. {hint or 'Estimate one with `hf-ewc fisher …`.'} "
            "Nothing was loaded."
        )
    _stop(source, [f"{name} is a pickle, which can run any code when it is read" for name in pickles_in(folder)])
    manifest, codec = read_manifest(folder / MANIFEST, source)
    _stop(source, _file_problems(folder, manifest))
    _stop(source, _hash_problems(folder, manifest))
    try:
        files = TensorFiles(folder / name for name in manifest.storage.shards)
    except SafetensorError as error:
        raise _damaged(source, [str(error)]) from None
    _stop(source, _header_problems(manifest, codec, files))
    _stop(source, _index_problems(folder, files))
    problems = []
    for name in manifest.parameters:
        problem = codec.problem(name, files.read)
        if problem:
            problems.append(problem)
    _stop(source, problems + anchor_problems(folder, manifest))
    return manifest, files


def read_manifest(path: Path, source: str) -> tuple[Manifest, Codec]:
    """A manifest that makes sense in itself, and the codec that it names."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FisherFormatError(f"{MANIFEST} of '{source}' is damaged ({error}). Copy it again. Nothing was loaded.") from None
    manifest = Manifest.from_json(text, source)
    codec = CODECS.get(manifest.storage.codec)
    if codec is None:
        _stop(source, [f"codec '{manifest.storage.codec}' is not one of {', '.join(CODECS)}; a newer hf_ewc may read it"])
    assert codec is not None
    if manifest.storage.block != codec.block:
        _stop(source, [f"storage.block is {manifest.storage.block}, but {codec.name} has {codec.block}"])
    return manifest, codec


def _file_problems(folder: Path, manifest: Manifest) -> list[str]:
    shards = manifest.files
    found = [f"{name} is not a shard's name" for name in shards if not SHARD.fullmatch(name)]  # "../../model" must lead nowhere
    if found or not shards:
        return found or ["storage.shards is empty"]
    for name, shard in shards.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != shard.size:
            found.append(f"{name} has {path.stat().st_size:,} bytes, recorded are {shard.size:,}; was a copy cut off?")
    extra = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in shards)
    found += [f"{name} is not in the manifest; it may be left over from another Fisher" for name in extra]
    if not (folder / INDEX).is_file():
        found.append(f"{INDEX} is missing")
    return found


def _hash_problems(folder: Path, manifest: Manifest) -> list[str]:
    found = []
    for name, shard in manifest.files.items():
        actual = sha256_file(folder / name)
        if actual != shard.sha256:
            found.append(f"{name} has sha256 {actual}, recorded is {shard.sha256}: bytes of it were changed")
    return found


def _header_problems(manifest: Manifest, codec: Codec, files: TensorFiles) -> list[str]:
    expected = {}
    for name, shape in manifest.parameters.items():
        expected.update(codec.layout(name, shape))
    found = []
    for key, (dtype, shape) in expected.items():
        if key not in files.headers:
            found.append(f"{key} {shape} is in the manifest but in no file")
        elif files.headers[key] != (dtype, shape):
            actual_dtype, actual_shape = files.headers[key]
            found.append(f"{key} is {actual_dtype} {actual_shape} in {files.home[key].name}, recorded is {dtype} {shape}")
    return found + [
        f"{key} is in {files.home[key].name} but not in the manifest" for key in files.headers if key not in expected
    ]


def _index_problems(folder: Path, files: TensorFiles) -> list[str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        recorded = set(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{INDEX} is not an index of tensors ({error!r})"]
    actual = {(key, path.name) for key, path in files.home.items()}
    return [f"{INDEX} says {key} is in {name}, the file says otherwise" for key, name in sorted(recorded - actual)] + [
        f"{INDEX} does not say that {key} is in {name}" for key, name in sorted(actual - recorded)
    ]


def _stop(source: str, problems: list[str]) -> None:
    if problems:
        raise _damaged(source, problems)


def _damaged(source: str, problems: list[str]) -> FisherFormatError:
    listed = "\n".join(f"  - {problem}" for problem in problems[:20])
    more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
    return FisherFormatError(
        f"the Fisher '{source}' is damaged or incomplete:\n{listed}{more}\n"
        "Copy or download it again, or estimate it again (`hf-ewc fisher …`). Nothing was loaded."
    )
