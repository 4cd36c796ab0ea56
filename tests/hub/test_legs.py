"""Runs the cases of `tests/hub/cases/`, each file and leg (LFS, Xet) in a process of its own: see `leg.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from leg import CASES, legs_of

RUNS = [(case.name, leg) for case in sorted(CASES.glob("case_*.py")) for leg in legs_of(case)]


@pytest.mark.parametrize(("case", "leg"), RUNS, ids=[f"{case.removesuffix('.py')}-{leg}" for case, leg in RUNS])
def test_case_passes_in_its_leg(case, leg):
    command = [sys.executable, CASES.parent / "leg.py", *(["--xet"] if leg == "xet" else []), "-q", "--color=no", CASES / case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]  # this run's xdist worker, for one
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    # pytest ends with 5 where it collected nothing
    assert run.returncode == 0, f"ended with {run.returncode}\n{(run.stdout + run.stderr)[-6000:]}"
