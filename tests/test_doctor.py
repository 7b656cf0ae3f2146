"""The doctor on recorded runs, on a run that grows, and as a command."""

import json
import logging
import shutil
from pathlib import Path

import msgspec
import pytest

from doctor.course import Course
from doctor.history import History
from doctor.rules import RULES
from doctor.window import SIZE
from launch.doctor import main
from protocol.errors import UserError
from protocol.metrics import MetricsWriter
from protocol.rundir import RunDir
from tests.diseases import recorded, unpack
from tests.diseases.table import DISEASES, MADE_UP
from tests.test_doctor_rules import STEP
from trainer.checkup import Checkup


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> Path:
    """All recorded runs, by name."""
    directory = tmp_path_factory.mktemp("streams")
    for name in recorded():
        unpack(name, directory)
    return directory


def course(run: Path) -> Course:
    followed = Course(History.open(run))
    followed.follow()
    return followed


@pytest.mark.parametrize("name", recorded())
def test_the_disease_of_a_recorded_run_is_seen_and_no_other(streams, name):
    disease = DISEASES[name]
    diagnoses = course(streams / name).diagnoses()
    said = {diagnosis.rule for diagnosis in diagnoses}
    assert disease.shows <= said <= disease.shows | disease.may, [(one.rule, one.evidence) for one in diagnoses]
    for one in diagnoses:
        assert 0 <= one.first <= one.last
        assert len(one.examples) <= 3


def test_every_disease_has_its_recording_and_every_rule_a_disease_or_a_reason():
    assert set(recorded()) == set(DISEASES)
    shown = set().union(*(disease.shows for disease in DISEASES.values()))
    assert shown | set(MADE_UP) == set(RULES) and not shown & set(MADE_UP)


def test_a_run_that_is_followed_says_what_it_says_afterwards(streams, tmp_path):
    """Records arrive one by one, and half a line at a time."""
    source, run = streams / "truncation", tmp_path / "run"
    for name in ("metrics", "rollouts"):
        (run / name).mkdir(parents=True)
    shutil.copy(source / "recipe.toml", run)
    for path in source.glob("rollouts/*.jsonl"):
        shutil.copy(path, run / "rollouts")
    live = Course(History.open(run))
    began = []
    with (run / "metrics" / "trainer.jsonl").open("ab", buffering=0) as file:
        for line in (source / "metrics" / "trainer.jsonl").read_bytes().splitlines(keepends=True):
            for half in (line[:50], line[50:]):
                file.write(half)
                live.history.refresh()
                began += [spell.rule for spell in live.follow()]
    whole = course(source).diagnoses()
    assert [(one.rule, one.first, one.last, one.evidence) for one in live.diagnoses()] == [
        (one.rule, one.first, one.last, one.evidence) for one in whole
    ]
    assert sorted(began) == sorted(one.rule for one in whole)


