"""How much better than others a completion is: rewards [groups, completions] -> advantages of that shape, float64.

    group        (r - mean of the group) / (std of the group + 1e-4)   GRPO, arXiv 2402.03300, section 4.1
    mean         r - mean of the group                                 Dr. GRPO, arXiv 2503.20783
    rloo         r - mean of the others in the group                   RLOO, arXiv 2402.14740, section 2.2
    batch        (r - mean of the group) / (std of the batch + 1e-4)   Lite PPO, arXiv 2508.08221, section 4.1
    reinforce++  (r - mean of the batch) / (std of the batch + 1e-4)   REINFORCE++, arXiv 2501.03262

Standard deviations (std) divide by n - 1. Equal rewards give exactly 0, whatever rounding a mean suffers.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from protocol.errors import UserError

EPSILON = 1e-4
Advantage = Callable[[np.ndarray], np.ndarray]


def group(rewards: np.ndarray) -> np.ndarray:
    return _centered(rewards) / (_std(rewards, 1) + EPSILON)


def mean(rewards: np.ndarray) -> np.ndarray:
    return _centered(rewards)


def rloo(rewards: np.ndarray) -> np.ndarray:
    count = rewards.shape[1]
    return _centered(rewards) * count / max(1, count - 1)


def batch(rewards: np.ndarray) -> np.ndarray:
    return _centered(rewards) / (_std(rewards) + EPSILON)


def reinforce(rewards: np.ndarray) -> np.ndarray:
    if (rewards == rewards.flat[0]).all():
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / (_std(rewards) + EPSILON)


ADVANTAGES: dict[str, Advantage] = {
    "group": group,
    "mean": mean,
    "rloo": rloo,
    "batch": batch,
    "reinforce++": reinforce,
}


def find(name: str) -> Advantage:
    """One of the five, or your own from `file.py:function`. Raises UserError."""
    if name in ADVANTAGES:
        return ADVANTAGES[name]
    file, colon, function = name.rpartition(":")
    if not (colon and file.endswith(".py") and function.isidentifier()):
        raise UserError(f"objective.advantage = {name!r}: expected one of {', '.join(ADVANTAGES)}, or file.py:function")
    return _checked(_load(name, Path(file).expanduser(), function), name)


def _load(name: str, path: Path, function: str) -> Callable[..., object]:
    if not path.is_file():
        raise UserError(f"objective.advantage = {name!r}: there is no file {path.absolute()}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it does is one line for its author
        raise UserError(f"objective.advantage = {name!r}: the import fails: {type(error).__name__}: {error}") from None
    found = vars(module).get(function)
    if not callable(found):
        raise UserError(f"objective.advantage = {name!r}: {path} has no function {function!r}")
    return found


def _checked(function: Callable[..., object], name: str) -> Advantage:
    """The user's function, its result looked at every time."""

    def advantage(rewards: np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(function(rewards.copy()), np.float64)
        except Exception as error:  # whatever it does is one line for its author
            raise UserError(f"objective.advantage = {name!r} fails: {type(error).__name__}: {error}") from None
        if found.shape != rewards.shape:
            raise UserError(
                f"objective.advantage = {name!r} made an array {found.shape} of rewards {rewards.shape}; expected the "
                f"same shape, [groups, completions]"
            )
        if not np.isfinite(found).all():
            raise UserError(f"objective.advantage = {name!r} made values that are not finite; expected numbers")
        return found

    return advantage


def _centered(rewards: np.ndarray) -> np.ndarray:
    equal = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return np.where(equal, 0.0, rewards - rewards.mean(axis=1, keepdims=True))


def _std(rewards: np.ndarray, axis: int | None = None) -> np.ndarray:
    if rewards.shape[1] == 1 and axis:
        return np.zeros((len(rewards), 1))
    return rewards.std(axis=axis, ddof=min(1, rewards.size - 1), keepdims=axis is not None)
