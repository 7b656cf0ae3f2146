"""What `--eval MODEL` means, and that a wrong one is refused before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import UserError
from protocol.recipe import Recipe
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from protocol.snapshot import Corrupt, Manifest, hash_file, seal, snapshot_id, staging
from sampler.candidate import Candidate, announced, find


def sealed(parent: Path, name: str, kind: str, files: dict[str, str]) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    with staging(parent, name) as aside:
        for file, text in files.items():
            (aside / file).write_text(text)
        manifest = Manifest(
            kind=kind,
            run_id="r",
            id=name,
            parent=None,
            step=2,
            incarnation=1,
            model="m",
            files={path.name: hash_file(path) for path in aside.iterdir()},
        )
        seal(aside, parent / name, manifest)
    return parent / name


@pytest.fixture
def run(tmp_path) -> RunDir:
    """Full snapshots of steps 1 and 2, the first one the best."""
    rundir = RunDir(tmp_path / "run")
    rundir.make()
    recipe = load(
        None, ["model.path=some/base", 'model.revision="v1"', "lora.rank=4", "eval.samples=3", "eval.temperature=1.0"]
    )
    rundir.recipe.write_text(dump(recipe))
    for step in (1, 2):
        sealed(rundir.snapshots, snapshot_id(step, 1), "full", {"config.json": "{}"})
    rundir.best.symlink_to(Path("snapshots") / snapshot_id(1, 1))
    return rundir


@pytest.mark.parametrize(("name", "step"), [("best", 1), ("latest", 2), (snapshot_id(1, 1), 1)])
def test_a_snapshot_of_a_run_is_a_model_with_the_runs_recipe(run, name, step):
    found = find(name, run.path, None, ["eval.temperature=0.5"])
    path = run.snapshots.resolve() / snapshot_id(step, 1)
    assert (found.name, found.step, found.sealed.path) == (path.name, step, path)
    assert (found.recipe.model.path, found.recipe.model.revision, found.recipe.lora.rank) == (str(path), None, 0)
    assert (found.recipe.eval.samples, found.recipe.eval.temperature) == (3, 0.5)
    assert announced(found.sealed).manifest_sha256 == hash_file(path / "manifest.json").sha256


def test_a_snapshots_path_brings_the_recipe_of_its_run_unless_another_is_given(run, tmp_path):
    path = str(run.snapshots / snapshot_id(2, 1))
    assert find(path, None, None, []).recipe.eval.samples == 3
    (tmp_path / "other.toml").write_text("[eval]\nsamples = 5\ntemperature = 1.0\n")
    assert find(path, None, tmp_path / "other.toml", []).recipe.eval.samples == 5


def test_an_adapter_goes_onto_the_recipes_model(run):
    name = snapshot_id(3, 1)
    sealed(run.snapshots, name, "adapter", {"adapter_config.json": json.dumps({"r": 32})})
    found = find("latest", run.path, None, [])
    assert found.name == name
    assert (found.recipe.model.path, found.recipe.model.revision, found.recipe.lora.rank) == ("some/base", "v1", 32)


def test_any_other_name_is_a_model_without_an_adapter(run):
    found = find("smollm2-135m-instruct", run.path, None, [])
    assert found == Candidate(name="smollm2-135m-instruct", recipe=found.recipe)
    assert (found.recipe.model.path, found.recipe.model.revision) == ("smollm2-135m-instruct", None)
    assert (found.recipe.lora.rank, found.recipe.eval.samples, found.step) == (0, 3, None)
    assert find("some/base", run.path, None, []).recipe.model.revision == "v1"
    assert find("a/b", None, None, []).recipe.eval == Recipe().eval


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (snapshot_id(9, 1), f"has no snapshot {snapshot_id(9, 1)}; it has: {snapshot_id(1, 1)}, {snapshot_id(2, 1)}"),
        ("{run}", "is a run; evaluate a snapshot of it: --eval best --run"),
        ("{run}/checkpoints/c00000002.i0001", "is a checkpoint"),
        ("{run}/adapter", "is an adapter without the manifest of a snapshot"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_do(run, model, says):
    sealed(run.checkpoints, "c00000002.i0001", "checkpoint", {"state.json": "{}"})
    (run.path / "adapter").mkdir()
    (run.path / "adapter/adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(UserError) as refused:
        find(model.format(run=run.path), run.path, None, [])
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_without_what_is_asked_for_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        find("best", tmp_path / "nowhere", None, [])
    run.best.unlink()
    with pytest.raises(UserError, match="no best snapshot yet; try --eval latest"):
        find("best", run.path, None, [])
    for path in run.snapshots.iterdir():
        path.rename(run.path / path.name)
    with pytest.raises(UserError, match="has no snapshot latest; it has: none"):
        find("latest", run.path, None, [])


def test_a_damaged_manifest_is_refused(run):
    manifest = run.snapshots / snapshot_id(2, 1) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(Corrupt, match=r"manifest\.json"):
        find("latest", run.path, None, [])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", "x.json"], "--out belongs to --eval MODEL"),
        (["--eval", "best", "--limit", "-1", "--run", "{run}"], "--limit -1"),
        (["--eval", "best", "--out", "x.txt", "--run", "{run}"], "expected FILE.json"),
        (["--eval", "best", "--out", "no/where/x.json", "--run", "{run}"], "expected FILE.json in a directory"),
        (["--eval", "best", "--against", "{run}/none.json", "--run", "{run}"], "cannot read the evaluation"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(run, options, says):
    command = [sys.executable, "-m", "sampler", *(option.format(run=run.path) for option in options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
