"""The files of the test Hub, and what hf-xet 1.8 sends (openapi/cas.openapi.yaml of huggingface/xet-core, version 1).

A client uploads chunks of files, packed into *xorbs*; a *shard* then says which chunks of which xorbs, one after another,
are which file. The file is given back as a xorb of its own, in chunks that are not compressed.
"""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from loopback import Refusal

RECORD = 48  # bytes of each record in a shard: its header, a file, a term, a verification entry, the file's metadata
END_OF_FILES = b"\xff" * 32  # in place of the next file's hash
HAS_VERIFICATION = 1 << 31
STORED, LZ4, GROUPED_LZ4 = 0, 1, 2  # how a chunk is packed; grouped: every 4th byte from the first on, then from the second ...
HEADER, CHUNK = 8, 1 << 16  # bytes of a chunk's header (version, packed size in 3; packing, size in 3) and of our own chunks


class XetStore:
    """A folder of files by their sha256, and of xorbs by their hash; `sizes[xet hash]` and `hash_of[sha256]` of files."""

    def __init__(self, folder: Path):
        self.folder, self.sizes, self.hash_of = folder, dict[str, int](), dict[str, str]()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        if not (self.folder / name).exists():  # or somebody may be reading it
            (self.folder / name).write_bytes(content)

    def keep(self, content: bytes, sha256: str | None = None) -> str:
        """Write a file whose name is its sha256; refuses if that is not `sha256`."""
        digest = hashlib.sha256(content).hexdigest()
        if sha256 not in (None, digest):
            raise Refusal(400, f"the content has the sha256 {digest}, not {sha256}")
        self.write(digest, content)
        return digest

    def add_shard(self, shard: bytes) -> None:
        """Put together every file that the shard names; refuses if its content has another sha256."""
        for file, sha256, terms in _read_shard(shard):
            content = b"".join(chunk for term in terms for chunk in self._unpack(*term))
            self.keep(content, sha256)
            chunks = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
            packed = [struct.pack("<II", len(chunk) << 8, STORED | len(chunk) << 8) + chunk for chunk in chunks]
            self.write(file, b"".join(packed))
            self.sizes[file], self.hash_of[sha256] = len(content), file

    def plan(self, file: str, start: int, end: int, url: str) -> dict | None:
        """Which bytes of the file's xorb, at `url`, hold its bytes `start` to `end` (inclusive); `None` if it is shorter."""
        size, packed_size = self.sizes[file], (self.folder / file).stat().st_size
        first, last = start // CHUNK, min(end, size - 1) // CHUNK + 1
        span = {"start": first, "end": last}
        packed = {"start": first * (HEADER + CHUNK), "end": min(last * (HEADER + CHUNK), packed_size) - 1}
        term = {"hash": file, "range": span, "unpacked_length": min(last * CHUNK, size) - first * CHUNK}
        fetch = {file: [{"range": span, "url": url, "url_range": packed}]}
        return {"offset_into_first_range": start % CHUNK, "terms": [term], "fetch_info": fetch} if start < size else None

    def _unpack(self, xorb: str, first: int, last: int) -> Iterator[bytes]:
        """The chunks `first` to `last` (exclusive) of a xorb."""
        content, end = (self.folder / xorb).read_bytes(), 0
        for index in range(last):
            packed, unpacked = struct.unpack_from("<II", content, end)
            start, end, packing = end + HEADER, end + HEADER + (packed >> 8), unpacked & 255
            if index >= first:
                chunk = content[start:end]
                chunk = chunk if packing == STORED else pa.decompress(chunk, unpacked >> 8, "lz4", asbytes=True)
                yield _ungroup(chunk) if packing == GROUPED_LZ4 else chunk


def _ungroup(data: bytes) -> bytes:
    target = np.empty(len(data), np.uint8)
    for offset, plane in enumerate(np.array_split(np.frombuffer(data, np.uint8), 4)):
        target[offset::4] = plane
    return target.tobytes()


def _read_shard(shard: bytes) -> Iterator[tuple[str, str, list[tuple[str, int, int]]]]:
    """Each file's Xet hash, sha256 and terms (xorb, first chunk, last chunk); the shard's second part is not needed."""
    at = RECORD
    while shard[at : at + 32] != END_OF_FILES:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        entries = [at + RECORD * (i + 1) for i in range(count)]  # the xorb's hash, flags, unpacked size, first and last chunk
        terms = [(_hash(shard, entry), *struct.unpack_from("<II", shard, entry + 40)) for entry in entries]
        metadata = at + RECORD * (1 + (2 * count if flags & HAS_VERIFICATION else count))
        yield _hash(shard, at), _hash(shard, metadata), terms
        at = metadata + RECORD


def _hash(data: bytes, at: int) -> str:
    """Xet writes a 32-byte hash as four little-endian numbers."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", data, at))
