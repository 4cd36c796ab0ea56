"""`hf-ewc pull fisher`: fetch a Fisher from the Hub, check it, and say how to use it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .push import repo_problems

HELP = """\
Usage: hf-ewc pull fisher --repo_id USER/NAME [--revision BRANCH|TAG|COMMIT] [--output_dir FOLDER [--overwrite]]

Fetch a Fisher into the Hub's cache, check all of it, and print what it is and the commit to pin. With --output_dir also as a
plain folder, for a machine without network or cache. What was broken off goes on where it stopped.

Examples:
  hf-ewc pull fisher --repo_id me/tiny-fisher
  hf-ewc pull fisher --repo_id me/tiny-fisher --revision v1 --output_dir fishers/tiny
"""


@dataclass
class PullFisher:
    """What `hf-ewc pull fisher` needs."""

    repo_id: str = field(metadata={"help": "Dataset repository on the Hub, USER/NAME or USER/NAME@REVISION."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit; main by default."})
    output_dir: str | None = field(default=None, metadata={"help": "Also copy it to this folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a Fisher that lies in output_dir."})

    def problems(self) -> list[str]:
        return repo_problems(self.repo_id, revision=True)


def run(argv: list[str]) -> int:
    from .options import parse

    (script,) = parse("pull fisher", argv, PullFisher)

    from ..artifact import FisherInformation
    from ..errors import ConfigError
    from .output import claim

    if script.output_dir is not None:
        claim(script.output_dir, ("fisher_config.json",), (), resume=None, overwrite=script.overwrite)
    fisher = FisherInformation.from_pretrained(script.repo_id, script.revision)
    place, manifest = fisher.place, fisher.manifest
    if place is None or place.repo_id is None:
        raise ConfigError(f"'{script.repo_id}' is a folder here already: there is nothing to pull.")
    probes = ", ".join(f"{probe.name or probe.kind} ({probe.examples:,} examples)" for probe in manifest.probes)
    size = sum(shard.size for shard in manifest.files.values())
    print(f"{place.repo_id} at commit {place.commit}: {size:,} bytes, {manifest.storage.codec}, checked")
    print(f"measured at {manifest.base_model.label} on {probes}")
    if script.output_dir is not None:
        print(f"copied to {fisher.copy_to(script.output_dir, script.overwrite)}")
    print(f"Use it: hf-ewc train … --fisher {place.repo_id} --fisher_revision {place.commit}")
    return 0
