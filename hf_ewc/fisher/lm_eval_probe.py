"""Documents of an lm-evaluation-harness task as prompts and continuations: the very predictions that it measures later.

lm-evaluation-harness itself renders everything here (templates, worked examples, delimiters). What it leaves open is decided
for a probe: from which split (never silently from the test split), and that no worked example is the document itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import FisherConfig
from ..errors import DataError
from .lm_eval_task import Splits, find_task, load_task_dataset, quiet, refuse_unfit, shown_name
from .templates import settings_sha256

logger = logging.getLogger(__name__)

WORDING = (
    *("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter"),
    *("gen_prefix", "use_prompt", "process_docs", "num_fewshot"),
)


@dataclass(frozen=True)
class Request:
    """
    What one document asks of the model.

    Attributes:
        pairs (`list[tuple[str, str]]`): Prompt and continuation of each answer option; without options, the one pair.
        gold (`int`): Which of them is right.
    """

    pairs: list[tuple[str, str]]
    gold: int = 0


class TaskDocuments:
    """
    The documents of one split of a task, each made into a [`Request`] (or into running text) when it is asked for.

    Attributes:
        task (`str`): Its name.
        dataset (`str`): What it reads: a dataset id on the Hub, or names of local files, never somebody's absolute path.
        config, split, revision (`str`, *optional*): As `load_dataset` took them.
        num_fewshot (`int`): Worked examples in front of each prompt.
        template_sha256 (`str`): Fingerprint of the settings that word the prompts.
    """

    def __init__(self, config: FisherConfig) -> None:
        assert config.task is not None
        self.task, self.seed = config.task, config.seed
        with quiet():
            manager, entry = find_task(self.task, config.task_folder)
            settings = entry.cfg
            refuse_unfit(self.task, settings)
            self.config = settings.get("dataset_name")
            data, self.revision = load_task_dataset(self.task, settings)
        splits = Splits(self.task, settings, list(data))
        self.split = splits.choose(config.dataset_split, config.allow_test_split)
        self.num_fewshot = int(settings.get("num_fewshot") or 0)
        source = splits.of_worked_examples(settings) if self.num_fewshot else None
        if source is not None and splits.is_test(source) and not config.allow_test_split:
            logger.warning(
                "`%s` takes its %d worked examples from the test split '%s'; set another `fewshot_split` in the task, or "
                "report nothing on it afterwards.",
                self.task,
                self.num_fewshot,
                source,
            )
        self.dataset = splits.files_named(self.split) or shown_name(settings["dataset_path"])
        # What the harness reads is handed to it, so that it touches one split and none must be there only to be looked at.
        # Metrics are not needed, and some would be fetched.
        own: dict[str, Any] = {"task": self.task, "custom_dataset": lambda **_: data, "fewshot_split": source}
        own |= {"training_split": None, "validation_split": self.split, "test_split": None}
        own |= {"dataset_kwargs": None, "metric_list": None, "filter_list": None}
        if not self.num_fewshot:
            own["fewshot_config"] = {"samples": []}
        try:
            with quiet():
                [task] = manager.load({"group": "hf_ewc_probe", "task": [own]})["tasks"].values()
                self._documents = task.eval_docs
        except Exception as error:  # other people's templates and functions, so anything
            raise DataError(
                f"lm-evaluation-harness cannot load the task `{self.task}`: {type(error).__name__}: {error}. Correct the task."
            ) from error
        same = source is not None and splits.same(source, self.split)
        if same and task.fewshot_cfg.process_docs is not task.config.process_docs:
            raise DataError(
                f"`{self.task}` prepares its worked examples in another way than its documents, both from '{source}', so that "
                "a document cannot be told from its own worked example. Take another split (`dataset_split`)."
            )
        if config.labels == "options" and (task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input):
            why = "its choices are prompts with one continuation" if task.multiple_input else f"it is `{task.OUTPUT_TYPE}`"
            raise DataError(
                f"`labels: options` needs several answers to one prompt, and `{self.task}` has none ({why}). Use "
                "`labels: empirical` or `sampled`."
            )
        if self.num_fewshot:
            task.sampler = self._worked = _OtherDocuments(task.sampler)
        self._task = task
        worded = {name: getattr(task.config, name) for name in WORDING}
        worded["fewshot_config"] = vars(task.fewshot_cfg) if self.num_fewshot else None
        self.template_sha256 = settings_sha256(worded)

    def __len__(self) -> int:
        return len(self._documents)

    def where(self, index: int) -> str:
        """A document's place, for messages; counted from 1."""
        return f"document {index + 1} of `{self.task}` ({self.split})"

    def request(self, index: int) -> Request | str:
        """
        What document `index` asks; a `str` is running text of which every token is scored.

        Its worked examples are drawn with the seed and its index, so that they do not depend on which other documents are used.

        Raises: [`DataError`] when it has no right answer, or cannot be rendered.
        """
        try:
            with quiet():
                return self._request(self._documents[index], index)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from None
        except Exception as error:  # as above
            raise DataError(
                f"{self.where(index)}: lm-evaluation-harness cannot put it into words: {type(error).__name__}: {error}. "
                "Correct the row or the task."
            ) from error

    def _request(self, document: dict[str, Any], index: int) -> Request | str:
        task = self._task
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            return _checked(task.doc_to_target(document))
        if self.num_fewshot:
            self._worked.document = document
            task.set_fewshot_seed((self.seed << 32) + index)
        prefix = task.doc_to_prefix(document)
        prompt = task.fewshot_context(doc=document, num_fewshot=self.num_fewshot, gen_prefix=prefix)
        if task.OUTPUT_TYPE == "generate_until":
            # Not measured by a likelihood, so the harness has no request for it: worded as in its worked examples, whose first
            # of several right answers it shows, too. The prompt keeps its trailing space, as it does before generation.
            return Request([(prompt, self._generated(document, prefix))])
        requests = task.construct_requests(doc=document, ctx=prompt, metadata=(self.task, index, 1))
        if task.OUTPUT_TYPE == "loglikelihood":
            _checked(task.doc_to_target(document))
            return Request([_split(*requests.args)])
        choices = task.doc_to_choice(document)
        gold = _gold(task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document), choices)
        pairs = [_split(*request.args) for request in requests[: len(choices)]]  # behind them, those of mutual information
        _checked(pairs[gold][1])
        return Request(pairs, gold)

    def _generated(self, document: dict[str, Any], prefix: str | None) -> str:
        task, target = self._task, self._task.doc_to_target(document)
        if task.config.doc_to_choice is not None:
            choices = task.doc_to_choice(document)
            target = choices[_gold(target, choices)]
        elif isinstance(target, list):
            target = target[0] if target else None
        target = _checked(str(target) if isinstance(target, (int, float)) else target)
        turn = {"q": task.doc_to_text(document), "gen_prefix": prefix, "tgt_delim": task.config.target_delimiter}
        asked, answered = (
            "".join(message.to_text() for message in task.build_qa_turn(**turn, a=answer, few_delim=""))
            for answer in (None, target)
        )
        return answered.removeprefix(asked)


