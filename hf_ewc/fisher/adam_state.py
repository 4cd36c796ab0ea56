"""
The second moments that Adam keeps, read from a file and given their parameters' names back.

Optimizer states are pickles nearly everywhere, and this package reads none (PITFALLS H1), with the one exception below. What
makes it tolerable: the user names the file, and nothing ever looks for one; torch's restricted unpickler (`weights_only=True`,
as the Trainer itself uses it to resume) builds tensors, numbers and containers and calls nothing else; files in torch's older
formats are refused altogether; and what comes out is checked like any other input, then written as safetensors.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DataError, FisherMismatchError

# bitsandbytes: the blocks that share one maximum, now and before version 0.45
_BNB_BLOCKS = (256, 2048)
_NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides its 8-bit state from FSDP


@dataclass(frozen=True)
class SecondMoment:
    """
    Adam's v of one parameter.

    Args:
        read (`Callable`): reads it: float32, the parameter's shape.
        shape (`tuple[int, ...]`): of the parameter.
        stored (`str`): how it is stored: a dtype, or `"8bit"`.
        step (`float`, *optional*): optimizer steps that are in it; `None` when the file does not say.
        beta2 (`float`, *optional*): its decay; likewise.
    """

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    stored: str
    step: float | None
    beta2: float | None


def read_moments(
    path: Path, parameters: Mapping[str, tuple[int, ...]], layouts: Mapping[str, list[list[str]]]
) -> dict[str, SecondMoment]:
    """
    All second moments of a state file by parameter name.

    Args:
        path (`Path`): `optimizer.pt` of a transformers checkpoint (or any `state_dict()` of a torch or bitsandbytes Adam that
            `torch.save` wrote), or a safetensors file with keys `<parameter>.exp_avg_sq` or `exp_avg_sq/<parameter>`.
        parameters (`Mapping[str, tuple[int, ...]]`): the model's shapes, in the order of `named_parameters()`.
        layouts (`Mapping[str, list[list[str]]]`): for files that know numbers only: what the layout is called → the names in
            each parameter group, in the order in which they may have been numbered.

    Raises:
        [`DataError`]: it is no Adam state, or one that cannot be read safely or as a whole.
        [`FisherMismatchError`]: it is the state of another model, or it fits this one in more than one way.
    """
    if path.is_dir():
        raise DataError(
            f"`optimizer_state: {path}` is a folder: a state that was saved in shards (FSDP, DeepSpeed), which are not put "
            f"together here. {_WHOLE}"
        )
    if not path.is_file():
        raise DataError(f"there is no file `optimizer_state: {path}`. In a checkpoint of transformers it is optimizer.pt.")
    if path.suffix == ".safetensors":
        moments = _from_safetensors(path)
    else:
        moments = _from_state_dict(path, _unpickle(path), parameters, layouts)
    _check_fit(path, moments, parameters)
    return moments


_WHOLE = (
    "Gather it first: for FSDP, save with `fsdp_state_dict_type: FULL_STATE_DICT`; for DeepSpeed, use "
    "`safe_get_full_optimizer_state(parameter, 'exp_avg_sq')` in a script of your own. Write the result as safetensors with "
    "keys `<parameter>.exp_avg_sq`. Nothing was imported."
)


def _from_safetensors(path: Path) -> dict[str, SecondMoment]:
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
            dtypes = {key: str(file.get_slice(key).get_dtype()) for key in shapes}
            steps = {key: file.get_tensor(key) for key in shapes if key.split(".")[-1] == "step" or key.startswith("step/")}
    except SafetensorError as error:
        raise DataError(f"'{path}' is not a whole safetensors file ({error}). Copy it again. Nothing was imported.") from None
    moments = {}
    for key, shape in shapes.items():
        name = key.removeprefix("exp_avg_sq/").removesuffix(".exp_avg_sq")
        if name == key:
            continue
        found = [steps[k] for k in (f"{name}.step", f"step/{name}", "step") if k in steps] or [said.get("step")]
        moments[name] = SecondMoment(_reader(path, key), shape, dtypes[key], _number(found[0]), _number(said.get("beta2")))
    if not moments:
        raise DataError(
            f"'{path}' has no key of the form `<parameter>.exp_avg_sq` or `exp_avg_sq/<parameter>`; the first of its "
            f"{len(shapes)} keys is {next(iter(shapes), None)!r}. Rename the keys. Nothing was imported."
        )
    return moments


def _reader(path: Path, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(key).float()

    return read


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _unpickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"'{path}' is neither safetensors nor a file that torch.save of version 1.6 or later wrote; or a copy was cut off. "
            "Other pickles are not read: unpickling can run any code. Write the state as safetensors, with keys "
            "`<parameter>.exp_avg_sq`. Nothing was imported."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the first moments stay on disk
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        asked = reason.partition("GLOBAL ")[2].split()[:1] or [reason[:200]]
        if "zero_pp_rank" in path.name or any(
            word in reason for word in ("deepspeed", "DTensor", "ShardedTensor", "FlatParam")
        ):
            raise DataError(f"'{path}' is one shard of a state (it holds {asked[0]}). {_WHOLE}") from None
        raise DataError(
            f"'{path}' holds more than tensors, numbers and containers ({asked[0]}), so torch's restricted unpickler refuses "
            "it, and the unrestricted one can run any code. Load it where you trust it and write safetensors with keys "
            "`<parameter>.exp_avg_sq`. Nothing was imported."
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"'{path}' is damaged ({str(error).splitlines()[0]}). Copy it again. Nothing was imported.") from None


def _from_state_dict(
    path: Path, content: Any, parameters: Mapping[str, tuple[int, ...]], layouts: Mapping[str, list[list[str]]]
) -> dict[str, SecondMoment]:
    if isinstance(content, dict) and any("zero" in str(key) or "fp32_flat" in str(key) for key in _keys(content, 2)):
        raise DataError(f"'{path}' is one shard of a DeepSpeed ZeRO state, flattened. {_WHOLE}")
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys() or not content["state"]:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"'{path}' is no optimizer's `state_dict()` after at least one step: it holds {keys}. Nothing was imported."
        )
    groups, states = content["param_groups"], content["state"]
    names = _names(path, groups, states, parameters, layouts)
    moments, strange = {}, []
    for group in groups:
        for number in group["params"]:
            state = states.get(number, {})
            state = {**state, **state.get(_NESTED, {})}
            moment = _moment(state, group)
            if moment is None:
                strange.append(
                    f"{names[number]} has {', '.join(map(str, state)) or 'no state: it was frozen or never stepped'}"
                )
            else:
                moments[names[number]] = moment
    if strange:
        raise DataError(
            f"'{path}' lacks Adam's second moment (exp_avg_sq, or state2 of bitsandbytes) for {len(strange)} of {len(names)} "
            f"parameters:\n    {_listed(strange)}\nOnly Adam and its kin average squared gradients by themselves; SGD, Lion "
            "and Adafactor do not. Estimate the Fisher with `hf-ewc fisher …` instead. Nothing was imported."
        )
    return moments


def _keys(content: dict, depth: int) -> list[Any]:
    below = [key for value in content.values() if isinstance(value, dict) and depth > 1 for key in _keys(value, depth - 1)]
    return [*content, *below]


def _moment(state: Mapping[str, Any], group: Mapping[str, Any]) -> SecondMoment | None:
    betas: tuple = tuple(group.get("betas") or ())
    beta2 = _number(betas[1]) if len(betas) > 1 else None
    step = _number(state.get("step"))
    values = state.get("exp_avg_sq", state.get("state2"))
    if not isinstance(values, Tensor):
        return None
    if values.dtype.is_floating_point:
        return SecondMoment(values.float, tuple(values.shape), str(values.dtype).removeprefix("torch."), step, beta2)
    absmax, qmap = state.get("absmax2"), state.get("qmap2")
    if values.dtype != torch.uint8 or absmax is None or qmap is None:
        return None
    block = next((size for size in _BNB_BLOCKS if -(-values.numel() // size) == absmax.numel()), None)
    if block is None:
        return None

    def dequantize() -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        flat = dequantize_blockwise(values.reshape(-1).contiguous(), absmax=absmax.float(), code=qmap.float(), blocksize=block)
        return flat.float().view(values.shape)

    return SecondMoment(dequantize, tuple(values.shape), "8bit", step, beta2)


def _names(
    path: Path,
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, Any],
    parameters: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, list[list[str]]],
) -> dict[Any, str]:
    """Number → parameter name. A file that says names is believed; otherwise every layout is tried, and one must fit."""
    numbers = [list(group["params"]) for group in groups]
    flat = [number for group in numbers for number in group]
    if all(isinstance(number, str) for number in flat):  # FSDP's whole state
        return {name: name for name in flat}
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):  # torch: from named parameters
        return dict(zip(flat, [name for group in groups for name in group["param_names"]], strict=True))
    shapes = {number: _moment_shape(states.get(number, {})) for number in flat}
    fitting: dict[str, dict[Any, str]] = {}
    for layout, named in layouts.items():
        if [len(group) for group in named] != [len(group) for group in numbers]:
            continue
        mapping = dict(zip(flat, [name for group in named for name in group], strict=True))
        if all(shapes[number] in (None, parameters[name]) for number, name in mapping.items()):
            fitting[layout] = mapping
    if not fitting:
        found = f"{len(flat)} parameters, {sum(prod(shape or ()) if shape else 0 for shape in shapes.values()):,} numbers"
        wanted = f"{len(parameters)} parameters, {sum(map(prod, parameters.values())):,} numbers"
        raise FisherMismatchError(
            f"the optimizer state '{path}' does not fit the model.\n    state  {found}, in groups of "
            f"{', '.join(str(len(group)) for group in numbers)}\n    model  {wanted}\nIt knows parameters by number only, and "
            f"in none of the usual orders ({'; '.join(layouts)}) do all shapes agree. Is it of another model, of an adapter, "
            "or were some weights frozen? Write it as safetensors with keys `<parameter>.exp_avg_sq`. Nothing was imported."
        )
    chosen = next(iter(fitting.values()))
    if any(mapping != chosen for mapping in fitting.values()):
        raise FisherMismatchError(
            f"the optimizer state '{path}' knows parameters by number only, and fits the model in more than one order: "
            f"{'; '.join(fitting)}. A guess could give each weight another one's Fisher. Write it as safetensors with keys "
            "`<parameter>.exp_avg_sq`. Nothing was imported."
        )
    return chosen


def _moment_shape(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    for key in ("exp_avg_sq", "state2", "exp_avg", "momentum_buffer", "state1"):
        value = state.get(key, state.get(_NESTED, {}).get(key))
        if isinstance(value, Tensor):
            return tuple(value.shape)
    return None


def _check_fit(path: Path, moments: Mapping[str, SecondMoment], parameters: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{name}   state absent   model {shape}" for name, shape in parameters.items() if name not in moments]
    problems += [f"{name}   state {moment.shape}   model absent" for name, moment in moments.items() if name not in parameters]
    problems += [
        f"{name}   state {moments[name].shape}   model {shape}"
        for name, shape in parameters.items()
        if name in moments and moments[name].shape != shape
    ]
    if problems:
        raise FisherMismatchError(
            f"the optimizer state '{path}' does not fit the model:\n    {_listed(problems)}\nIs it of another checkpoint? A "
            "tied table belongs in it once, under its name in `named_parameters()`. Nothing was imported."
        )


def _listed(lines: Sequence[str]) -> str:
    more = [f"… and {len(lines) - 5} more"] if len(lines) > 5 else []
    return "\n    ".join([*lines[:5], *more])


def steps_of_trainer(path: Path) -> int | None:
    """`global_step` of the `trainer_state.json` beside a state file, if there is one."""
    try:
        return int(json.loads((path.parent / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
