"""An exported directory is the policy that was trained, whole, or it is not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy.model import load_model, model_fingerprint
from protocol.errors import StorageError, UserError, WrongWeights
from protocol.evaluation import Evaluation
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from protocol.snapshot import hash_file, listed, open_sealed, seal, snapshot_id, staging
from tests.groups import make_group
from tests.test_policy import COMMON, run
from tests.tiny import make_model
from trainer.export import export

pytestmark = pytest.mark.slow

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def trained(directory: Path, *overrides: str) -> RunDir:
    """A run of two real steps of one real rank, with its recipe."""
    tiny = make_model(directory / "tiny")
    run(tiny, directory, *overrides)
    rundir = RunDir(directory / "run")
    rundir.recipe.write_text(dump(load(None, [*COMMON, f"model.path={tiny}", *overrides])))
    return rundir


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> RunDir:
    return trained(tmp_path_factory.mktemp("full"), "trainer.zero_stage=3")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> RunDir:
    options = ["lora.rank=4", "lora.alpha=8", "model.dtype=bfloat16", "optimizer.learning_rate=1e-2"]
    return trained(tmp_path_factory.mktemp("adapter"), *options)


def exported(rundir: RunDir, target: Path, which: str | None = None, *overrides: str):
    return export(rundir, load(rundir.recipe, overrides), target, which)


def respoiled(rundir: RunDir, spoil, name: str = snapshot_id(99, 1)) -> RunDir:
    """A copy of the run whose only snapshot was spoiled before it was sealed: its hashes are right."""
    source, copy = listed(rundir.snapshots)[-1], RunDir(rundir.path.with_name(f"spoiled-{os.urandom(4).hex()}"))
    copy.make()
    shutil.copy(rundir.recipe, copy.recipe)
    with staging(copy.snapshots, name) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)
        (aside / "manifest.json").unlink()
        spoil(aside)
        files = {path.name: hash_file(path) for path in aside.iterdir()}
        seal(aside, copy.snapshots / name, msgspec.structs.replace(open_sealed(source).manifest, id=name, files=files))
    return copy


def change(file: str, **tensors):
    """A spoiler that replaces tensors of a file by what a function makes of them all; None removes one."""

    def spoil(aside: Path) -> None:
        found = load_file(aside / file)
        made = {name.replace("__", "."): make(found) for name, make in tensors.items()}
        kept = {name: tensor for name, tensor in (found | made).items() if tensor is not None}
        save_file(kept, aside / file, metadata={"format": "pt"})

    return spoil


def nothing_is_left(target: Path) -> bool:
    return not target.exists() and not list(target.parent.glob(f".tmp-{target.name}*"))


def test_a_full_snapshot_becomes_a_model_directory_that_transformers_loads(full, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in full.path.rglob("*")}
    done = exported(full, tmp_path / "deep" / "model")
    newest = listed(full.snapshots)[-1]
    assert (done.snapshot, done.step) == (newest.name, 2)
    assert done.verified.gap < 1e-6 and done.verified.size == 4 * sum(
        tensor.numel() for tensor in load_file(newest / "model.safetensors").values()
    )
    model, info = AutoModelForCausalLM.from_pretrained(done.path, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sealed = load_file(newest / "model.safetensors")
    assert all(torch.equal(tensor, sealed[name]) for name, tensor in model.state_dict().items() if name in sealed)
    assert AutoTokenizer.from_pretrained(done.path).chat_template
    assert (done.path / "generation_config.json").exists() and not (done.path / "manifest.json").exists()
    card = (done.path / "README.md").read_text()
    assert "step 2" in card and newest.name in card and "dapo" in card and str(tmp_path.parent) not in card
    assert {path: path.stat().st_mtime_ns for path in full.path.rglob("*")} == before  # only read


def test_an_adapter_is_merged_in_float32_and_rounded_once(adapter, tmp_path):
    done = exported(adapter, tmp_path / "model")
    recipe, newest = load(adapter.recipe), listed(adapter.snapshots)[-1]
    base = load_file(Path(recipe.model.path) / "model.safetensors")
    lora = load_file(newest / "adapter_model.safetensors")
    merged = load_file(done.path / "model.safetensors")
    assert merged.keys() == base.keys() and all(merged[name].shape == base[name].shape for name in base)
    moved = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in lora:
            a, b = lora[f"{prefix}A.weight"].float(), lora[f"{prefix}B.weight"].float()
            expected = (weight + b @ a * (8 / 4)).bfloat16()
            moved += not torch.equal(expected, weight.bfloat16())
        else:
            expected = weight.bfloat16()
        assert torch.equal(merged[name], expected), name
    assert moved == 2 * 7
    assert done.verified.gap < 0.05 and done.verified.tensors == len(base)
    assert {path.stat().st_mode & 0o777 for path in done.path.iterdir()} == {0o644}  # another user may serve it
    assert model_fingerprint(done.path) == model_fingerprint(Path(recipe.model.path))
    assert "adapters of rank 4" in (done.path / "README.md").read_text()


def test_the_card_gives_the_accuracy_of_an_evaluated_snapshot(full, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(full.path, copy.path)
    name, recipe = listed(copy.snapshots)[-1].name, load(copy.recipe)
    groups = [make_group(row, rewards=[float(row < 3)], split="eval") for row in range(4)]
    place = {"step": 2, "snapshot": name, "data": "/home/me/held-out.jsonl", "fingerprint": "f"}
    without = msgspec.structs.replace(recipe, eval=msgspec.structs.replace(recipe.eval, extractors=[]))
    Evaluation.from_groups(groups, recipe=without, **place).write(copy.evals / f"{name}.json")
    card = (exported(copy, tmp_path / "model").path / "README.md").read_text()
    assert "| held-out accuracy | 0.750 [0.301, 0.954] (95 %), 4 prompts of held-out.jsonl" in card
    (copy.evals / f"{name}.json").write_text("{")
    card = (exported(copy, tmp_path / "again").path / "README.md").read_text()
    assert "accuracy" not in card


def test_best_comes_first_and_a_damaged_latest_gives_way_to_the_one_before(full, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(full.path, copy.path)
    first, second, third = listed(copy.snapshots)
    copy.best.symlink_to(Path("snapshots") / first.name)
    assert exported(copy, tmp_path / "best").snapshot == first.name
    assert exported(copy, tmp_path / "named", second.name).snapshot == second.name
    shard = third / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert exported(copy, tmp_path / "latest", "latest").snapshot == second.name
    with pytest.raises(StorageError, match="not the sealed"):
        exported(copy, tmp_path / "truncated", third.name)
    assert nothing_is_left(tmp_path / "truncated")
    for path in (first, second):
        (path / "config.json").unlink()
    with pytest.raises(StorageError, match=r"no snapshot in .* is intact"):
        exported(copy, tmp_path / "none", "latest")
    with pytest.raises(UserError, match="no such snapshot"):
        exported(copy, tmp_path / "none", "s00000077.i0001")


def test_a_directory_with_something_in_it_is_left_alone(full, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(UserError, match="not empty"):
            exported(full, target)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


WHOLE = "model.safetensors"
SPOILED = {
    "empty": (change(WHOLE, model__norm__weight=lambda _: torch.empty(0)), f"{NORM} is empty"),
    "missing": (change(WHOLE, model__norm__weight=lambda _: None), f"lacks {NORM}"),
    "no embedding": (change(WHOLE, model__embed_tokens__weight=lambda _: None), "lacks lm_head"),
    "shape": (change(WHOLE, model__norm__weight=lambda _: torch.ones(32)), f"wrong shape of {NORM}"),
    "unknown": (change(WHOLE, extra=lambda _: torch.ones(2)), "unknown extra"),
    "dtype": (change(WHOLE, model__norm__weight=lambda _: torch.ones(64).bfloat16()), "expected float32"),
    "tie": (change(WHOLE, lm_head__weight=lambda found: found[EMBEDDING] * 1.5), "other values for the tied lm_head"),
    "nan": (change(WHOLE, model__norm__weight=lambda _: torch.full([64], torch.nan)), "not finite"),
    "other": (change(WHOLE, model__norm__weight=lambda found: found[NORM] * 1.5), "computes something else"),
    "truncated": (lambda aside: os.truncate(aside / WHOLE, 5000), "cannot be read"),
    "tokenizer": (lambda aside: other_tokenizer(aside), "another configuration or tokenizer"),
}


def other_tokenizer(aside: Path) -> None:
    tokenizer = json.loads((aside / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (aside / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_snapshot_that_was_spoiled_before_it_was_sealed_is_refused(full, tmp_path, spoiled):
    spoil, message = SPOILED[spoiled]
    with pytest.raises(WrongWeights, match=message) as refused:
        exported(respoiled(full, spoil), tmp_path / "model")
    assert "\n" not in str(refused.value)
    assert nothing_is_left(tmp_path / "model")


ADAPTER = "adapter_model.safetensors"
FIRST = "base_model__model__model__layers__0__mlp__down_proj__lora_"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(ADAPTER, **{f"{FIRST}A__weight": lambda _: None}), "1 of 28 tensors"),
        (change(ADAPTER, **{f"{FIRST}A__weight": lambda _: torch.empty(0)}), "1 of 28 tensors"),
        (change(ADAPTER, extra=lambda _: torch.ones(2)), "extra for example"),
        (change(ADAPTER, **{f"{FIRST}B__weight": lambda _: torch.ones(64, 4)}), "computes something else"),
        (change(ADAPTER, **{f"{FIRST}B__weight": lambda _: torch.full([64, 4], torch.inf)}), "not finite"),
    ],
    ids=["missing", "empty", "unknown", "other values", "infinite"],
)
def test_an_adapter_that_was_spoiled_before_it_was_sealed_is_refused(adapter, tmp_path, spoil, message):
    with pytest.raises(WrongWeights, match=message):
        exported(respoiled(adapter, spoil), tmp_path / "model")
    assert nothing_is_left(tmp_path / "model")


def test_an_adapter_does_not_go_into_another_base_or_another_recipe(adapter, tmp_path):
    untied = make_model(tmp_path / "untied", tie=False)
    with pytest.raises(UserError, match=r"another config\.json than the base"):
        exported(adapter, tmp_path / "model", None, f"model.path={untied}")
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(WrongWeights, match="computes something else"):
        exported(adapter, tmp_path / "model", None, f"model.path={other}")
    with pytest.raises(WrongWeights, match="not the adapter of this recipe"):
        exported(adapter, tmp_path / "model", None, "lora.rank=8")
    assert nothing_is_left(tmp_path / "model")


def test_a_base_model_that_transformers_would_complete_at_random_is_refused(tmp_path):
    tiny = make_model(tmp_path / "tiny")
    change(WHOLE, model__norm__weight=lambda _: None)(tiny)
    with pytest.raises(UserError, match=f"lacks {NORM}"):
        load_model(tiny, "float32")
    change(WHOLE, model__norm__weight=lambda _: torch.ones(64), extra=lambda _: torch.ones(1))(tiny)
    assert load_model(tiny, "float32")  # hub models carry tensors that nobody needs


def test_large_models_come_in_shards(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.export.SHARD", "100KB")
    done = exported(adapter, tmp_path / "model")
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == done.verified.tensors and len(set(index["weight_map"].values())) > 1


def test_the_command_exports_and_says_how_to_use_it(adapter, tmp_path):
    command = [sys.executable, "-m", "trainer", "--run", str(adapter.path), "--export", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"vllm serve {tmp_path}/model" in done.stdout and "(step 2)" in done.stdout
    without = subprocess.run([*command[:3], *command[5:]], capture_output=True, text=True, check=False)
    assert without.returncode == 2 and "--run RUN --export DIR" in without.stderr
