"""`hf-ewc pull`: the page that says what can be pulled."""

from __future__ import annotations

import sys

HELP = """\
Usage: hf-ewc pull fisher --repo_id USER/NAME

Pulling is rarely needed: wherever a Fisher is asked for, its id on the Hub will do, also with a version (USER/NAME@v1). This
fetches it in advance, for machines without network. Its page:
  hf-ewc pull fisher --help
"""


def run(argv: list[str]) -> int:
    print(HELP, end="", file=sys.stderr)
    return 2
