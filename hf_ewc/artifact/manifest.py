"""`fisher_config.json`: what was measured, on which model and data, how, and how it is stored."""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from ..errors import FisherFormatError
from .base import BaseModel
from .records import FoldRecord, ShardRecord

SCHEMA = 2  # 1 lacks fields that all have defaults, so that both are read
ADAM_PATH = "adam_exp_avg_sq"  # `EstimatorRecord.path` of an imported Adam state, which is no measurement
REDUCTIONS = ("sum", "mean_per_scored_token")


@dataclass(kw_only=True)
class ProbeRecord:
    """
    The data that the model's log-likelihood was differentiated on.

    Args:
        kind (`str`): `"mmlu"`, `"completion"`, `"text"`, …
        dataset (`str`, *optional*): file name or Hub id; `None` for a dataset object in memory.
        config, split, revision (`str`, *optional*): as for `load_dataset`; the revision as a commit.
        template_sha256 (`str`, *optional*): hash of the prompt's template.
        ids_sha256 (`str`): hash of the token ids and of which of them are scored, in order.
        examples (`int`): examples whose squares are in the sums.
        scored_tokens (`int`): scored tokens of those examples.
        dropped (`int`, *optional*, defaults to 0): examples left out for NaN or infinite gradients.
        weight (`float`, *optional*, defaults to 1.0): share in a mixture, see [`FisherInformation.mix`].
        name (`str`, *optional*): what a mixture calls it.
        task (`str`, *optional*): task of lm-evaluation-harness, for `kind="lm_eval"`.
        num_fewshot (`int`, *optional*): worked examples in front of each prompt, for `kind="lm_eval"`.

    Of an imported Adam state (`kind="adam"`) no data are known: `ids_sha256` is the state file's hash, `examples` the number of
    batches that its average amounts to, `scored_tokens` that times the tokens of a batch.
    """

    kind: str
    dataset: str | None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    template_sha256: str | None = None
    ids_sha256: str
    examples: int
    scored_tokens: int
    dropped: int = 0
    weight: float = 1.0
    name: str | None = None
    task: str | None = None
    num_fewshot: int | None = None


@dataclass(kw_only=True)
class StabilityRecord:
    """
    How well the Fishers of two halves of the examples agree: 1.0 is perfectly. Tells whether more examples would change much.

    Args:
        examples (`int`): examples that were used by then, both halves together.
        correlation (`float`): Pearson correlation of log F between the halves, over sampled weights, each of which stands for
            its share of the model.
        overlap (`float`): share of the top 1 % of weights that both halves agree on.
        groups (`dict[str, float]`): the correlation by layer and group (`"layer 3 mlp"`, `"embedding"`).
        probe (`str`, *optional*): of which probe of a mixture.
    """

    examples: int
    correlation: float
    overlap: float
    groups: dict[str, float]
    probe: str | None = None


@dataclass(kw_only=True)
class EstimatorRecord:
    """
    How the numbers were made. The reduction is written down, never guessed: a sum read as a mean over T tokens
    rescales the Fisher, and with it λ.

    Args:
        labels (`str`, *optional*, defaults to `"empirical"`): which targets were differentiated.
        granularity (`str`, *optional*, defaults to `"example"`): what was squared.
        reduction (`str`, *optional*, defaults to `"sum"`): `"sum"` of squares, or `"mean_per_scored_token"` in a
            mixture.
        normalizer (`float`): divide the stored values by this to get F per scored token. T for `"sum"`, else 1.
        accumulation_dtype, model_dtype (`str`, *optional*): of the sums, and of the model's weights.
        seed, max_length (`int`, *optional*): of the draw of examples, and of the longest one.
        path (`str`, *optional*, defaults to `"one_by_one"`): which implementation ran.
        fallback (`list[str]`, *optional*): parameters that the batched path left to the one-by-one path.
        self_check (`float`, *optional*): largest disagreement of the batched with the one-by-one path on the first batch,
            ‖√S − √S′‖ / ‖√S′‖, over the parameters that it was used for.
        draws (`int`, *optional*): label draws per example, for `labels="sampled"`.
        batch_size (`int`, *optional*): examples per square, for `granularity="batch"`.
        trace_stderr (`float`, *optional*): standard error of the trace over its value, from the scatter of the batches, for
            `granularity="batch"`.
        stability (`list[StabilityRecord]`, *optional*): split-half figures at doubling counts.
    """

    labels: str = "empirical"
    granularity: str = "example"
    reduction: str = "sum"
    normalizer: float
    accumulation_dtype: str = "float32"
    model_dtype: str = "float32"
    seed: int | None = None
    path: str = "one_by_one"
    max_length: int | None = None
    fallback: list[str] = field(default_factory=list)
    self_check: float | None = None
    draws: int | None = None
    batch_size: int | None = None
    trace_stderr: float | None = None
    stability: list[StabilityRecord] = field(default_factory=list)


@dataclass(kw_only=True)
class Storage:
    """How the values lie on disk: the codec's name, how many values share a scale (log8), and the files."""

    codec: str
    block: int | None = None
    shards: dict[str, ShardRecord]


@dataclass(kw_only=True)
class Totals:
    """Over all parameters; `trace` is Σᵢ Fᵢ per scored token, `zeros` counts exact zeros."""

    num_parameters: int
    trace: float
    zeros: int


