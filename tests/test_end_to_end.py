"""The two real workers, joined by ZeroMQ and a directory: vLLM and DeepSpeed with two ranks, as a user starts them.

The model is random and tiny; everything else is what a real run uses.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.local import run_local
from protocol.metrics import read_metrics
from protocol.process import group_alive
from protocol.snapshot import listed
from tests import warm
from tests.tiny import make_model
from tests.warm import Warm

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
RECIPE = """
name = "tiny"
seed = 3
[model]
path = "{model}"
dtype = "{dtype}"
[data]
train = "{train}"
eval = "{eval}"
limit = 60
eval_limit = 6
system = ""
max_prompt_tokens = 400
[sampling]
group_size = 4
max_tokens = 12
[[reward]]
function = "{rewards}:vowels"
options = {{ scale = 0.5, pause_s = {pause_s} }}
[eval]
temperature = 1.0
[objective]
kl_beta = 0.04
[optimizer]
learning_rate = 1e-3
warmup_steps = 0
[trainer]
gpus = 2
steps = 6
prompts_per_step = 4
tokens_per_micro_batch = 512
checkpoint_every = 2
gradient_checkpointing = false
threads = 1
[sampler]
reward_workers = 1
max_running = 32
compile = false
cpu_kv_cache_gb = 0.1
threads = 1
[network]
beat_s = 1.0
dead_s = 10.0
"""


PAUSE_S = 0.25
"""Between two groups of a run that must not be over before something was done to it: its 24 groups take six seconds."""


def make_recipe(
    directory: Path, dtype: str = "float32", data: str = "word-problems", extra: str = "", pause_s: float = 0.0
) -> Path:
    model = make_model(directory / "model")
    held_out = data if data.endswith(".jsonl") else "word-problems:test"
    rewards = Path(__file__).with_name("rewards_for_tests.py")
    text = RECIPE.format(model=model, dtype=dtype, train=data, eval=held_out, rewards=rewards, pause_s=pause_s)
    (directory / "tiny.toml").write_text(text + extra)
    return directory / "tiny.toml"


Process = subprocess.Popen | Warm


def start(*words: str, log: Path, cold: bool = False, python: str = sys.executable) -> Process:
    """Starts what stands after `python` on a command line. cold: with a new Python, which imports the libraries."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "VESPER_TEST": str(log.parent)}
    if cold or python != sys.executable:
        command = [python, *words]
        with log.open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    else:
        process = warm.start(words, environment, log)
    STARTED.append(process)
    return process


STARTED: list[Process] = []


@pytest.fixture(scope="module", autouse=True)
def nothing_stays():
    """Also after a failed test."""
    yield
    for process in STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def sampler(run: Path, recipe: Path | None = None, *more: str, cold: bool = False) -> Process:
    options = [*more, *(["--recipe", str(recipe)] if recipe else [])]
    return start("-m", "sampler", "--run", str(run), *options, log=run.with_suffix(".sampler.log"), cold=cold)


def deepspeed(run: Path, recipe: Path | None = None, cold: bool = False) -> Process:
    """Exactly the interface's command, `--local_rank` appended by the launcher itself."""
    program = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
    options = ["--recipe", str(recipe)] if recipe else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [program, "--num_gpus=2", "--master_port", port, "--module", "trainer"]
    return start(*words, "--run", str(run), *options, log=run.with_suffix(".trainer.log"), cold=cold)


def finished(process: Process, run: Path, timeout_s: float = 600) -> int:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        logs = [run.with_suffix(f".{name}.log").read_text()[-2000:] for name in ("trainer", "sampler")]
        pytest.fail("\n".join(logs))


def descendants_of(run: Path) -> list[str]:
    """Command lines of processes that were started for this run and are alive."""
    alive = []
    for pid in pids_of(run):
        with contextlib.suppress(psutil.Error):
            alive.append(" ".join(psutil.Process(pid).cmdline()))
    return alive


