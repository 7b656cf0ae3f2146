"""A snapshot as a model directory that stands alone: `python -m trainer --run runs/x --export DIR`.

A full snapshot is copied, every byte verified. An adapter is merged into its base model in float32 and rounded once:
W + alpha / rank * B A (arXiv 2106.09685, section 4.1). What was written is then loaded from the disk like any model
and must compute the snapshot's canary log-probs; only then does it get its name. The run directory is only read, so
the run may go on meanwhile.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from policy.model import DTYPES, adapter_settings, copy_model_files, load_model, locate, model_fingerprint
from protocol.disk import sync_directory, write_new
from protocol.errors import StorageError, UserError, WrongWeights
from protocol.evaluation import Evaluation, read
from protocol.recipe import Recipe
from protocol.rundir import RunDir
from protocol.snapshot import Corrupt, Sealed, listed, open_sealed, staging
from trainer.card import model_card
from trainer.verify import Verified, verify

log = logging.getLogger(__name__)

SHARD = "2GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    path: Path
    snapshot: str
    step: int
    verified: Verified


def export(rundir: RunDir, recipe: Recipe, target: Path, which: str | None) -> Exported:
    """Writes the snapshot `which` (`best`, `latest` or its id; None: `best` where there is one) to `target`.

    Of the latest, one that is damaged gives way to the one before it. Raises UserError; StorageError where nothing
    intact is left to read or the disk is full; WrongWeights where the result is not the policy that was trained.
    """
    path = target.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--export {target} exists and is not empty; name a new directory")
    _make_parents(path)
    damaged: list[Corrupt] = []
    for snapshot in choose(rundir, which):
        try:
            return _export(open_sealed(snapshot), recipe, path, _evaluation(rundir, snapshot.name))
        except Corrupt as error:
            log.error("%s", error)
            damaged.append(error)
    if len(damaged) > 1:
        raise StorageError(f"no snapshot in {rundir.snapshots} is intact; the newest: {damaged[0]}")
    raise damaged[0]


def choose(rundir: RunDir, which: str | None) -> Iterator[Path]:
    """The snapshots to try, one after another. Raises UserError where there is none."""
    found = listed(rundir.snapshots)
    if which == "best" or (which is None and rundir.best.is_symlink()):
        if not rundir.best.is_symlink():
            raise UserError(f"{rundir.path} has no best snapshot; set eval.every, or export --snapshot latest")
        yield rundir.snapshots / rundir.best.readlink().name
    elif which in (None, "latest"):
        if not found:
            raise UserError(f"{rundir.path} has no snapshot yet; has its trainer started?")
        yield from reversed(found)
    else:
        if which not in [path.name for path in found]:
            known = ", ".join(path.name for path in found) or "none"
            raise UserError(f"--snapshot {which}: no such snapshot in {rundir.path}; there: {known}")
        yield rundir.snapshots / which


def _export(sealed: Sealed, recipe: Recipe, target: Path, evaluation: Evaluation | None) -> Exported:
    manifest = sealed.manifest
    with staging(target.parent, target.name) as aside:
        if manifest.kind == "adapter":
            _merge(sealed, recipe, aside)
        else:
            _copy(sealed, aside)
        verified = verify(aside, manifest, recipe)
        write_new(aside / "README.md", [model_card(manifest, recipe, verified, evaluation).encode()])
        _make_durable(aside, target)
    return Exported(path=target, snapshot=manifest.id, step=manifest.step, verified=verified)


def _copy(sealed: Sealed, aside: Path) -> None:
    for number, name in enumerate(sealed.manifest.files, 1):
        data = sealed.read(name)
        write_new(aside / name, [data])
        log.info("copied %s (%.3f GB), file %d of %d", name, len(data) / 1e9, number, len(sealed.manifest.files))


def _merge(sealed: Sealed, recipe: Recipe, aside: Path) -> None:
    """The adapter goes into its base model. Raises UserError for another base, WrongWeights for another adapter."""
    tensors = load(sealed.read("adapter_model.safetensors"))
    base = locate(recipe.model)
    if model_fingerprint(base) != sealed.manifest.model:
        raise UserError(
            f"model.path = {recipe.model.path!r} has another config.json than the base model of {sealed.manifest.id}; "
            "name the right directory with --set model.path=DIR"
        )
    log.info("loading the base model in float32 and merging %d adapter tensors", len(tensors))
    model = get_peft_model(load_model(base, "float32"), adapter_settings(recipe.lora))
    _refuse_if_different(sealed.manifest.id, get_peft_model_state_dict(model), tensors)
    set_peft_model_state_dict(model, tensors)
    merged = model.merge_and_unload().to(DTYPES[recipe.model.dtype])
    assert isinstance(merged, PreTrainedModel), "peft gives back the model that it was put around"
    try:
        merged.save_pretrained(aside, max_shard_size=SHARD)
    except SafetensorError as error:  # it reports a full disk as one
        raise StorageError(f"cannot write {aside}: {error}; free space or mend permissions") from error
    copy_model_files(base, aside, recipe.model.dtype)


def _refuse_if_different(name: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    wrong = {key for key, tensor in found.items() if shapes.get(key) != tuple(tensor.shape)} | (shapes.keys() - found)
    if wrong:
        raise WrongWeights(
            f"{name} is not the adapter of this recipe: {len(wrong)} of {len(shapes)} tensors are missing, unknown or "
            f"of another shape, {min(wrong)} for example; see [lora] in recipe.toml"
        )


def _evaluation(rundir: RunDir, snapshot: str) -> Evaluation | None:
    """Of this snapshot, for the model card; None where it was not evaluated."""
    path = rundir.evals / f"{snapshot}.json"
    try:
        return read(path) if path.exists() else None
    except UserError as error:
        log.error("%s: left out of the model card", error)
        return None


def _make_durable(aside: Path, target: Path) -> None:
    for path in aside.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(aside)
    os.rename(aside, target)
    sync_directory(target.parent)


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {path.parent}: {error.strerror}") from None