class _OtherDocuments:
    """
    The task's sampler of worked examples, without the document that is asked. The harness leaves it out only where worked
    examples come from the *test* split; from a training split, a probe would show the model the answer that it scores.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.document: dict[str, Any] = {}

    def set_rnd(self, seed: int) -> _OtherDocuments:
        self.sampler.set_rnd(seed)
        return self

    def sample(self, n: int, **_: Any) -> Sequence[dict[str, Any]]:
        try:
            drawn = self.sampler.sample(n=n)
            if self.document in drawn:
                drawn = self.sampler.sample(n=n, eval_doc=self.document)
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"there are no {n} worked examples beside it ({error}). Add rows, or lower `num_fewshot`."
            ) from error
        if self.document in drawn:
            raise DataError("the task's own sampler shows it as its own worked example. Take another split (`dataset_split`).")
        return drawn


def _split(prompt: str, continuation: str) -> tuple[str, str]:
    """The harness scores the white space that ends a prompt together with the continuation (its `_encode_pair`)."""
    bare = prompt.rstrip()
    return bare, prompt[len(bare) :] + continuation


def _checked(answer: Any) -> str:
    if not isinstance(answer, str) or not answer.strip():
        shown = "nothing" if answer is None else repr(answer)
        raise DataError(f"it has no answer to score (`doc_to_target` gives {shown}). Correct the row or the task.")
    return answer


def _gold(answer: Any, choices: Any) -> int:
    """The index of the right choice, of several right ones the first; the harness would count an unknown one as wrong."""
    if not isinstance(choices, list) or not choices:
        raise DataError(f"`doc_to_choice` must give a list of choices, got {choices!r}. Correct the row or the task.")
    first = (answer[0] if answer else None) if isinstance(answer, list) else answer
    if isinstance(first, str) and first in choices:
        return choices.index(first)
    if not isinstance(first, int) or not 0 <= first < len(choices):
        shown = "nothing" if first is None else repr(first)
        raise DataError(
            f"its right answer is {shown}, which is none of its choices (0 to {len(choices) - 1}). Correct the row or the "
            "task; benchmarks often publish their test split without answers."
        )
    return first
