"""A recipe is right or is refused in one line that says what to do."""

from pathlib import Path

import pytest

from protocol.errors import UserError
from protocol.resolve import dump, load
from protocol.rundir import resolve_recipe

RECIPES = sorted(Path("recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_the_way_back(path, tmp_path):
    recipe = load(path)
    (tmp_path / "again.toml").write_text(dump(recipe))
    assert load(tmp_path / "again.toml") == recipe


def test_the_defaults_are_the_seed_experiment():
    recipe = load(None)
    assert recipe.model.path == "Qwen/Qwen2.5-1.5B-Instruct" and recipe.data.train.startswith("openai/gsm8k")
    assert recipe.sampling.group_size == 8 and recipe.objective.kl_beta == 0.04 and recipe.objective.name == "dapo"
    assert [reward.options for reward in recipe.reward] == [
        {"correct": 1.0, "wrong": -1.0},
        {"correct": 1.25, "wrong": -1.0},
    ]
    assert "<think>" in recipe.data.system and "<answer>" in recipe.data.system


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.stepz=3", "did you mean `steps`"),
        ("trainer.steps=0", ">= 1"),
        ("trainer.steps=many", "Expected `int`"),
        ("nonsense", "expected table.key=value"),
        ("network.bind=0.0.0.0", "listens everywhere"),
        ("trainer.zero_stage=0", "not exact"),
        ("sampling.group_size=1", "use 2 or more"),
        ("sampler.tensor_parallel=2", "no multiple"),
        ("name=../up", "names a directory"),
        ("optimizer.learning_rate=-1.0", ">= 0"),
        ("reward=[]", "at least one function"),
        ("network.beat_s=60.0", "below"),
        ("model=3", "Expected `object`"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(override, says):
    with pytest.raises(UserError, match=says) as caught:
        load(None, [override])
    assert "\n" not in str(caught.value)


SFT = ["objective.name=sft", "objective.kl_beta=0.0", "sampling.group_size=1", "data.demonstration={answer}"]
RAW = ["objective.recompute_old_logprobs=true", "objective.correction=none"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective.name=ppo"], "Invalid enum value 'ppo'"),
        (["objective.dual_clip=1.0"], r"objective\.dual_clip = 1\.0 must be above 1"),
        (["objective.clip_low=1.5"], "<= 1"),
        (["objective.correction_cap=0.9"], ">= 1"),
        (SFT[:3], r"set data\.demonstration"),
        ([*SFT[:2], SFT[3]], r"sampling\.group_size = 1"),
        ([SFT[0], *SFT[2:]], r"objective\.kl_beta = 0"),
        (["trainer.refill=1.0", "objective.advantage=reinforce++"], r"trainer\.refill .* 'reinforce\+\+'"),
        (["trainer.refill=1.0", "objective.advantage=mine.py:best"], "set refill = 0"),
        ([*SFT, "trainer.refill=1.0"], "set refill = 0"),
        ([*SFT, "objective.dual_clip=3.0"], "dual_clip has no use with"),
        ([*SFT, "objective.entropy_bonus=0.1"], "entropy_bonus has no use with"),
        (["objective.name=cispo", "objective.dual_clip=3.0"], "dual_clip has no use with"),
        (["objective.correction_floor=0.5"], "correction_floor has no use with"),
        (["objective.name=gspo"], r"recompute_old_logprobs = true, or objective\.clip_low"),
        (["objective.name=gspo", "objective.clip_low=0.02"], r"objective\.clip_low"),
        ([*SFT, "sampling.temperature=0.7"], r"remove sampling\.temperature"),
        (["sampling.stop=['a']", "sampling.stop_after=['a']"], r"'a' is in sampling\.stop and in"),
        (["sampling.stop=['']"], "every text contains it"),
        (["eval.samples=4"], "4 times the same"),
        (["eval.temperature=0.001"], r"below 0\.01 to 0\.01"),
        (["sampling.top_p=0.9"], r"sampling\.top_p = 0\.9 .* leave it at 1\.0"),
        (["sampling.top_k=20", *RAW[1:]], r"objective\.recompute_old_logprobs = true"),
        (["sampling.min_p=0.1", *RAW[:1]], r"objective\.correction = 'none'"),
        (["sampling.repetition_penalty=1.1"], r"sampling\.repetition_penalty = 1\.1 .* leave it at 1\.0"),
        (["eval.patience=3"], r"set eval\.every"),
    ],
)
def test_an_objective_that_cannot_be_right_is_refused(overrides, says):
    with pytest.raises(UserError, match=says) as caught:
        load(None, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [SFT, *([*RAW, f"sampling.{name}"] for name in ("top_p=0.9", "top_k=20", "min_p=0.1", "repetition_penalty=1.1"))]
    + [[f"objective.advantage={name}", "trainer.refill=1.0"] for name in ("group", "mean", "rloo", "batch")]
    + [["objective.dual_clip=3.0"], ["eval.patience=3", "eval.every=10"], ["eval.samples=4", "eval.temperature=1.0"]]
    + [["objective.name=gspo", one] for one in ("objective.recompute_old_logprobs=true", "model.dtype=float32")],
    ids=" ".join,
)
def test_an_objective_that_can_be_right_is_not(overrides):
    load(None, overrides)


def test_an_unreadable_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("a = [")
    with pytest.raises(UserError, match="no valid TOML"):
        load(tmp_path / "broken.toml")


def test_every_setting_that_is_set_is_the_setting_that_is_used(tmp_path):
    """Ancestor defect 6: five keys of the configuration were read and ignored."""
    recipe = load(None, ["optimizer.learning_rate=3e-5", "lora.dropout=0.2", "optimizer.max_grad_norm=0.5"])
    assert (recipe.optimizer.learning_rate, recipe.lora.dropout, recipe.optimizer.max_grad_norm) == (3e-5, 0.2, 0.5)


@pytest.mark.fault("H7")
def test_a_run_keeps_its_recipe_and_refuses_another(tmp_path):
    run, first = resolve_recipe(tmp_path / "run", None, ["seed=5"])
    assert resolve_recipe(tmp_path / "run", None, []) == (run, first)
    with pytest.raises(UserError, match=r"another \[seed\]"):
        resolve_recipe(tmp_path / "run", None, ["seed=6"])
    _, longer = resolve_recipe(tmp_path / "run", None, ["trainer.steps=300"])
    assert longer.trainer.steps == 300 and longer.seed == 5
