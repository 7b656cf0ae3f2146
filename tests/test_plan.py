"""What a run needs, foretold: the arithmetic against torch's and peft's own, the verdict, and the command itself."""

import json
import os
import re
import shutil
import socket
from dataclasses import replace as replace_shape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import Qwen2Config

from launch.plan import machine
from launch.plan.command import Plan, look_at_exchange, main
from launch.plan.lengths import lengths, refusals
from launch.plan.need import activations, of_engine, of_host, of_rank
from launch.plan.placement import place
from launch.plan.proposal import nearest
from launch.plan.shape import Shape, shape_of
from launch.plan.storage import storage_need
from launch.plan.surroundings import filesystem, free_bytes, unbindable, unwritable, versions
from policy.logprobs import pack
from policy.model import add_adapter, load_model
from protocol.errors import UserError
from protocol.memory import GIB
from protocol.resolve import load
from tests.tiny import make_model

PROMPT = 96


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Shape:
    """Qwen2.5-1.5B's own numbers; no weights."""
    directory = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    config.save_pretrained(directory)
    return shape_of(directory)


def test_the_shape_is_the_models(qwen):
    assert qwen.parameters == 1_543_714_304  # as its model card and its safetensors say
    assert (qwen.query, qwen.key, qwen.tied, qwen.context) == (1536, 256, True, 32768)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*\.k_proj"])
def test_adapters_are_counted_as_peft_makes_them(tiny, targets):
    lora = replace(load(None, ["lora.rank=4"]).lora, targets=targets)
    model = load_model(tiny, "float32")
    add_adapter(model, lora)
    made = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert shape_of(tiny).adapter(lora) == made > 0


