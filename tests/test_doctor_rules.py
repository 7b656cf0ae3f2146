"""Each rule on both sides of its threshold, on histories made up step by step."""

from dataclasses import replace
from pathlib import Path

import pytest

from doctor import groups, lengths
from doctor.history import History, Seen
from doctor.rules import EXPLAINS, RULES, examine
from doctor.text import repetition, tail_after_answer
from doctor.window import Window
from protocol.resolve import load
from protocol.rundir import RunDir

STEP = {
    "accuracy": 0.4,
    "reward": 0.4,
    "reward_std": 0.5,
    "rewards/gsm8k/mean": 0.4,
    "frac_reward_zero_std": 0.2,
    "completions/clipped_ratio": 0.0,
    "completions/mean_length": 100.0,
    "train/tokens": 3000.0,
    "loss": 0.01,
    "grad_norm": 1.0,
    "entropy": 0.5,
    "clip_ratio/region_mean": 0.01,
    "correction/masked_fraction": 0.0,
    "sampling/sampling_logp_difference/mean": 0.03,
    "sampling/importance_sampling_ratio/p01": 0.8,
    "sampling/importance_sampling_ratio/p99": 1.2,
    "staleness/mean": 1.0,
    "step_time": 10.0,
    "time/wait_s": 1.0,
    "time/publish_s": 1.0,
    "sampler/tokens_per_s": 300.0,
    "train/tokens_per_s": 400.0,
}
"""Of a healthy step."""

COMPLETION = Seen(
    split="train", group=0, row=0, version=0, reward=0.0, rewards={"gsm8k": 0.0}, tokens=100, truncated=False,
    specials=0, gold="7", answers={"marks": "9", "last": "9"}, repetition=0.05, after=0, file=Path("a"), offset=0,
)  # fmt: skip


def completions(version: int, count: int = 32, **changes) -> list[Seen]:
    """Groups of 8. A change is a value, or a function of the completion's number."""
    right = {"rewards": lambda i: {"gsm8k": float(i % 5 < 2)}, "reward": lambda i: float(i % 5 < 2)}
    made = []
    for i in range(count):
        values = {name: change(i) if callable(change) else change for name, change in (right | changes).items()}
        group = version * count + i // 8
        made.append(replace(COMPLETION, group=group, row=group, version=version, **values))
    return made


def scored(value: float | None, name: str = "gsm8k") -> dict:
    return {"rewards": {name: value}, "reward": value or 0.0}


def window(count: int = 8, overrides: tuple[str, ...] = (), seen: dict | None = None, **figures) -> Window:
    """The last window of a run of `count` steps. A figure is a value, or a function of the step."""
    recipe = load(None, ["sampling.group_size=8", 'reward=[{function="gsm8k"}]', *overrides])
    history = History(RunDir(Path("nowhere")), recipe)
    for number in range(1, count + 1):
        changed = {name: figure(number) if callable(figure) else figure for name, figure in figures.items()}
        history.steps.append({**STEP, "kind": "step", "step": number, **changed})
        made = completions(number - 1, **(seen or {}))
        history.train += made
        history.scores[number - 1] = min(one.first for one in made), max(one.first for one in made)
    return Window.at(history, count)


def spoken(made: Window) -> list[str]:
    return list(examine(made))


OWN = ('reward=[{function="own.py:score"}]',)
BOTH = ('reward=[{function="gsm8k"}, {function="format", weight=0.5}]',)


def with_format(value: float) -> dict:
    return {"rewards": lambda i: {"gsm8k": 0.0, "format": value}, "reward": lambda i: 0.01 * i}


FORMED = {"count": 12, "overrides": BOTH, "seen": with_format(1.0)}
HALF_SOLVED = {"count": 40, "rewards": lambda i: {"gsm8k": float(i > 15)}}


