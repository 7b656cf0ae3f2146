"""DeepSpeed really makes the update that the mathematics asks for, for any stage and any number of ranks."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from protocol.keys import open_keys
from protocol.rundir import RunDir
from protocol.snapshot import listed, remove
from tests.test_storage import save
from tests.tiny import make_model
from tests.warm import Warm
from trainer.optimizer import learning_rate_factor

pytestmark = pytest.mark.slow

COMMON = [
    "model.dtype=float32",
    "trainer.gradient_checkpointing=false",
    "trainer.checkpoint_every=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=1",
    "sampling.group_size=4",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


def run(
    tiny: Path,
    directory: Path,
    *overrides: str,
    world: int = 1,
    steps: int = 2,
    gpu: bool = False,
    module: str = "tests.policy_run",
    **settings,
) -> list[dict]:
    """The first rank's records of a run in `world` real processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory.mkdir(exist_ok=True)
    file = directory / "settings.json"
    recipe = [*COMMON, f"model.path={tiny}", *overrides]
    file.write_text(json.dumps({"overrides": recipe, "run": str(directory / "run"), "steps": steps, **settings}))
    ranks = []
    outputs = [directory / f"rank{rank}.out" for rank in range(world)]
    errors = [directory / f"rank{rank}.err" for rank in range(world)]
    for rank in range(world):
        outputs[rank].unlink(missing_ok=True)
        errors[rank].unlink(missing_ok=True)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        ranks.append(start_rank(module, file, environment, outputs[rank], errors[rank], gpu))
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(error.read_text() for error in errors)
    return [json.loads(line) for line in outputs[0].read_text().splitlines() if line.startswith("{")]


def start_rank(
    module: str, settings: Path, environment: dict[str, str], output: Path, errors: Path, gpu: bool
) -> Warm | subprocess.Popen:
    if not gpu:
        return Warm(["-m", module, str(settings)], environment, output, errors)
    command = [sys.executable, "-m", module, str(settings)]
    with output.open("w") as stdout, errors.open("w") as stderr:
        return subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One rank, everything in one row."""
    return run(tiny, tmp_path_factory.mktemp("alone"), "trainer.zero_stage=1", "trainer.tokens_per_micro_batch=4096")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("world", "tokens"), [pytest.param(1, 45, marks=pytest.mark.long), (2, 45)])
def test_gradients_and_updates_do_not_depend_on_stage_ranks_or_rows(tiny, alone, tmp_path, stage, world, tokens):
    cut = run(tiny, tmp_path, f"trainer.zero_stage={stage}", f"trainer.tokens_per_micro_batch={tokens}", world=world)
    assert cut[0]["rows"] > 2
    for one, other in zip(alone, cut, strict=True):
        assert other["norm"] == pytest.approx(one["norm"], rel=1e-6)
        gap = np.linalg.norm(np.subtract(one["gradient"], other["gradient"])) / np.linalg.norm(one["gradient"])
        assert gap < 1e-5
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["weights"] == pytest.approx(one["weights"], rel=1e-6)


@pytest.mark.long
def test_zero_3_partitions_an_output_layer_of_its_own(tmp_path):
    """Untied: the head's weight is read outside its module, gathered for it, and published by its own name."""
    untied = make_model(tmp_path / "untied", tie=False)
    one = run(untied, tmp_path / "one", "trainer.zero_stage=1")
    three = run(untied, tmp_path / "three", "trainer.zero_stage=3", "trainer.tokens_per_micro_batch=45", world=2)
    for a, b in zip(one, three, strict=True):
        gap = np.linalg.norm(np.subtract(a["gradient"], b["gradient"])) / np.linalg.norm(a["gradient"])
        assert gap < 1e-5
    newest = listed(tmp_path / "three" / "run" / "snapshots")[-1]
    assert "lm_head.weight" in load_file(newest / "model.safetensors")


