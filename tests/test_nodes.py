"""The trainer on two nodes, as each launcher starts it, with a sampler on a third: real processes, a toy policy.

Nodes are network namespaces where that is allowed, so that each has an address and a name of its own.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.metrics import read_metrics
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from protocol.snapshot import listed
from tests.chaos.cluster import SETTINGS
from tests.nodes.network import Node, end_all, living, network, wait_for
from tests.tiny import make_model

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 500
"""More than there are before a signal comes."""
GONE_S = 60.0
"""For all ranks of all nodes to have ended after one was killed."""


@pytest.fixture(scope="module")
def nodes():
    """Two for the trainer and one for a sampler."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("no `ip` or `unshare` here: nodes cannot be set apart")
    try:
        with network(3) as found:
            yield found
    except OSError as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("nodes"))


class Run:
    """A run directory, its log files, and the processes of all nodes; none is left at the end."""

    def __init__(self, directory: Path, model: Path, nodes: list[Node], **settings: object) -> None:
        self.nodes, self.directory, self.processes = nodes, directory, []
        reward = Path(__file__).parent / "rewards_for_tests.py"
        overrides = [
            *SETTINGS,
            f"model.path={model}",
            f"trainer.steps={STEPS}",
            "trainer.checkpoint_every=1000",
            "trainer.zero_stage=0",
            "eval.every=0",
            "eval.before=false",
            "eval.after=false",
        ]
        overrides += [f"reward=[{{function='{reward}:vowels'}}]", f"network.bind={nodes[0].address}"]
        overrides += [f"{name}={value}" for name, value in settings.items()]
        self.rundir = RunDir(directory / "run")
        self.rundir.make()
        self.rundir.recipe.write_text(dump(load(None, overrides)))
        self.port = 20_000
        (directory / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")

    def deepspeed(self, number: int, *flags: str) -> subprocess.Popen:
        command = ["deepspeed.launcher.runner", "--hostfile", str(self.directory / "hosts"), "--no_ssh"]
        command += ["--node_rank", str(number), "--master_addr", self.nodes[0].address]
        command += ["--master_port", str(self.port), "--module", "tests.nodes.trainer"]
        return self._start(number, [*command, "--run", str(self.rundir.path), *flags])

    def torchrun(self, number: int, *flags: str) -> subprocess.Popen:
        command = ["torch.distributed.run", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        command += ["--master-addr", self.nodes[0].address, "--master-port", str(self.port)]
        return self._start(
            number, [*command, "-m", "--", "tests.nodes.trainer", "--run", str(self.rundir.path), *flags]
        )

    def srun(self, number: int, *flags: str) -> subprocess.Popen:
        """The environment that Slurm gives to a task; tests/test_slurm.py has a real one."""
        job = {"SLURM_JOB_ID": str(self.port - 20_000), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        task = {"SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_GTIDS": str(number)}
        task |= {"SLURM_STEP_NODELIST": "node[1-2]", "MASTER_ADDR": self.nodes[0].address}
        return self._start(number, ["tests.nodes.trainer", "--run", str(self.rundir.path), *flags], **job, **task)

    def alone(self, number: int) -> subprocess.Popen:
        return self._start(number, ["torch.distributed.run", "--nproc-per-node", "1", "--master-port", str(self.port),
                                    "-m", "--", "tests.nodes.trainer", "--run", str(self.rundir.path)])  # fmt: skip

    def sampler(self, number: int) -> subprocess.Popen:
        return self._start(number, ["tests.nodes.sampler", str(self.rundir.path)])

    def log(self, number: int) -> Path:
        return self.directory / f"node{number + 1}.log"

    def said(self, number: int) -> str:
        return self.log(number).read_text(errors="replace") if self.log(number).exists() else ""

    def _start(self, number: int, command: list[str], **environment: str) -> subprocess.Popen:
        process = self.nodes[number].start(command, self.log(number), **environment)
        self.processes.append(process)
        return process

    def wait(self, what: Callable[[], object], seconds: float = 300.0) -> object:
        return wait_for(what, seconds, *[self.log(number) for number in range(3)])

    def steps(self) -> int:
        return len([one for one in read_metrics(self.rundir.metrics / "trainer.jsonl") if one["kind"] == "step"])

    def trained(self) -> list[int]:
        """Ids of the groups of all steps."""
        records = read_metrics(self.rundir.metrics / "trainer.jsonl")
        return [group for one in records if one["kind"] == "step" for group in one["groups"]]

    def ranks(self) -> list[int]:
        """Living ranks, whoever their parents are: DeepSpeed's launcher leaves its own."""
        return [one.pid for one in living(str(self.rundir.path)) if "tests.nodes.trainer" in one.cmdline()[:4]]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        end_all(self.processes, str(self.rundir.path))


def all_over(processes: list[subprocess.Popen]) -> bool:
    return all(process.poll() is not None for process in processes)


@pytest.mark.parametrize(
    "launcher", ["deepspeed", *(pytest.param(name, marks=pytest.mark.long) for name in ("torchrun", "srun"))]
)
def test_a_signal_to_one_nodes_launcher_ends_all_resumably(nodes, model, tmp_path, launcher):
    """A third node samples. What two nodes have saved goes on on one."""
    with Run(tmp_path, model, nodes) as run:
        start = getattr(run, launcher)
        trainers = [start(0), start(1)]
        sampler = run.sampler(2)
        run.wait(lambda: run.steps() >= 2)
        assert "2 ranks on 2 nodes: node1 (0), node2 (1)" in run.said(0)
        trainers[1].send_signal(signal.SIGTERM)
        run.wait(lambda: not run.ranks())  # torchrun's agent waits five minutes more for the one that was stopped
        assert "stopped, resumable" in run.said(0) and "stopped, resumable" in run.said(1)
        assert not (run.rundir.path / "FAILED.md").exists()
        done = run.steps()
        assert listed(run.rundir.checkpoints)[-1].name == f"c{done:08d}.i0001" and done < STEPS
        if launcher != "torchrun":
            return
        recipe = load(run.rundir.recipe, [f"network.bind={nodes[1].address}", f"trainer.steps={done + 2}"])
        run.rundir.recipe.write_text(dump(recipe))
        trainer = run.alone(1)
        run.wait(lambda: all_over([trainer, sampler]))
        assert run.steps() == done + 2 and (trainer.returncode, sampler.returncode) == (0, 0)
        assert len(set(run.trained())) == len(run.trained()) == 4 * run.steps()


def test_a_killed_rank_ends_those_of_the_other_node_and_is_named(nodes, model, tmp_path):
    with Run(tmp_path, model, nodes) as run:
        ranks = [run.srun(0), run.srun(1)]
        run.wait(lambda: "listening on" in run.said(0))
        ranks[1].kill()
        killed = time.monotonic()
        run.wait(lambda: all_over(ranks), GONE_S)
        assert ranks[0].returncode == 1 and time.monotonic() - killed < GONE_S
        failed = (run.rundir.path / "FAILED.md").read_text()
        assert failed.startswith("# trainer rank 0 failed first")
        assert f"rank 1 on node2 ({nodes[1].address}) is gone" in failed


def meet(nodes: list[Node], log: Path, come_s: int = 60, **environment: str) -> list[tuple[int, str]]:
    """Exit code and words of one rank on each node."""
    place = {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": "20001", "WORLD_SIZE": "2"}
    place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    logs = [log.with_name(f"{log.name}{number}") for number in range(len(nodes))]
    ranks = [
        node.start(["tests.nodes.meeting", str(come_s), "5"], logs[rank], RANK=str(rank), **place, **environment)
        for rank, node in enumerate(nodes)
    ]
    try:
        return [(rank.wait(300), file.read_text()) for rank, file in zip(ranks, logs, strict=True)]
    finally:
        end_all(ranks, str(log))


def test_an_interface_that_the_other_node_does_not_reach_is_named(nodes, tmp_path):
    """Without an interface gloo takes the host name's address, here the loopback; `lo` is asked for all the same."""
    unset = meet(nodes[:2], tmp_path / "unset", GLOO_SOCKET_IFNAME="127.0.0.1")
    wrong = meet(nodes[:2], tmp_path / "wrong", GLOO_SOCKET_IFNAME="lo")
    for code, said in unset + wrong:
        assert code == 2 and "set GLOO_SOCKET_IFNAME, and on GPUs NCCL_SOCKET_IFNAME" in said, said
        assert f"(reaches rank 0 from {nodes[1].address})" in said
    assert "node2 127.0.0.1" in unset[0][1] and "node2 lo" in wrong[0][1]


def test_ranks_that_do_not_come_are_not_waited_for_without_end(nodes, tmp_path):
    [(code, said)] = meet(nodes[:1], tmp_path / "first", come_s=10)
    assert code == 1 and "for up to 10 s" in said and "not all of 2 ranks came" in said, said