def kept_by_autograd(directory: Path, dtype: str, tokens: int, attention: str) -> int:
    """Bytes that are kept for the backward pass through all layers, beside the weights; half of it is a prompt."""
    model, kept = load_model(directory, dtype).train(), {}
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    alive = []

    def keep(tensor):
        alive.append(tensor)  # else its address is used again
        storage = tensor.untyped_storage()
        kept.update({} if storage.data_ptr() in own else {storage.data_ptr(): storage.nbytes()})
        return tensor

    half = np.zeros(tokens // 2, np.int64)
    packed = pack([(half, [np.append(half, 0)])])
    model.set_attn_implementation(attention)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if attention == "varlen":
            seen = {"segments": packed.segments}
        else:
            seen = {"attention_mask": packed.segments.mask(packed.input_ids.shape[1], model.dtype)}
        model.base_model(packed.input_ids, position_ids=packed.position_ids, use_cache=False, **seen)
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [64, 512])
def test_activations_are_what_autograd_keeps(tiny, dtype, tokens, attention):
    wanted = {"model.dtype": dtype, "trainer.attention": attention, "sampling.max_tokens": tokens // 2}
    recipe = load(None, ["trainer.gradient_checkpointing=false", *(f"{key}={value}" for key, value in wanted.items())])
    kept = kept_by_autograd(tiny, dtype, tokens, attention)
    assert kept == pytest.approx(activations(shape_of(tiny), recipe, tokens, prompt=tokens // 2), rel=0.12)


def test_a_rank_keeps_twenty_bytes_a_parameter_and_less_with_more_ranks(qwen):
    """Rajbhandari et al. (arXiv 1910.02054) have 16; float32 sums of gradients in place of 16 bits are 4 more."""

    def state(*overrides: str) -> float:
        need = of_rank(qwen, load(None, list(overrides)), PROMPT, "cpu")
        return sum(need[part] for part in ("weights", "gradients", "optimizer")) / qwen.parameters

    assert state("trainer.gpus=1") == pytest.approx(20)
    assert state("trainer.gpus=4") == pytest.approx(2 + 6 + 12 / 4)
    assert state("trainer.gpus=4", "trainer.zero_stage=2") < state("trainer.gpus=4")
    assert state("lora.rank=16", "trainer.gpus=1") < 2.5
    packed = state("lora.rank=16", "trainer.gpus=1", "model.quantize=nf4")
    assert 0.5 < packed < 1.5


def test_buffers_for_the_exchange_follow_the_models_size(qwen):
    """DeepSpeed's own would take 1 GB of each rank for 50 MB of adapters."""

    def gradients(*overrides: str) -> float:
        return of_rank(qwen, load(None, ["trainer.gpus=4", *overrides]), PROMPT, "gpu")["gradients"] / GIB

    assert gradients("lora.rank=16", "trainer.zero_stage=2") < 0.05
    two = 4 * qwen.parameters / 4 / GIB  # the sums of one rank
    assert gradients("trainer.zero_stage=2") == pytest.approx(two + (4 * 50e6 + 2 * 151936 * 1536) / GIB)
    assert gradients("trainer.zero_stage=3", "trainer.backend=gloo") - gradients(
        "trainer.zero_stage=3", "trainer.backend=nccl"
    ) == pytest.approx(4 * (151936 * 1536 - 50e6) / GIB)


def test_gloo_keeps_host_memory(qwen):
    gloo, other = (of_host(qwen, load(None, [f"trainer.backend={name}"])) for name in ("gloo", "auto"))
    assert gloo - other == pytest.approx(2 * 12 * qwen.parameters)
    adapters = load(None, ["trainer.backend=gloo", "lora.rank=16"])
    assert of_host(qwen, adapters) < other + GIB


def test_much_to_exchange_over_gloo_is_warned_of(qwen):
    def doubts(*overrides: str) -> list[str]:
        plan = Plan(recipe=load(None, ["trainer.backend=gloo", *overrides]), machine=machine.described(3, 32))
        look_at_exchange(plan, qwen, PROMPT)
        return plan.doubtful

    [doubt] = doubts("trainer.zero_stage=3")
    assert "trainer.zero_stage = 1 sends 7.72" in doubt and "adapters" in doubt
    assert not doubts() and not doubts("trainer.zero_stage=2", "lora.rank=16") and not doubts("trainer.gpus=1")
    assert "adapters" not in doubts("trainer.zero_stage=3", "lora.rank=16")[0]


def test_what_is_longer_or_larger_needs_more(qwen):
    def total(*overrides: str) -> float:
        """With adapters, else the optimizer's step needs most."""
        return sum(of_rank(qwen, load(None, ["lora.rank=16", *overrides]), PROMPT, "gpu").values())

    assert total("trainer.tokens_per_micro_batch=16384") > total() > total("trainer.tokens_per_micro_batch=4096")
    assert total("trainer.gradient_checkpointing=false") > 1.8 * total()
    assert total("trainer.attention=sdpa") > total()
    assert total("trainer.logits_chunk=1024") > total() > total("trainer.logits_chunk=64")


def test_an_engine_holds_a_reference_only_where_somebody_asks_for_it(qwen):
    assert "reference" in of_engine(qwen, load(None), PROMPT, 32 * GIB)
    for without in ("objective.kl_beta=0.0", "lora.rank=16"):
        assert "reference" not in of_engine(qwen, load(None, [without]), PROMPT, 32 * GIB)


def test_the_seed_experiment_fits_three_gpus_of_32_gb_and_not_of_12(qwen):
    recipe = load(Path("recipes/gsm8k.toml"))
    assert not place(qwen, recipe, machine.described(3, 32), 512).problem
    small = machine.described(3, 12)
    assert "GiB needed" in place(qwen, recipe, small, 512).problem
    changes, found = nearest(Path("recipes/gsm8k.toml"), [], qwen, small, 512)
    assert "lora.rank=32" in changes and not found.problem
    assert nearest(Path("recipes/gsm8k.toml"), [], qwen, machine.described(3, 2), 512) is None


def test_what_changes_nothing_in_the_result_is_proposed_first(qwen):
    needs = sum(of_rank(qwen, load(None), 512, "gpu").values()) / GIB
    changes, _ = nearest(None, [], qwen, machine.described(3, needs), 512)
    assert changes and all("lora" not in change and "kl_beta" not in change for change in changes)


def test_an_engine_gets_more_of_its_gpu_or_more_gpus_where_the_weights_leave_no_room(qwen):
    adapters = Path("recipes/gsm8k-lora.toml")
    little, enough = ["sampler.gpu_memory=0.3"], machine.described(3, 14)
    assert place(qwen, load(adapters, little), enough, 300).problem.startswith("the KV cache does not hold")
    assert nearest(adapters, little, qwen, enough, 300)[0] == ["sampler.gpu_memory=0.45"]
    wide = replace_shape(qwen, parameters=15_000_000_000)
    changes, found = nearest(adapters, [], wide, machine.described(6, 32), 300)
    assert {"sampler.gpus=2", "sampler.tensor_parallel=2"} <= set(changes) and not found.problem
    odd = replace_shape(wide, heads=13)  # vLLM divides them
    assert nearest(adapters, [], odd, machine.described(6, 32), 300) is None


def test_where_gpus_are_few_both_workers_share_them(qwen):
    [gpu, _] = place(qwen, load(None), machine.described(1, 80), 512).devices
    apart = place(qwen, load(None), machine.described(3, 80), 512)
    assert gpu.needed == pytest.approx(sum(one.needed for one in apart.devices[:3]))


def test_a_full_checkpoint_is_as_large_as_deepspeed_writes_it():
    """SmolLM2-135M with two ranks: 1883324847 bytes; adapters of rank 16: 125334279."""
    shape = Shape(
        parameters=134_515_008,
        tied=True,
        layers=30,
        hidden=576,
        inner=1536,
        heads=9,
        query=576,
        key=192,
        vocabulary=49152,
        context=8192,
        linears={f"{n}.{m}": size for n in range(30) for m, size in enumerate(LLAMA)},
    )
    assert storage_need(shape, load(None)).checkpoint == pytest.approx(1_883_324_847, rel=0.01)
    assert storage_need(shape, load(None, ["lora.rank=16"])).checkpoint == pytest.approx(125_334_279, rel=0.01)


LLAMA = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]


def test_lengths_that_cannot_work_are_refused_with_the_way_out():
    found = [("rows", lengths([10, 20, 30, 600], 512))]
    assert found[0][1].words() == "4 rows, tokens p50 30, p95 600, max 600"
    [line] = refusals(found, load(None), 4096)
    assert "1 of 4 prompts" in line and "data.max_prompt_tokens = 600" in line
    [line] = refusals([("rows", lengths([10, 20], 512))], load(None), 800)
    assert "1024 tokens, more than the model's 800" in line and "set data.max_prompt_tokens = 288" in line
    [line] = refusals([("rows", lengths([400], 512))], load(None), 800)
    assert "set sampling.max_tokens = 288" in line


def test_addresses_and_directories_are_tried(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in unbindable("127.0.0.1", taken.getsockname()[1])
    assert unbindable("127.0.0.1", 0) is None
    assert "network.bind" in unbindable("192.0.2.1", 0)  # of nobody (RFC 5737)
    assert unwritable(tmp_path / "a" / "b") is None
    (tmp_path / "file").touch()
    assert "is a file" in unwritable(tmp_path / "file")
    assert filesystem(tmp_path / "a")[0] != "unknown"


def test_versions_are_those_of_the_tested_ranges():
    found, doubts = versions(load(None, ["lora.rank=4"]))
    assert {"torch", "transformers", "deepspeed", "peft"} <= set(found)
    assert not doubts


def recipe_of(directory: Path, model: Path) -> Path:
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(40)))
    text = f'[model]\npath = "{model}"\n[data]\ntrain = "{rows}"\neval = ""\nsystem = ""\n[objective]\nkl_beta = 0.0\n'
    path = directory / "recipe.toml"
    path.write_text(text)
    return path


def test_the_command_says_what_a_run_needs(tmp_path, tiny, capsys):
    recipe = recipe_of(tmp_path, tiny)
    assert main([str(recipe), "--run", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"activations: [\d.]+ GiB with gradient checkpointing, [\d.]+ without; now with\n", out)
    for words in (
        "40 rows",
        "sampler x1",
        "rank x2",
        "optimizer",
        "KV cache",
        "128 completions",
        "exchange",
        "this can run",
    ):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_read_do_not_hide_the_rest(tmp_path, tiny, capsys):
    recipe = recipe_of(tmp_path, tiny)
    assert main([str(recipe), "--run", str(tmp_path / "run"), "--set", f"data.train={tmp_path}/none.jsonl"]) == 2
    out = capsys.readouterr().out
    assert "refused   cannot read the data set" in out and "optimizer" in out


def test_a_model_of_another_kind_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    with pytest.raises(UserError, match="intermediate_size"):
        shape_of(tmp_path)


def test_the_command_refuses_with_one_line_each_and_exit_code_2(tmp_path, tiny, capsys):
    recipe = recipe_of(tmp_path, tiny)
    wrong = ["sampling.max_tokens=4096", "network.bind=192.0.2.1", "sampler.cpu_kv_cache_gb=100000"]
    flags = [part for change in wrong for part in ("--set", change)]
    assert main([str(recipe), "--run", str(tmp_path / "run"), *flags]) == 2
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused")]
    assert len(refused) == 3 and "192.0.2.1" in refused[-1] and "positions" in refused[0]
    with pytest.raises(UserError, match="--gpu-gb and --gpus"):
        main([str(recipe), "--gpus", "2"])
    with pytest.raises(UserError, match="--gpus 0 --gpu-gb 24: expected at least one GPU"):
        main([str(recipe), "--gpus", "0", "--gpu-gb", "24"])


def test_the_same_rows_for_training_and_evaluation_are_warned_of_with_each_limit(tmp_path, tiny, capsys):
    recipe = recipe_of(tmp_path, tiny)
    flags = ["--set", f"data.eval={tmp_path}/rows.jsonl", "--set", "data.eval_limit=7"]
    assert main([str(recipe), "--run", str(tmp_path / "run"), *flags]) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl: 40 rows" in out and "rows.jsonl: 7 rows" in out
    assert "warning   data.train and data.eval are both" in out


def test_what_vanishes_while_a_disk_is_measured_counts_nothing(tmp_path, monkeypatch):
    for name in ("gone", "kept"):
        (tmp_path / name).write_bytes(bytes(5000))
    (tmp_path / "link").symlink_to("kept")
    walk = os.walk

    def listed_then_removed(path):
        for folder in walk(path):
            (tmp_path / "gone").unlink(missing_ok=True)
            yield folder

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    monkeypatch.setattr(os, "walk", listed_then_removed)
    assert free_bytes(tmp_path) == 5001
