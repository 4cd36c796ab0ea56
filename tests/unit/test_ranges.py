"""Which bytes a slice of a remote tensor costs, and what is refused as a header; the Hub is in `tests/hub/cases`."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from hf_ewc.artifact import remote
from hf_ewc.artifact.remote import RemoteTensors, parse_header
from hf_ewc.hub import RemoteFile


class Held(RemoteFile):
    """A remote file whose bytes are in memory, and which notes the requests that it would send."""

    def __init__(self, content: bytes, filename: str = "a.safetensors") -> None:
        super().__init__("alice/f", "dataset", "0" * 40, filename, len(content))
        self.content, self.ranges = content, []

    def read_into(self, start: int, target: memoryview) -> None:
        assert 0 <= start <= start + len(target) <= len(self.content)
        assert len(target), "a request for nothing"
        self.ranges.append((start, start + len(target)))
        target[:] = self.content[start : start + len(target)]


def opened(tensors: dict[str, torch.Tensor]) -> tuple[Held, RemoteTensors]:
    file = Held(save(tensors))
    files = RemoteTensors([file])
    length = int.from_bytes(file.content[:8], "little")
    assert file.ranges == [(0, 8), (8, 8 + length)], "the header costs two requests, and not a byte more than itself"
    file.ranges.clear()
    return file, files


def bounds(size: int):
    edge = st.none() | st.integers(-size - 2, size + 2)
    return st.builds(slice, edge, edge, st.none() | st.integers(1, 3))


@st.composite
def tensor_and_index(draw):
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8]))
    index = tuple(draw(bounds(size)) for size in shape[: draw(st.integers(0, len(shape)))])
    return shape, dtype, index


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensor_and_index(), st.sampled_from([0, 3, 40, 1 << 20]), st.sampled_from([1, 24, 100, 1 << 20]))
def test_any_slice_equals_that_of_safetensors(tmp_path, drawn, gap, piece):
    """Bit for bit, whatever is fetched together (`GAP`) and in how many pieces (`PIECE`)."""
    shape, dtype, index = drawn
    count = torch.Size(shape).numel()
    tensor = torch.arange(3, 3 + count).remainder(251).to(dtype).view(shape)
    tensors = {"before": torch.ones(5, dtype=torch.uint8), "t": tensor, "scalar": torch.tensor(2.5)}
    _, files = opened(tensors)
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.MonkeyPatch.context() as patch, safe_open(tmp_path / "t.safetensors", "pt") as reference:
        patch.setattr(remote, "GAP", gap)
        patch.setattr(remote, "PIECE", piece)
        part, expected = files.read("t", index), reference.get_slice("t")[index]
        assert part.dtype == expected.dtype
        assert part.is_contiguous()
        assert torch.equal(part, expected)
        assert torch.equal(files.read("scalar"), reference.get_tensor("scalar"))


def test_what_a_slice_costs():
    file, files = opened({"t": torch.arange(6000.0).view(10, 20, 30)})  # a row of 30 is 120 bytes, one of 20 x 30 is 2,400

    def cost(*index: slice) -> list[int]:
        file.ranges.clear()
        assert torch.equal(files.read("t", index), torch.arange(6000.0).view(10, 20, 30)[index])
        return [stop - start for start, stop in file.ranges]

    whole = slice(None)
    assert cost() == [24000]
    assert cost(slice(2, 5)) == [7200], "rows: one request for exactly them"
    assert cost(slice(2, 3), slice(4, 6)) == [240]
    assert cost(slice(2, 3), slice(4, 5), slice(0, 1)) == [4]
    assert cost(slice(3, 3)) == cost(whole, slice(20, None)) == [], "nothing costs nothing"
    assert cost(whole, slice(0, 5)) == [9 * 2400 + 600], "small gaps are fetched too, up to the last byte that is needed"
    assert cost(slice(0, 2), whole, slice(10, 12)) == [2400 + 19 * 120 + 8]


def test_large_gaps_are_not_fetched_and_scratch_is_bounded(monkeypatch):
    file, files = opened({"t": torch.arange(6000.0).view(10, 20, 30)})
    monkeypatch.setattr(remote, "GAP", 1000)
    files.read("t", (slice(None), slice(0, 5)))
    assert file.ranges == [(file.ranges[0][0] + 2400 * row, file.ranges[0][0] + 2400 * row + 600) for row in range(10)]
    file.ranges.clear()
    files.read("t", (slice(None), slice(0, 5), slice(0, 1)))
    assert [stop - start for start, stop in file.ranges] == [4 * 120 + 4] * 10, "together within a row, alone between rows"
    file.ranges.clear()
    monkeypatch.setattr(remote, "GAP", 1 << 20)
    monkeypatch.setattr(remote, "PIECE", 5000)
    files.read("t", (slice(None), slice(0, 5)))
    assert [stop - start for start, stop in file.ranges] == [2400 + 600] * 5


def test_refused_indices_are_those_of_safetensors():
    _, files = opened({"t": torch.ones(4, 3), "scalar": torch.tensor(1.0)})
    with pytest.raises(IndexError, match="3 slices for t, which has 2 dimensions"):
        files.read("t", (slice(0, 1),) * 3)
    with pytest.raises(IndexError):
        files.read("scalar", (slice(0, 1),))
    with pytest.raises(ValueError, match="forwards"):
        files.read("t", (slice(None, None, -1),))


def test_a_read_is_memory_of_its_own():
    _, files = opened({"t": torch.ones(4, 3)})
    files.read("t").zero_()
    assert torch.equal(files.read("t", (slice(1, 3),)), torch.ones(2, 3))


def test_one_tensor_in_two_files_is_refused():
    content = save({"t": torch.ones(2)})
    with pytest.raises(SafetensorError, match=r"t is in 1\.safetensors and in 2\.safetensors"):
        RemoteTensors([Held(content, "1.safetensors"), Held(content, "2.safetensors")])


GOOD = {
    "__metadata__": {"format": "hf_ewc.fisher"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [24, 24]},
    "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
}


def changed(**entries) -> bytes:
    return json.dumps({**GOOD, **entries}).encode()


DAMAGED = {
    "cut off": changed()[:-9],
    "no JSON": b"\x80\x04K\x01.",
    "no UTF-8": changed().replace(b"empty", b"emp\xffy"),
    "a list": b"[1]",
    "a space in front": b" " + changed(),
    "twice": changed().replace(b'"b"', b'"a"'),
    "a hole": changed(b={"dtype": "U8", "shape": [1], "data_offsets": [25, 26]}),
    "an overlap": changed(b={"dtype": "U8", "shape": [2], "data_offsets": [23, 25]}),
    "backwards": changed(b={"dtype": "U8", "shape": [1], "data_offsets": [25, 24]}),
    "behind the end": changed(b={"dtype": "U8", "shape": [2], "data_offsets": [24, 26]}),
    "too few": changed(a={"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 24]}),
    "huge": changed(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 24]}),
    "negative": changed(a={"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}),
    "a fraction": changed(a={"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]}),
    "a truth": changed(b={"dtype": "U8", "shape": [True], "data_offsets": [24, 25]}),
    "an unknown type": changed(b={"dtype": "Q7", "shape": [], "data_offsets": [24, 25]}),
    "no shape": changed(b={"dtype": "U8", "data_offsets": [24, 25]}),
    "one offset": changed(b={"dtype": "U8", "shape": [], "data_offsets": [24]}),
    "no entry": changed(b=[1, 2]),
}


def accepted_by_safetensors(header: bytes, data: int, path: Path) -> bool:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))
    try:
        with safe_open(path, "pt") as file:
            return len(list(file.keys())) >= 0
    except SafetensorError:
        return False


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_headers(kind, tmp_path):
    header = DAMAGED[kind]
    with pytest.raises(ValueError, match=r"."):
        parse_header(header, 25)
    # stricter than safetensors in what the format's description forbids
    assert not accepted_by_safetensors(header, 25, tmp_path / "f") or kind in ("twice", "a space in front")
    with pytest.raises(SafetensorError, match=r"a\.safetensors is not a whole safetensors file"):
        RemoteTensors([Held(struct.pack("<Q", len(header)) + header + bytes(25))])


def test_a_whole_header_and_files_that_are_too_short_or_too_long():
    assert parse_header(changed(), 25) == {"a": ("F32", (2, 3), 0), "empty": ("BF16", (0, 3), 24), "b": ("U8", (), 24)}
    content = save({"t": torch.ones(3)})
    for length in (*range(len(content)), len(content) + 1):
        with pytest.raises(SafetensorError, match=r"a\.safetensors is not a whole"):
            RemoteTensors([Held((content + b"\0")[:length])])
    claimed = struct.pack("<Q", 100_000_001)
    with pytest.raises(SafetensorError, match="100,000,001"):
        RemoteTensors([Held(claimed + bytes(100))])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(b'0123456789{}[],:" -.FUaeb')), min_size=1, max_size=3))
def test_a_mutated_header_is_never_accepted_against_safetensors(tmp_path, changes):
    """What safetensors refuses is refused; what both accept has the same tensors."""
    header = bytearray(changed())
    for position, byte in changes:
        header[position % len(header)] = byte
    try:
        mine = parse_header(bytes(header), 25)
    except (ValueError, RecursionError):
        return
    path = tmp_path / "f"
    assert accepted_by_safetensors(bytes(header), 25, path)
    with safe_open(path, "pt") as file:
        theirs = {key: (file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    assert {key: place[:2] for key, place in mine.items()} == theirs


def test_all_boxes_of_a_small_tensor(monkeypatch):
    """Without the randomness: every box of 3 x 4 x 2, with every gap that occurs."""
    file, files = opened({"t": torch.arange(24, dtype=torch.uint8).view(3, 4, 2)})
    whole = torch.arange(24, dtype=torch.uint8).view(3, 4, 2)
    spans = [[slice(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in whole.shape]
    for gap in range(8):
        monkeypatch.setattr(remote, "GAP", gap)
        for index in itertools.product(*spans):
            file.ranges.clear()
            assert torch.equal(files.read("t", index), whole[index])
            fetched = sum(stop - start for start, stop in file.ranges)
            vain = (len(file.ranges) and fetched - whole[index].numel()) or 0
            assert 0 <= vain <= gap * (whole[index].numel() - 1)
            assert all(second[0] - first[1] > gap for first, second in itertools.pairwise(file.ranges))
