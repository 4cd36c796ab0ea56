"""The fast in-place kernels are the ten-line definition, on every dtype and size, and allocate nothing that grows."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ewc.penalty import kernels, metric, reference, views

SIZES = [1, 7, 255, kernels.CHUNK - 1, kernels.CHUNK, kernels.CHUNK + 1]
DTYPES = [torch.float32, torch.bfloat16]


def _case(size: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    theta, anchor, grad = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
    fisher = torch.exp(4 * torch.randn(size, generator=generator))
    return theta, anchor, fisher, grad


def _close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected.to(dtype), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_gradient_is_the_reference(size, dtype):
    theta, anchor, fisher, grad = _case(size, dtype)
    expected = reference.loss_gradient(grad.float(), theta.float(), anchor.float(), fisher, 0.3)
    kernels.add_penalty_gradient_(grad, theta, anchor, fisher, 0.3, kernels.Scratch())
    _close(grad, expected, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adam", [True, False])
def test_implicit_step_is_the_reference(size, dtype, adam):
    theta, anchor, fisher, grad = _case(size, dtype)
    denominator = grad.float().abs() + 1e-8
    expected = reference.implicit_step(theta.float(), anchor.float(), fisher, 2.0, 0.05, denominator if adam else 1.0)
    kernels.implicit_step_(
        theta, anchor, fisher, 2.0 * 0.05, (lambda part, out: out.copy_(denominator[part])) if adam else None, kernels.Scratch()
    )
    _close(theta, expected, dtype)


def test_sums_are_the_reference():
    theta, anchor, fisher, grad = _case(kernels.CHUNK + 5, torch.float32)
    weighted, squared, pull, task = kernels.penalty_sums(theta, anchor, fisher, grad, kernels.Scratch()).tolist()
    t, a, f = theta.double(), anchor.double(), fisher.double()
    assert 0.5 * weighted == pytest.approx(float(reference.penalty(t, a, f, 1.0)), rel=1e-4)
    assert squared == pytest.approx(float(((t - a) ** 2).sum()), rel=1e-4)
    assert pull == pytest.approx(float(((f * (t - a)) ** 2).sum()), rel=1e-4)
    assert task == pytest.approx(float((grad.double() ** 2).sum()), rel=1e-4)


@given(
    value=st.floats(-1e3, 1e3, width=32),
    anchor=st.floats(-1e3, 1e3, width=32),
    fisher=st.floats(0, 2.0**100, width=32),
    scale=st.sampled_from([0.0, 1e-12, 1.0, 1e12]),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_implicit_step_never_leaves_the_segment_between_weight_and_anchor(value, anchor, fisher, scale):
    theta, a = torch.tensor([value]), torch.tensor([anchor])
    low, high = torch.minimum(theta, a), torch.maximum(theta, a)
    kernels.implicit_step_(theta, a, torch.tensor([fisher]), scale, None, kernels.Scratch())
    slack = 1e-6 * max(abs(value), abs(anchor), 1e-30)
    assert float(low) - slack <= float(theta) <= float(high) + slack
    if fisher == 0 or scale == 0:
        assert float(theta) == float(torch.tensor(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_penalty_at_the_anchor_is_exactly_zero(dtype):
    theta = torch.randn(1000).to(dtype)
    grad = torch.zeros_like(theta)
    kernels.add_penalty_gradient_(grad, theta, theta.clone(), torch.full((1000,), 1e30), 1e8, kernels.Scratch())
    assert torch.count_nonzero(grad) == 0
    before = theta.clone()
    kernels.implicit_step_(theta, before, torch.full((1000,), 1e30), 1e8, None, kernels.Scratch())
    assert torch.equal(theta, before)


class _NewMemory(TorchDispatchMode):
    """Bytes of every storage that an operation returns and that was not there before."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.known.add(tensor.untyped_storage().data_ptr())
                self.bytes += tensor.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("chunks", [1, 8])
def test_memory_is_a_fixed_scratch_however_large_the_parameter(chunks):
    theta, anchor, fisher, grad = _case(chunks * kernels.CHUNK, torch.float32)
    theta.requires_grad_(True)
    flat, scratch = views.flat(theta), kernels.Scratch()
    with _NewMemory([theta, anchor, fisher, grad]) as memory:
        kernels.add_penalty_gradient_(grad, flat, anchor, fisher, 0.1, scratch)
        kernels.implicit_step_(flat, anchor, fisher, 0.1, None, scratch)
        kernels.penalty_sums(flat, anchor, fisher, grad, scratch)
        kernels.largest_step(fisher, 0.1, None, scratch)
    assert grad.grad_fn is None
    assert memory.bytes <= 3 * 4 * kernels.CHUNK + 1024 * chunks
    assert memory.bytes >= 3 * 4 * kernels.CHUNK  # the probe does see the scratch


def test_names_lose_the_wrappers_of_ddp_and_compile():
    assert views.clean_name("module._orig_mod.model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert views.clean_name("model.layers.0._orig_mod.mlp.weight") == "model.layers.0.mlp.weight"
    assert views.clean_name("submodule.weight") == "submodule.weight"


@pytest.mark.parametrize("shape", [(8,), (64, 80), (300, 1000)])
@pytest.mark.parametrize("kind", ["torch", "amsgrad", "bnb"])
def test_adam_metric_is_read_from_the_optimizer_state(kind, shape):
    from bitsandbytes.optim import AdamW

    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape))
    arguments = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    if kind == "bnb":
        optimizer = AdamW([param], optim_bits=8, **arguments)
    else:
        optimizer = torch.optim.AdamW([param], amsgrad=kind == "amsgrad", **arguments)
    assert metric.denominator(optimizer, optimizer.param_groups[0], param) is None  # never stepped: nothing to pull back
    v = largest = torch.zeros(shape)
    # each block of 256 has a size of its own, so that a block read with its neighbour's maximum shows
    sizes = torch.exp(3 * torch.randn(-(-param.numel() // 256))).repeat_interleave(256)[: param.numel()].view(shape)
    for decay in (1.0, 0.9, 0.1):  # gradients fade, so that AMSGrad's maximum is not its last value
        param.grad = decay * sizes * torch.randn(shape) * torch.exp(torch.randn(shape))
        v = 0.95 * v + 0.05 * param.grad**2
        largest = torch.maximum(largest, v)
        optimizer.step()
    exact = ((largest if kind == "amsgrad" else v) / (1 - 0.95**3)).sqrt().view(-1) + 1e-8
    read = metric.denominator(optimizer, optimizer.param_groups[0], param)
    parts = kernels._chunks(param.numel())
    found = torch.cat([read(part, torch.empty(part.stop - part.start)).clone() for part in parts])
    if kind != "bnb" or param.numel() < 4096:  # bitsandbytes keeps small tensors in float32
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    else:
        for part in parts:
            ratio = found[part] / exact[part]
            assert 0.97 < float(ratio.median()) < 1.03
            assert float(ratio.quantile(0.05)) > 0.5
            assert float(ratio.quantile(0.95)) < 1.5
