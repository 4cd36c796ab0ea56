"""`hf-ewc push release`: Fisher, model, Space and a collection on the Hub, visible together or not at all."""

from __future__ import annotations

HELP = """\
Usage: hf-ewc push release [--config FILE.yaml] [--key value …]

Publish a Fisher, the model that was trained with it, a Space that shows the model beside its base, if you name one, and a
collection of all of them. Everything is checked before anything is sent, and private until all of it is there. A release that
was broken off goes on when it is repeated, and one that changes nothing sends nothing.

  what          --fisher FOLDER  (or USER/NAME@REVISION: one that is published stays where it is)
                --checkpoint FOLDER  (of `hf-ewc train`, with this Fisher)
                --results results.json  (of `hf-ewc evaluate --base … --output` or a sweep: the card's table)
  where         --fisher_repo NAME  --checkpoint_repo NAME  (or USER/NAME; default: the folders' names)
                --space_repo NAME  (default: no Space)  --base_repo NAME[@REVISION]  (the base, if training took a folder)
                --namespace USER|ORGANISATION  (default: the token's user)  --collection TITLE  --tag v1
  how           --private true|false  (default true; false makes all of it public at the end)
                --dry_run  (check everything, list files and bytes, send nothing)
  the card      --licence ID  (default: the base model's)  --language lt en

Log in with `hf auth login`, or set HF_TOKEN: the token is no setting, and a file that holds one is refused. Repositories that
are public already show each commit at once; the dry run says so.

Examples:
  hf-ewc push release --config recipes/tiny-cpu/release.yaml --dry_run
  hf-ewc push release --config recipes/tiny-cpu/release.yaml
"""


def run(argv: list[str]) -> int:
    from ..publish import ReleaseConfig, plan_release, push_release
    from .options import parse

    (config,) = parse("push release", argv, ReleaseConfig)
    if config.dry_run:
        print(f"{plan_release(config).text()}\nNothing was sent (--dry_run).")
    else:
        print(push_release(config).text())
    return 0