def engines(sampler: Process) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(sampler.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "EngineCore" in " ".join(child.cmdline()):
                found.append(child)
    return found


def pids_of(run: Path) -> list[int]:
    """By a word in the environment; vLLM's processes overwrite theirs with a title, but write into the run's logs."""
    alive = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = process.environ().get("VESPER_TEST") == str(run.parent)
            ours = ours or os.readlink(f"/proc/{process.pid}/fd/1").startswith(f"{run.parent}/")
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
    return alive


def steps(run: Path) -> list[dict]:
    return [record for record in read_metrics(run / "metrics" / "trainer.jsonl") if record["kind"] == "step"]


def exams(run: Path) -> list[dict]:
    return [record for record in read_metrics(run / "metrics" / "trainer.jsonl") if record["kind"] == "exam"]


def no_engine_left(run: Path) -> bool:
    deadline = time.monotonic() + 120
    while descendants_of(run) and time.monotonic() < deadline:
        time.sleep(0.5)
    return not descendants_of(run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One complete run of the two workers, started by the commands of the README. The sampler is started first."""
    directory = tmp_path_factory.mktemp("whole")
    recipe, run = make_recipe(directory), directory / "run"
    samples = sampler(run, recipe, cold=True)
    trains = deepspeed(run, recipe, cold=True)
    assert finished(trains, run) == 0, run.with_suffix(".trainer.log").read_text()[-3000:]
    assert finished(samples, run) == 0, run.with_suffix(".sampler.log").read_text()[-3000:]
    return run


def test_every_group_is_trained_once_and_in_order(whole):
    trained = [group_id for record in steps(whole) for group_id in record["groups"]]
    assert sorted(trained) == list(range(24))
    assert [record["step"] for record in steps(whole)] == [1, 2, 3, 4, 5, 6]
    assert all(record["groups/train/accepted"] >= 4 * record["step"] for record in steps(whole))


def test_sampler_and_trainer_compute_the_same_logprobs(whole):
    """float32 on both sides and the same snapshot: only the order of additions differs."""
    first = steps(whole)[0]
    assert first["staleness/max"] == 0
    assert first["sampling/sampling_logp_difference/mean"] < 1e-5
    assert first["sampling/sampling_logp_difference/max"] < 1e-3


def test_the_kl_to_the_reference_is_zero_before_the_first_update(whole):
    assert steps(whole)[0]["kl"] < 1e-6
    assert steps(whole)[-1]["kl"] > 1e-6


def test_staleness_stays_within_its_bound_and_weights_do_change_in_between(whole):
    assert all(record["staleness/max"] <= 1 for record in steps(whole))
    assert any(record["staleness/mean"] > 0 for record in steps(whole))


def test_held_out_prompts_are_answered_before_and_after(whole):
    before, after = exams(whole)
    assert (before["step"], after["step"], before["n"], after["n"]) == (0, 6, 6, 6)


def test_every_rollout_is_on_disk_with_its_text_and_versions(whole):
    rows = [row for file in (whole / "rollouts").glob("*.jsonl") for row in read_metrics(file)]
    trained = {group_id for record in steps(whole) for group_id in record["groups"]}
    assert {row["group"] for row in rows if row["split"] == "train"} >= trained
    assert all(row["completion"] is not None and row["snapshots"] for row in rows)
    assert {row["finish"] for row in rows} <= {"stop", "length"}


def test_the_last_snapshot_is_a_model_that_transformers_loads(whole):
    model = AutoModelForCausalLM.from_pretrained(listed(whole / "snapshots")[-1])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_snapshots_are_pruned_and_nothing_half_written_is_left(whole):
    assert 1 <= len(listed(whole / "snapshots")) <= 4
    assert not [path for path in whole.rglob(".tmp-*")]


def test_no_process_is_left(whole):
    assert no_engine_left(whole)


def test_a_process_that_stays_would_be_seen(tmp_path):
    process = start("-c", "import time; time.sleep(30)", log=tmp_path / "log", cold=True)
    deadline = time.monotonic() + 60  # its environment can be read a moment after it has started
    while not (seen := descendants_of(tmp_path / "run")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert seen == [f"{sys.executable} -c import time; time.sleep(30)"]


def test_starting_a_complete_run_again_does_nothing_and_succeeds(whole):
    before = len(steps(whole))
    assert finished(deepspeed(whole), whole, 120) == 0
    assert len(steps(whole)) == before


@pytest.mark.long
@pytest.mark.fault("B4")
def test_a_dead_engine_ends_its_sampler_which_says_so_and_a_new_one_takes_over(tmp_path):
    recipe, run = make_recipe(tmp_path, pause_s=PAUSE_S), tmp_path / "run"
    samples, trains = sampler(run, recipe), deepspeed(run, recipe)
    wait_for(lambda: engines(samples), trains, run)  # now, because soon after its first step the run is over
    [engine] = engines(samples)
    assert engine.pid in pids_of(run), "the check for leftovers would not see it"
    wait_for(lambda: len(steps(run)) >= 1, trains, run)
    engine.kill()
    assert samples.wait(200) == 71, run.with_suffix(".sampler.log").read_text()[-2000:]
    said = (run / "FAILED.md").read_text()
    assert said.startswith("# sampler engine 0 on ") and "vLLM died" in said
    second = sampler(run)
    assert finished(trains, run) == 0
    assert finished(second, run) == 0
    assert audit(run) == list(range(24))
    assert not (run / "FAILED.md").exists()
    assert no_engine_left(run)


def test_a_killed_trainer_resumes_while_its_sampler_stays(tmp_path):
    """kill -9 of all ranks in mid-run: nothing is lost, nothing trained twice, and the sampler is not restarted."""
    recipe, run = make_recipe(tmp_path, pause_s=PAUSE_S), tmp_path / "run"
    samples, trains = sampler(run, recipe), deepspeed(run, recipe)
    wait_for(lambda: len(steps(run)) >= 3, trains, run)
    assert {samples.pid, trains.pid} <= set(pids_of(run)), "the check for leftovers would not see them"
    os.killpg(trains.pid, signal.SIGKILL)
    trains.wait()
    assert finished(deepspeed(run), run) == 0
    assert finished(samples, run) == 0
    assert audit(run) == list(range(24))
    assert no_engine_left(run)


@pytest.mark.fault("B5")
def test_sigterm_saves_and_a_killed_sampler_is_replaced_without_loss(tmp_path):
    recipe, run = make_recipe(tmp_path, pause_s=PAUSE_S), tmp_path / "run"
    first, trains = sampler(run, recipe), deepspeed(run, recipe)
    wait_for(lambda: len(steps(run)) >= 1, trains, run)
    os.killpg(first.pid, signal.SIGKILL)  # the supervisor; its engine must go with it
    os.killpg(trains.pid, signal.SIGTERM)
    deadline = time.monotonic() + 200
    while group_alive(trains) and time.monotonic() < deadline:  # the launcher is gone at once, its ranks still save
        time.sleep(0.1)
    saved = [path.name for path in listed(run / "checkpoints")]
    assert saved, run.with_suffix(".trainer.log").read_text()[-2000:]
    done = len(steps(run))
    assert int(saved[-1][1:9]) == done, "a stop loses no step"
    second, trains = sampler(run), deepspeed(run)
    assert finished(trains, run) == 0
    assert finished(second, run) == 0
    assert audit(run) == list(range(24))
    assert no_engine_left(run)


@pytest.mark.fault("N1")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_in_the_first_seconds_ends_the_trainer_and_all_that_it_started(tmp_path, number):
    """Before DeepSpeed's launcher has started a rank there is nobody to tell; the ranks that come later must know."""
    recipe, run = make_recipe(tmp_path), tmp_path / "run"
    words = ["-m", "trainer", "--run", str(run), "--recipe", str(recipe)]
    trainer = start(*words, log=run.with_suffix(".trainer.log"), cold=True)  # a warm one has no command line
    wait_for(lambda: any("deepspeed.launcher" in line for line in descendants_of(run)), trainer, run)
    trainer.send_signal(number)
    code = trainer.wait(300)
    assert code in ((0, 143) if number == signal.SIGTERM else (-number,)), code
    deadline = time.monotonic() + 120
    while descendants_of(run) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not descendants_of(run)
    assert not (run / "FAILED.md").exists()


@pytest.mark.long
def test_gsm8k_with_adapters_in_bfloat16(tmp_path):
    """Real problems, LoRA, ZeRO 2, two engines: adapters reach vLLM, the base model is the reference.

    And evaluation beside training with several samples, groups without signal replaced, stop texts, another objective.
    """
    if not GSM8K.exists():
        pytest.skip("GSM8K is not at hand (../shared/data/gsm8k/train.jsonl)")
    extra = "[lora]\nrank = 8\nalpha = 16\n"
    recipe, run = make_recipe(tmp_path, "bfloat16", str(GSM8K), extra), tmp_path / "run"
    text = recipe.read_text().replace("max_prompt_tokens = 400", "max_prompt_tokens = 900")
    text = text.replace("[trainer]", "[trainer]\nzero_stage = 2\nrefill = 2.0")
    text = text.replace("[eval]", "[eval]\nevery = 2\nsamples = 2").replace(
        "[sampling]", '[sampling]\nstop_after = ["e"]'
    )
    recipe.write_text(text.replace("[objective]", '[objective]\nname = "grpo"\ndual_clip = 3.0'))
    samples, trains = sampler(run, recipe, "--gpus", "2"), deepspeed(run, recipe)
    assert finished(trains, run) == 0, run.with_suffix(".trainer.log").read_text()[-3000:]
    assert finished(samples, run) == 0, run.with_suffix(".sampler.log").read_text()[-3000:]
    assert "sampler: 2 engines (CPU processes)" in run.with_suffix(".sampler.log").read_text()
    assert steps(run)[0]["kl"] == 0.0
    assert steps(run)[-1]["kl"] > 0.0
    assert all(record["sampling/sampling_logp_difference/mean"] < 0.1 for record in steps(run))
    assert (listed(run / "snapshots")[-1] / "adapter_model.safetensors").exists()
    assert [exam["step"] for exam in exams(run)] == [0, 2, 4, 6] and {"pass@2", "maj@2"} <= exams(run)[-1].keys()
    assert (run / "best").resolve() in listed(run / "snapshots")
    last = steps(run)[-1]
    assert last["groups/train/accepted"] >= 24 and last["groups/train/no_signal"] > 0
    texts = [row["completion"] for file in (run / "rollouts").glob("*.jsonl") for row in read_metrics(file)]
    assert any(text.endswith("e") for text in texts) and not any("e" in text[:-1] for text in texts)
    rows = json.loads((run / "metrics" / "prompts.json").read_text())
    assert sum(map(len, rows.values())) >= 24


@pytest.mark.long
def test_the_launcher_runs_a_recipe_from_start_to_summary(tmp_path, capsys, monkeypatch):
    """Here with demonstrations: they come in as groups of one through the same two workers, and are learned."""
    monkeypatch.setenv("VESPER_TEST", str(tmp_path))
    recipe, run = make_recipe(tmp_path), tmp_path / "run"
    text = recipe.read_text().replace("group_size = 4\nmax_tokens = 12", "group_size = 1\nmax_tokens = 40")
    text = text.replace("max_prompt_tokens = 400", 'max_prompt_tokens = 400\ndemonstration = "{answer}"')
    recipe.write_text(text.replace("kl_beta = 0.04", 'kl_beta = 0.0\nname = "sft"'))
    code = run_local(recipe, run, [], fresh=False)
    before, after = exams(run)
    assert steps(run)[-1]["loss"] < steps(run)[0]["loss"] - 0.5  # nats a token
    out = capsys.readouterr().out.strip().splitlines()
    assert code == (0 if after["accuracy"] > before["accuracy"] else 1)
    assert out[-1].startswith("tiny: held-out accuracy ") and ", 6 steps, " in out[-1]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert no_engine_left(run)


@pytest.mark.long
def test_ctrl_c_once_saves_ends_everything_and_the_same_command_goes_on(tmp_path):
    recipe, run = make_recipe(tmp_path, pause_s=PAUSE_S), tmp_path / "run"
    command = ["-m", "launch", str(recipe), "--run", str(run)]
    first = start(*command, log=tmp_path / "launch.log")
    wait_for(lambda: len(steps(run)) >= 1, first, run)
    first.send_signal(signal.SIGINT)  # the terminal's own; workers live in sessions of their own
    assert first.wait(300) == 130
    assert no_engine_left(run)
    done = len(steps(run))
    assert int(listed(run / "checkpoints")[-1].name[1:9]) == done
    assert start(*command, log=tmp_path / "launch.log").wait(600) in (0, 1)
    assert audit(run) == list(range(24))
    assert no_engine_left(run)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.path=/no/such/model", "is no directory"),
        ('data.train="/no/such.jsonl"', "cannot read the data set"),
        ('reward=[{function="/no/such.py:reward"}]', "/no/such.py"),
        ('reward=[{function="gsm8k", options={corect=1.0}}]', "corect"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_engine_starts(tmp_path, override, says):
    recipe, run = make_recipe(tmp_path), tmp_path / "run"
    command = ["-m", "sampler", "--run", str(run), "--recipe", str(recipe), "--set", override]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = warm.run(command, environment)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and says in errors[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "EngineCore" not in done.stdout + done.stderr


def audit(run: Path) -> list[int]:
    """Ids trained in the history that leads to the end: the last record of a step is the one that counts."""
    history = {record["step"]: record["groups"] for record in steps(run)}
    assert sorted(history) == [1, 2, 3, 4, 5, 6]
    state = json.loads((listed(run / "checkpoints")[-1] / "state.json").read_text())["inbox"]["ledger"]
    trained = sorted(group_id for groups in history.values() for group_id in groups)
    assert state["done_below"] + len(state["done_above"]) == len(trained)
    return trained


def wait_for(condition, process: Process, run: Path) -> None:
    """Until the condition holds; fails with the logs when the process ends before."""
    deadline = time.monotonic() + 400
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            logs = [*run.parent.glob("*.log"), *run.glob("logs/*.log")]
            pytest.fail("\n".join(log.read_text()[-2000:] for log in logs))
        time.sleep(0.1)
