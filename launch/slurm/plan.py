"""What the jobs of a run on Slurm ask for, and the files that say so."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from protocol.errors import UserError

FILES = {"node": ("node",), "nodes": ("nodes",), "array": ("trainer", "samplers")}
"""Of each shape, in the order in which they are submitted."""
PLAIN = re.compile(r"[A-Za-z0-9/._+=@,-]+")
"""What Slurm and a shell take literally: no space, no `%`, no quotes."""
OURS = ("--array", "--job-name", "--chdir", "--output", "--open-mode", "--signal", "--nodes", "--ntasks",
        "--ntasks-per-node", "--cpus-per-task", "--time")  # fmt: skip
"""Options of sbatch that the rest of a file relies on."""
SHORT = {"-a", "-J", "-D", "-o", "-N", "-n", "-c", "-t"}
"""The same options in one letter; a value may follow without a space, as in -N4."""
TIME = re.compile(r"\d+|\d+(:\d\d){1,2}|\d+-\d+(:\d\d){0,2}")
LONGEST_WARNING_S = 65535
"""Slurm keeps it in 16 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that the templates know. Raises UserError for what Slurm or a shell would read in another way."""

    shape: str
    run: Path
    """Absolute, like `directory` and `python`."""
    directory: Path
    """Where the jobs start: relative paths of a recipe begin there."""
    python: Path
    ranks: int
    """Of the trainer on each of its nodes."""
    engine_gpus: int
    """Of one sampler in an array."""
    bind: str = ""
    """The trainer's address; "" finds it when the job runs."""
    trainer_nodes: int = 1
    sampler_nodes: int = 1
    samplers: int = 2
    gpus_per_node: int = 0
    cpus_per_node: int = 0
    """0: all of a node."""
    time: str = ""
    partition: str = ""
    sampler_partition: str = ""
    """Of an array's samplers; "": the same."""
    account: str = ""
    warning_s: int = 300
    restarts: int = 20
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("run", "directory", "python", "partition", "sampler_partition", "account", "bind"):
            text = str(getattr(self, name))
            if text and not PLAIN.fullmatch(text):
                raise UserError(f"{name} {text!r}: Slurm takes letters, digits and /._+=@,- there; choose another one")
        if self.time and not TIME.fullmatch(self.time):
            raise UserError(f"--time {self.time}: expected minutes, HH:MM:SS or D-HH, as in --time 24:00:00")
        for name in ("trainer_nodes", "sampler_nodes", "samplers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")
        for name in ("gpus_per_node", "cpus_per_node", "warning_s", "restarts"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.removesuffix('_s').replace('_', '-')} cannot be below 0")
        self._check_resources()
        self._check_lines()

    def _check_resources(self) -> None:
        if self.warning_s > LONGEST_WARNING_S:
            raise UserError(f"--warning {self.warning_s}: Slurm takes at most {LONGEST_WARNING_S} seconds")
        if self.time and 0 < (limit_s := seconds(self.time)) <= self.warning_s:
            raise UserError(f"--warning {self.warning_s}: expected less than --time {self.time}, which is {limit_s} s")
        if self.part_of_node and not self.cpus_per_node:
            raise UserError(
                f"a sampler asks for {self.engine_gpus} of a node's {self.gpus_per_node} GPUs, so not for the whole "
                "node: say with --cpus-per-node N how many CPUs a node has; each sampler gets as large a part of them"
            )
        if self.trainer_nodes > 1 and 0 < self.cpus_per_node < self.ranks:
            raise UserError(f"--cpus-per-node {self.cpus_per_node}: expected {self.ranks} or more, one for each rank")

    def _check_lines(self) -> None:
        for line in (*self.setup, *self.sbatch):
            if not line.isprintable() or not line.strip():
                raise UserError(f"{line!r}: expected one line of text; repeat the flag for more")
        if wrong := [line for line in self.sbatch if not line.startswith("-")]:
            raise UserError(f"--sbatch {wrong[0]!r}: expected an option of sbatch, as in --sbatch=--qos=high")
        for line in self.sbatch:
            if ours := [word for word in line.split() if is_ours(word)]:
                raise UserError(
                    f"--sbatch={line}: `launch slurm` writes {ours[0].partition('=')[0]} itself; take its own flag, or "
                    "use --dry-run and edit the file"
                )

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def part_of_node(self) -> bool:
        """Whether a sampler of an array asks for fewer GPUs than a node has."""
        return self.shape == "array" and self.engine_gpus < self.gpus_per_node

    @property
    def trainer_job(self) -> str:
        """The path's hash tells runs of the same name in other directories apart."""
        return f"vesper-{self.name}-{hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:6]}"

    @property
    def samplers_job(self) -> str:
        return f"{self.trainer_job}-samplers"

    def job(self, file: str) -> str:
        """Its name in Slurm's queue."""
        return self.samplers_job if file == "samplers" else self.trainer_job

    def render(self, directory: Path) -> dict[Path, str]:
        """The text of each sbatch file, by its path in `directory`."""
        environment = Environment(
            loader=PackageLoader("launch.slurm"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        found = {}
        for name in FILES[self.shape]:
            path = directory / f"{name}.sbatch"
            samplers = name == "samplers"
            partition = (samplers and self.sampler_partition) or self.partition
            gpus, cpus = self.gpus_per_node, self.cpus_per_node
            if samplers and self.part_of_node:
                gpus, cpus = self.engine_gpus, max(1, cpus * self.engine_gpus // gpus)
            template = environment.get_template(f"{name}.sbatch.j2")
            text = template.render(plan=self, file=path, job=self.job(name), gpus=gpus, cpus=cpus, partition=partition)
            found[path] = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
        return found


def is_ours(word: str) -> bool:
    """Of an option for sbatch, which also takes the beginning of a long name."""
    name = word.partition("=")[0]
    if name.startswith("--"):
        return len(name) > 2 and any(ours.startswith(name) for ours in OURS)
    return name[:2] in SHORT


def seconds(time: str) -> int:
    """Of a limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. 0: none."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:  # it begins with minutes, else with hours
        parts = [0, *parts]
    hours, minutes, last = [*parts, 0, 0][:3]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + last
