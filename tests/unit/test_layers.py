"""The order of the rooms (DESIGN §1): imports run downwards, and into a sub-package only through its `__init__`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_ewc"
FLOORS = {
    **dict.fromkeys(("errors", "config", "data", "devices", "files"), 0),
    "hub": 1,
    "artifact": 2,
    **dict.fromkeys(("fisher", "penalty"), 3),
    "evaluation": 4,
    **dict.fromkeys(("publish", "merge", "compare"), 5),
    **dict.fromkeys(("callback", "trainer"), 6),
    "experiment": 7,
    **dict.fromkeys(("demo", "bench"), 8),
    "cli": 9,
}


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of this package that a file imports anywhere in it, as parts below `hf_ewc`."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level] if node.level else ()
            module = (*start, *(node.module or "").split(".")) if node.module else start
            found |= {module} if len(module) > 1 else {(*module, alias.name) for alias in node.names}
    return {parts[1:] for parts in found if parts[0] == "hf_ewc" and parts[1:] and parts[1] != "__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards_and_through_the_front_door(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":  # the package's front door is lazy and shows every room
        return
    for target, *inside in imported(path):
        assert target in FLOORS, f"{path} imports hf_ewc.{target}, which has no floor yet: add it to FLOORS"
        if target == room:
            continue
        assert FLOORS[target] <= FLOORS[room], f"{path} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]})"
        assert not inside or (PACKAGE / f"{target}.py").exists(), f"{path} reaches into {target}.{'.'.join(inside)}"
