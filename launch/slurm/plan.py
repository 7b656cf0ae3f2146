"""What the jobs of a run on Slurm ask for, and the files that say so."""

import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from protocol.errors import UserError

FILES = {"node": ("node",), "nodes": ("nodes",), "array": ("trainer", "samplers")}
"""Of each shape, in the order in which they are submitted."""
PLAIN = re.compile(r"[A-Za-z0-9/._+=@,-]+")
"""What Slurm and a shell take literally: no space, no `%`, no quotes."""
OURS = {"--array", "--job-name", "--chdir", "--output", "--open-mode", "--signal", "--nodes"}
"""Options of sbatch that the rest of a file relies on."""
TIME = re.compile(r"\d+|\d+(:\d\d){1,2}|\d+-\d+(:\d\d){0,2}")


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
        for line in (*self.setup, *self.sbatch):
            if not line.isprintable() or not line.strip():
                raise UserError(f"{line!r}: expected one line of text; repeat the flag for more")
        if wrong := [line for line in self.sbatch if not line.startswith("-")]:
            raise UserError(f"--sbatch {wrong[0]!r}: expected an option of sbatch, as in --sbatch=--qos=high")
        for line in self.sbatch:
            if (name := re.split("[= ]", line)[0]) in OURS:
                raise UserError(
                    f"--sbatch={line}: `launch slurm` writes {name} itself; use --dry-run and edit the file"
                )

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def trainer_job(self) -> str:
        return f"vesper-{self.name}"

    @property
    def samplers_job(self) -> str:
        return f"vesper-{self.name}-samplers"

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
            gpus = min(self.gpus_per_node, self.engine_gpus) if samplers else self.gpus_per_node
            template = environment.get_template(f"{name}.sbatch.j2")
            text = template.render(plan=self, file=path, job=self.job(name), gpus=gpus, partition=partition)
            found[path] = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
        return found
