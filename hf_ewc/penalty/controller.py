"""Binds a Fisher and an anchor to the live parameters of one training run, and applies the penalty to them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import BaseModel, FisherInformation
from ..errors import ConfigError
from . import kernels, metric, views

logger = logging.getLogger(__name__)


@dataclass
class Protected:
    """One trainable parameter with its F (as stored: sums of squares) and θ*, flat and on its device."""

    name: str
    param: nn.Parameter
    anchor: Tensor  # (numel,)
    fisher: Tensor  # (numel,)
    group: dict[str, Any]  # the optimizer's parameter group: the learning rate lives there


class EWCController:
    """
    The penalty λ/2 · Σ F (θ − θ*)² on the parameters of a live model.

    Parameters are captured once, in [`~EWCController.bind`], and never enumerated again: under FSDP2 `named_parameters()` shows
    other tensors between a forward and the next. F and θ* are kept in bfloat16 where that loses nothing, else in float32.

    Args:
        fisher ([`FisherInformation`]): the artifact; its values are divided by its number of scored tokens.
        base ([`BaseModel`]): the model that θ* is read from, file by file, unless a folded Fisher brings its own θ*.
        ewc_lambda (`float`): λ ≥ 0, in nats of new loss per nat of divergence on the probe, both per token.
        mode (`str`): `"loss"`, `"proximal"` or `"decoupled"`; see `reference.py`.
        missing (`str`): `"error"`, or `"ignore"` to leave parameters that the Fisher does not hold unpenalised.
    """

    def __init__(
        self, fisher: FisherInformation, base: BaseModel, ewc_lambda: float, mode: str = "proximal", missing: str = "error"
    ) -> None:
        self.fisher, self.base, self.ewc_lambda, self.mode, self.missing = fisher, base, ewc_lambda, mode, missing
        self.protected: list[Protected] = []
        self.unprotected: list[str] = []
        self._scratch = kernels.Scratch()
        self._optimizer: torch.optim.Optimizer | None = None
        self._sums, self._max_step, self._warned = torch.zeros(4, dtype=torch.float64), 0.0, False

    # -- binding -------------------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module, optimizer: Any) -> None:
        """
        Match F and θ* to the model's trainable parameters. Called when training begins, after `accelerator.prepare`, and again
        for a repeated `train()`: it reads the anchor from its files each time, never from the live weights.
        """
        params = dict(views.trainable_parameters(model))
        # a frozen parameter needs no Fisher, but one that the Fisher holds must have its shape
        named = {views.clean_name(name): param for name, param in model.named_parameters()}
        shapes = {name: tuple(param.shape) for name, param in named.items() if name in params or name in self.fisher}
        uncovered = set(self.fisher.check_parameters(shapes, self.missing))
        self.unprotected = sorted(uncovered & params.keys())
        if self.unprotected:
            logger.warning(
                "EWC covers %d of %d trainable tensors; unpenalised: %s",
                len(params) - len(self.unprotected),
                len(params),
                self.unprotected,
            )
        self.metrics()  # what a run that failed in the middle of a step had observed
        self._optimizer = metric.unwrap(optimizer)
        if self.mode == "proximal":
            metric.check_adam(self._optimizer)
        groups = {id(param): group for group in self._optimizer.param_groups for param in group["params"]}
        strangers = [name for name, param in params.items() if id(param) not in groups]
        if strangers:
            raise ConfigError(
                f"The optimizer does not hold {len(strangers)} of the model's {len(params)} trainable tensors (first: "
                f"{strangers[0]}): it was built for another model object, or leaves them out. Let the Trainer build the "
                "optimizer. Nothing was trained."
            )
        anchors = self.fisher.anchor([name for name in params if name not in uncovered], self.base)
        self.protected = [
            self._protect(name, param, anchors.read(name), groups[id(param)])
            for name, param in params.items()
            if name not in uncovered
        ]
        self._warn_of_low_precision()

    def _protect(self, name: str, param: nn.Parameter, anchor: Tensor, group: dict[str, Any]) -> Protected:
        if not self.fisher.has_own_anchor:
            # rounded through the parameter's dtype, as loading did, so that the penalty is exactly 0 before the first step. A
            # folded anchor lies between models: the penalty does not start at 0, and rounding would only move it
            anchor = anchor.to(param.dtype)
        fisher = self.fisher.read(name)
        device = views.flat(param).device
        return Protected(name, param, views.narrow(anchor).to(device).view(-1), views.narrow(fisher).to(device).view(-1), group)

    def _warn_of_low_precision(self) -> None:
        low = [p.name for p in self.protected if p.param.dtype != torch.float32]
        if low:
            logger.warning(
                "%d trainable tensors are %s: updates below about 1/256 of a weight's size are rounded away, the optimizer's "
                "and the penalty's alike. Load the model in float32 and set `bf16: true` for mixed precision.",
                len(low),
                str(self.protected[0].param.dtype).removeprefix("torch."),
            )

    # -- acting --------------------------------------------------------------------------------------------------------------

    def add_to_gradients(self, entries: Iterable[Protected] | None = None) -> None:
        """
        Mode `loss`: add λ F (θ − θ*) to `.grad`. Once per optimizer step, when the task's gradient is complete and unclipped.
        """
        for entry in self.protected if entries is None else entries:
            if entry.param.grad is None:  # untouched by this step's task, but the penalty's own gradient is there all the same
                entry.param.grad = torch.zeros_like(entry.param)
            kernels.add_penalty_gradient_(
                views.flat(entry.param.grad), views.flat(entry.param), entry.anchor, entry.fisher, self._scale, self._scratch
            )

    def after_optimizer_step(self) -> None:
        """Modes `proximal` and `decoupled`: the implicit step, after the optimizer's and with its learning rate."""
        for entry in self.protected:
            known, denominator = self._metric(entry)
            if known:
                scale = float(entry.group["lr"]) * self._scale
                kernels.implicit_step_(views.flat(entry.param), entry.anchor, entry.fisher, scale, denominator, self._scratch)

    @property
    def _scale(self) -> float:
        return self.ewc_lambda / self.fisher.normalizer

    def _metric(self, entry: Protected) -> tuple[bool, kernels.DenominatorFn | None]:
        """(whether an implicit step applies, its denominator or `None` for the identity metric)."""
        if self.mode != "proximal":
            return True, None
        assert self._optimizer is not None
        denominator = metric.denominator(self._optimizer, entry.group, entry.param)
        return denominator is not None, denominator

    # -- measuring -----------------------------------------------------------------------------------------------------------

    def observe(self, entry: Protected) -> None:
        """Add one parameter to the sums behind [`metrics`]; its `.grad` must be the task's alone."""
        grad = None if entry.param.grad is None else views.flat(entry.param.grad)
        sums = kernels.penalty_sums(views.flat(entry.param), entry.anchor, entry.fisher, grad, self._scratch)
        self._sums += sums.cpu()
        known, denominator = self._metric(entry)
        if known:
            scale = float(entry.group["lr"]) * self._scale
            self._max_step = max(self._max_step, float(kernels.largest_step(entry.fisher, scale, denominator, self._scratch)))

    def metrics(self) -> dict[str, float]:
        """
        `ewc/*` of the parameters observed since the last call.

        Returns:
            `dict[str, float]`: `ewc/penalty` = λ/2 Σ F δ² (nats per token, as the loss); `ewc/kl_nats` = ½ Σ F δ², the estimate
            of the KL from the base per probe token; `ewc/anchor_distance` = ‖δ‖₂; `ewc/grad_ratio` = ‖λ F δ‖ / ‖task gradient‖;
            `ewc/max_step` = max lr · λ · F, in `proximal` mode over Adam's √v̂ + ε (the k of the implicit step).
        """
        weighted, squared, pull, task = self._sums.tolist()
        kl = 0.5 * weighted / self.fisher.normalizer
        found = {
            "ewc/penalty": self.ewc_lambda * kl,
            "ewc/kl_nats": kl,
            "ewc/anchor_distance": math.sqrt(squared),
            "ewc/grad_ratio": self._scale * math.sqrt(pull) / math.sqrt(task) if task > 0 else math.nan,
            "ewc/max_step": self._max_step,
        }
        self._sums, self._max_step = torch.zeros(4, dtype=torch.float64), 0.0
        return found

    def measure(self) -> dict[str, float]:
        """[`metrics`] of all parameters at the present weights and gradients: one read-only pass, so on logging steps only."""
        for entry in self.protected:
            self.observe(entry)
        return self.metrics()

    def warn_of_large_steps(self, metrics: dict[str, float]) -> None:
        """
        In `loss` mode an explicit step of k = lr · λ · F ≥ 2 overshoots the anchor by more than it started from: say so, once.
        """
        step = metrics.get("ewc/max_step", 0.0)
        if self.mode == "loss" and step > 2 and not self._warned:
            self._warned = True
            logger.warning(
                "`ewc_mode: loss` takes explicit steps, and the largest lr · λ · F is now %.3g, above 2: those weights "
                "overshoot the anchor (plain SGD diverges, Adam chatters). Lower `ewc_lambda` or the learning rate, or set "
                "`ewc_mode: proximal`, which is stable for every λ and has the same fixed point.",
                step,
            )

    def state(self) -> dict[str, Any]:
        """
        What `ewc_state.json` says beside a checkpoint: enough to find F and θ* again and to tell that they are the same. Where
        several Fishers were folded, `fisher.fold` lists them, and `anchor` is the base of the newest.
        """
        pairs = self.fisher.manifest.fold.pairs if self.fisher.manifest.fold and self.fisher.parts else []
        fold = [{**_named(part), "coefficient": p.coefficient} for part, p in zip(self.fisher.parts, pairs, strict=True)]
        return {
            "ewc_lambda": self.ewc_lambda,
            "ewc_mode": self.mode,
            "fisher": {**_named(self.fisher), **({"fold": fold} if fold else {})},
            "anchor": {"id": self.base.id, "revision": self.base.revision, "fingerprint": self.base.fingerprint},
            "protected_tensors": len(self.protected),
            "unprotected": self.unprotected,
        }


def _named(fisher: FisherInformation) -> dict[str, Any]:
    hub = {"repo_id": fisher.place.repo_id, "revision": fisher.place.commit} if fisher.place and fisher.place.repo_id else {}
    return {"source": fisher.source, "sha256": fisher.sha256, **hub}