def test_zero_0_in_float32_makes_the_same_update(tiny, alone, tmp_path):
    plain = run(tiny, tmp_path, "trainer.zero_stage=0", world=2)
    for one, other in zip(alone, plain, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["weights"] == pytest.approx(one["weights"], rel=1e-6)


@pytest.mark.fault("J1")
@pytest.mark.parametrize(
    ("stage", "dtype", "what"),
    [
        (0, "float32", "gradient"),
        pytest.param(1, "bfloat16", "loss", marks=pytest.mark.long),
        pytest.param(2, "bfloat16", "gradient", marks=pytest.mark.long),
        (3, "float32", "loss"),
    ],
)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_changes_nothing(tiny, tmp_path, stage, dtype, what):
    options = [f"trainer.zero_stage={stage}", f"model.dtype={dtype}", "optimizer.schedule=cosine"]
    sound = run(tiny, tmp_path / "sound", *options, world=2, steps=3)
    spoil = {"rank": 1, "after": 1, "times": 1, "what": what}
    cut = run(tiny, tmp_path / "cut", *options, world=2, steps=3, spoil=spoil)
    assert [record["done"] for record in cut] == [True, False, True, True]
    assert cut[1]["weights"] == cut[0]["weights"]  # to the last bit
    assert [cut[0], *cut[2:]] == sound  # optimizer, schedule and ranks go on as if it had not been


@pytest.mark.parametrize(
    "options", [["model.dtype=bfloat16"], pytest.param(["lora.rank=4", "lora.dropout=0.5"], marks=pytest.mark.long)]
)
def test_a_resumed_run_goes_on_exactly_as_the_uninterrupted_one(tiny, tmp_path, options):
    """Dropout too draws what it would have drawn."""
    options = [*options, "optimizer.schedule=cosine"]
    whole = run(tiny, tmp_path / "whole", *options, world=2, steps=4)
    run(tiny, tmp_path / "cut", *options, world=2, steps=2)
    resumed = run(tiny, tmp_path / "cut", *options, world=2, steps=4, incarnation=2)
    assert [record["step"] for record in resumed] == [3, 4]
    assert resumed == whole[2:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "rank", "before", "after"),  # before, after: ranks and ZeRO stage
    [("bfloat16", 4, (2, 1), (1, 1)), ("float32", 0, (2, 3), (1, 3)), ("float32", 0, (1, 2), (2, 1))],
)
def test_another_number_of_ranks_goes_on_where_the_run_was_cut(tiny, tmp_path, dtype, rank, before, after):
    """Without Adam's moments the weights would be off by 3e-5 (float32) and 4e-3 (adapters)."""
    options = [f"model.dtype={dtype}", f"lora.rank={rank}", "optimizer.schedule=cosine", "optimizer.weight_decay=0.1"]
    whole = run(tiny, tmp_path, *options, f"trainer.zero_stage={before[1]}", world=before[0], steps=4)
    rundir = RunDir(tmp_path / "run")
    remove(listed(rundir.checkpoints)[-1])
    options.append(f"trainer.zero_stage={after[1]}")
    resumed = run(tiny, tmp_path, *options, world=after[0], steps=4, incarnation=2)
    assert [record["step"] for record in resumed] == [3, 4]
    close = {"weights": 1e-8, "grad_norm": 1e-6} if dtype == "float32" else {"weights": 1e-4, "grad_norm": 0.01}
    for one, other in zip(whole[2:], resumed, strict=True):
        assert other["learning_rate"] == one["learning_rate"]
        for figure, tolerance in close.items():
            assert other[figure] == pytest.approx(one[figure], rel=tolerance)
    assert not [path for path in rundir.checkpoints.iterdir() if path.name.startswith(".")]


@pytest.mark.long
def test_settings_that_were_changed_count_from_the_resumed_step_on(tiny, tmp_path):
    run(tiny, tmp_path, steps=2)
    changed = ["optimizer.learning_rate=1e-5", "optimizer.max_grad_norm=1e-9"]
    before, after = run(tiny, tmp_path, *changed, steps=4, incarnation=2)
    assert before["learning_rate"] == after["learning_rate"] == 1e-5
    assert after["weights"] == pytest.approx(before["weights"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "said"),
    [(2, r"could not convert .*c00000002.*: .*; or start it with --num_gpus=1"), (3, "cannot load it with 3")],
)
def test_a_checkpoint_that_cannot_be_converted_is_one_clear_error(tiny, tmp_path, stage, said):
    rundir = RunDir(tmp_path / "run")
    rundir.make()
    path = save(rundir, open_keys(rundir.keys).checkpoint, 2)  # sealed and signed, but nothing that DeepSpeed wrote
    with pytest.raises(AssertionError, match=said):
        run(tiny, tmp_path, f"trainer.zero_stage={stage}", incarnation=2)
    assert list(rundir.checkpoints.iterdir()) == [path]


