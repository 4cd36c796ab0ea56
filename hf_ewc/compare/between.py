"""[`Between`]: models between a base and an adapted model, made in memory while somebody moves a slider."""

from __future__ import annotations

import copy
import gc
import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..artifact import FisherInformation, fit
from ..errors import DataError, FisherMismatchError
from ..merge import finite, kept, pieces, pull_back, scale_of
from .pair import ModelPair, Side
from .problems import CompareError

logger = logging.getLogger(__name__)

STOPS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10_000.0, math.inf)
"""
Where a slider of λ stops. The values of F lie many decades apart, so that λ has to cross them for the weights to follow: on the
demo's Fisher, each stop takes the mean weight about a tenth of the way further back, 4 % at 0.1 and 90 % at 10,000.
"""

MARGIN = 0.25
"""Of the memory that is free, this share stays so: for the texts that are being written, and for whatever else runs there."""

_GROUPS = (  # limit, use and the pages among it that can be dropped at any time, of a container: cgroup v2, then v1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


class Between:
    r"""
    Post-hoc EWC, live: the models

    $$\theta^* + \frac{\theta - \theta^*}{1 + \lambda F / \bar F}$$

    between the base θ* and the adapted model θ of a pair. They are what `hf-ewc merge` writes of the same weights, bit by bit;
    of a Fisher that was folded from several bases, θ* is its own anchor, as there.

    Each λ is a model with weights of its own, made once and kept as long as there is room; then the one that nobody asked for
    longest goes. A model that is in use stays as it is, whatever is asked for meanwhile, and its memory counts until it is let
    go: ask again with [`Between.at`] each time instead of keeping one. Any number of threads may do so at once.

    Parameters:
        pair ([`ModelPair`]): The models, in float64, float32, bfloat16 or float16. They are only read.
        fisher ([`FisherInformation`]): Measured at the base (a pair in memory has no hash to tell that by: see [`fisher_of`]).
            It is read slice by slice, each time a model is made.
        memory_limit (`int`, *optional*):
            Bytes for all models that are made. By default three quarters of what is free where the pair lies, looked up each
            time: on CUDA as the driver says, else of the machine or of the container, whichever has less.
        ewc_missing (`str`, *optional*, defaults to `"error"`): `"ignore"` leaves adapted what the Fisher does not hold.

    Raises:
        [`DataError`], [`FisherMismatchError`]: the models, or the Fisher, do not belong together.

    Example:

    ```python
    >>> between = Between(pair, fisher)
    >>> between.at(10).label
    'λ = 10'
    >>> for frame in stream(between.pair_at(10), "Vilnius yra"):
    ...     print(frame.base.text, "|", frame.adapted.text)
    ```
    """

    def __init__(self, pair: ModelPair, fisher: FisherInformation, memory_limit: int | None = None, ewc_missing: str = "error"):
        self.pair, self.fisher, self.memory_limit = pair, fisher, memory_limit
        base, adapted = (dict(side.model.named_parameters()) for side in pair.sides)
        shapes = _checked(pair, base, adapted)
        try:
            scale_of(fisher, 1.0)  # refuses a Fisher that is 0 everywhere
            self._left = set(fisher.check_parameters(shapes, ewc_missing))
        except FisherMismatchError as error:
            raise FisherMismatchError(str(error).partition(" Nothing was ")[0]) from None
        self._base, self._adapted = base, adapted
        self._anchor = fisher.anchor([name for name in shapes if name not in self._left]) if fisher.has_own_anchor else None
        self._blank = _without_weights(pair.adapted.model)
        weights: list[Tensor] = [*adapted.values(), *self._blank.buffers()]
        self.cost_bytes = sum(each.numel() * each.itemsize for each in weights)
        self._kept: OrderedDict[float, Side] = OrderedDict()  # the one that was asked for last comes last
        # these, and those that were let go and are still in use elsewhere
        self._alive: weakref.WeakValueDictionary[float, PreTrainedModel] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # of both; held for no longer than it takes to look
        self._making = threading.Lock()  # one model at a time: two at once might have room only one after the other

    def at(self, merge_lambda: float) -> Side:
        """
        The model at λ, from 0 (the adapted model itself, which costs nothing) to `math.inf` (the base where F > 0).

        Raises:
            [`CompareError`]: no such λ (`code="setting"`); or there is no room for a model (`code="memory"`), for good, see
                [`Between.problem`], or until others let theirs go. Then nothing was allocated.
        """
        try:
            strength = float(merge_lambda)
        except (TypeError, ValueError, OverflowError):
            strength = math.nan
        if not strength >= 0:
            raise CompareError(
                "setting",
                f"λ is {merge_lambda!r}, and it must be a number from 0 (the adapted model) to infinity (the base).",
                name="merge_lambda",
            )
        if strength == 0:
            return self.pair.adapted
        if found := self._found(strength):
            return found
        with self._making:
            if found := self._found(strength):  # made by another thread meanwhile
                return found
            self._make_room()
            model = self._made(strength)
            with self._lock:
                self._alive[strength] = model
            return self._found(strength) or self._side(strength, model)

    def pair_at(self, merge_lambda: float) -> ModelPair:
        """The pair of base and [`Between.at`]: for [`stream`] and [`score`]."""
        side = self.at(merge_lambda)
        return self.pair if side is self.pair.adapted else ModelPair(self.pair.base, side, self.pair.tokenizer)

    @property
    def at_hand(self) -> tuple[float, ...]:
        """Each λ whose model is there now, so that nobody waits for it."""
        with self._lock:
            return tuple(sorted(self._alive))

    def fits(self) -> bool:
        """Whether there is room for one model, once others are let go."""
        return self.problem is None

    @property
    def problem(self) -> CompareError | None:
        """Why no model can be made here, however long one waits (`code="memory"`); `None` if one can."""
        room = self._room()
        if self.cost_bytes <= room:
            return None
        return CompareError(
            "memory",
            f"a model between the two needs {_size(self.cost_bytes)} of memory, and the server has {_size(room)} free for it. "
            "Take λ = 0, the adapted model itself; `hf-ewc merge` makes the others one by one, on disk.",
            needed=self.cost_bytes,
            free=room,
        )

    def _found(self, strength: float) -> Side | None:
        """The model at λ if it is there, and from now on the last one to be let go."""
        with self._lock:
            side = self._kept.pop(strength, None)
            if side is None and (model := self._alive.get(strength)) is not None:
                side = self._side(strength, model)
            if side is not None:
                self._kept[strength] = side
                while len(self._kept) > len(STOPS):  # a program may ask for any λ
                    self._kept.popitem(last=False)
            return side

    def _side(self, strength: float, model: PreTrainedModel) -> Side:
        return Side("between", label_of(strength), model, self.pair.adapted.chat_template)

    def _used(self) -> int:
        return self.cost_bytes * len(self._alive)

    def _room(self) -> int:
        """Bytes for all models that are made, those that are there already included."""
        if self.memory_limit is not None:
            return self.memory_limit
        used = self._used()  # before asking what is free: a model that is let go between the two counts once, not twice
        return int((1 - MARGIN) * (used + free_memory(self.pair.adapted.model.device)))

    def _make_room(self) -> None:
        """Let go of models until one more fits, or refuse."""
        if problem := self.problem:
            raise problem
        while self._used() + self.cost_bytes > self._room():
            with self._lock:
                gone = self._kept.popitem(last=False)[1].label if self._kept else None
            if gone is not None:
                logger.info("The model at %s makes room for another.", gone)
                continue
            gc.collect()  # a model may be held by nothing but a cycle
            if self._used() + self.cost_bytes <= self._room():
                return
            raise CompareError(
                "memory",
                f"models at other λ, which others are using now, take {_size(self._used())} of the {_size(self._room())} that "
                "are free for them. Take λ = 0, or try again in a minute.",
                needed=self.cost_bytes,
                free=self._room() - self._used(),
            )

    def _made(self, strength: float) -> PreTrainedModel:
        scale = scale_of(self.fisher, strength)
        weights = {
            id(blank): torch.nn.Parameter(self._merged(name, scale), requires_grad=False)
            for name, blank in self._blank.named_parameters()
        }
        return copy.deepcopy(self._blank, weights).eval()

    @torch.no_grad()
    def _merged(self, name: str, scale: float) -> Tensor:
        theta, base = self._adapted[name], self._base[name]
        if name in self._left:
            return theta.detach().clone()
        # MPS has no float64
        place = theta.device if theta.device.type != "mps" else torch.device("cpu")
        out = torch.empty_like(theta)
        for index in pieces(tuple(theta.shape)):
            keep = kept(self.fisher.read(name, index).to(place), scale)
            anchor = self._anchor.read(name, index) if self._anchor else base[index]
            out[index] = pull_back(theta[index].to(place), anchor.to(place), keep).to(out.dtype)
        if not finite(out):
            raise CompareError(
                "not_finite",
                f"{name} would hold numbers that are not finite (NaN) at λ. The weights of one of the models are damaged, or "
                "their dtype is too narrow: load them in float32 (`dtype`).",
            )
        return out


def label_of(merge_lambda: float) -> str:
    """How a page calls the model at λ: `λ = 10`, `λ = ∞`."""
    return f"λ = {'∞' if math.isinf(merge_lambda) else f'{merge_lambda:g}'}"


def free_memory(device: torch.device) -> int:
    """Bytes that are free for tensors: what the driver says of a CUDA device, else those of the machine or the container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([psutil.virtual_memory().available, *_of_container()])


def _of_container(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What this container may still take, if it has a limit; `psutil` sees the whole machine that it runs on."""
    for limit, use, statistics, droppable in _GROUPS:
        try:
            most, used = ((root / name).read_text().strip() for name in (limit, use))
            lines = dict(line.split() for line in (root / statistics).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdecimal():  # or "max"
            yield max(0, int(most) - int(used) + int(lines.get(droppable, 0)))


def _checked(pair: ModelPair, base: dict[str, torch.nn.Parameter], adapted: dict[str, torch.nn.Parameter]) -> dict:
    """Shapes of the parameters of both; refuses models that are not of one kind, and quantised ones."""
    ours, theirs = ({name: tuple(each.shape) for name, each in held.items()} for held in (base, adapted))
    if rows := fit.parameter_rows(ours, theirs):
        raise DataError(
            f"there is nothing between '{pair.base.label}' and '{pair.adapted.label}': their parameters differ.\n"
            f"{fit.table(rows, 'base', 'adapted')}\nName the base model that the adapted one was trained from."
        )
    for name, each in (*base.items(), *adapted.items()):
        if not each.is_floating_point() or each.itemsize == 1:
            raise DataError(
                f"{name} is quantised ({str(each.dtype).removeprefix('torch.')}), and such numbers cannot be averaged. Take "
                "both models in float32 or bfloat16."
            )
    return theirs


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with parameters that take no memory; tied ones stay tied. No stream ever touches it, so a copy is safe."""
    blank = {id(each): torch.nn.Parameter(torch.empty_like(each, device="meta"), False) for each in model.parameters()}
    return copy.deepcopy(model, blank)


def _size(count: int) -> str:
    return f"{max(0, count) / 1e9:.1f} GB" if count >= 5e7 else f"{max(0, count) / 1e6:.1f} MB"
