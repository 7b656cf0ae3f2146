"""Evaluation beside training: when it is due, what it leaves behind, and what ends a run early."""

import os

import msgspec
import pytest

from protocol.messages import DataSet
from protocol.metrics import MetricsWriter, read_metrics
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.snapshot import snapshot_id, step_of
from tests.groups import make_group
from trainer.exams import Exams
from trainer.record import Record


class Alone:
    """`Ranks` of a single process."""

    first = True

    def max(self, values):
        return [int(value) for value in values]


class Answers:
    """An inbox whose samplers answer at once: `right` of four prompts, by the number of steps."""

    def __init__(self, right: dict[int, int]) -> None:
        self.right, self.step, self.asked = right, 0, []

    def start_exam(self, alone: bool) -> None:
        self.asked.append((self.step, alone))

    def end_exam(self, wait: bool):
        step, name = self.asked[-1][0], snapshot_id(self.asked[-1][0], 1)
        return [
            make_group(row, rewards=[float(row < self.right.get(step, 0))], row=row, snapshot=name, split="eval")
            for row in range(4)
        ]

    def data(self, split):
        return DataSet(rows=4, fingerprint="e")


class Steps:
    """A policy as far as exams look at it."""

    def __init__(self, step: int = 0) -> None:
        self.steps_done = step


@pytest.fixture
def rundir(tmp_path):
    result = RunDir(tmp_path / "run")
    result.make()
    return result


def run(rundir, answers: Answers, *overrides: str, steps: int = 8, start: int = 0) -> Exams:
    """The calls that rank.py and the loop make."""
    recipe = load(None, [f"trainer.steps={steps}", "eval.extractors=[]", *overrides])
    with MetricsWriter(rundir.metrics / "trainer.jsonl") as writer:
        record = Record(writer, Alone(), type("Store", (), {"spent_s": 0.0}))
        exams = Exams(rundir, recipe, answers, record, Alone(), step=start)
        policy = Steps(start)
        answers.step = start
        exams.look(policy)
        while policy.steps_done < steps and not exams.over:
            policy.steps_done += 1
            answers.step = policy.steps_done
            (rundir.snapshots / snapshot_id(policy.steps_done, 1)).mkdir(exist_ok=True)
            exams.look(policy)
        assert exams.finish(policy)
    return exams


def results(rundir) -> dict[int, float]:
    records = [record for record in read_metrics(rundir.metrics / "trainer.jsonl") if record["kind"] == "exam"]
    return {record["step"]: record["accuracy"] for record in records}


def test_the_first_and_the_last_weights_and_those_between_are_evaluated_once_each(rundir):
    answers = Answers({0: 1, 3: 2, 6: 4, 8: 3})
    run(rundir, answers, "eval.every=3")
    assert results(rundir) == {0: 0.25, 3: 0.5, 6: 1.0, 8: 0.75}
    assert answers.asked == [(0, False), (3, True), (6, True), (8, False)]  # one sampler where training goes on
    assert rundir.best.resolve().name == snapshot_id(6, 1)
    assert not os.path.isabs(os.readlink(rundir.best))  # the run directory may move
    last = read_metrics(rundir.metrics / "trainer.jsonl")[-1]
    assert last["change/difference"] == 0.5 and last["change/wins"] == 2 and last["change/losses"] == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(["eval.before=false"], [8]), (["eval.after=false"], [0]), (["eval.after=false", "eval.every=4"], [0, 4, 8])],
)
def test_what_is_not_wanted_is_not_evaluated(rundir, settings, expected):
    run(rundir, Answers({}), *settings)
    assert list(results(rundir)) == expected


def test_training_ends_when_patience_does_and_the_best_stays(rundir):
    answers = Answers({0: 1, 1: 3, 2: 2, 3: 3, 4: 3, 5: 4})
    exams = run(rundir, answers, "eval.every=1", "eval.patience=2")
    # Equal is no new best; the answers to step 3's came after step 4, whose weights are the last.
    assert exams.over and list(results(rundir)) == [0, 1, 2, 3, 4]
    assert rundir.best.resolve().name == snapshot_id(1, 1)


def test_a_resumed_run_keeps_the_results_of_its_history_and_removes_those_of_another(rundir):
    run(rundir, Answers({0: 1, 2: 3, 4: 2}), "eval.every=2", steps=4)
    assert {step_of(path.stem) for path in rundir.evals.iterdir()} == {0, 2, 4}
    answers = Answers({4: 2, 6: 2})
    run(rundir, answers, "eval.every=2", steps=6, start=3)  # a checkpoint of step 3 was the newest
    assert answers.asked == [(4, True), (6, False)]
    assert rundir.best.resolve().name == snapshot_id(2, 1)
    last = read_metrics(rundir.metrics / "trainer.jsonl")[-1]
    assert last["change/difference"] == 0.25  # against the first weights, evaluated by the trainer before


def test_what_is_damaged_of_other_prompts_or_somebodys_own_counts_for_nothing_and_stays(rundir, caplog):
    run(rundir, Answers({0: 4, 2: 3}), steps=2)
    first = rundir.evals / f"{snapshot_id(0, 1)}.json"
    first.write_bytes(msgspec.json.encode(msgspec.json.decode(first.read_bytes()) | {"fingerprint": "another"}))
    for name in (f"{snapshot_id(1, 1)}.json", "mine.json", "s1.json"):
        (rundir.evals / name).write_text("{")
    run(rundir, Answers({4: 3}), steps=4, start=2)
    assert "damaged" in caplog.text and (rundir.evals / "mine.json").exists() and (rundir.evals / "s1.json").exists()
    last = read_metrics(rundir.metrics / "trainer.jsonl")[-1]
    assert last["accuracy"] == 0.75 and "change/difference" not in last
    assert rundir.best.resolve().name == snapshot_id(2, 1)  # the first prompts were other ones


def test_the_best_weights_of_an_abandoned_history_are_linked_no_more(rundir):
    run(rundir, Answers({0: 1, 2: 2, 4: 4}), "eval.every=2", steps=4)
    assert rundir.best.resolve().name == snapshot_id(4, 1)
    run(rundir, Answers({}), "eval.every=100", "eval.after=false", steps=3, start=3)
    assert rundir.best.resolve().name == snapshot_id(2, 1)


def test_a_run_whose_patience_has_ended_does_not_go_on_after_a_restart(rundir):
    settings = ("eval.every=1", "eval.patience=2")
    run(rundir, Answers({0: 1, 1: 3, 2: 2, 3: 3, 4: 3}), *settings)
    answers = Answers({})
    assert run(rundir, answers, *settings, start=4).over and not answers.asked


def test_a_prompt_that_could_not_be_answered_costs_the_comparison_alone(rundir, caplog):
    answers = Answers({0: 1, 2: 3})
    everything = answers.end_exam
    answers.end_exam = lambda wait: everything(wait)[: 3 if answers.asked[-1][0] else 4]
    run(rundir, answers, steps=2)
    assert results(rundir) == {0: 0.25, 2: 1.0} and "on one side only" in caplog.text


def test_an_evaluation_without_answers_is_said(rundir, caplog):
    answers = Answers({})
    answers.end_exam = lambda wait: []
    run(rundir, answers)
    assert caplog.text.count("came to nothing") == 2 and not list(rundir.evals.iterdir())
