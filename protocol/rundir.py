"""The run directory: where everything lies. It is all that two machines of one run need to share.

recipe.toml  endpoint.json  keys/  incarnations/  snapshots/  checkpoints/  best -> snapshots/...
metrics/{trainer,sampler-*}.jsonl  rollouts/*.jsonl  stream/  evals/*.json  logs/  quarantine/  trackers/
report.html  FAILED.md
"""

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from protocol.disk import is_listed, names_in, write_atomic
from protocol.errors import StorageError, Superseded, UserError
from protocol.recipe import Recipe
from protocol.resolve import dump, load


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where the trainer listens. Example: Endpoint(address="tcp://127.0.0.1:41873", incarnation=2, host="node3")"""

    address: str
    incarnation: int
    host: str
    steps: int = 0
    """Optimizer steps after which the run is complete; 0 while it is not."""


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def stream(self) -> Path:
        """The groups of every step, for a replay."""
        return self.path / "stream"

    @property
    def evals(self) -> Path:
        """One file for each evaluation, named by its snapshot."""
        return self.path / "evals"

    @property
    def best(self) -> Path:
        """A link to the snapshot with the best held-out accuracy."""
        return self.path / "best"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    def make(self) -> None:
        """Creates what is missing. Raises StorageError where that is not allowed."""
        try:
            for name in ("snapshots", "checkpoints", "metrics", "rollouts", "stream", "evals", "logs", "incarnations"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the run directory {self.path}: {error.strerror}") from None

    def write_endpoint(self, endpoint: Endpoint) -> None:
        write_atomic(self.path / "endpoint.json", msgspec.json.encode(endpoint))

    def read_endpoint(self) -> Endpoint | None:
        """None until a trainer listens."""
        if not is_listed(self.path / "endpoint.json"):
            return None
        try:
            return msgspec.json.decode((self.path / "endpoint.json").read_bytes(), type=Endpoint)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def is_complete(self, steps: int) -> bool:
        """Whether a trainer has finished this many steps here; asked for more, it goes on."""
        endpoint = self.read_endpoint()
        return endpoint is not None and endpoint.steps >= steps

    def claim_incarnation(self) -> int:
        """The next number, ours alone: every trainer start in this directory gets another one."""
        number = self.newest_incarnation() + 1
        while True:
            try:
                descriptor = os.open(self.path / "incarnations" / str(number), os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                number += 1
                continue
            except OSError as error:
                raise StorageError(f"cannot claim {self.path}/incarnations/{number}: {error.strerror}") from error
            os.close(descriptor)
            return number

    def newest_incarnation(self) -> int:
        return max((int(name) for name in names_in(self.path / "incarnations") if name.isdigit()), default=0)

    def refuse_if_superseded(self, incarnation: int) -> None:
        """Called before every write of weights. Raises Superseded when a newer trainer owns the run."""
        newest = self.newest_incarnation()
        if newest > incarnation:
            raise Superseded(f"trainer incarnation {newest} took over {self.path}; this is {incarnation}: ending")


def resolve_recipe(
    run: Path | None, recipe: Path | None, overrides: list[str], keep: bool = True
) -> tuple[RunDir, Recipe]:
    """What `--run`, `--recipe` and `--set` mean together; the resolved recipe is kept in the run directory.

    A run that has a recipe keeps what its history hangs on: another one is refused, with the difference named. The
    other settings may change; the one who starts the run writes them (keep), one who joins it does not.
    """
    kept = run / "recipe.toml" if run else None
    if run and kept and run.is_dir() and is_listed(kept):
        previous = load(kept)
        if not recipe and not overrides:
            return RunDir(run), previous
        wanted = load(recipe or kept, overrides, previous.model.dtype)
        _refuse_if_different(run, previous, wanted)
        if keep:
            write_atomic(kept, dump(wanted).encode())
        return RunDir(run), wanted
    resolved = load(recipe, overrides)
    rundir = RunDir(run or Path("runs") / resolved.name)
    rundir.make()
    if is_listed(rundir.recipe):  # of a run without --run, or of one that this machine did not see before
        return resolve_recipe(rundir.path, recipe, overrides, keep)
    write_atomic(rundir.recipe, dump(resolved).encode())
    return rundir, load(rundir.recipe)  # another process may have begun it at the same time


LINEAGE = ("seed", "model", "lora", "data", "sampling", "reward")
"""Tables that the history of a run hangs on; the others may change on resume."""


def _refuse_if_different(run: Path | None, previous: Recipe, wanted: Recipe) -> None:
    for table in LINEAGE:
        if getattr(previous, table) != getattr(wanted, table):
            raise UserError(
                f"{run} was started with another [{table}]: {getattr(previous, table)} there, "
                f"{getattr(wanted, table)} now; use the run's own recipe or another --run directory"
            )
