"""`hf-ewc card`: the page of a model, its lineage, and the committed cards against their data."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..hub import Licence

HELP = """\
Usage: hf-ewc card --model FOLDER|USER/NAME[@REVISION] [--results results.json] [--repo_id USER/NAME] [--output FILE]
       hf-ewc card --lineage FOLDER|USER/NAME[@REVISION]
       hf-ewc card --check | --write  [--folder model_cards]

Cards say what was recorded and measured, and nothing else: what is unknown reads "not recorded".

  --model      the card of a model that was trained with hf-ewc, printed or written
    --results    the results.json in which it was measured, for the table of what it kept and learned; figures of other
                 weights are refused
    --repo_id    repository that the card is for; the examples then name it
    --language   codes for the front matter, such as: --language en lt
    --output     write it there (README.md in the model's folder is where the Hub looks)
  --lineage    follow a model or a Fisher from commit to commit: checkpoint, Fisher, base model, probe. Recorded hashes are
               compared with the Hub's; no weights are downloaded. Exit code 2 if one does not match
  --revision   of both: branch, tag or commit on the Hub, if it does not stand behind an @
  --check      render all cards of --folder again and compare; exit code 2 and a diff if one is stale
  --write      render them again in place

Examples:
  hf-ewc card --model runs/tiny-cpu/train --results runs/tiny-cpu/results.json
  hf-ewc card --model runs/lt --repo_id me/gemma-2-2b-lt --output runs/lt/README.md
  hf-ewc card --lineage me/gemma-2-2b-lt
  hf-ewc card --check
"""


@dataclass
class CardScript:
    """What `hf-ewc card` needs."""

    model: str | None = field(default=None, metadata={"help": "Trained model: a folder, or USER/NAME[@REVISION]."})
    lineage: str | None = field(
        default=None, metadata={"help": "Model or Fisher to follow: a folder, or USER/NAME[@REVISION]."}
    )
    check: bool = field(default=False, metadata={"help": "Compare the committed cards with their data."})
    write: bool = field(default=False, metadata={"help": "Render the committed cards in place."})
    folder: str = field(default="model_cards", metadata={"help": "Where the committed cards are."})
    results: str | None = field(default=None, metadata={"help": "results.json in which the model was measured."})
    repo_id: str | None = field(default=None, metadata={"help": "Repository that the card is for, USER/NAME."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    language: list[str] | None = field(default=None, metadata={"help": "Language codes of the model."})
    output: str | None = field(default=None, metadata={"help": "File to write the card to; printed without."})

    def problems(self) -> list[str]:
        from ..hub import is_repo_id

        tasks = [name for name in ("model", "lineage", "check", "write") if getattr(self, name)]
        found = []
        if len(tasks) != 1:
            given = " and ".join(f"`{name}`" for name in tasks) or "nothing"
            found.append(f"give exactly one of `model`, `lineage`, `check` and `write`; got {given}.")
        elif tasks != ["model"]:
            unused = [name for name in ("results", "repo_id", "language", "output") if getattr(self, name)]
            found += [f"`{name}` belongs to `model`, not to `{tasks[0]}`." for name in unused]
        if self.repo_id is not None and not is_repo_id(self.repo_id):
            found.append(f"`repo_id: {self.repo_id}` is not of the form `user/name`.")
        return found


def run(argv: list[str]) -> int:
    from .options import parse

    (script,) = parse("card", argv, CardScript)
    if script.check:
        return check(script.folder)
    if script.lineage:
        return follow(script.lineage, script.revision)

    from ..files import write_atomically
    from ..publish import write_cards

    if script.write:
        changed = write_cards(script.folder)
        print("\n".join(f"written: {path}" for path in changed) or "all cards agree with their data")
        return 0
    text = render(script)
    if script.output is None:
        print(text, end="")
    else:
        print(f"The card is in {write_atomically(script.output, text)}")
    return 0


def render(script: CardScript) -> str:
    """The card of one model, with the licence of its base if the Hub can be asked."""
    from ..errors import DataError
    from ..evaluation import load_results
    from ..hub import is_repo_id
    from ..publish import read_state, remote_state, render_checkpoint_card

    source = str(script.model)
    repo_id, local = source.partition("@")[0], Path(source).expanduser().is_dir()
    if not local and not is_repo_id(repo_id):
        raise DataError(
            f"there is no folder '{source}', and it is no id on the Hub (`user/name`), either. Name what `hf-ewc train` or "
            "EWCTrainer wrote, or where it was published."
        )
    results = load_results(script.results) if script.results else None
    try:
        state = read_state(source) if local else remote_state(source, script.revision)
    except DataError as error:
        raise DataError(str(error).removesuffix(" Nothing was sent.")) from None
    return render_checkpoint_card(
        state,
        repo_id=script.repo_id or (None if local else repo_id),
        results=results,
        licence=licence(state),
        language=script.language,
        name=Path(source).expanduser().resolve().name if local else None,
        fingerprint=fingerprint(source, script.revision, local) if results else None,
    )


def fingerprint(source: str, revision: str | None, local: bool) -> str | None:
    """Of the weights that the card is for, or `None` with a remark: then the card names those that were measured."""
    from ..artifact import BaseModel
    from ..errors import EWCError
    from ..publish import remote_fingerprint

    try:
        found = BaseModel.resolve(Path(source).expanduser()).fingerprint if local else remote_fingerprint(source, revision)
    except EWCError as error:
        print(f"warning: the results cannot be compared with the model's weights: {error}", file=sys.stderr)
        return None
    if found is None:
        print("warning: the results cannot be compared with the model's weights: the Hub states no hash.", file=sys.stderr)
    return found


def licence(state: dict) -> Licence | None:
    """The base's licence, or `None` with a remark: a card is worth having offline, too."""
    from ..errors import HubError
    from ..hub import licence_of

    anchor = state.get("anchor") or {}
    if not anchor.get("revision"):
        return None
    try:
        return licence_of(anchor["id"], anchor["revision"])
    except HubError as error:
        print(f"warning: the card will state no licence: {error}", file=sys.stderr)
        return None


def follow(source: str, revision: str | None) -> int:
    from ..publish import lineage, lineage_text

    links = lineage(source, revision)
    print(lineage_text(links))
    wrong = sum(link.verified is False for link in links)
    if wrong:
        are = "is" if wrong == 1 else "are"
        print(f"hf-ewc card: {wrong} of {len(links)} links {are} not what was recorded, see MISMATCH above.", file=sys.stderr)
    return 2 if wrong else 0


def check(folder: str) -> int:
    from ..publish import check_cards

    stale = check_cards(folder)
    if not stale:
        print("all cards agree with their data")
        return 0
    print("\n\n".join(stale))
    print(f"hf-ewc card: stale cards: {len(stale)}. `hf-ewc card --write` renders them again.", file=sys.stderr)
    return 2
