"""A real Slurm on this machine: munged, slurmctld and one slurmd a made-up node, in a directory of their own.

Each node has an address of its own (127.0.0.11, ...), so what binds to one address is not reached by another one's.
No systemd, no cgroups, no accounting; times are short, so that a test takes seconds.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from protocol.process import end, start

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONF = """\
ClusterName=vesper
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={here}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool-%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait={kill_wait_s}
OverTimeLimit=0
MinJobAge=600
CompleteWait=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    absent = [name for name in DAEMONS if not shutil.which(name)]
    if absent:
        return f"no {absent[0]}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd must be root to start jobs"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class SlurmCluster:
    """Use with `with`: whatever happens, no daemon and no job is left."""

    def __init__(self, directory: Path, *, nodes: int = 3, kill_wait_s: int = 20) -> None:
        self.here = directory
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        lines = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.{11 + at} Port={free_port()} "
            f"CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"
            for at, name in enumerate(self.nodes)
        ]
        (directory / "state").mkdir(parents=True)
        self.conf = directory / "slurm.conf"
        more = {"host": socket.gethostname(), "port": free_port(), "nodes": "\n".join(lines)}
        self.conf.write_text(CONF.format(here=directory, kill_wait_s=kill_wait_s, **more))
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.environment = {"SLURM_CONF": str(self.conf)}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        key = self.here / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}-file={self.here}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.here}/munge.socket", *munge)
        self.until(lambda: (self.here / "munge.socket").exists(), 20)
        self._daemon("slurmctld", "-D")
        for name in self.nodes:
            self._daemon("slurmd", "-D", "-N", name)
        self.until(lambda: self.tell("sinfo", "-h", "-o", "%D", "-t", "idle").strip() == str(len(self.nodes)), 60)

    def _daemon(self, *command: str) -> None:
        with (self.here / f"{command[0]}.log").open("ab") as log:
            self._daemons.append(start(command, log=log, environment=self.environment))

    def tell(self, *command: str) -> str:
        """What a Slurm command prints; "" where it fails."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`, by field."""
        words = self.tell("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number).get("JobState", "")

    def until(self, true: Callable[[], bool], timeout_s: float, why: Callable[[], str] = lambda: "") -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s; {why()}"
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """All that jobs have started and that is still alive."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("SLURM_CONF") == str(self.conf) and "SLURM_JOB_ID" in process.environ()
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for daemon in reversed(self._daemons):
            end(daemon, 10.0)
