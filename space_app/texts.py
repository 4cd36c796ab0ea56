"""The words of the page: one file per language in `strings/`, and the choice of one by what a browser asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_ewc.compare import CompareError, problem_code, public_message
from hf_ewc.errors import ConfigError

STRINGS: dict[str, dict[str, str]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).with_name("strings").glob("*.json"))
}
DEFAULT = "en"


class Texts:
    """
    The words and the numbers of a language; English for one that has no strings.

    Example:

    ```python
    >>> t = Texts("lt")
    >>> t("tokens", count=t.number(1500, 0)), t.number(-0.5, signed=True)
    ('gabalėlių: 1\xa0500', '−0,50')
    ```
    """

    def __init__(self, language: str | None):
        self.words = STRINGS.get(language or "", STRINGS[DEFAULT])

    def __call__(self, key: str, **facts: Any) -> str:
        return self.words[key].format(**facts)

    def number(self, value: float, digits: int = 2, signed: bool = False) -> str:
        """With the language's signs, and a real minus; never a negative zero."""
        text = f"{value:{'+' if signed else ''},.{digits}f}"
        return self.figures(f"{0:.{digits}f}" if float(text.replace(",", "")) == 0 else text)

    def figures(self, text: str) -> str:
        """Figures as Python writes them, in this language."""
        signs = {",": self.words["number.thousands"], ".": self.words["number.decimal"], "-": "−"}
        return text.translate(str.maketrans(signs))


def texts(language: str | None) -> Texts:
    return Texts(language)


def load_examples(path: str | Path) -> dict[str, Any]:
    """
    The prompts and texts that are offered: `compare` and `natural`, lists of `{"kind": …, "text": …}`, and the texts that the
    λ slider begins with, `between`. A [`ConfigError`] says what is wrong with them.
    """
    try:
        examples = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        for example in [*examples["compare"], *examples["natural"]]:
            if not isinstance(example["text"], str) or f"example.{example['kind']}" not in STRINGS[DEFAULT]:
                raise ValueError(f"{example} is none")
        if not all(isinstance(examples["between"][name], str) for name in ("old", "new", "prompt")):
            raise ValueError("`between` must hold texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        kinds = ", ".join(key.partition(".")[2] for key in STRINGS[DEFAULT] if key.startswith("example."))
        raise ConfigError(
            f"`examples: {path}` holds no examples for the page ({type(error).__name__}: {error}). It must be JSON with "
            f"`compare` and `natural` (lists of kind and text; kinds: {kinds}) and `between` (old, new, prompt), as in "
            "space_app/examples.json."
        ) from None
    return examples


def choose_language(query: Mapping[str, str], headers: Mapping[str, str]) -> str:
    """`?lang=lt` of the address, else the first language of the browser that has strings, else English."""
    if query.get("lang") in STRINGS:
        return query["lang"]
    wanted = []
    for part in headers.get("accept-language", "").split(","):
        tag, *options = part.strip().lower().split(";")
        weight = next((option.strip()[2:] for option in options if option.strip().startswith("q=")), "1")
        try:
            wanted.append((float(weight), tag.partition("-")[0]))
        except ValueError:
            continue
    ranked = sorted(wanted, key=lambda pair: -pair[0])  # stable: equal weights stay in the browser's order
    return next((tag for weight, tag in ranked if weight > 0 and tag in STRINGS), DEFAULT)


def domain(t: Texts, name: str) -> str:
    """Name of a set of texts or questions, in words where it has some."""
    try:
        return t(f"domain.{name.lower()}")
    except KeyError:
        return name


def problem_text(t: Texts, error: BaseException) -> str:
    """An error for the page, in its language where there are words for it, else in the package's plain English."""
    facts = {name: _fact(value, t) for name, value in getattr(error, "facts", {}).items()}
    if isinstance(error, CompareError) and error.code == "not_text":
        facts["position"] = error.facts["position"] + 1
    return coded(t, problem_code(error), public_message(error), **facts)


def coded(t: Texts, code: str | None, message: str, **facts: Any) -> str:
    """The page's own words for a problem of this code; the package's where it has none."""
    try:
        return t(f"problem.{code}", **facts)
    except KeyError:
        return message if code == "setting" else message[:1].upper() + message[1:]  # its first word is a name


def _fact(value: Any, t: Texts) -> Any:
    return t.figures(f"{value:,g}" if isinstance(value, float) else f"{value:,}") if isinstance(value, int | float) else value
