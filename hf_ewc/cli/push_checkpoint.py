"""`hf-ewc push checkpoint`: an adapted model becomes a model repository on the Hub, with its card."""

from __future__ import annotations

from dataclasses import dataclass, field

from .push import PushTarget

HELP = """\
Usage: hf-ewc push checkpoint --checkpoint FOLDER --repo_id USER/NAME [--key value …]

Publish a model that `hf-ewc train` wrote: weights, tokenizer, `ewc_state.json`, and a card that names base, Fisher, data and
settings and shows what was kept and what was learned. Optimizer state and pickles stay here.

  what          --checkpoint FOLDER
                --results results.json  (of `hf-ewc evaluate --base … --output` or of a sweep: the card's table)
                --fisher_repo USER/NAME[@REVISION]  (where its Fisher was published, if it was trained with a local folder)
  where         --repo_id USER/NAME  --revision BRANCH  --tag v1  --private true|false  (of a new repository; default true)
  how           --commit_message TEXT  --create_pr  (propose it instead)  --dry_run  (list files and bytes, send nothing)

Examples:
  hf-ewc push checkpoint --checkpoint runs/tiny-cpu/train --results runs/tiny-cpu/results.json --repo_id me/tiny-lt --dry_run
"""


@dataclass(kw_only=True)
class PushCheckpoint(PushTarget):
    """What `hf-ewc push checkpoint` needs."""

    checkpoint: str = field(metadata={"help": "Folder that `hf-ewc train` wrote."})
    results: str | None = field(default=None, metadata={"help": "results.json with the model's row."})
    fisher_repo: str | None = field(default=None, metadata={"help": "Dataset repository of its Fisher, USER/NAME[@REVISION]."})


def run(argv: list[str]) -> int:
    from .options import parse

    (script,) = parse("push checkpoint", argv, PushCheckpoint)

    from ..hub import Pushed
    from ..publish import push_checkpoint

    made_of = dict(results=script.results, fisher_repo=script.fisher_repo)
    done = push_checkpoint(script.checkpoint, script.repo_id, **made_of, **script.options())
    print(done.text() if isinstance(done, Pushed) else f"{done.text()}\nNothing was sent (--dry_run).")
    return 0
