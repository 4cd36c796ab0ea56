"""Writing a Fisher folder: shards, index, manifest, summary and card, all at once or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, EWCError
from .anchor import write_anchor
from .card import render_card
from .codec import CODECS, Codec, get_codec
from .files import Reader, reader_of, replaced_folder, sha256_file
from .manifest import Manifest, ShardRecord, Storage, Totals
from .summary import describe, write_summary
from .verify import CARD, INDEX, MANIFEST, SHARD, SUMMARY


def write_folder(
    manifest: Manifest,
    read: Reader,
    target: Path,
    codec: str,
    max_shard_size: int | str,
    overwrite: bool,
    anchor: Reader | None = None,
) -> None:
    """
    See [`FisherInformation.save_pretrained`]; `read` gives the values that `manifest` describes, `anchor` those of an anchor
    that is no model's weights.
    """
    coder, limit = get_codec(codec), _bytes(max_shard_size)
    check_target(target, overwrite)
    with replaced_folder(target) as fresh:
        if anchor is not None:
            manifest = write_anchor(manifest, anchor, fresh, _plan_shards(manifest.parameters, CODECS["float32"], limit))
        _write(manifest, read, fresh, coder, limit)


def _write(manifest: Manifest, read: Reader, folder: Path, codec: Codec, limit: int) -> None:
    plan = _plan_shards(manifest.parameters, codec, limit)
    rows, shards, weight_map = [], {}, {}
    for number, names in enumerate(plan, start=1):
        file = f"fisher-{number:05d}-of-{len(plan):05d}.safetensors"
        stored: dict[str, Tensor] = {}
        for name in names:
            parts = codec.encode(name, read(name, None))
            stored.update(parts)
            # The table describes what a reader will get, so the decoded values and not the ones that were encoded.
            decoded = codec.decode(name, reader_of(parts))
            rows.append(describe(name, decoded, manifest.estimator.normalizer, file))
        # One entry only: safetensors writes several in random order, and the same Fisher would get another hash each time.
        save_file(stored, folder / file, metadata={"format": "hf_ewc.fisher"})
        shards[file] = ShardRecord(sha256=sha256_file(folder / file), size=(folder / file).stat().st_size)
        weight_map.update(dict.fromkeys(stored, file))
    totals = Totals(
        num_parameters=sum(row["numel"] for row in rows),
        trace=math.fsum(row["trace"] for row in rows),
        zeros=sum(row["zeros"] for row in rows),
    )
    manifest = replace(manifest, storage=Storage(codec=codec.name, block=codec.block, shards=shards), totals=totals)
    index = {"metadata": {"total_size": sum(shard.size for shard in shards.values())}, "weight_map": weight_map}
    write_summary(rows, folder / SUMMARY)
    for name, text in (
        (INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n"),
        (CARD, render_card(manifest, rows=rows)),
        (MANIFEST, manifest.to_json()),
    ):
        (folder / name).write_text(text, encoding="utf-8")


def _bytes(size: int | str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    try:
        number = int(text) if text.isdigit() else int(float(text[:-2]) * units[text[-2:]])
    except (KeyError, ValueError):
        number = 0
    if number <= 0:
        raise ConfigError(
            f"`max_shard_size: {size}` is not a size. Give bytes, or a number with KB, MB, GB or TB, such as '5GB'."
        )
    return number


def _plan_shards(parameters: Mapping[str, tuple[int, ...]], codec: Codec, limit: int) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    filled = 0
    for name, shape in parameters.items():
        size = codec.size(name, shape)
        if plan[-1] and filled + size > limit:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise EWCError(f"'{folder}' is a file; a Fisher is a folder. Choose another name. Nothing was written.")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not present:
        return
    foreign = sorted(name for name in present if name not in (MANIFEST, INDEX, CARD, SUMMARY) and not SHARD.fullmatch(name))
    if foreign or MANIFEST not in present:
        listed = ", ".join(foreign[:5] or sorted(present)[:5])
        raise EWCError(
            f"'{folder}' holds files that are not part of a Fisher ({listed}), and saving would have to delete them. "
            "Choose a new folder. Nothing was written."
        )
    if not overwrite:
        raise EWCError(
            f"'{folder}' holds a Fisher already. Choose a new folder, or pass `overwrite=True`. Nothing was written."
        )
