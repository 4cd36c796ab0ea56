r"""The definition of Elastic Weight Consolidation, in ten obviously right lines.

The penalty (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, eq. 3; arXiv 2505.05946, eq. 2) is

$$\frac{\lambda}{2} \sum_i F_i (\theta_i - \theta^*_i)^2,$$

and the three modes are the three places where it can act. Everything fast in this package is tested against this file.
"""

from __future__ import annotations

from torch import Tensor


def penalty(theta: Tensor, anchor: Tensor, fisher: Tensor, ewc_lambda: float) -> Tensor:
    """λ/2 · Σ F (θ − θ*)², a scalar; `fisher` is per scored token."""
    return 0.5 * ewc_lambda * (fisher * (theta - anchor) ** 2).sum()


def loss_gradient(grad: Tensor, theta: Tensor, anchor: Tensor, fisher: Tensor, ewc_lambda: float) -> Tensor:
    """Mode `loss`: the gradient of task loss + penalty, to be clipped and stepped as one."""
    return grad + ewc_lambda * fisher * (theta - anchor)


def implicit_step(
    theta: Tensor, anchor: Tensor, fisher: Tensor, ewc_lambda: float, lr: float, metric: Tensor | float
) -> Tensor:
    """
    Modes `proximal` (`metric` = √v̂ + ε of Adam) and `decoupled` (`metric` = 1): after the optimizer moved to `theta`, the
    minimiser of λ/2 F (x − θ*)² + metric / (2 lr) (x − θ)². As it is a weighted mean of θ and θ*, no λ can make it overshoot.
    """
    k = lr * ewc_lambda * fisher / metric
    return (theta + k * anchor) / (1 + k)
