"""The embedded default: the whole way of a real run, through the same code, on a world small enough for two CPU cores.

base → Fisher → λ sweep → table, picture, report. Only the base model and the data are small; trainer, optimizer, artifact and
evaluation are those of a real run.
"""

from .run import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
