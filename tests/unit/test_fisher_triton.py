"""
The GPU kernel's arithmetic, run by Triton's interpreter on the CPU, against the definition. What this cannot show: speed, and
what the compiler makes of it; nor bfloat16 operands of the matrix product itself, which the interpreter has to widen. That it
compiles for an H100 and H200 is tested; that it runs there is owed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_ewc.fisher.products import add_squared_products_reference

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

# Triton decides when it is imported whether it interprets, and other libraries import it: so all cases run in one process of
# their own. Input and output travel as files.
RUN = """
import sys, torch
from hf_ewc.fisher.triton_kernel import add_squared_products
cases = torch.load(sys.argv[1], weights_only=True)
for case in cases.values():
    add_squared_products(case["x"], case["g"], case["out"], case.get("lengths"))
torch.save({name: case["out"] for name, case in cases.items()}, sys.argv[2])
"""


def random(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def case(units, positions, heights, widths, *, scale=1.0, dtype=torch.float32, **extra):
    """Random x and g, and an `out` that starts at 0. Tiles are 16 × 16 × 16 here."""
    x = random(units, positions, widths, seed=1, dtype=dtype)
    g = random(units, positions, heights, seed=2, scale=scale, dtype=dtype)
    return {"x": x, "g": g, "out": torch.zeros(heights, widths), **extra}


def cases():
    wide = random(3, 21, 120, seed=3)
    found = {
        "exactly one tile": case(2, 16, 16, 16),
        "no multiple of a tile": case(3, 37, 45, 21),
        "smaller than a tile": case(2, 5, 3, 7),
        "one unit": case(1, 33, 20, 40),
        "one position": case(35, 1, 33, 18),
        "one position in bfloat16": case(35, 1, 33, 18, dtype=torch.bfloat16),
        "more rows of tiles than a group": case(2, 8, 90, 33),
        "bfloat16": case(3, 40, 35, 50, dtype=torch.bfloat16),
        "float16": case(3, 40, 35, 50, dtype=torch.float16),
        "gradients of 1e-5": case(3, 40, 20, 20, scale=1e-5),
        "gradients of 1e-15": case(3, 40, 20, 20, scale=1e-15),
        "gradients of 1e12": case(3, 40, 20, 20, scale=1e12),
        # one of three projections that share a product, as in a fused QKV
        "a slice of g": case(3, 21, 40, 30) | {"g": wide[:, :, 40:80]},
        "every other position of x": case(3, 21, 40, 30) | {"x": random(3, 42, 30, seed=4)[:, ::2]},
        "transposed": case(3, 21, 40, 30) | {"x": random(3, 30, 21, seed=4).mT, "g": random(21, 3, 40, seed=5).transpose(0, 1)},
        "columns of a larger out": case(3, 21, 40, 30) | {"out": torch.zeros(40, 64)[:, 10:40]},
        "x in bfloat16, g in float32": case(2, 20, 17, 19) | {"x": random(2, 20, 19, dtype=torch.bfloat16)},
        "added to what is there": case(2, 20, 17, 19) | {"out": random(17, 19, seed=6).square() * 40},
        "padding": case(4, 37, 20, 20, lengths=torch.tensor([37, 16, 1, 0])),
        "padding of single positions": case(5, 1, 20, 20, lengths=torch.tensor([1, 0, 1, 1, 0])),
        "lengths beyond the end": case(2, 20, 20, 20, lengths=torch.tensor([50, 20])),
        "no unit": case(0, 4, 20, 20),
        "no position": case(4, 0, 20, 20),
    }
    for name in ("padding", "padding of single positions"):  # what lies there must not be read
        found[name]["x"], found[name]["g"] = found[name]["x"].clone(), found[name]["g"].clone()
        for u, length in enumerate(found[name]["lengths"]):
            found[name]["x"][u, length:] = torch.nan
            found[name]["g"][u, length:] = torch.inf
    return found


def in_a_process(code, *arguments, **environment):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    torch.save(cases(), folder / "cases.pt")
    in_a_process(RUN, folder / "cases.pt", folder / "results.pt", TRITON_INTERPRET="1")
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", cases())
def test_the_kernel_computes_the_definition(results, name):
    wanted = cases()[name]
    x, g, out = wanted["x"], wanted["g"], wanted["out"].double()
    for u, length in enumerate(wanted.get("lengths", [x.shape[1]] * x.shape[0])):
        one = slice(u, u + 1)
        add_squared_products_reference(x[one, :length], g[one, :length], out)
    assert results[name].dtype == torch.float32
    # products cancel, so a single small entry may be off by more than its own size: the scale is that of the largest
    torch.testing.assert_close(results[name].double(), out, rtol=1e-5, atol=1e-6 * float(out.abs().max()))


def test_small_gradients_survive_the_square(results):
    # 1e-5 would give 1e-10, below float16's smallest number
    small, plain = results["gradients of 1e-5"], case(3, 40, 20, 20)
    out = torch.zeros(20, 20)
    add_squared_products_reference(plain["x"], plain["g"], out)
    torch.testing.assert_close(small * 1e10, out, rtol=1e-4, atol=1e-5)
    assert (small > 0).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"x": random(2, 5, 4)}, "share U and T"),
        ({"out": torch.zeros(4, 3)}, r"\(3, 4\), not \(4, 3\)"),
        ({"out": torch.zeros(3, 4, dtype=torch.bfloat16)}, "float32, in which small squares"),
        ({"g": random(2, 6, 3).double()}, "not torch.float64"),
        ({"lengths": [6, 6, 6]}, r"\(2,\), one per row"),
        ({"out": torch.zeros(3, 4, device="meta")}, "on one device"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(wrong, named):
    from hf_ewc.fisher.triton_kernel import add_squared_products

    arguments = {"x": random(2, 6, 4), "g": random(2, 6, 3), "out": torch.zeros(3, 4)} | wrong
    with pytest.raises((ValueError, TypeError), match=named):
        add_squared_products(**arguments)


def test_the_kernel_is_used_on_cuda_only():
    from hf_ewc.fisher import triton_kernel

    assert triton_kernel.available() == (torch.cuda.is_available() and torch.version.cuda is not None)


# Triton brings NVIDIA's assembler, so that this needs neither a GPU nor a driver. `wgmma` are Hopper's matrix instructions; a
# kernel that fell back to plain ones, or whose loads wait for the arithmetic, would still be right, and many times slower.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_ewc.fisher.triton_kernel import CONFIGS, squared_products_kernel as kernel
best = CONFIGS[0]
fixed = {"HAS_LENGTHS": True, "RANK_ONE": False, "WIDEN": False, "x_i": 1, "g_o": 1, "out_i": 1, **best.kwargs}
tensors = {"x": "*bf16", "g": "*bf16", "out": "*fp32", "lengths": "*i32"}
signature = {name: tensors.get(name, "constexpr" if name in fixed else "i32") for name in kernel.arg_names}
multiples = [n for n, kind in signature.items() if kind != "constexpr" and n not in ("units", "positions")]
aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
options = {"num_warps": best.num_warps, "num_stages": best.num_stages}
made = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", 90, 32), options=options)
print("wgmma.mma_async" in made.asm["ptx"], "async_copy_global_to_local" in made.asm["ttgir"], len(made.asm["cubin"]) > 0)
"""


def test_the_kernel_compiles_for_hopper_to_its_matrix_instructions(tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no NVIDIA backend")
    assert in_a_process(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).split() == ["True"] * 3