class Growing:
    """A run directory that a trainer writes to, step by step."""

    def __init__(self, path: Path) -> None:
        self.rundir = RunDir(path)
        self.rundir.make()
        self.rundir.recipe.write_text("[sampling]\ngroup_size = 8\n[[reward]]\nfunction = 'gsm8k'\n")
        self.history = History.open(path)
        self.checkup = Checkup(self.rundir, self.history.recipe, 0)

    def step(self, number: int, **figures) -> None:
        with MetricsWriter(self.rundir.metrics / "trainer.jsonl") as writer:
            writer.write({"kind": "step", "step": number, "groups": [], **STEP, **figures})

    def rollouts(self, version: int, text: str = "1 2 3") -> None:
        with MetricsWriter(self.rundir.rollouts / "a.jsonl") as writer:
            for index in range(16):
                rewards = {"gsm8k": float(index % 5 < 2)}
                writer.write(
                    {"split": "train", "group": 2 * version + index // 8, "row": index // 8, "prompt": "2+2?"}
                    | {"completion": text, "reward": rewards["gsm8k"], "rewards": rewards, "finish": "stop"}
                    | {"tokens": 9, "snapshots": [f"s{version:08d}.i0001"], "seconds": 1.0}
                )


DRIFT = {"sampling/sampling_logp_difference/mean": 2.0}


def test_a_disease_is_said_once_and_again_only_after_it_was_away(tmp_path, caplog, capsys):
    run = Growing(tmp_path)
    said = []
    with caplog.at_level(logging.INFO):
        for number in range(1, 41):
            run.step(number, **DRIFT if number in (5, 6, 30, 31) else {})
            caplog.clear()
            run.checkup.look()
            said += [number for record in caplog.records if record.getMessage().startswith("drift: ")]
        run.checkup.end()
    assert said == [5, 30]
    assert caplog.messages == [f"doctor: drift; see `python -m launch doctor {tmp_path}`"]
    first, second = course(tmp_path).diagnoses()
    assert (first.first, second.first) == (5, 30)
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("drift  (steps 30 to 38, over; 1 earlier, from step 5)\n")
    assert out.endswith("40 steps: nothing is wrong at the end\n")


def test_an_error_of_the_doctor_is_counted_and_said_once_and_stops_nothing(tmp_path, caplog):
    run = Growing(tmp_path)
    (run.rundir.metrics / "sampler-a.jsonl").mkdir()  # which no sampler does
    for number in range(1, 3):
        run.step(number)
        run.checkup.look()
    run.checkup.end()
    assert run.checkup.failed == 3
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_steps_that_a_restarted_trainer_does_again_count_once(tmp_path):
    run = Growing(tmp_path)
    for number in range(1, 10):
        run.step(number, **DRIFT if number > 5 else {})
    followed = course(tmp_path)
    assert followed.holding == ["drift"]
    for number in range(6, 20):
        run.step(number)
    followed.history.refresh()
    followed.follow()
    assert followed.step == 19
    assert followed.holding == []
    assert [one.last for one in course(tmp_path).diagnoses()] == []


def test_beside_a_run_only_what_a_window_needs_is_kept(tmp_path):
    run = Growing(tmp_path)
    for number in range(1, 41):
        run.rollouts(number - 1)
        run.step(number)
        run.checkup.look()
    kept = run.checkup._course.history.train
    assert {seen.version for seen in kept} == set(range(40 - SIZE - 1, 40))


def test_the_evaluation_after_the_last_step_is_looked_at(tmp_path, caplog):
    run = Growing(tmp_path)
    for number in range(1, 9):
        run.rollouts(number - 1)
        run.step(number, reward=0.1 * number)
        run.checkup.look()
    with MetricsWriter(run.rundir.metrics / "trainer.jsonl") as writer:
        for step, accuracy in ((0, 0.6), (8, 0.3)):
            interval = {"low": accuracy - 0.05, "high": accuracy + 0.05}
            writer.write({"kind": "exam", "step": step, "accuracy": accuracy, **interval})
    run.checkup.end()
    assert caplog.messages[0].startswith("reward up, accuracy down: held-out accuracy fell from 0.600 [0.550, 0.650]")


def test_a_resumed_run_is_looked_at_from_there(tmp_path, caplog):
    run = Growing(tmp_path)
    for number in range(1, 31):
        run.rollouts(number - 1)
        run.step(number, **DRIFT if number < 20 else {})
    resumed = Checkup(run.rundir, run.history.recipe, 29)
    with caplog.at_level(logging.INFO):
        resumed.look()
        resumed.end()
    assert min(seen.version for seen in resumed._course.history.train) == 30 - SIZE - 1
    assert caplog.messages == ["doctor: nothing wrong in steps 30 to 30"]


def test_the_command_shows_evidence_advice_and_completions(streams, capsys):
    assert main([str(streams / "truncation")]) == 1
    out = capsys.readouterr().out
    assert "truncation trap  (steps 3 to 8)" in out
    assert "sampling.max_tokens = 16" in out
    assert out.count("    answered  ") >= 3
    assert out.endswith("8 steps, 256 completions, 1 sampler\n")
    assert main([str(streams / "truncation"), "--json"]) == 1
    [first, *_] = json.loads(capsys.readouterr().out)
    assert first["rule"] == "truncation trap"
    assert len(first["examples"]) == 3


def test_a_healthy_run_says_what_was_looked_at(streams, capsys):
    assert main([str(streams / "healthy")]) == 0
    assert capsys.readouterr().out.endswith(": nothing wrong\n")


def test_text_of_a_model_commands_no_terminal(tmp_path, capsys):
    run = Growing(tmp_path)
    for number in range(1, 4):
        run.rollouts(number - 1, "\x1b[2J\u202e" + "go on \x07" * 40)
        run.step(number)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "repetition" in out
    assert not {character for character in out if ord(character) < 32} - {"\n"}
    assert main([str(tmp_path), "--json"]) == 1
    out = capsys.readouterr().out
    assert out.isascii() and "\\u202e" in out


def test_damaged_lines_are_counted_and_a_directory_without_a_run_is_refused(tmp_path, capsys):
    run = Growing(tmp_path)
    run.step(1)
    with (run.rundir.metrics / "trainer.jsonl").open("ab") as file:
        file.write(b"{\xff\n" + msgspec.json.encode({"kind": "step"}) + b"\n")
    for number, figures in ((2, {"step_time": None}), (3, {"reward": "much"})):
        run.step(number, **figures)
    with MetricsWriter(run.rundir.metrics / "trainer.jsonl") as writer:
        writer.write({"kind": "exam", "step": 3, "accuracy": 0.5})
    run.rollouts(0)
    file = run.rundir.rollouts / "a.jsonl"
    unrewarded = json.loads(file.read_text().splitlines()[0]) | {"rewards": {}}
    (run.rundir.rollouts / "b.jsonl").write_text('{"split": "train"}\n' + json.dumps(unrewarded) + "\n")
    assert main([str(tmp_path)]) == 0
    assert "1 step, 16 completions, 7 unreadable lines" in capsys.readouterr().out
    with pytest.raises(UserError):
        main([str(tmp_path / "nothing")])
