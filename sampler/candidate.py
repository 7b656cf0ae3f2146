"""The model that `--eval` names, and the recipe that says how it is asked: found before anything heavy is imported.

best, latest, s00000042.i0001   with --run: a snapshot of that run
runs/x/snapshots/s00000042.i0001   the same; its run's recipe counts unless another one is given
DIR, FILE.gguf, hub/id, smollm2-135m-instruct   whatever `model.path` may be
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from protocol.errors import UserError
from protocol.messages import Pulse
from protocol.recipe import Lora, Recipe
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.snapshot import Sealed, listed, open_sealed, step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """recipe: its `model.path` is what the engine starts with, its `lora.rank` the adapter's (0: none)."""

    name: str
    recipe: Recipe
    sealed: Sealed | None = None
    """The snapshot to load, with every check of training; None for a model that is no snapshot."""

    @property
    def step(self) -> int | None:
        return step_of(self.name) if self.sealed else None


def find(model: str, run: Path | None, recipe: Path | None, overrides: list[str]) -> Candidate:
    """Raises UserError for a model, run or recipe that is not there, Corrupt for a damaged manifest.

    The recipe is the one given, else that of the run, else of the run that the snapshot lies in, else the defaults.
    """
    path = snapshot(model, RunDir(run)) if run else None
    path = path or Path(model).expanduser()
    if (path / "recipe.toml").is_file():
        raise UserError(f"{path} is a run; evaluate a snapshot of it: --eval best --run {path}, or latest, or its name")
    around = path.resolve().parent.parent
    kept = run or (around if (path / "manifest.json").is_file() and (around / "recipe.toml").is_file() else None)
    if not recipe and kept:
        recipe = kept / "recipe.toml"
    began = load(kept / "recipe.toml").model.dtype if kept else None
    settings = load(recipe, overrides, began)
    if (path / "manifest.json").is_file():
        return _of_snapshot(open_sealed(path.resolve()), settings)
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} is an adapter without the manifest of a snapshot; evaluate the snapshot or an export")
    other = model != settings.model.path
    revision = None if other else settings.model.revision
    base = replace(settings.model, path=model, revision=revision)
    return Candidate(name=model, recipe=replace(settings, model=base, lora=Lora()))


def snapshot(name: str, rundir: RunDir) -> Path | None:
    """The directory of a run's snapshot; None for a name that cannot be one. Raises UserError where it is not there."""
    if not rundir.recipe.is_file():
        raise UserError(f"{rundir.path} is no run directory: it has no recipe.toml")
    found = listed(rundir.snapshots) if rundir.snapshots.is_dir() else []
    if name == "best":
        if not rundir.best.is_dir():
            raise UserError(f"{rundir.path} has no best snapshot yet; try --eval latest")
        return rundir.best.resolve()
    if name == "latest" and found:
        return found[-1]
    if name != "latest" and not re.fullmatch(r"s\d{8,}\.i\d{4,}", name):
        return None
    if rundir.snapshots / name not in found:
        raise UserError(
            f"{rundir.path} has no snapshot {name}; it has: {', '.join(one.name for one in found) or 'none'}"
        )
    return rundir.snapshots / name


def announced(sealed: Sealed) -> Pulse:
    """As a trainer would announce it. There is none here, so the manifest vouches for itself."""
    sha256 = hashlib.sha256((sealed.path / "manifest.json").read_bytes()).hexdigest()
    return Pulse(snapshot=sealed.manifest.id, manifest_sha256=sha256)


def _of_snapshot(sealed: Sealed, recipe: Recipe) -> Candidate:
    """A full snapshot is a model of its own; an adapter goes onto the recipe's."""
    if sealed.manifest.kind == "checkpoint":
        raise UserError(f"{sealed.path} is a checkpoint; evaluate a snapshot, --eval latest --run RUN for example")
    if sealed.manifest.kind == "full":
        recipe = replace(recipe, model=replace(recipe.model, path=str(sealed.path), revision=None), lora=Lora())
    else:
        settings = json.loads(sealed.read("adapter_config.json"))
        recipe = replace(recipe, lora=replace(recipe.lora, rank=settings["r"]))
    return Candidate(name=sealed.manifest.id, recipe=recipe, sealed=sealed)
