"""[`merge_models`]: from two models and a Fisher to a third model, tensor by tensor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..artifact import AnchorTensors, BaseModel, FisherInformation, files
from ..config import raise_problems
from ..errors import FisherMismatchError
from ..files import STATE_FILE
from .checks import base_of, check_target, compare, fisher_of, resolve, setting_problems, state_of
from .formula import Mover, Share, label_of
from .shards import Adapted, write_beside, write_shard


@dataclass(frozen=True)
class Merged:
    """
    What [`merge_models`] wrote.

    Args:
        folder (`Path`): the new model.
        base, adapted ([`BaseModel`]): what it was made from.
        fisher ([`FisherInformation`], *optional*): `None` for an interpolation.
        groups (`dict[str, Share]`): how far embedding, attention, mlp, … went back to the base, and `"all"` together.
    """

    folder: Path
    base: BaseModel
    adapted: BaseModel
    fisher: FisherInformation | None
    groups: dict[str, Share]


def merge_models(
    base: str | Path | None,
    adapted: str | Path,
    fisher: FisherInformation | str | Path | None,
    merge_lambda: float | None,
    output_dir: str | Path,
    *,
    interpolate: float | None = None,
    revision: str | None = None,
    adapted_revision: str | None = None,
    fisher_revision: str | None = None,
    ewc_missing: str = "error",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Merged:
    r"""
    Pull an adapted model back to its base, each weight by its importance, and write the result as a checkpoint:

    $$\theta_{out} = \theta^* + \frac{\theta - \theta^*}{1 + \lambda F / \bar F}$$

    with F̄ the mean of F over all weights. λ = 0 gives the adapted model, bit by bit. For λ → ∞ all weights with F > 0 are the
    base's; those with F = 0 stay adapted, whatever λ is, and so does what the Fisher does not hold. Of a Fisher that was folded
    from several bases, θ* is its own anchor, as in training. Computed in float64 and rounded once.

    No model is loaded: some pieces of a tensor are in memory at a time. (Where the base's files have other names than its
    parameters, as some old ones have, that model is loaded on the CPU.)

    Args:
        base (`str` or `Path`, *optional*): θ*: a folder, or an id on the Hub. `None` for the one that `ewc_state.json` of the
            adapted model names.
        adapted (`str` or `Path`): θ, trained from it, in float64, float32, bfloat16 or float16.
        fisher ([`FisherInformation`], `str` or `Path`, *optional*): measured at the base. `None` for the one that
            `ewc_state.json` of the adapted model names, and for an interpolation.
        merge_lambda (`float`, *optional*): λ ≥ 0, or `math.inf`. Unlike the λ of training it is a pure number: 1 moves a weight
            of mean importance half of the way.
        output_dir (`str` or `Path`): new or empty, unless `overwrite`. All of it appears at once, or not at all.
        interpolate (`float`, *optional*): in place of λ, the α of θ* + (1 − α)(θ − θ*), 0 to 1, the same for all weights. In
            the paper about it (WiSE-FT, Wortsman et al. 2022, https://arxiv.org/abs/2109.01903) α counts from the other end.
        revision, adapted_revision, fisher_revision (`str`, *optional*): branch, tag or commit of each on the Hub.
        ewc_missing (`str`, *optional*, defaults to `"error"`): `"ignore"` permits parameters that the Fisher does not hold.
        dtype (`str`, *optional*): `"float32"` or `"bfloat16"`, for all parameters. By default each stays in the dtype that it
            has in the adapted model's files.
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier merge.

    Returns:
        [`Merged`]: the folder, and how far which tensors went.

    Raises:
        [`ConfigError`], [`DataError`], [`FisherMismatchError`]: settings that contradict each other; models, or a Fisher, that
            do not belong together; weights that are NaN or infinite. Nothing was written.
    """
    target = Path(output_dir).expanduser()
    problems = setting_problems(merge_lambda, interpolate, ewc_missing, dtype)
    raise_problems("these settings cannot run; nothing was written", problems)
    check_target(target, overwrite, [each for each in (base, adapted, fisher) if isinstance(each, (str, Path))])
    theta = resolve("adapted", adapted, adapted_revision)
    state = state_of(theta)
    start = base_of(base, revision, theta, state)
    shapes, owners = compare(start, theta)
    source = Adapted(theta, shapes, owners)
    if merge_lambda is None:
        assert interpolate is not None
        information, strength, uncovered = None, interpolate, []
    else:
        information, strength = fisher_of(fisher, fisher_revision, start, theta, state), merge_lambda
        try:
            uncovered = information.check_parameters(shapes, ewc_missing)
        except FisherMismatchError as error:
            raise FisherMismatchError(str(error).replace("Nothing was trained", "Nothing was written")) from None
    check_target(target, overwrite, [each.folder for each in (start, theta) if each.folder])  # those that the state named
    covered = [name for name in shapes if name not in uncovered]
    anchor = AnchorTensors(start, covered) if information is None else information.anchor(covered, start)
    mover = Mover(anchor.read, label_of("base", start), information, strength, uncovered)

    cast = None if dtype is None else getattr(torch, dtype)
    record = _record(state, start, theta, information, merge_lambda, interpolate)
    with files.replaced_folder(target) as fresh:
        size = sum(write_shard(source, name, fresh / name, mover, cast) for name in source.names)
        write_beside(theta, fresh, dtype, size)
        (fresh / STATE_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Merged(target, start, theta, information, mover.shares())


def _record(
    state: dict[str, Any],
    base: BaseModel,
    adapted: BaseModel,
    fisher: FisherInformation | None,
    merge_lambda: float | None,
    interpolate: float | None,
) -> dict[str, Any]:
    """`ewc_state.json`: how the adapted model was trained, as it says itself, and what was merged. JSON has no infinity."""
    how: dict[str, Any] = {"interpolate": interpolate}
    if merge_lambda is not None:
        how = {"merge_lambda": "inf" if math.isinf(merge_lambda) else merge_lambda}
    if fisher is not None:
        place = fisher.place
        hub = {"repo_id": place.repo_id, "revision": place.commit} if place and place.repo_id else {}
        how["fisher"] = {"source": fisher.source, "sha256": fisher.sha256, **hub}
    named = {
        role: {"id": model.id, "revision": model.revision, "fingerprint": model.fingerprint}
        for role, model in (("base", base), ("adapted", adapted))
    }
    if "merge" in state:  # what was merged was a merge itself
        named["adapted"]["merge"] = state["merge"]
    trained = state or {"schema": 1, "hf_ewc": __version__, "fisher": None, "anchor": None}
    return {**trained, "merge": {"hf_ewc": __version__, **how, **named}}
