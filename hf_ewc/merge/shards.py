"""Safetensors files that are written piece by piece, in the layout of others; and what lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..artifact import BaseModel, files, fit
from ..errors import DataError
from ..files import BESIDE_WEIGHTS
from ..hub import fetch
from .formula import FLOATS, Mover, finite, label_of, pieces, sound

INDEX = "model.safetensors.index.json"
BLOCK = 8 << 20


class Adapted:
    """
    The weights of the adapted model as they lie in its files: keys, which parameter each one is, and their values.

    Args:
        model ([`BaseModel`]): with its folder.
        shapes (`Mapping[str, tuple[int, ...]]`): of its parameters.
        owners (`Mapping[str, str]`): key → parameter.

    Raises:
        [`DataError`]: keys that are no names of parameters, quantised weights, shapes that the config does not announce.
    """

    def __init__(self, model: BaseModel, shapes: Mapping[str, tuple[int, ...]], owners: Mapping[str, str]) -> None:
        assert model.folder is not None
        self.folder, self.label, self.names = model.folder, label_of("adapted", model), list(model.files_sha256)
        self.files = files.TensorFiles(self.folder / name for name in self.names)
        headers = self.files.headers
        self.owners = {key: owners[key] for key in headers if key in owners}
        self.key_of = {name: key for key, name in reversed(self.owners.items())}  # the one that stands for tied copies
        self.key_of |= {name: name for name in shapes if name in headers}
        if absent := [name for name in shapes if name not in self.key_of]:
            raise DataError(
                f"{self.label} stores its weights under names or in pieces that transformers changes while it loads them: "
                f"{absent[0]} is a parameter, and none of its files' {len(headers)} tensors. Write it under its parameters' "
                "names, and merge that:\n    AutoModelForCausalLM.from_pretrained(MODEL, dtype='auto').save_pretrained(FOLDER, "
                "save_original_format=False)\nNothing was written."
            )
        if packed := [key for key in self.owners if headers[key][0] not in FLOATS]:
            raise DataError(
                f"{len(packed)} weights of {self.label} are quantised ({packed[0]} is {headers[packed[0]][0]}), and such "
                "numbers cannot be averaged. Take the model in float32 or bfloat16. Nothing was written."
            )
        stored = {key: headers[key][1] for key in self.owners}
        if rows := fit.parameter_rows(stored, {key: shapes[name] for key, name in self.owners.items()}):
            raise DataError(
                f"the files of {self.label} do not fit its config.json.\n{fit.table(rows, 'files', 'config')}\n"
                "Copy or download it again. Nothing was written."
            )

    def merged(self, key: str, mover: Mover, dtype: torch.dtype | None) -> Iterable[Tensor]:
        """The new values of a key, one piece after the other."""
        name, main = self.owners[key], self.key_of[self.owners[key]]
        for index in pieces(self.files.headers[key][1]):
            theta = sound(self.files.read(key, index), key, self.label)
            if key != main and not torch.equal(theta, self.files.read(main, index)):
                raise DataError(
                    f"the config of {self.label} ties {key} to {main}, and its files hold two different tables. If they are "
                    "meant to differ, set `tie_word_embeddings` to false in its config.json; else load it and save it again. "
                    "Nothing was written."
                )
            out = mover.move(name, index, theta, dtype or theta.dtype, counted=key == main)
            if not finite(out):
                raise DataError(
                    f"{key} would hold numbers that {str(out.dtype).removeprefix('torch.')} cannot, so that the merge would be "
                    "infinite there. Set `dtype: float32`. Nothing was written."
                )
            yield out


def write_shard(adapted: Adapted, name: str, path: Path, mover: Mover, dtype: torch.dtype | None) -> int:
    """
    Write one file with the keys, the order and the metadata of the adapted model's file `name`. Tensors that are no parameters
    (buffers) are copied.

    safetensors itself writes a file only from all of its tensors at once, and a file may hold a whole model: its format is a
    length of 8 bytes, a header in JSON, and the tensors one after the other.

    Returns:
        `int`: bytes of tensors.
    """
    with open(adapted.folder / name, "rb") as source, open(path, "xb") as out:
        size = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(size))
        old = {key: entry for key, entry in header.items() if key != "__metadata__"}
        code = next((code for code, each in FLOATS.items() if each == dtype), None)
        new = {key: code if code and key in adapted.owners else entry["dtype"] for key, entry in old.items()}
        order = sorted(old, key=lambda key: old[key]["data_offsets"])
        if code:  # larger items first, as safetensors has it: then each tensor begins at a multiple of its item's size
            order.sort(key=lambda key: -_itemsize(old[key], new[key]))
        layout, end = {}, 0
        for key in order:
            begin, end = end, end + prod(old[key]["shape"]) * _itemsize(old[key], new[key])
            layout[key] = {"dtype": new[key], "shape": old[key]["shape"], "data_offsets": [begin, end]}
        layout = {**{key: header[key] for key in header if key not in old}, **layout}
        data = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
        data += b" " * (-len(data) % 8)
        out.write(len(data).to_bytes(8, "little") + data)
        for key in order:
            if key in adapted.owners:
                for piece in adapted.merged(key, mover, dtype):
                    out.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                begin, stop = old[key]["data_offsets"]
                _copy_bytes(source, 8 + size + begin, stop - begin, out)
        return end


def _itemsize(entry: Mapping[str, Any], code: str) -> int:
    """Bytes of an entry of a tensor, in its own dtype or in the one that it gets."""
    if code in FLOATS:
        return FLOATS[code].itemsize
    begin, end = entry["data_offsets"]
    return (end - begin) // max(1, prod(entry["shape"]))


def _copy_bytes(source: BinaryIO, start: int, length: int, out: BinaryIO) -> None:
    source.seek(start)
    while length > 0:
        block = source.read(min(length, BLOCK))
        if not block:
            raise DataError(f"'{source.name}' ends before its header says. Copy or download it again. Nothing was written.")
        out.write(block)
        length -= len(block)


def write_beside(adapted: BaseModel, folder: Path, dtype: str | None, size: int) -> None:
    """Index, config, tokenizer and chat template of the adapted model; `size` are the bytes of all tensors."""
    source = adapted.folder
    assert source is not None
    if adapted.revision is not None:  # of a model on the Hub, no more than what loading it needs lies in the cache yet
        source = fetch(adapted.id, "model", adapted.revision, ["config.json", INDEX, *BESIDE_WEIGHTS])
    for path in sorted({path for pattern in BESIDE_WEIGHTS for path in source.glob(pattern) if path.is_file()}):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    config, index = (source / "config.json").read_text(encoding="utf-8"), source / INDEX
    if dtype is not None:
        config = json.dumps(_with_dtype(json.loads(config), dtype), indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    if list(adapted.files_sha256) != ["model.safetensors"]:
        content = json.loads(index.read_text(encoding="utf-8"))
        if dtype is not None and "total_size" in content.get("metadata", {}):
            content["metadata"]["total_size"] = size
        (folder / INDEX).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config with another dtype for its weights, also in the parts of a model of several."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }
