"""Advantages against their definitions."""

import numpy as np
import pytest

from protocol.errors import UserError
from trainer.advantage import ADVANTAGES, EPSILON, find

REWARDS = np.array([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.1, 0.2, 0.3, 0.4]])
"""The second group has no signal."""


def written_out(name: str, rewards: list[list[float]]) -> list[list[float]]:
    """One completion after the other."""

    def std(values: list[float]) -> float:
        center = sum(values) / len(values)
        return (sum((value - center) ** 2 for value in values) / (len(values) - 1)) ** 0.5

    everything = [reward for group in rewards for reward in group]
    result = []
    for group in rewards:
        center = sum(group) / len(group)
        match name:
            case "group":
                result.append([(reward - center) / (std(group) + EPSILON) for reward in group])
            case "mean":
                result.append([reward - center for reward in group])
            case "rloo":
                result.append([reward - (sum(group) - reward) / (len(group) - 1) for reward in group])
            case "batch":
                result.append([(reward - center) / (std(everything) + EPSILON) for reward in group])
            case "reinforce++":
                middle = sum(everything) / len(everything)
                result.append([(reward - middle) / (std(everything) + EPSILON) for reward in group])
    return result


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_equal_their_definition(name):
    found = ADVANTAGES[name](REWARDS)
    np.testing.assert_allclose(found, written_out(name, REWARDS.tolist()), atol=1e-12)
    assert found.shape == REWARDS.shape


@pytest.mark.fault("I6")
@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exactly_zero_where_a_mean_would_round(name):
    """Ancestor defect 8: std + 1e-8 on rounded rewards turned noise into gradients."""
    for value in (0.1, 1 / 3, 1e8 + 0.1):
        assert not ADVANTAGES[name](np.full((3, 7), value)).any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_do_not_depend_on_an_offset_or_the_order(name):
    rewards = np.random.default_rng(0).normal(size=(4, 8))
    advantage = ADVANTAGES[name]
    np.testing.assert_allclose(advantage(rewards + 5), advantage(rewards), atol=1e-9)
    np.testing.assert_allclose(advantage(rewards[::-1, ::-1]), advantage(rewards)[::-1, ::-1], atol=1e-12)


def test_your_own_function_is_used_and_looked_at(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def best(rewards):\n    return (rewards == rewards.max(1, keepdims=True)) * 1.0\n"
        "def short(rewards):\n    return rewards[0]\n"
        "def wild(rewards):\n    return rewards / 0.0\n"
    )
    assert find(f"{file}:best")(REWARDS).tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    with pytest.raises(UserError, match="expected the same shape"):
        find(f"{file}:short")(REWARDS)
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(UserError, match="finite"):
        find(f"{file}:wild")(REWARDS)


@pytest.mark.parametrize("name", ["median", "nothing.py:f", "{file}:nobody", "{broken}:f", "os:getcwd"])
def test_what_is_no_function_is_refused_in_one_line(tmp_path, name):
    file, broken = tmp_path / "mine.py", tmp_path / "broken.py"
    file.write_text("x = 1\n")
    broken.write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"objective\.advantage"):
        find(name.format(file=file, broken=broken))
