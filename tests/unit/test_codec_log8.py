"""The `log8` codec: 8.4 bits per value that zero nothing, keep the order and the penalty (PITFALLS H4), and slice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ewc.artifact import log8
from hf_ewc.artifact.codec import CODECS
from hf_ewc.artifact.files import reader_of

LOG8 = CODECS["log8"]
LARGEST, LEAST = torch.finfo(torch.float32).max, 2.0**-149


def spread(*shape: int, seed: int = 0, sigma: float = 3.0) -> torch.Tensor:
    """Log-normal values, 5 % of them 0: σ = 3 is that of a measured Fisher."""
    generator = torch.Generator().manual_seed(seed)
    values = (sigma * torch.randn(shape, generator=generator) - 20).exp()
    return values * (torch.rand(shape, generator=generator) > 0.05)


def again(values: torch.Tensor) -> torch.Tensor:
    return log8.decode(*log8.encode(values))


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# The format

positive = st.floats(LEAST, LARGEST, width=32, allow_subnormal=True)


@given(values=st.lists(st.one_of(st.just(0.0), positive, st.floats(2.0**-66, 2.0**-20, width=32)), min_size=1, max_size=300))
@settings(max_examples=300, deadline=None)
def test_the_fast_path_is_the_definition_block_by_block(values):
    codes, scale, span = log8.encode(torch.tensor(values))
    decoded = log8.decode(codes, scale, span)
    for block, start in enumerate(range(0, len(values), log8.BLOCK)):
        inside = torch.tensor(values)[start : start + log8.BLOCK].tolist()
        theirs, top, orders, back = log8.reference(inside)
        ours = codes[start : start + log8.BLOCK].tolist()
        assert (scale[block].item(), span[block].item()) == (top, orders)
        # two logarithms may differ in the last bit, which shows when a value lies exactly between two codes
        position = [255 - log8.STEPS / orders * math.log2(top / v) if v and orders else None for v in inside]
        for a, b, at in zip(ours, theirs, position, strict=True):
            assert a == b or (abs(a - b) == 1 and at is not None and abs(at % 1 - 0.5) < 1e-9)
        if ours == theirs:
            same(decoded[start : start + log8.BLOCK], torch.tensor(back, dtype=torch.float64).float())


@given(values=st.lists(st.one_of(st.just(0.0), positive), min_size=1, max_size=200), rows=st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_zeros_and_maxima_are_exact_and_no_error_exceeds_half_a_step(values, rows):
    tensor = torch.tensor(values * rows).view(rows, -1)
    codes, scale, span = log8.encode(tensor)
    back = log8.decode(codes, scale, span)
    assert torch.equal(back == 0, tensor == 0)
    assert back.isfinite().all()
    assert bool((span >= 0).all())
    assert bool((span <= log8.MAX_SPAN).all())
    for block in range(scale.shape[1]):
        part = slice(block * log8.BLOCK, (block + 1) * log8.BLOCK)
        same(scale[:, block], tensor[:, part].amax(1))
        same(back[:, part].amax(1), tensor[:, part].amax(1))
        kept = tensor[:, part] >= 2.0**-126  # below, float32 has too few digits to tell
        error = (back[:, part].double().log2() - tensor[:, part].double().log2()).abs()
        allowed = span[:, block, None].double() / (2 * log8.STEPS) + 1e-6
        assert bool((error <= allowed)[kept].all())


@pytest.mark.parametrize(
    "values",
    [
        [LEAST, LARGEST],
        [LEAST] * 3,
        [0.0, LEAST, 3 * LEAST],
        [LARGEST, LARGEST, 0.0],
        [1.0, 1 - 2.0**-24],
        [0.0, 0.0],
        [1e-45, 1e-40, 1e-38, 1.0],
    ],
)
def test_the_ends_of_float32_come_back(values):
    tensor = torch.tensor(values)
    back = again(tensor)
    assert torch.equal(back == 0, tensor == 0)
    assert (back.max(), back.isfinite().all()) == (tensor.max(), True)
    least = tensor[tensor > 0].min() if tensor.any() else tensor.min()
    assert back[tensor == least].tolist() == pytest.approx([least.item()] * int((tensor == least).sum()), rel=1e-3)


def test_neighbours_in_float32_get_the_codes_of_the_definition():
    """Their spans are denormal in float16, and may be rounded to less than they are: codes must not run past 1 into 0."""
    for steps in range(1, 60):
        values = torch.tensor([1.0, 1 - steps * 2.0**-24])
        codes, _, span = log8.encode(values)
        theirs, _, orders, _ = log8.reference(values.tolist())
        assert (codes.tolist(), span.item()) == (theirs, orders)
        torch.testing.assert_close(again(values), values, rtol=2**-22, atol=0)


@pytest.mark.parametrize("need", [0.0, 1e-8, 0.3, 9.99951, 10.0, 126.97, 255.9, 276.9, 277.0])
def test_spans_are_rounded_up_and_by_no_more_than_a_float16_step(need):
    span = log8._half_at_least(torch.tensor([need], dtype=torch.float64))
    assert span.dtype == torch.float16
    assert need - log8._SLACK <= span.item() <= need + max(2.0**-24, need * 2.0**-10)


def test_equal_values_and_rows_of_zeros_are_exact():
    tensor = torch.cat([torch.full((2, 300), 0.7), torch.zeros(2, 300)])
    same(again(tensor), tensor)


@pytest.mark.parametrize("shape", [(), (1,), (127,), (128,), (129,), (7, 1), (5, 300), (2, 3, 257), (0, 4), (4, 0), (3, 99, 9)])
def test_what_is_stored_is_what_the_layout_says(shape):
    tensor = spread(*shape)
    stored = LOG8.encode("w", tensor)
    announced = LOG8.layout("w", shape)
    codes = {torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16"}
    assert {key: (codes[part.dtype], tuple(part.shape)) for key, part in stored.items()} == announced
    assert sum(part.nbytes for part in stored.values()) == LOG8.size("w", shape)
    assert LOG8.decode("w", reader_of(stored)).shape == shape


def test_it_takes_eight_point_four_bits():
    assert 8 * LOG8.size("w", (256, 2304)) / (256 * 2304) == 8.375


def test_storing_a_stored_fisher_again_changes_nothing():
    for sigma in (0.01, 1, 3, 8):
        stored = log8.encode(spread(40, 300, sigma=sigma))
        for first, second in zip(stored, log8.encode(log8.decode(*stored)), strict=True):
            same(first, second)


# In pieces


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_slice_of_any_axis_is_that_part_of_the_whole(data):
    shape = [*data.draw(st.lists(st.integers(1, 4), max_size=2)), data.draw(st.integers(1, 400))]
    tensor = spread(*shape)
    read = reader_of(LOG8.encode("w", tensor))
    whole = LOG8.decode("w", read)

    def cut(size):
        ends = st.one_of(st.none(), st.integers(-size - 1, size + 1))
        return st.builds(slice, ends, ends, st.sampled_from([None, 1, 3]))

    index = tuple(data.draw(cut(size)) for size in shape[: data.draw(st.integers(1, len(shape)))])
    part = LOG8.decode("w", read, index)
    same(part, whole[index])
    assert part.is_contiguous()  # the penalty takes flat views


def test_a_slice_reads_only_its_rows_and_blocks():
    tensor = spread(64, 1000)
    stored, touched = LOG8.encode("w", tensor), {}

    def read(name, index):
        part = reader_of(stored)(name, index)
        touched[name] = max(touched.get(name, 0), part.numel())
        return part

    LOG8.decode("w", read, (slice(10, 12),))
    assert touched == {"w": 2 * 1000, "w::scale": 2 * 8, "w::span": 2 * 8}
    touched.clear()
    LOG8.decode("w", read, (slice(10, 12), slice(130, 260)))
    assert touched == {"w": 2 * 256, "w::scale": 2 * 2, "w::span": 2 * 2}


def test_the_size_of_the_pieces_does_not_matter(monkeypatch):
    tensors = [spread(3, 70_000), spread(5000, 3), spread(40, 300)]
    large = [(log8.encode(tensor), again(tensor)) for tensor in tensors]
    monkeypatch.setattr(log8, "CHUNK", 256)
    for tensor, (stored, back) in zip(tensors, large, strict=True):
        for first, second in zip(log8.encode(tensor), stored, strict=True):
            same(first, second)
        same(again(tensor), back)


class Allocations(TorchDispatchMode):
    """Bytes of each storage that operations return, views not counted twice."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.storages.setdefault(id(tensor.untyped_storage()), tensor.untyped_storage())
        return result


