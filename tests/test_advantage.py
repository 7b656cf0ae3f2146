"""Group advantages against their definition."""

import numpy as np
import pytest

from trainer.advantage import EPSILON, group_advantages


def test_advantages_are_deviations_over_the_sample_standard_deviation():
    rewards = np.array([1.0, 0.0, 0.0, 3.0])
    mean, std = 1.0, np.sqrt(((rewards - 1.0) ** 2).sum() / 3)
    np.testing.assert_allclose(group_advantages(rewards, True), (rewards - mean) / (std + EPSILON))
    np.testing.assert_allclose(group_advantages(rewards, False), rewards - mean)


@pytest.mark.fault("I6")
def test_equal_rewards_give_exactly_zero_where_a_mean_would_round():
    """Ancestor defect 8: std + 1e-8 on rounded rewards turned noise into gradients."""
    for value in (0.1, 1 / 3, 1e8 + 0.1):
        assert not group_advantages(np.full(7, value), True).any()


def test_advantages_do_not_depend_on_an_offset_or_the_order():
    rewards = np.random.default_rng(0).normal(size=8)
    np.testing.assert_allclose(group_advantages(rewards + 5, True), group_advantages(rewards, True), atol=1e-9)
    np.testing.assert_allclose(group_advantages(rewards[::-1], True), group_advantages(rewards, True)[::-1])
