"""Settings that are allowed and rarely meant get one line."""

import re
from pathlib import Path

import pytest

from doctor.learning_rate import learning_rate_advice
from protocol.resolve import load


@pytest.mark.parametrize(
    ("rate", "rank", "said"),
    [
        (1e-6, 0, None),
        (5e-5, 0, None),
        (6e-5, 0, "6e-05 is high for full fine-tuning: usual are 1e-7 to 5e-5"),
        (6e-5, 32, None),
        (1e-5, 32, None),
        (1e-6, 32, r"1e-06 is low for adapters \(lora.rank = 32\): usual are 1e-5 to 2e-4"),
    ],
)
def test_a_learning_rate_out_of_its_usual_range_is_named(rate, rank, said):
    advice = learning_rate_advice(load(None, [f"optimizer.learning_rate={rate}", f"lora.rank={rank}"]))
    assert advice is None if said is None else re.search(said, advice or "")


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_our_own_recipes_need_no_advice(path):
    assert learning_rate_advice(load(path)) is None
