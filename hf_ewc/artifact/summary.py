"""`summary/params.parquet`: one row per tensor, what the Hub's viewer and `load_dataset(folder)` show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

SAMPLE = 1 << 22  # exact quantiles up to here; a 590 M-entry embedding would take a minute to sort

_GROUPS = (  # the first that occurs in the name wins
    ("norm", ("norm", "ln_")),
    ("embedding", ("embed", "wte", "wpe")),
    ("head", ("lm_head",)),
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "feed_forward", "ffn", "experts")),
)

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("module", pa.string()),
        ("layer", pa.int32()),
        ("group", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("numel", pa.int64()),
        *[(column, pa.float64()) for column in ("trace", "mean", "max", "q50", "q90", "q99")],
        ("zeros", pa.int64()),
        ("shard", pa.string()),
    ]
)


def sum_and_zeros(values: Tensor) -> tuple[float, int]:
    """Σ of the values in float64, and how many are exactly 0."""
    return values.sum(dtype=torch.float64).item(), values.numel() - int(values.count_nonzero())


def range_problem(values: Tensor) -> str | None:
    """
    What keeps these values from being a Fisher (a mean of squares), or `None`.

    `aminmax` passes NaN on, so one pass without scratch memory decides.
    """
    if values.numel() == 0:
        return None
    low, high = (bound.item() for bound in values.aminmax())
    if low >= 0 and high < float("inf"):
        return None
    if low < 0 and high < float("inf"):
        return f"has negative values (least {low:.3g}), which no mean of squares has"
    return f"is not finite: {int((~values.isfinite()).sum())} of {values.numel()} values are NaN or infinite"


def layer_and_group(name: str) -> tuple[int | None, str]:
    """
    Where a parameter sits: its layer's number (`None` outside the layers) and `"norm"`, `"embedding"`, `"head"`, `"attention"`,
    `"mlp"` or `"other"`.

    Example:

    ```python
    >>> layer_and_group("model.layers.3.mlp.up_proj.weight")
    (3, 'mlp')
    ```
    """
    layer = re.search(r"\.(\d+)\.", name)
    group = next((group for group, parts in _GROUPS if any(part in name for part in parts)), "other")
    return int(layer[1]) if layer else None, group


def describe(name: str, values: Tensor, normalizer: float, shard: str) -> dict[str, Any]:
    """
    One row of the table, of F per scored token.

    Args:
        name (`str`): the parameter.
        values (`torch.Tensor`): stored values, float32.
        normalizer (`float`): scored tokens that these are sums over.
        shard (`str`): file that holds them.
    """
    total, zeros = sum_and_zeros(values)
    flat = values.flatten()
    if flat.numel() > SAMPLE:  # at random, as a stride could stay within one column for ever
        flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0))]
    if flat.numel():
        ordered = flat.sort().values
        q50, q90, q99 = (ordered[round(q * (len(ordered) - 1))].item() / normalizer for q in (0.5, 0.9, 0.99))
        largest = values.max().item() / normalizer
    else:
        q50 = q90 = q99 = largest = 0.0
    layer, group = layer_and_group(name)
    return {
        "name": name,
        "module": name.rpartition(".")[0],
        "layer": layer,
        "group": group,
        "shape": list(values.shape),
        "numel": values.numel(),
        "trace": total / normalizer,
        "mean": total / normalizer / max(1, values.numel()),
        "max": largest,
        "q50": q50,
        "q90": q90,
        "q99": q99,
        "zeros": zeros,
        "shard": shard,
    }


def write_summary(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
