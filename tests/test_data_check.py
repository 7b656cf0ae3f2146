"""`launch data check`: what it says of good rows, and that it says what is wrong with bad ones."""

import json
from pathlib import Path

import pytest

from launch.plan.data import main
from tests.tiny import make_model

GOOD = [{"question": f"{n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(20)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def check(tmp_path, tiny, capsys):
    """Runs the command on rows for training and held-out ones; -> exit code, output."""

    def run(train: list[dict], held_out: list[dict] | None = None, *overrides: str) -> tuple[int, str]:
        for name, rows in (("train", train), ("eval", held_out or [])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        held = tmp_path / "eval.jsonl" if held_out else ""
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(
            f'[model]\npath = "{tiny}"\n[data]\ntrain = "{tmp_path}/train.jsonl"\neval = "{held}"\nsystem = ""\n'
            '[[reward]]\nfunction = "gsm8k"\n'
        )
        flags = [part for change in overrides for part in ("--set", change)]
        return main(["check", str(recipe), *flags]), capsys.readouterr().out

    return run


def said(out: str, title: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(title)]


def test_good_rows_are_shown_as_the_model_reads_them(check, tiny):
    code, out = check(GOOD)
    assert code == 0 and not said(out, "warning") and not said(out, "refused")
    assert "20 rows, tokens p50" in out and "the columns question, answer" in out
    assert "<|im_start|>user\n    0 + 1?<|im_end|>\n" in out  # the text
    ids = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    assert f"{ids['?']}:'?'" in out and "'<|im_end|>'" in said(out, "ends")[0]


def test_doubtful_rows_are_warned_of(check):
    rows = [*GOOD, GOOD[3], {"question": "Who?", "answer": "nobody"}]
    code, out = check(rows, [GOOD[0], {"question": "9 + 9?", "answer": "18"}])
    [repeated, both] = [line for line in said(out, "warning") if "no number" not in line]
    assert code == 0
    assert "1 prompts are repetitions, the first of row 3" in repeated
    assert "1 of 2 prompts of" in both and "row 0" in both
    assert "1 of 22 answers hold no number" in out and "row 21 (from 0): 'nobody'" in out


def test_the_same_rows_for_both_are_warned_of(check, tmp_path):
    code, out = check(GOOD, None, f"data.eval={tmp_path}/train.jsonl", "data.eval_limit=3")
    [line] = said(out, "warning")
    assert code == 0 and "data.train and data.eval are both" in line and "trained prompts" in line
    assert "train.jsonl: 20 rows" in out and "train.jsonl: 3 rows" in out


def test_answers_that_completions_have_no_room_for_are_warned_of(check):
    code, out = check(GOOD, None, "sampling.max_tokens=10")
    [line] = said(out, "warning")
    assert code == 0 and "20 of 20 answers are longer than sampling.max_tokens = 10" in line


@pytest.mark.parametrize(
    ("rows", "overrides", "reason"),
    [
        ([*GOOD, {"question": "long " * 200, "answer": "1"}], [], "1 of 21 prompts have more than"),
        ([*GOOD, {"question": "1?"}], [], "1 of 21 rows"),
        (GOOD, ["data.template={problem}"], "no column 'problem'"),
        ([{"question": "1?"}], [], "reward gsm8k needs the column 'answer'"),
        (GOOD, ["sampling.max_tokens=4096"], "more than the model's 1024 positions"),
        ([], [], "the data set is empty"),
    ],
)
def test_what_training_refuses_is_refused_here(check, rows, overrides, reason):
    code, out = check(rows, None, *overrides)
    [line] = said(out, "refused")
    assert code == 2 and reason in line


def test_demonstrations_are_made_as_training_makes_them(check):
    sft = ["objective.name=sft", "sampling.group_size=1", "objective.kl_beta=0.0"]
    code, out = check(GOOD, None, *sft, "data.demonstration={final}")
    assert code == 0 and "the first: '1'" in out and said(out, "learned")
    code, out = check(GOOD, None, *sft, "data.demonstration={answer}", "sampling.max_tokens=5")
    assert code == 2 and "the demonstration has" in said(out, "refused")[0]


def test_what_rows_say_commands_no_terminal(check):
    _, out = check([{"question": "\x1b[2J 1?", "answer": "1"}])
    assert "\x1b" not in out and "\\x1b" in out


def test_other_rows_can_be_checked_with_a_recipes_model(check, tmp_path, capsys):
    check(GOOD)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "8 + 8?", "answer": "16"}) + "\n")
    assert main(["check", str(tmp_path / "recipe.toml"), "--data", str(other)]) == 0
    out = capsys.readouterr().out
    assert "other.jsonl: 1 rows" in out and "train.jsonl" not in out
