"""The model that is measured, and the files in which its weights, the anchor θ*, lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..artifact import AnchorTensors, BaseModel
from ..config import FisherConfig
from ..devices import usable_device
from ..errors import ConfigError, DataError
from .replicas import Replicas
from .sharded import shard


def model_and_base(
    model: str | Path | PreTrainedModel, config: FisherConfig, processes: Replicas
) -> tuple[PreTrainedModel, BaseModel]:
    """Load the model that an id or folder names; or find the files of a loaded one, and see that it still equals them."""
    kind, way_out = type(model).__name__, "Save it first (model and tokenizer, `save_pretrained(folder)`) and pass that folder."
    given = isinstance(model, PreTrainedModel)
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise DataError(
            f"`model` must be an id, a folder or a `PreTrainedModel`, got {kind}. Unwrap it (`.module` of DDP, "
            f"`merge_and_unload()` of PEFT). {way_out}"
        )
    name = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
    if not name:
        raise DataError(f"this {kind} comes from no file, so that the anchor θ* could not be read again. {way_out}")
    if config.sharding == "fsdp2" and (given or processes.size == 1):
        raise ConfigError(
            "`sharding: fsdp2` spreads a model over several processes while it is loaded: "
            + ("name it by id or folder." if given else "start them with `torchrun --nproc_per_node N …`; here there is one.")
        )
    base = BaseModel.resolve(name, config.revision)
    assert base.folder is not None  # `resolve` found it
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, config.dtype))
        if config.sharding == "fsdp2":
            shard(model)
        else:
            model.to(device=usable_device(config.device) if config.device else processes.device)  # type: ignore[call-arg]
    parameters = dict(model.named_parameters())
    if packed := [name for name, parameter in parameters.items() if not parameter.is_floating_point()]:
        raise DataError(
            f"{len(packed)} parameters of '{base.label}' are quantised ({packed[0]}, …), so that they have no gradient. Take "
            "the model in float32 or bfloat16."
        )
    if given and (other := _differing(parameters, base)):
        raise DataError(
            f"the weights of this {kind} are not those of '{base.label}', where it was loaded from: `{other}` differs. A "
            f"Fisher belongs to the weights at which it was measured, and the anchor θ* is read from files. {way_out}"
        )
    return model, base


def _differing(parameters: Mapping[str, Tensor], base: BaseModel) -> str | None:
    """The first parameter that is not what the base's files hold, rounded to the parameter's dtype."""
    anchor = AnchorTensors(base, parameters)
    for name, parameter in parameters.items():
        there = anchor.read(name)
        if there.shape != parameter.shape or not torch.equal(there.to(parameter), parameter.detach()):
            return name
    return None
