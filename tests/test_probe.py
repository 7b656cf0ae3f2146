"""What a probe computes of completions, against closed forms and simulations; its table, warnings and mistakes."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from launch.probe.command import explained, main, nothing
from launch.probe.figures import answers, figures, grouped, histogram, rewards
from launch.probe.forecast import (
    DirichletMultinomial,
    all_equal,
    completions_for_one,
    dead_share,
    forecast,
    good_size,
    groups_of_step,
    length_needed,
    rounded,
)
from launch.probe.table import bins, table
from launch.probe.warnings import hopeless
from protocol.errors import RunError, UserError
from protocol.messages import Failure
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rollout import Rollout
from sampler.probe_feed import ENOUGH, Feed, order
from sampler.probed import Calls, Probed, read
from trainer.ledger import Ledger

# -- dead groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", ["aaaab", "aabbc", "abcde", "aaaaa"])
def test_all_equal_counts_subsets(draws):
    for size in range(1, 6):
        subsets = list(itertools.combinations(draws, size))
        exact = Fraction(sum(len(set(subset)) == 1 for subset in subsets), len(subsets))
        assert all_equal([draws.count(one) for one in set(draws)], size) == pytest.approx(float(exact), abs=1e-15)


def test_dead_share_has_no_bias_up_to_what_was_drawn():
    """Summed over every outcome of 5 draws of 3 values."""
    chances = np.array([0.1, 0.3, 0.6])
    outcomes = list(itertools.product(range(3), repeat=5))
    for size in (2, 3, 5):
        expected = math.fsum(chances[list(one)].prod() * dead_share([one], size) for one in outcomes)
        assert expected == pytest.approx((chances**size).sum(), abs=1e-14)


@pytest.mark.parametrize(("a", "b"), [(0.4, 2.0), (3.0, 1.0)])
def test_with_two_values_the_model_is_the_beta_binomial(a, b):
    """E[p^k + (1 - p)^k] = B(a + k, b) / B(a, b) + B(a, b + k) / B(a, b)."""

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    model = DirichletMultinomial([a / (a + b), b / (a + b)], 1 / (a + b + 1))
    for size in (1, 2, 8, 64):
        exact = sum(math.exp(log_beta(*pair) - log_beta(a, b)) for pair in ((a + size, b), (a, b + size)))
        assert model.all_equal(size) == pytest.approx(exact, rel=1e-12)


def test_the_model_at_its_limits():
    alike, apart = DirichletMultinomial([0.3, 0.7], 1.0), DirichletMultinomial([0.3, 0.7], 0.0)
    assert alike.all_equal(64) == pytest.approx(1) and apart.all_equal(5) == pytest.approx(0.3**5 + 0.7**5)
    assert dead_share([[0.0] * 4] * 9, 32) == 1.0, "nothing else was ever seen"


@pytest.mark.parametrize("parameters", [(0.5, 1.5), (0.3, 0.5, 1.0)])
def test_larger_groups_are_foretold(parameters):
    """8 draws of each of 3000 simulated prompts foretell what 16 and 64 draws of these chances give."""
    random = np.random.default_rng(0)
    chances = random.dirichlet(parameters, 3000)
    drawn = [random.choice(len(parameters), 8, p=one).tolist() for one in chances]
    for size in (16, 64):
        assert dead_share(drawn, size) == pytest.approx((chances**size).sum(axis=1).mean(), abs=0.02)


def test_larger_groups_never_cost_less_for_one_that_teaches():
    """The chance that a group teaches is concave in its size, and so no warning proposes a larger one."""
    random = np.random.default_rng(0)
    for values in (2, 3):
        drawn = [random.choice(values, 8, p=one).tolist() for one in random.dirichlet([0.2] * values, 200)]
        costs = [completions_for_one(size, dead_share(drawn, size)) for size in range(2, 9)]
        assert all(more >= less - 1e-9 for less, more in itertools.pairwise(costs))


def test_a_good_size_and_the_groups_of_a_step():
    assert good_size({2: 0.2, 4: 0.5, 8: 0.3, 16: 0.1}) == 8 and good_size({4: 0.9, 64: 0.5}) is None
    assert groups_of_step(8, 0.0, 0.75) == (8, 2)
    assert groups_of_step(8, 1.0, 0.25) == (pytest.approx(8 / 0.75), pytest.approx(8))
    assert groups_of_step(8, 1.0, 0.75) == (16, 4)
    assert groups_of_step(8, 0.5, 1.0) == (12, 0)


# -- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "limit"), [(0.02, 64), (0.005, 200)])
def test_the_length_of_what_was_cut_is_foretold(rate, limit):
    """Completions that end with the same chance after each token: 1 % are longer than log 0.01 / log (1 - rate)."""
    whole = np.random.default_rng(0).geometric(rate, 20_000)
    found = length_needed(np.minimum(whole, limit), whole > limit, limit)
    assert found == pytest.approx(math.log(0.01) / math.log1p(-rate), rel=0.05)


def test_lengths_where_nothing_needs_to_be_foretold():
    assert length_needed(list(range(1, 101)), [False] * 100, 128) == pytest.approx(99.01)
    assert length_needed([4] * 10, [True] * 10, 4) is None
    assert length_needed([4] * 9 + [3], [True] * 9 + [False], 4) > 4
    assert [rounded(length) for length in (1, 32, 33)] == [32, 32, 64]


# -- which prompts ---------------------------------------------------------------------------------------------------


def test_prompts_come_in_the_order_of_a_run():
    ledger = Ledger(rows=50, per_step=50, max_staleness=1, lease_s=9.0, seed=3)
    ledger.lineage["s"] = 0
    assert [row for _, row in ledger.grant("s", "s", 50, 0.0)] == order(3, 50)


def test_nothing_is_begun_that_would_end_too_late():
    engine = SimpleNamespace(tokens=700)
    feed = Feed([5, 3, 4], seconds=100.0, engine=engine)
    assert next(feed) == (0, 5)
    feed.add(5, SimpleNamespace(seconds=40.0))
    feed.began -= 50
    assert next(feed) == (1, 3)
    feed.add(3, Failure(session="s", split="train", group_id=1, why="no grader"))
    feed.began -= 20
    assert list(feed) == [] and (feed.begun, feed.answered, feed.failed) == (2, 1, {3: "no grader"})
    assert feed.speed(10_000) == pytest.approx(10, rel=0.01), "what came while it was kept full"
    assert len(list(Feed(range(1000), 100.0, engine))) == ENOUGH


# -- figures, table, warnings ----------------------------------------------------------------------------------------


def rollout(group: int, reward: float, text: str = "#### 5", **changes) -> Rollout:
    plain = {"gold": "5", "tokens": 20, "finish": "stop", "rewards": {"gsm8k": reward}}
    plain |= {"split": "train", "group": group, "row": group, "prompt": "?", "snapshots": ["s"], "seconds": 1.0}
    return Rollout(completion=text, reward=reward, **(plain | changes))


HEALTHY = [rollout(group, float(index < 4)) for group in range(40) for index in range(8)]


def probed(**changes) -> Probed:
    calls = Calls(values=320, not_applicable=0, errors=0, timeouts=0, seconds=[0.001] * 40)
    plain = {"model": "m", "device": "CPU", "data": "d", "rows": 100, "context": 512, "prompt": "\x1b[2Jsay"}
    plain |= {"prompt_lengths": (9, 10, 11), "ends": {2: "<end>"}, "closing": None, "begun": 40, "answered": 40}
    plain |= {"failed": {}, "seconds": 60.0, "tokens_per_s": 100.0, "rewards": {"gsm8k": calls}, "stopped": False}
    return Probed(**(plain | changes))


def result(rollouts: list[Rollout], overrides: list[str] = (), **changes) -> tuple[Recipe, dict]:
    plain = ["sampling.max_tokens=64", "reward=[{function='gsm8k'}]", "trainer.prompts_per_step=8", *overrides]
    recipe = load(None, plain)
    return recipe, explained(recipe, probed(**changes), grouped(rollouts))


def test_figures_of_a_few_completions():
    first = [rollout(0, 1.0, tokens=10), rollout(0, 0.0, "5", tokens=64, finish="length")]
    second = [rollout(1, 0.0, "#### 4\nand so on"), rollout(1, 0.0, "no idea", specials=1)]
    third = [rollout(2, 1.0), rollout(2, 1.0)]
    groups = grouped([*third, *first, *second])
    assert [group[0].group for group in groups] == [0, 1, 2]
    found = figures(groups)
    shares = {name: round(6 * found[name]) for name in ("pass_rate", "truncated", "specials", "after", "repeats")}
    assert shares == {"pass_rate": 3, "truncated": 1, "specials": 1, "after": 1, "repeats": 0}
    prompts = {name: round(3 * found[name]) for name in ("always", "never", "dead", "dead/wrong", "dead/right")}
    assert prompts == {"always": 1, "never": 1, "dead": 2, "dead/wrong": 1, "dead/right": 1}
    assert found["sometimes"] == pytest.approx(1 / 3) and found["length/max"] == 64
    assert histogram(groups) == [1, 1, 1]
    shares = answers(groups, ["marks", "last"])
    assert {name: round(6 * share) for name, share in shares.items()} == {
        "answered/marks": 4,
        "answered/last": 5,
        "right/marks": 3,
        "right/last": 4,
        "extraction_failures": 1,
    }
    assert rewards(groups)["gsm8k"] == {"mean": 0.5, "std": 0.5, "within": pytest.approx(1 / 3)}


def test_a_step_is_foretold():
    recipe, found = result(HEALTHY, ["trainer.refill=1.0", "sampler.gpus=2"])
    ahead = forecast(recipe, grouped(HEALTHY), 100.0)
    assert ahead == found["forecast"] and ahead["dead"][8] == 0 and ahead["dead"][4] == pytest.approx(2 / 70)
    assert (ahead["groups"], ahead["useful"], ahead["tokens"]) == (8, 8, 8 * 8 * 20)
    assert ahead["sampler_s"] == pytest.approx(8 * 8 * 20 / 200)
    assert (ahead["max_tokens"], ahead["group_size"]) == (32, 4)


def test_the_table_has_every_figure_and_no_control_characters():
    recipe, found = result(HEALTHY)
    said = table(recipe, probed(), found)
    assert found["warnings"] == [] and found["hopeless"] is None
    assert "\x1b" not in said and "2 '<end>'" in said and "40 of 100 prompts" in said
    assert "passed        0.500 [" in said and "    4 of 8       40  ####" in said and "[8]" in said
    assert "8.0 of 8.0 groups teach something" in said and "12.8 s a step: 1280 tokens at 1 x 100 tokens/s" in said
    assert all(len(line) <= 130 for line in said.splitlines())


def test_every_number_of_right_completions_has_its_place():
    for size in (2, 8, 12, 64):
        covered = [number for low, high in bins(size) for number in range(low, high + 1)]
        assert covered == list(range(size + 1)) and len(bins(size)) <= 10


def every(make) -> list[Rollout]:
    """40 prompts, 8 completions each; make: their group and index -> rollout."""
    return [make(group, index) for group in range(40) for index in range(8)]


LOOP = "so it is 5 more and 5 less " * 8
CUT = {"finish": "length", "tokens": 64}
DISEASES = {
    "31% of the completions are cut before they end. Set sampling.max_tokens = ": every(
        lambda g, i: rollout(g, float(i < 4), "hm", **(CUT if (8 * g + i) % 16 < 5 else {"tokens": 40}))
    ),
    "repeat themselves, which a larger sampling.max_tokens does not end": every(
        lambda g, i: rollout(g, float(i < 4), *([LOOP] if i < 3 else []), **(CUT if i < 3 else {}))
    ),
    "go on behind a final answer: set sampling.stop": every(
        lambda g, i: rollout(g, float(i < 4), "#### 5\nNext: 7", **(CUT if i < 3 else {}))
    ),
    "hold special tokens before their last token": every(lambda g, i: rollout(g, float(i < 4), specials=i // 7)),
    "the form of the answer is missing, not the answer": every(lambda g, i: rollout(g, 0.0, "it is 5")),
    "hold the right number last, but not where marks looks": every(
        lambda g, i: rollout(g, float(i < 4), "5" if i > 5 else "#### 5")
    ),
    "all completions are right, and every reward is 1: nothing can be learned. Choose harder": every(
        lambda g, i: rollout(g, 1.0)
    ),
    "all completions are wrong, and every reward is 0: nothing can be learned. Choose easier": every(
        lambda g, i: rollout(g, 0.0, "#### 6")
    ),
    "60% of the groups teach nothing: 20 completions for one that does, and larger groups cost more. Set "
    "trainer.refill = 1.0, which puts others in their place. Choose easier": every(
        lambda g, i: rollout(g, *((1.0,) if i == 0 and g % 5 < 2 else (0.0, "#### 6")))
    ),
    "75% of the groups teach nothing: 32 completions for one that does, and larger groups cost more. Set "
    "trainer.refill = 1.0, which puts others in their place. Choose harder": every(
        lambda g, i: rollout(g, float(g % 4 > 0 or i < 4))
    ),
}


@pytest.mark.parametrize("words", DISEASES)
def test_what_is_wrong_is_said(words):
    _, found = result(DISEASES[words])
    assert words in "\n".join(found["warnings"])
    assert found["hopeless"] is None


def test_what_the_measurement_itself_shows_is_said():
    slow = Calls(values=300, not_applicable=0, errors=2, timeouts=3, seconds=[3.0] * 40)
    states = {
        "only 7 prompts were answered": {"answered": 7, "begun": 7},
        "5 of 45 prompts were begun and not ended": {"begun": 45},
        "closes a turn with '<|im_end|>'": {"closing": "<|im_end|>"},
        "gsm8k failed in 5 of 40 calls, first: no grader": {"rewards": {"gsm8k": slow}, "failed": {3: "no grader"}},
        "busy 100% of the time": {"rewards": {"gsm8k": slow}},
    }
    for words, changes in states.items():
        assert any(words in one for one in result(HEALTHY, **changes)[1]["warnings"]), words


@pytest.mark.parametrize(("share", "stops"), [(0.9, False), (0.95, True)])
def test_a_recipe_that_cuts_nearly_everything_is_stopped(share, stops):
    cut = every(lambda g, i: rollout(g, 0.0, "hm", **(CUT if 8 * g + i < share * 320 else {"tokens": 60})))
    recipe, found = result(cut)
    assert bool(found["hopeless"]) is stops
    if stops:
        assert "95% of the completions are cut before they end. Set sampling.max_tokens = " in found["hopeless"]
        assert found["forecast"]["max_tokens"] > 64
    unknown = found["forecast"] | {"max_tokens": None}
    every_cut = found["figures"] | {"truncated": 1.0}
    assert "set sampling.max_tokens = 256 and probe again" in hopeless(recipe, every_cut, unknown)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path.parents[0])
    (tmp_path / "r.toml").write_text("")
    for arguments, words in (
        (["none.toml"], "cannot read recipe"),
        ([f"{tmp_path}/r.toml", "--seconds", "0"], "expected more than 0"),
        ([f"{tmp_path}/r.toml", "--out", "x.txt"], "expected FILE.json"),
        ([f"{tmp_path}/r.toml", "--set", "sampling.max_tokenz=3"], "did you mean `max_tokens`"),
    ):
        with pytest.raises(UserError, match=words):
            main(arguments)
    with pytest.raises(UserError, match="no probe, or damaged"):
        read(tmp_path / "r.toml")


def test_why_nothing_is_known_is_said(tmp_path):
    out = tmp_path / "x.json"
    assert "no prompt has a reward: no grader" in nothing(probed(failed={3: "no grader"}), out)
    assert "answered in 1m00s at 100 tokens/s; use more --seconds" in nothing(probed(), out)


def test_demonstrations_are_not_probed(tmp_path):
    with pytest.raises(UserError, match="samples nothing: nothing to probe"):
        main(["recipes/demo-sft.toml", "--out", str(tmp_path / "x.json")])
    assert not any(tmp_path.iterdir())


def test_what_ended_the_sampler_is_said(tmp_path):
    arguments = ["recipes/demo.toml", "--set", f"model.path={tmp_path}/none"]
    with pytest.raises(RunError, match="none") as error:
        main([*arguments, "--out", str(tmp_path / "p" / "x.json")])
    assert error.value.exit_code == 2 and "x.log" in str(error.value)