@pytest.mark.parametrize("shape", [(16, 65_536 + 128), (1_100_000,), (300_000, 4), (8000, 150)])
def test_scratch_does_not_grow_with_the_tensor(shape):
    tensor = spread(*shape)
    with Allocations() as encoding:
        stored = log8.encode(tensor)
    with Allocations() as decoding:
        log8.decode(*stored)
    results = {part.untyped_storage()._cdata for part in stored} | {tensor.untyped_storage()._cdata}
    limit = 8 * log8.CHUNK * 2  # float64; blocks may be filled up to twice the values
    scratch = [each.nbytes() for each in encoding.storages.values() if each._cdata not in results]
    assert max(scratch) <= limit < tensor.nbytes * 2
    large = [each.nbytes() for each in decoding.storages.values() if each._cdata not in results and each.nbytes() > limit]
    assert large in ([tensor.nbytes], [])  # the result itself


# How good it is


def test_the_bias_of_rounding_is_the_documented_one():
    """h²/24 upwards in the mean of F′/F, as much downwards in ΣF′, in blocks that span 120 binary orders (24 decades more than
    a measured Fisher does): that is 4.5e-3, and stays below 1e-3 up to 56."""
    generator = torch.Generator().manual_seed(0)
    for orders in (30, 120):
        exponent = torch.rand(4000, 128, generator=generator, dtype=torch.float64) * orders - orders / 2
        exponent[:, 0], exponent[:, 1] = orders / 2, -orders / 2
        values = exponent.exp2().float()
        ratio = (again(values).double() / values.double())[:, 2:]
        step = orders * math.log(2) / 254
        noise = 4 * step / math.sqrt(12 * ratio.numel())
        assert ratio.mean().item() - 1 == pytest.approx(step**2 / 24, abs=noise)
        assert (1 / ratio).mean().item() - 1 == pytest.approx(step**2 / 24, abs=noise)