@dataclass(kw_only=True)
class Manifest:
    """
    Everything about a Fisher but its values. Fields as in `fisher_config.json`; `parameters` maps each parameter to
    its shape, in the order of `named_parameters()`; `fold` is there for folded Fishers only.
    """

    schema: int = SCHEMA
    base_model: BaseModel
    probes: list[ProbeRecord]
    estimator: EstimatorRecord
    storage: Storage
    parameters: dict[str, tuple[int, ...]]
    totals: Totals
    versions: dict[str, str]
    fold: FoldRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON's content, `digest` included."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fold"}
        data["base_model"] = self.base_model.to_dict()
        data["probes"] = [asdict(probe) for probe in self.probes]
        for name in ("estimator", "storage", "totals"):
            data[name] = asdict(data[name])
        data |= {"fold": asdict(self.fold)} if self.fold else {}
        data["parameters"] = {name: {"shape": list(shape)} for name, shape in self.parameters.items()}
        return {**data, "digest": digest_of(data)}

    @property
    def files(self) -> dict[str, ShardRecord]:
        """All safetensors files: those of F, and those of the anchor where a fold stores one."""
        return {**self.storage.shards, **((self.fold and self.fold.anchor) or {})}

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON without `digest`. As it covers the shards' hashes, it identifies the whole artifact."""
        return self.to_dict()["digest"]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """
        Parse `fisher_config.json`, field by field, and check its digest.

        Args:
            text (`str`): the file's content.
            source (`str`): where it comes from, for messages.

        Raises:
            [`FisherFormatError`]: for broken JSON, a newer schema, unknown, missing or mistyped fields, or an edited
            file.
        """
        try:
            data = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except ValueError as error:
            raise _unusable(source, [f"not JSON ({error}); was the download or copy cut off?"]) from None
        if not isinstance(data, dict):
            raise _unusable(source, [f"holds a {type(data).__name__} where an object belongs"])
        schema = data.get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise FisherFormatError(
                f"the Fisher '{source}' has schema {schema} and needs a newer hf_ewc; this version reads up to {SCHEMA}. "
                "Upgrade with `pip install -U hf_ewc`. Nothing was loaded."
            )
        recorded = data.pop("digest", None)
        computed = digest_of(data)  # of what is in the file, not of what this version would write
        problems: list[str] = []
        shapes = data.get("parameters")
        if isinstance(shapes, dict) and all(isinstance(v, dict) and list(v) == ["shape"] for v in shapes.values()):
            data["parameters"] = {name: value["shape"] for name, value in shapes.items()}
        manifest = _parse(cls, data, "", problems)
        if not problems:
            problems += manifest.problems()
            if recorded != computed:
                problems.append(
                    f"digest recorded {recorded}, computed {computed}: it was edited after it was written, so it no "
                    "longer says what was measured"
                )
        if problems:
            raise _unusable(source, problems)
        manifest.schema = SCHEMA
        return manifest

    def problems(self) -> list[str]:
        """Values of the right type that still make no sense."""
        found = []
        estimator = self.estimator
        if self.schema not in (1, SCHEMA):
            found.append(f"schema is {self.schema}, this version reads 1 to {SCHEMA}")
        if estimator.reduction not in REDUCTIONS:
            found.append(f"estimator.reduction is '{estimator.reduction}', not one of {', '.join(REDUCTIONS)}")
        if not (math.isfinite(estimator.normalizer) and estimator.normalizer > 0):
            found.append(f"estimator.normalizer must be a finite number above 0, is {estimator.normalizer}")
        if estimator.reduction == "mean_per_scored_token" and estimator.normalizer != 1:
            found.append(f"estimator.normalizer is {estimator.normalizer}, but a mean per scored token needs 1")
        if not self.parameters:
            found.append("parameters is empty")
        if not self.probes:
            found.append("probes is empty: what was the Fisher measured on?")
        return found + (self.fold.problems() if self.fold else [])


def digest_of(data: dict[str, Any]) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def _unusable(source: str, problems: list[str]) -> FisherFormatError:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return FisherFormatError(
        f"the manifest fisher_config.json of '{source}' cannot be used:\n{listed}\n"
        "Copy or download the artifact again, or estimate it again (`hf-ewc fisher …`). Nothing was loaded."
    )


def _parse(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Build `kind` (a dataclass, container or scalar type) from JSON; says what is wrong and where instead of raising."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        return None if value is None else _parse(arguments[0], value, where, problems)
    if origin in (list, tuple) and isinstance(value, list):
        items = [_parse(arguments[0], item, f"{where}[{n}]", problems) for n, item in enumerate(value)]
        return origin(items)
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}".strip("."), problems) for key, item in value.items()}
    if hasattr(kind, "__dataclass_fields__") and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in fields(kind) if f.name != "folder"}
        problems += [f"unknown field `{where}.{key}`".replace("`.", "`") for key in value if key not in known]
        absent = [n for n, f in known.items() if n not in value and f.default is MISSING and f.default_factory is MISSING]
        problems += [f"field `{where}.{name}` is missing".replace("`.", "`") for name in absent]
        parts = {k: _parse(hints[k], v, f"{where}.{k}".strip("."), problems) for k, v in value.items() if k in known}
        return kind(**parts) if not problems else None
    expected = (int, float) if kind is float else kind if isinstance(kind, type) else ()
    if isinstance(value, expected) and not isinstance(value, bool):
        return value
    problems.append(f"field `{where}` holds {value!r}, not a {getattr(origin or kind, '__name__', kind)}")
    return None
