"""Tensors of safetensors files on the Hub, read slice by slice: of the files, only the bytes of the slices travel."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..hub import RemoteFile
from .files import Index, TensorFiles

MAX_HEADER = 100_000_000  # as in safetensors
GAP = 256 << 10
"""Rather fetch this many bytes in vain than ask once more: about what 10 MB/s bring in the 25 ms of another request."""
PIECE = 64 << 20
"""Bytes of scratch for a slice of inner dimensions, whatever its size."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class RemoteTensors(TensorFiles):
    """
    The tensors of several safetensors files on the Hub under one roof: like [`TensorFiles`], but nothing is downloaded except
    the headers, and later the slices that are read.

    A slice of the first dimension, which is what each rank of FSDP holds, is one request for exactly its bytes. One of inner
    dimensions is fetched together with what lies between its rows where that is less than [`GAP`], else row by row.

    Args:
        files (`Iterable[RemoteFile]`): the files.

    Raises:
        [`~safetensors.SafetensorError`]: for a damaged or oversized header.
        [`HubError`]: when a header cannot be had.
    """

    def __init__(self, files: Iterable[RemoteFile]) -> None:
        super().__init__(())
        self._places: dict[str, tuple[RemoteFile, int]] = {}  # key -> file, and where in it the tensor begins
        remote = list(files)
        with ThreadPoolExecutor(max_workers=8) as pool:  # a header is three round trips, and there can be many files
            headers = list(pool.map(_read_header, remote))
        for file, tensors in zip(remote, headers, strict=True):
            for key, (dtype, shape, begin) in tensors.items():
                if key in self.headers:
                    raise SafetensorError(f"{key} is in {self.home[key].name} and in {file.filename}")
                self.headers[key], self.home[key] = (dtype, shape), Path(file.filename)
                self._places[key] = file, begin

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """Return tensor `key`, or its part `index` (slices of the leading dimensions), in the file's dtype."""
        (code, shape), (file, begin) = self.headers[key], self._places[key]
        if len(index := index or ()) > len(shape):
            raise IndexError(f"{len(index)} slices for {key}, which has {len(shape)} dimensions")
        triples = [at.indices(size) for at, size in zip(index, shape, strict=False)]
        if any(step < 1 for _, _, step in triples):
            raise ValueError(f"{key} can only be read forwards, not with the slices {index}")
        box = [(start, max(start, stop)) for start, stop, _ in triples] + [(0, size) for size in shape[len(index) :]]
        out = torch.empty([stop - start for start, stop in box], dtype=_DTYPES[code])
        if out.numel():
            item = out.element_size()
            raw = out.view(-1).view(torch.uint8).view(*out.shape, item)
            _fetch(file, begin, (*shape, item), [*box, (0, item)], raw)
        if all(step == 1 for _, _, step in triples):
            return out
        return out[tuple(slice(None, None, step) for _, _, step in triples)].clone()


def _fetch(file: RemoteFile, begin: int, shape: tuple[int, ...], box: list[tuple[int, int]], out: Tensor) -> None:
    """Fill `out`, of the box's shape, with that part of a tensor of bytes whose first one is at `begin`."""
    (start, stop), row = box[0], prod(shape[1:])
    if out.numel() == (stop - start) * row:  # whole rows
        file.read_into(begin + start * row, _memory(out))
        return
    lead, span, gap = _inside(shape[1:], box[1:])
    if row > PIECE or max(gap, row - span if stop - start > 1 else 0) > GAP:
        for number, target in enumerate(out, start):
            _fetch(file, begin + number * row, shape[1:], box[1:], target)
        return
    inner = tuple(slice(*bounds) for bounds in box[1:])
    height = PIECE // row
    for top in range(start, stop, height):
        bottom = min(top + height, stop)
        scratch = torch.empty((bottom - top, *shape[1:]), dtype=torch.uint8)
        wanted = slice(lead, (bottom - top - 1) * row + lead + span)
        file.read_into(begin + top * row + lead, _memory(scratch)[wanted])
        out[top - start : bottom - start] = scratch[(slice(None), *inner)]


def _inside(shape: tuple[int, ...], box: list[tuple[int, int]]) -> tuple[int, int, int]:
    """Where a box begins in its tensor, how far it is from its first to its last byte, and its largest gap in between."""
    lead, span, gap, stride = 0, 1, 0, 1
    for size, (start, stop) in zip(reversed(shape), reversed(box), strict=True):
        if stop - start > 1:
            gap = max(gap, stride - span)
        lead += start * stride
        span += (stop - start - 1) * stride
        stride *= size
    return lead, span, gap


def _memory(tensor: Tensor) -> memoryview:
    return tensor.view(-1).numpy().data


def _read_header(file: RemoteFile) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """
    Key → (dtype, shape, where in the file the tensor begins).

    Two requests: the 8 bytes that say how long the header is, then the header. A guess in one request would be short for
    large models, and for small ones many times the header.
    """
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else -1
    begin = 8 + length
    if not 0 <= length <= min(MAX_HEADER, file.size - 8):
        raise _not_whole(file, f"its header claims {length:,} bytes of {file.size:,}; the limit is {MAX_HEADER:,}")
    header = bytes(file.read(8, begin))
    try:
        tensors = parse_header(header, file.size - begin)
    except (ValueError, RecursionError) as error:
        raise _not_whole(file, str(error)) from None
    return {key: (dtype, shape, begin + offset) for key, (dtype, shape, offset) in tensors.items()}


def _not_whole(file: RemoteFile, why: str) -> SafetensorError:
    return SafetensorError(f"{file.filename} is not a whole safetensors file ({why})")


def parse_header(header: bytes, data: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """
    Parse the JSON of a safetensors header, as strictly as safetensors does: the tensors must fill the file without a hole or an
    overlap.

    Args:
        header (`bytes`): the JSON.
        data (`int`): how many bytes follow it.

    Returns:
        `dict`: key → (dtype, shape, offset of the first byte behind the header).

    Raises:
        `ValueError`: says what is wrong.
    """
    if not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    content = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    content.pop("__metadata__", None)
    places = sorted((_place(key, entry) for key, entry in content.items()), key=lambda place: place[3:])
    reached = 0
    for key, dtype, shape, begin, end in places:
        if begin != reached:
            raise ValueError(f"{key} begins at {begin}, the one before it ends at {reached}")
        if end - begin != prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(f"{key} is {dtype} {list(shape)}, for which {end - begin:,} bytes are wrong")
        reached = end
    if reached != data:
        raise ValueError(f"its tensors end at {reached:,}, {data:,} bytes are there; was it cut off?")
    return {key: (dtype, shape, begin) for key, dtype, shape, begin, _ in places}


def _place(key: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{key} has no dtype, shape and data_offsets: {entry!r}"[:300]) from None
    if dtype not in _DTYPES:
        raise ValueError(f"{key} is of type {dtype!r}, not one of {', '.join(_DTYPES)}")
    return key, dtype, shape, begin, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names something twice")
    return found
