"""TensorBoard, W&B and trackio, each behind the same three methods; `protocol/mirror.py` feeds them.

Their libraries are imported only when a tracker is made. Everything that they write lies in the run directory.
"""

import importlib.util
import logging
import math
import os
from pathlib import Path
from typing import Protocol

import msgspec

from protocol.errors import UserError
from protocol.recipe import Recipe, Tracking

log = logging.getLogger(__name__)

NOT_VALUES = {"step", "time_s"}


class Tracker(Protocol):
    def log(self, record: dict, values: dict[str, float]) -> None:
        """values: `scalars` of the record."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


def refuse_missing(settings: Tracking) -> None:
    """Raises UserError for a tracker that is asked for and not installed."""
    for name in settings.mirrors:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # W&B leaves directories called `wandb` behind, which look like it
            raise UserError(
                f"tracking.mirrors asks for {name}, which is not installed: pip install '.[{name}]', or remove it there"
            )


def scalars(record: dict) -> dict[str, float]:
    """What of a record is shown as a curve: its finite numbers, under their names. {} for one of another kind.

    Those of an exam get eval/ in front, because a step has an `accuracy` and a `reward` too.
    """
    prefix = {"step": "", "exam": "eval/"}.get(record["kind"])
    if prefix is None:
        return {}
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return {
        prefix + name: float(value)
        for name, value in numbers.items()
        if name not in NOT_VALUES and math.isfinite(value) and not isinstance(value, bool)
    }


def make(name: str, directory: Path, recipe: Recipe, tracked_as: str) -> Tracker:
    """tracked_as: the id of the tracker's run; the same one continues it. What the library raises is passed on."""
    kinds: dict[str, type[TensorBoard] | type[WandB] | type[Trackio]]
    kinds = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
    directory.mkdir(parents=True, exist_ok=True)
    return kinds[name](directory, recipe, tracked_as)


class TensorBoard:
    """Event files; every start adds one to the same directory, which is one run."""

    def __init__(self, directory: Path, recipe: Recipe, tracked_as: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events, self._summaries = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(directory))
        self._newest = 2**62  # the first step after a restart may be one that was done before

    def log(self, record: dict, values: dict[str, float]) -> None:
        step, time_s = record["step"], record["time_s"]
        if record["kind"] == "step":
            if step <= self._newest:  # done again after a restart: readers drop what they have from this step on
                start = self._events.SessionLog(status=self._events.SessionLog.START)
                self._writer.add_event(self._events.Event(wall_time=time_s, step=step, session_log=start))
            self._newest = step
        entries = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summaries.Summary(value=entries)
        self._writer.add_event(self._events.Event(wall_time=time_s, step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One W&B run of the record and the recipe, nothing else; offline without a key."""

    def __init__(self, directory: Path, recipe: Recipe, tracked_as: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # only who uses it installs it
        from wandb.errors import UsageError  # pyright: ignore[reportMissingImports]  # the same

        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        about = {
            "project": recipe.tracking.project,
            "name": recipe.name,
            "id": tracked_as,
            "dir": str(directory),
            "config": msgspec.to_builtins(recipe),
            "settings": quiet,
        }
        try:
            self._run = wandb.init(**about, resume="allow")
        except UsageError as error:
            log.info("W&B: %s It is kept in %s; send it later with: wandb sync DIRECTORY", error, directory)
            self._run = wandb.init(**about, mode="offline")
        # Its own step may only rise, but steps are done again after a restart, and exams end late.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict, values: dict[str, float]) -> None:
        self._run.log({"step": record["step"], **values})

    def flush(self) -> None:
        """It sends on its own."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A local store; `TRACKIO_DIR=DIRECTORY trackio show` opens it."""

    def __init__(self, directory: Path, recipe: Recipe, tracked_as: str) -> None:
        os.environ["TRACKIO_DIR"] = str(directory)  # read at import
        import trackio  # pyright: ignore[reportMissingImports]  # only who uses it installs it

        self._run = trackio.init(
            project=recipe.tracking.project,
            name=f"{recipe.name}-{tracked_as}",
            config=msgspec.to_builtins(recipe),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, record: dict, values: dict[str, float]) -> None:
        self._run.log(values, step=record["step"])

    def flush(self) -> None:
        """It writes on its own."""

    def close(self) -> None:
        self._run.finish()
