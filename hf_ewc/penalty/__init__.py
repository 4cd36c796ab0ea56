"""
The penalty: its definition (`reference.py`), its arithmetic (`kernels.py`), its binding to a live model (`controller.py`).
"""

from .controller import EWCController, Protected

__all__ = ["EWCController", "Protected"]