@pytest.mark.long
@pytest.mark.fault("G1")
def test_a_snapshot_is_not_begun_where_there_is_no_room_for_it(tiny, tmp_path):
    rundir = RunDir(tmp_path / "run")
    rundir.make()
    huge = rundir.snapshots / "s00000001.i0001"
    huge.mkdir()
    (huge / "manifest.json").touch()
    with (huge / "model.safetensors").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).total + 2**30)
    with pytest.raises(AssertionError, match=r"no room for s00000000\.i0002: \d+\.\d MiB needed, \d+\.\d free"):
        run(tiny, tmp_path, incarnation=2)
    assert list(rundir.snapshots.iterdir()) == [huge]


@pytest.mark.long
@pytest.mark.fault("G2")
@pytest.mark.parametrize(("stage", "rank"), [(1, 1), (3, 0)])
def test_a_rank_that_cannot_write_its_part_holds_up_nobody(tiny, tmp_path, stage, rank):
    """DeepSpeed meets in barriers after it has written; the checkpoint is tried again after the next step."""
    records = run(tiny, tmp_path, f"trainer.zero_stage={stage}", world=2, steps=4, full_disk=rank)
    assert [record["unsaved"] for record in records] == [0, 1, 0, 0]
    assert [path.name[:9] for path in listed(tmp_path / "run" / "checkpoints")] == ["c00000003", "c00000004"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_train_alone_and_their_base_model_is_the_reference(tiny, tmp_path, stage):
    options = ["lora.rank=4", "lora.alpha=8", f"trainer.zero_stage={stage}"]
    records = run(tiny, tmp_path, *options, world=2, steps=3)
    assert records[0]["kl"] == 0.0  # to the last bit: the same weights, adapters off
    assert records[2]["kl"] > 0.0
    newest = listed(tmp_path / "run" / "snapshots")[-1]
    weights = load_file(newest / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2 and all(".lora_" in name for name in weights)
    assert all(name.startswith("base_model.model.model.layers.") for name in weights)
    adapted = AutoModelForCausalLM.from_pretrained(tiny)
    adapted.load_adapter(str(newest))
    moved = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert moved and all(parameter.abs().sum() > 0 for parameter in moved)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_snapshot_is_a_model_directory_that_transformers_loads(tiny, tmp_path, stage):
    run(tiny, tmp_path, f"trainer.zero_stage={stage}", world=2)
    first, *_, last = listed(tmp_path / "run" / "snapshots")
    loaded, info = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.dtype == torch.float32
    original = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    start = AutoModelForCausalLM.from_pretrained(first).state_dict()
    assert all(torch.equal(start[name], original[name]) for name in original)
    assert not any(torch.equal(loaded.state_dict()[name], original[name]) for name in original)
    assert (last / "tokenizer.json").exists() and (last / "generation_config.json").exists()


def test_gradient_checkpointing_changes_nothing(tiny, alone, tmp_path):
    same = run(tiny, tmp_path, "trainer.gradient_checkpointing=true")
    for one, other in zip(alone, same, strict=True):
        assert other["norm"] == pytest.approx(one["norm"], rel=1e-6)


def test_schedules_warm_up_without_a_wasted_step_and_end_where_they_should():
    from protocol.recipe import Optimizer

    settings = Optimizer(warmup_steps=4, schedule="cosine")
    factors = [learning_rate_factor(step, settings, 20) for step in range(21)]
    assert factors[:4] == [0.2, 0.4, 0.6, 0.8] and factors[4] == 1.0
    assert factors[12] == pytest.approx(0.5) and factors[20] == pytest.approx(0.0)
    linear = Optimizer(warmup_steps=0, schedule="linear")
    assert [learning_rate_factor(step, linear, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert math.isclose(learning_rate_factor(999, Optimizer(), 20), 1.0)