STREAMS: list[tuple[str, dict, dict]] = [
    # rule, a stream that shows it, a change of it that does not
    ("truncation trap", {"seen": {"truncated": lambda i: i % 10 != 0}}, {"seen": {"truncated": lambda i: i % 10 < 7}}),
    (
        "truncation trap",
        {"seen": {"truncated": lambda i: i % 5 > 1}, "completions/clipped_ratio": 0.6},
        {"seen": {"truncated": lambda i: i % 5 > 1}, "completions/clipped_ratio": lambda step: 0.9 - 0.08 * step},
    ),
    ("dead groups: all wrong", {"seen": scored(0.0)}, {"seen": scored(0.0) | {"reward": lambda i: i % 2 * 0.1}}),
    ("dead groups: all right", {"seen": scored(1.0)}, {"seen": scored(1.0) | {"reward": lambda i: i % 8 * 0.1}}),
    (
        "dead groups: all right",  # three in five, the other two all wrong
        {"seen": HALF_SOLVED | {"reward": lambda i: float(i > 15)}},
        {"seen": HALF_SOLVED | {"reward": lambda i: float(i > 15) + i % 8 * (i > 23)}},
    ),
    ("reward trap", {"seen": scored(0.1)}, {"seen": scored(0.6) | {"reward": lambda i: i % 8 * 0.1}}),
    (  # of a user's own function nobody knows the best
        "reward trap",
        {"overrides": OWN, "seen": scored(0.7)},
        {"overrides": OWN, "seen": {"rewards": lambda i: {"own": 0.5 * (i % 10 < 7)}, "answers": {"last": "7"}}},
    ),
    (
        "reward trap",
        {**FORMED, "rewards/format/mean": lambda step: float(step > 2), "accuracy": 0.02},
        {**FORMED, "rewards/format/mean": lambda step: float(step > 2), "accuracy": lambda step: 0.3 + 0.003 * step},
    ),
    (
        "reward trap",
        {**FORMED, "rewards/format/mean": lambda step: float(step > 2), "accuracy": 0.02},
        {**FORMED, "rewards/format/mean": lambda step: min(1.0, 0.1 * step), "accuracy": 0.02},  # only just learned
    ),
    ("loss 0", {"loss": 0.0, "grad_norm": 0.0}, {"loss": 0.0}),
    (
        "no end",
        {"seen": {"truncated": True, "specials": 2}},
        {"seen": {"truncated": lambda i: i % 10 != 0, "specials": 0}, "completions/clipped_ratio": 0.0},
    ),
    ("text after the end", {"seen": {"specials": lambda i: i % 5 == 0}}, {"seen": {"specials": lambda i: i == 0}}),
    ("text after the end", {"seen": {"after": lambda i: i % 4 // 3 * 200}}, {"seen": {"after": 40}}),
    ("repetition", {"seen": {"repetition": lambda i: 0.9 * (i % 5 == 0)}}, {"seen": {"repetition": 0.4}}),
    (  # one in a hundred is right where there is room: chance
        "truncation trap",
        {"seen": {"truncated": lambda i: i % 5 > 1}, "completions/clipped_ratio": 0.6},
        {"seen": scored(0.0) | {"truncated": lambda i: i % 5 > 1, "reward": lambda i: i % 8 * 0.1}}
        | {"completions/clipped_ratio": 0.6},
    ),
    (
        "length explosion",
        {"completions/mean_length": lambda step: 50.0 * step},
        {"completions/mean_length": lambda step: 50.0 * step, "accuracy": lambda step: 0.05 * step},
    ),
    ("entropy collapse", {"entropy": lambda step: 0.3 if step < 4 else 0.04}, {"entropy": 0.04}),
    ("entropy collapse", {"entropy": lambda step: 2 / 4**step}, {"entropy": lambda step: max(0.1, 2 / 4**step)}),
    (
        "extraction failed",
        {"seen": {"answers": {"marks": None, "last": "7"}, **scored(0.0)}},
        {"seen": {"answers": {"marks": None, "last": "9"}, **scored(0.0), "reward": lambda i: 0.1 * i}},
    ),
    (
        "extraction failed",
        {"seen": {"answers": lambda i: {"marks": "7" if i % 5 < 2 else None, "last": "7"}}},
        {"overrides": OWN, "seen": {"answers": {"marks": None, "last": "7"}}},  # two in five are paid without a mark
    ),
    (
        "extraction failed",  # the function looks at one mark, the model writes another
        {"seen": {"answers": {"marks": "7", "last": "7"}, **scored(0.0)}}
        | {"overrides": ('reward=[{function="gsm8k", options={extractor="heading"}}]',)},
        {"seen": {"answers": {"marks": "7", "last": "7"}, **scored(0.0), "reward": lambda i: 0.1 * i}},
    ),
    (
        "extraction failed",  # of the own function it is not known whether it looks for marks at all
        {"overrides": OWN, "seen": {"answers": {"marks": None, "last": "7"}, **scored(0.0)}},
        {"overrides": OWN, "seen": {"answers": {"last": "7"}, "rewards": lambda i: {"own": i % 8 * 0.1}}},
    ),
    ("drift", {"sampling/sampling_logp_difference/mean": 0.2}, {"sampling/sampling_logp_difference/mean": 0.1}),
    ("drift", {"correction/masked_fraction": 0.3}, {"correction/masked_fraction": 0.1}),
    ("drift", {"sampling/importance_sampling_ratio/p99": 9.0}, {"sampling/importance_sampling_ratio/p99": 2.0}),
    ("stale weights", {"staleness/mean": 4.0}, {"staleness/mean": 2.0}),
    ("slow sampler", {"time/wait_s": 6.0}, {"time/wait_s": 4.0}),
    (
        "learning rate",
        {"overrides": ("optimizer.learning_rate=1e-3",)},
        {"overrides": ("optimizer.learning_rate=1e-5",)},
    ),
    (
        "learning rate",
        {"overrides": ("optimizer.learning_rate=1e-6", "lora.rank=8")},
        {"overrides": ("optimizer.learning_rate=1e-4", "lora.rank=8")},
    ),
    (
        "learning rate",
        {"overrides": ("optimizer.learning_rate=5e-3", "lora.rank=8")},
        {"overrides": ("optimizer.learning_rate=1e-3", "lora.rank=8")},
    ),
    (
        "rewards constant",
        {"overrides": BOTH, "seen": with_format(0.0), "rewards/format/mean": 0.0},
        {"overrides": BOTH, "seen": with_format(1.0), "rewards/format/mean": 1.0},
    ),
    (
        "rewards constant",
        {"overrides": BOTH, "seen": with_format(0.0), "rewards/format/mean": 0.0},
        {"overrides": BOTH, "seen": with_format(0.0), "rewards/format/mean": 0.2},
    ),
]


@pytest.mark.parametrize(("rule", "ill", "well"), STREAMS, ids=[f"{rule}-{i}" for i, (rule, *_) in enumerate(STREAMS)])
def test_a_rule_speaks_above_its_threshold_and_not_below(rule, ill, well):
    made = window(**ill)
    assert spoken(made) == [rule]
    finding = examine(made)[rule]
    assert finding.evidence and len(finding.examples) <= 3
    assert finding.advice.partition(":")[2], "names a setting, then says why"
    assert rule not in spoken(window(**well))
    assert rule not in spoken(window(**ill | {"count": 2})), "two steps are not enough"


def test_a_healthy_stream_is_healthy():
    assert spoken(window()) == []
    assert spoken(window(count=40)) == []


def with_samplers(figures: dict, records: list[dict], **changes) -> Window:
    made = window(**figures, **changes)
    named = [{"snapshot": f"s{number:08d}.i0001", "time_s": 10.0 * number, **one} for number, one in enumerate(records)]
    return replace(made, samplers=[named])


@pytest.mark.parametrize(
    ("rule", "ill", "well"),
    [
        ("reward failures", {"gsm8k/errors": 4, "gsm8k/timeouts": 0}, {"gsm8k/errors": 0, "gsm8k/timeouts": 0}),
        ("reward failures", {"gsm8k/errors": 0, "gsm8k/timeouts": 4}, {"gsm8k/errors": 1, "gsm8k/timeouts": 0}),
        ("stale weights", {"snapshots_unreadable": 3}, {"snapshots_unreadable": 2}),
        ("slow trainer", {"busy_s": 5.0}, {"busy_s": 50.0}),
    ],
)
def test_rules_about_samplers_count_what_rose_within_the_window(rule, ill, well):
    base = dict.fromkeys(ill, 7)
    quiet = {"time/wait_s": 0.0}

    def records(rises: dict) -> list[dict]:
        return [base] * 7 + [{name: 7 + rise for name, rise in rises.items()}]

    assert spoken(with_samplers(quiet, records(ill))) == [rule]
    assert spoken(with_samplers(quiet, records(well))) == []


def test_samplers_that_idle_are_no_news_while_the_trainer_waits_or_has_nothing_to_train():
    records = [{"busy_s": 0.1 * number} for number in range(8)]
    assert spoken(with_samplers({"time/wait_s": 3.0}, records)) == []
    assert spoken(with_samplers({"time/wait_s": 0.0, "train/tokens": 0.0}, records)) == []


def exam(step: int, accuracy: float) -> dict:
    return {"kind": "exam", "step": step, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}


@pytest.mark.parametrize(
    ("accuracies", "reward", "said"),
    [
        ([0.5, 0.3], lambda step: 0.1 * step, ["reward up, accuracy down"]),
        ([0.3, 0.6, 0.4], lambda step: 0.1 * step, ["reward up, accuracy down"]),
        ([0.5, 0.45], lambda step: 0.1 * step, []),
        ([0.5, 0.3], 0.4, []),
        ([0.3, 0.5], lambda step: 0.1 * step, []),
    ],
)
def test_accuracy_has_fallen_only_outside_its_interval_and_while_the_reward_rises(accuracies, reward, said):
    exams = [exam(step, accuracy) for step, accuracy in enumerate(accuracies)]
    assert spoken(replace(window(reward=reward), exams=exams)) == said


def test_steps_that_were_not_finite_are_said_at_once_even_before_the_first_step():
    recipe = load(None, [])
    history = History(RunDir(Path("nowhere")), recipe, skipped=[{"kind": "skipped", "step": 0}])
    assert spoken(Window.at(history, 0)) == ["not finite"]


@pytest.mark.parametrize(
    ("overrides", "figures", "reason"),
    [
        (("objective.mask_truncated=true",), {"completions/clipped_ratio": 1.0}, "mask_truncated"),
        ((), {"frac_reward_zero_std": 1.0}, "equal within every group"),
        ((), {"correction/masked_fraction": 1.0}, "masks 100%"),
        ((), {"clip_ratio/region_mean": 1.0}, "clipping holds 100%"),
        ((), {}, "all advantages are 0"),
    ],
)
def test_loss_0_names_its_reason(overrides, figures, reason):
    made = window(overrides=overrides, loss=0.0, grad_norm=0.0, **figures)
    assert reason in RULES["loss 0"](made).evidence


def test_a_cause_is_named_and_not_its_signs():
    dead = {"loss": 0.0, "grad_norm": 0.0, "frac_reward_zero_std": 1.0}
    made = window(seen=scored(0.0) | {"truncated": True, "answers": {}}, **dead)
    assert spoken(made) == ["truncation trap"]
    assert "the loss is 0" in examine(made)["truncation trap"].evidence
    assert set(EXPLAINS) | set().union(*EXPLAINS.values()) <= set(RULES)


def test_demonstrations_have_no_groups_and_no_reward_to_judge():
    made = window(
        overrides=(
            'objective.name="sft"',
            "sampling.group_size=1",
            "objective.kl_beta=0",
            'data.demonstration="{answer}"',
        ),
        seen=scored(1.0),
        entropy=lambda step: 2 / 4**step,
        frac_reward_zero_std=1.0,
    )
    assert spoken(made) == []


@pytest.mark.parametrize(
    ("limit", "lengths_seen", "cut", "wanted"),
    [(100, [100] * 40, 40, 200), (100, [40] * 30 + [100] * 10, 10, 152), (6, [6] * 40, 39, 16)],
)
def test_the_length_that_is_proposed_follows_from_the_lengths_seen(limit, lengths_seen, cut, wanted):
    made = window(
        count=3,
        overrides=(f"sampling.max_tokens={limit}",),
        seen={"count": len(lengths_seen), "tokens": lengths_seen.__getitem__, "truncated": lambda i: i >= 40 - cut},
    )
    assert lengths.more_tokens(made) == wanted


@pytest.mark.parametrize(("solved", "size"), [(0.01, 72), (0.05, 16), (0.5, 8)])
def test_the_group_size_that_is_proposed_gives_half_of_the_groups_a_right_one(solved, size):
    assert groups.larger_group(8, solved) == size
    assert size == 8 or 0.5 <= 1 - (1 - solved) ** size < 0.6


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("1 + 1 = 2\n#### 2", 0),
        ("#### 2 apples.\nI hope it helps", 15),
        ("so \\boxed{2}. Thanks", 8),
        ("<answer>2</answer> ok", 2),
        ("so \\boxed{2}. Wait, no. It is \\boxed{3}. Yes", 5),
        ("#### 2\nand once more\n#### 2", len("and once more\n#### 2")),
        ("#### 1,080\nthe same: \\boxed{1080}", len("the same: \\boxed{1080}")),
        ("<think>so \\boxed{2}? Let me check. Yes.</think> It is \\boxed{2}.", 1),
        ("<think>so \\boxed{2}? Let me check", 0),
        ("#### Step 1: look\n#### 1. Add them\nit is 2", 0),
        ("#### " + "1" * 10_000, 0),
    ],
)
def test_what_stands_behind_an_answer(text, behind):
    assert tail_after_answer(text) == behind


@pytest.mark.parametrize(("text", "share"), [("a b c", 0), ("a b c d e f g h i j", 0), ("x " * 12, 7 / 8)])
def test_repetition_is_the_share_of_five_words_in_a_row_that_came_before(text, share):
    assert repetition(text) == pytest.approx(share)


def test_every_rule_has_a_stream_here():
    shown = {rule for rule, *_ in STREAMS} | {
        "reward failures",
        "slow trainer",
        "reward up, accuracy down",
        "not finite",
    }
    assert shown == set(RULES)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (("sampler.max_running=8",), "sampler.max_running = 64"),
        (("sampler.max_running=32", "sampler.gpus=4", "sampler.tensor_parallel=2"), "sampler.gpus = 10"),
        (("sampler.max_running=20", "sampler.gpus=4", "sampler.tensor_parallel=2"), "sampler.max_running = 32"),
    ],
)
def test_engines_side_by_side_share_the_completions_of_a_step(overrides, advice):
    made = window(overrides=("trainer.prompts_per_step=8", *overrides), **{"time/wait_s": 6.0})
    assert RULES["slow sampler"](made).advice.partition(":")[0] == advice


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"marks": "7", "last": "7"}, ["dead groups: all right"]),
        ({"marks": "9", "last": "9"}, ["reward trap"]),
        ({}, []),
    ],
)
def test_a_score_that_never_varies_is_judged_by_the_numbers_that_it_pays(answer, said):
    made = window(overrides=OWN, seen=scored(0.1) | {"answers": answer})
    assert spoken(made) == said
    assert not said or "0.1" in examine(made)[said[0]].evidence


def test_a_group_that_was_sampled_again_counts_once():
    made = window(count=3)
    again = replace(made, train=sorted(made.train + made.train, key=lambda seen: seen.version))
    assert len(again.groups) == len(made.groups) == 12


def test_a_reward_that_no_gradient_can_take_is_named():
    made = replace(window(seen=scored(1e60)), skipped=[{"kind": "skipped", "step": 8}])
    assert RULES["not finite"](made).advice.startswith("reward: bound it, 1e+60")
    assert len(RULES["not finite"](made).examples) == 3
    made = replace(window(), skipped=[{"kind": "skipped", "step": 8}])
    assert RULES["not finite"](made).advice.startswith("optimizer.learning_rate = 2.5e-07")
