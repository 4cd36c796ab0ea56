"""The Xet part of the test Hub: keeps what hf-xet 1.8 sends (openapi/cas.openapi.yaml of huggingface/xet-core, version 1).

A client cuts files into chunks, packs chunks into *xorbs* (up to 64 MB) and uploads those; a *shard* then says which chunks
of which xorbs, one after another, are which file.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from loopback import Refusal

RECORD = 48  # bytes of each record in a shard: its header, a file, a term, a verification entry, the file's metadata
END_OF_FILES = b"\xff" * 32  # in place of the next file's hash
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
STORED, LZ4, GROUPED_LZ4 = 0, 1, 2  # how a chunk is packed; grouped: every 4th byte from the first on, then from the second ...


class Term(NamedTuple):  # `size` unpacked bytes of a file: the chunks `first` to `last` (exclusive) of a xorb
    xorb: str
    size: int
    first: int
    last: int


def keep(folder: Path, parts: Iterable[bytes], sha256: str | None = None, name: str | None = None) -> str:
    """Write a file (its `name` is its sha256) at once, as other requests may read it; refuses if that is not `sha256`."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    if sha256 not in (None, digest.hexdigest()):
        Path(file.name).unlink()
        raise Refusal(400, f"the content has the sha256 {digest.hexdigest()}, not {sha256}")
    Path(file.name).replace(folder / (name or digest.hexdigest()))
    return digest.hexdigest()


class XetStore:
    """Xorbs in `folder`, and the files that shards made of them: `files[xet hash]` and `hash_of[sha256]`."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.hash_of = folder, dict[str, list[Term]](), dict[str, str]()
        folder.mkdir(parents=True, exist_ok=True)

    def add_xorb(self, xorb: str, content: bytes) -> None:
        """Its hash is not checked: `add_shard` checks the files that are made of it."""
        keep(self.folder, [content], name=xorb)

    def add_shard(self, shard: bytes, blobs: Path) -> None:
        """Put together every file that the shard names, as `blobs/<sha256>`; refuses if its content has another sha256."""
        for file, sha256, terms in _read_shard(shard):
            keep(blobs, (data for term in terms for data in self._unpack(term)), sha256)
            self.files[file], self.hash_of[sha256] = terms, file

    def plan(self, file: str, start: int, end: int | None, url: str) -> dict | None:
        """Which bytes of which xorbs (at `url`/<xorb>) give a file's bytes `start` to `end` (inclusive); `None` if beyond."""
        total = sum(term.size for term in self.files[file])
        end, terms, spans, skip, position = total - 1 if end is None else end, [], dict[str, list[tuple[int, int]]](), 0, 0
        for term in self.files[file]:
            if position <= end and position + term.size > start:
                skip = skip if terms else start - position
                span = {"start": term.first, "end": term.last}
                terms.append({"hash": term.xorb, "range": span, "unpacked_length": term.size})
                # a chunk that occurs twice in the file is in two terms, and hf-xet expects it in one range
                known = spans.get(term.xorb, [])
                joined = [s for s in known if s[0] <= term.last and term.first <= s[1]] + [(term.first, term.last)]
                one = (min(first for first, _ in joined), max(last for _, last in joined))
                spans[term.xorb] = [s for s in known if s not in joined] + [one]
            position += term.size
        ranges = {xorb: [self._range(xorb, *span, url) for span in spans[xorb]] for xorb in spans}
        return {"offset_into_first_range": skip, "terms": terms, "fetch_info": ranges} if start < total else None

    def _range(self, xorb: str, first: int, last: int, url: str) -> dict:
        chunks = self._chunks(xorb)
        packed = {"start": chunks[first][0], "end": chunks[last - 1][1] - 1}
        return {"range": {"start": first, "end": last}, "url": f"{url}/{xorb}", "url_range": packed}

    def _chunks(self, xorb: str) -> list[tuple[int, int, int, int]]:
        """The (start, end, packing, unpacked size) of every chunk; it starts with a header of 8 bytes."""
        content, chunks, at = (self.folder / xorb).read_bytes(), [], 0
        while at + 8 <= len(content) and content[at] == 0:  # header: version, packed size (3 bytes), packing, size (3 bytes)
            end = at + 8 + int.from_bytes(content[at + 1 : at + 4], "little")
            chunks.append((at, end, content[at + 4], int.from_bytes(content[at + 5 : at + 8], "little")))
            at = end
        return chunks

    def _unpack(self, term: Term) -> Iterator[bytes]:
        content = (self.folder / term.xorb).read_bytes()
        for start, end, packing, size in self._chunks(term.xorb)[term.first : term.last]:
            data = content[start + 8 : end]
            if packing != STORED:
                data = pa.decompress(data, size, "lz4", asbytes=True)
            yield _ungroup(data) if packing == GROUPED_LZ4 else data


def _ungroup(data: bytes) -> bytes:
    target = np.empty(len(data), np.uint8)
    for offset, plane in enumerate(np.array_split(np.frombuffer(data, np.uint8), 4)):
        target[offset::4] = plane
    return target.tobytes()


def _read_shard(shard: bytes) -> Iterator[tuple[str, str, list[Term]]]:
    """The (Xet hash, sha256, terms) of every file in a shard; its second part, about xorbs, is not needed."""
    at = RECORD
    while shard[at : at + 32] != END_OF_FILES:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        if not flags & HAS_SHA256:
            raise Refusal(400, "the shard names a file without its sha256")
        entries = [at + RECORD * (i + 1) for i in range(count)]  # the xorb's hash, flags, unpacked size, first and last chunk
        terms = [Term(_hash(shard, entry), *struct.unpack_from("<III", shard, entry + 36)) for entry in entries]
        metadata = at + RECORD * (1 + (2 * count if flags & HAS_VERIFICATION else count))
        yield _hash(shard, at), _hash(shard, metadata), terms
        at = metadata + RECORD


def _hash(data: bytes, at: int) -> str:
    """Xet writes a 32-byte hash as four little-endian numbers."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", data, at))
