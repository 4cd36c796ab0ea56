"""`hf-ewc push fisher`: a Fisher folder becomes a dataset repository on the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field

from .push import PushTarget

HELP = """\
Usage: hf-ewc push fisher --fisher FOLDER --repo_id USER/NAME [--key value …]

Publish a Fisher as a dataset repository: its values, the record of what they were measured on, a table of tensors that the
Hub's viewer shows, a card, and a picture of where the trace lies.

  what          --fisher FOLDER    (of `hf-ewc fisher`; checked once more before it is sent)
  where         --repo_id USER/NAME  --revision BRANCH  --tag v1  --private true|false  (of a new repository; default true)
  how           --commit_message TEXT  --create_pr  (propose it instead)  --dry_run  (list files and bytes, send nothing)

Others use it by its id: hf-ewc train … --fisher USER/NAME --fisher_revision COMMIT

Examples:
  hf-ewc push fisher --fisher runs/tiny-cpu/fisher --repo_id me/tiny-fisher --dry_run
  hf-ewc push fisher --fisher runs/tiny-cpu/fisher --repo_id me/tiny-fisher --tag v1
"""


@dataclass(kw_only=True)
class PushFisher(PushTarget):
    """What `hf-ewc push fisher` needs."""

    fisher: str = field(metadata={"help": "Folder that `hf-ewc fisher` wrote."})


def run(argv: list[str]) -> int:
    from .options import parse

    (script,) = parse("push fisher", argv, PushFisher)

    from ..artifact import FisherInformation
    from ..hub import Pushed

    done = FisherInformation.from_pretrained(script.fisher).push_to_hub(script.repo_id, **script.options())
    if not isinstance(done, Pushed):
        print(f"{done.text()}\nNothing was sent (--dry_run).")
        return 0
    print(done.text())
    if not script.create_pr:
        print(f"Use it: hf-ewc train … --fisher {done.repo_id} --fisher_revision {done.commit}")
    return 0
