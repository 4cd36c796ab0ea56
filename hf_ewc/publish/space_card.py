"""`README.md` of a Space: its front matter, which is the Space's configuration, and what is compared there, by commit."""

from __future__ import annotations

import importlib.metadata
import shlex
from dataclasses import fields
from fnmatch import fnmatch
from string import Template
from typing import TYPE_CHECKING, Any

from huggingface_hub import SpaceCard, SpaceCardData

from .. import __version__
from ..artifact import card
from ..files import BESIDE_WEIGHTS, STATE_FILE
from ..hub import page
from .compared import Compared, Part

if TYPE_CHECKING:
    from ..compare import CompareConfig

# What the page reads of a model. Licences and the settings of image processors lie there, too, and are not read.
_LOADED = (
    *("config.json", STATE_FILE, "model*.safetensors", "model.safetensors.index.json"),
    *(name for name in BESIDE_WEIGHTS if not name.startswith(("LICENSE", "NOTICE", "*processor"))),
)


def render_space_card(
    template: str,
    compared: Compared,
    config: CompareConfig,
    *,
    repo_id: str,
    title: str | None = None,
    hardware: str | None = None,
) -> str:
    """
    The card of a Space, from `space_app/README.md`.

    Args:
        template (`str`): front matter that stays as it is, and a text with `$names`.
        compared ([`Compared`]): what the Space shows.
        config ([`CompareConfig`]): its settings, for the table of its variables.
        repo_id (`str`): the Space.
        title (`str`, *optional*): defaults to the names of both models.
        hardware (`str`, *optional*): suggested to who duplicates the Space.
    """
    given, base, adapted = SpaceCard(template), compared.base, compared.adapted
    title = title or f"{card.last_part(adapted.repo_id)} against {card.last_part(base.repo_id)}"
    meta: dict[str, Any] = given.data.to_dict()
    meta |= {
        "title": title,
        "sdk_version": _gradio(str(meta["sdk_version"])),
        "models": list(dict.fromkeys(part.repo_id for part in compared.models)),
    }
    meta |= {"datasets": [compared.fisher.repo_id]} if compared.fisher else {}
    meta |= {"suggested_hardware": hardware} if hardware else {}
    lines = [line for part in dict.fromkeys(compared.models) if (line := preload_line(part))]
    meta |= {"preload_from_hub": lines} if lines else {}
    command = ["hf-ewc", "compare"]
    for name in ("base", "adapted", "plain", "fisher"):
        for key in (name, f"{name}_revision"):
            command += [f"--{key}", getattr(config, key)] if getattr(config, key) else []
    text = Template(given.text.lstrip("\n")).substitute(
        title=title,
        compared=_compared(compared, config),
        made_with=card.made_with(__version__),
        access=_access(compared, repo_id),
        command=shlex.join(command),
        address=page(repo_id, "space"),
        gradio=meta["sdk_version"],
        settings=_settings(config),
        votes=_votes(config.votes_repo),
    )
    return f"---\n{SpaceCardData(**meta).to_yaml().strip()}\n---\n\n{text}"


def preload_line(part: Part) -> str | None:
    """
    The files that the Hub puts into the Space when it is built, so that it starts without a download; `None` for a model that
    is private or gated, as the build has no token.
    """
    names = [name for name in part.files if any(_matches(name, pattern) for pattern in _LOADED)]
    return f"{part.repo_id} {','.join(names)} {part.commit}" if part.open and names else None


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _gradio(default: str) -> str:
    """The version that is installed here; where there is none, the one that the template was tested with."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        return default


def _link(part: Part) -> str:
    repo_id, kind, commit = part.repo_id, part.repo_type, part.commit
    return f"[{repo_id}]({page(repo_id, kind)}) | [`{commit}`]({page(repo_id, kind, commit)})"


def _compared(compared: Compared, config: CompareConfig) -> str:
    rows = [f"| base | {_link(compared.base)} |", f"| adapted | {_link(compared.adapted)} |"]
    rows += [f"| plain (trained without EWC) | {_link(compared.plain)} |"] if compared.plain else []
    rows += [f"| Fisher | {_link(compared.fisher)} |"] if compared.fisher else ["| Fisher | none | |"]
    rows += [f"| figures | {'`results.json`, in this repository' if config.results else 'none'} | |"]
    return "\n".join(["| | where | commit |", "|---|---|---|", *rows])


def _access(compared: Compared, repo_id: str) -> str:
    if not compared.closed:
        return ""
    return (
        f"\n**Not open to everybody: {', '.join(compared.closed)}.** The Space needs a token of its own to read them: add a\n"
        f"secret `HF_TOKEN` with read access in [its settings]({page(repo_id, 'space')}/settings).\n"
    )


def _settings(config: CompareConfig) -> str:
    """One row per setting; its `help` is the same as that of `hf-ewc compare`."""
    rows = [
        f"| `HF_EWC_{item.name.upper()}` | {'' if (value := getattr(config, item.name)) is None else f'`{value}`'} | "
        f"{item.metadata['help']} |"
        for item in fields(config)
    ]
    return "\n".join(["| variable | `space.yaml` | |", "|---|---|---|", *rows])


def _votes(repo_id: str | None) -> str:
    if repo_id is None:
        return (
            "Blind votes are counted while the Space runs, and stored nowhere. `HF_EWC_VOTES_REPO` names a dataset that would\n"
            "keep them."
        )
    return (
        f"Blind votes are stored in the dataset [{repo_id}]({page(repo_id, 'dataset')}), and the page says so. The Space\n"
        "needs a secret `HF_TOKEN` that may write there."
    )
