"""How much better than its group a completion is (DeepSeekMath, arXiv 2402.03300, section 4.1)."""

import numpy as np

EPSILON = 1e-4


def group_advantages(rewards: np.ndarray, divide_by_std: bool) -> np.ndarray:
    """rewards [group] -> advantages [group], float64.

    (r - mean), divided by the group's standard deviation (n - 1) plus 1e-4 if asked for; without the division it
    is Dr. GRPO's (arXiv 2503.20783). Equal rewards give exactly 0, whatever rounding the mean suffers.
    """
    rewards = np.asarray(rewards, np.float64)
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    centered = rewards - rewards.mean()
    return centered / (rewards.std(ddof=1) + EPSILON) if divide_by_std else centered
