"""`python -m sampler --eval`, as a user starts it: real vLLM, real models, no trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from policy.canary import canary_sequences
from policy.logprobs import TokenLogprobs, pack
from policy.model import load_tokenizer, model_fingerprint
from protocol.errors import UserError
from protocol.evaluation import compare, read, summary
from protocol.metrics import read_metrics
from protocol.resolve import dump, load
from protocol.rundir import RunDir
from protocol.snapshot import Canary, Corrupt, Manifest, hash_file, seal, snapshot_id, staging
from sampler.candidate import find
from sampler.evaluate import run as evaluate
from sampler.rewards.answers import extracted, gold
from tests import warm
from tests.tiny import make_model

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
SMOL = ["--recipe", "recipes/demo.toml"]


def command(*options: str | Path) -> list[str]:
    return ["-m", "sampler", "--eval", *map(str, options)]


def evaluated(*options: str | Path) -> str:
    """What the command prints; it must succeed."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = warm.run(command(*options), environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
def test_smollm2_on_word_problems(tmp_path):
    """Every figure follows from the texts that are kept beside the result."""
    out = tmp_path / "base.json"
    settings = ["--limit", "12", "--set", "eval.samples=4", "--set", "eval.extractors=['heading','last']"]
    (tmp_path / "base.jsonl").write_text('{"old": true}\n')
    said = evaluated("smollm2-135m-instruct", *SMOL, *settings, "--out", out)
    found, rows = read(out), read_metrics(tmp_path / "base.jsonl")
    assert len(rows) == 48 and [one.row for one in found.prompts] == list(range(12))
    figures = summary(found)
    for prompt in found.prompts:
        texts = [row["completion"] for row in rows if row["row"] == prompt.row]
        by_text = [extracted(text, ["heading", "last"]) for text in texts]
        marks = [extracted(text, ["marks"])["marks"] for text in texts]
        assert prompt.correct == [answer == prompt.gold for answer in marks]
        assert prompt.answers["heading"] == [one["heading"] for one in by_text]
        assert prompt.answers["last"] == [one["last"] for one in by_text]
        assert prompt.truncated == [row["finish"] == "length" for row in rows if row["row"] == prompt.row]
    assert figures["accuracy"] == pytest.approx(sum(row["reward"] for row in rows) / 48)
    assert figures["accuracy"] >= figures["accuracy/heading"]  # `marks` pays for other marks too
    assert "smollm2-135m-instruct on word-problems:test: 12 prompts, 4 samples each, temperature 1" in said
    assert f"accuracy {figures['accuracy']:26.3f} [{figures['low']:.3f}, {figures['high']:.3f}]" in said
    assert "pass@4" in said and "maj@4" in said and "tokens/s" in said


@pytest.mark.long
@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}")
def test_smollm2_on_gsm8k(tmp_path):
    out = tmp_path / "gsm8k.json"
    settings = ["--limit", "8", "--set", "data.max_prompt_tokens=400", "--set", "sampling.max_tokens=64"]
    said = evaluated("smollm2-135m-instruct", *SMOL, "--data", GSM8K, *settings, "--out", out)
    golds = [gold(json.loads(line)["answer"]) for line in GSM8K.read_text().splitlines()[:8]]
    found = read(out)
    assert [one.gold for one in found.prompts] == [str(value) for value in golds]
    assert all(0 < count <= 64 for one in found.prompts for count in one.tokens)
    assert str(GSM8K) in said


# -- a run of a tiny model -------------------------------------------------------------------------------------------


def write_snapshot(rundir: RunDir, step: int, kind: str, base: Path, model: torch.nn.Module) -> Path:
    """As the trainer writes it; model: on disk its weights alone, or its adapter."""
    name = snapshot_id(step, 1)
    tokenizer = load_tokenizer(base)
    tokens = canary_sequences(tokenizer)
    rows = [np.asarray(row) for row in tokens]
    with torch.no_grad():
        inner = getattr(model, "base_model", model).model if kind == "adapter" else model
        scores, _ = TokenLogprobs(inner, 1.0, 64)(pack([(row[:1], [row[1:]]) for row in rows]))
    with staging(rundir.snapshots, name) as aside:
        model.save_pretrained(aside)
        (aside / "README.md").unlink(missing_ok=True)
        if kind == "full":
            tokenizer.save_pretrained(aside)
        manifest = Manifest(
            kind=kind,
            run_id="r",
            id=name,
            parent=None,
            step=step,
            incarnation=1,
            model=model_fingerprint(base),
            canary=Canary(tokens=tokens, logprobs=[part.tolist() for part in scores.split([len(r) - 1 for r in rows])]),
            files={path.name: hash_file(path) for path in aside.iterdir()},
        )
        seal(aside, rundir.snapshots / name, manifest)
    return rundir.snapshots / name


def adapted(base: Path) -> torch.nn.Module:
    """With an adapter that changes the model a lot."""
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def rundir(tmp_path_factory) -> RunDir:
    """Snapshot 1 is full and the best, snapshot 2 an adapter on the recipe's model."""
    directory = tmp_path_factory.mktemp("evaluate")
    base, result = make_model(directory / "model"), RunDir(directory / "run")
    result.make()
    rewards = Path(__file__).with_name("rewards_for_tests.py")
    recipe = load(
        None,
        [
            f"model.path={base}",
            "model.dtype=float32",
            'data.eval="word-problems:test"',
            "data.eval_limit=24",
            'data.system=""',
            "sampling.max_tokens=12",
            f'reward=[{{function="{rewards}:vowels"}}]',
            "eval.temperature=0.0",
            "sampler.max_running=16",
            "sampler.compile=false",
            "sampler.cpu_kv_cache_gb=0.1",
        ],
    )
    result.recipe.write_text(dump(recipe))
    full = AutoModelForCausalLM.from_pretrained(make_model(directory / "other", seed=1), dtype=torch.float32)
    path = write_snapshot(result, 1, "full", base, full)
    write_snapshot(result, 2, "adapter", base, adapted(base))
    result.best.symlink_to(Path("snapshots") / path.name)
    return result


def greedy(model: torch.nn.Module, base: Path, prompts: list[list[dict]]) -> list[str]:
    """12 tokens of each, by transformers."""
    tokenizer, said = load_tokenizer(base), []
    for messages in prompts:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            whole = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        said.append(tokenizer.decode(whole, skip_special_tokens=True).rstrip("\ufffd"))
    return said


@pytest.mark.long
def test_snapshots_of_a_run_are_evaluated_with_their_own_weights_and_compared(rundir, tmp_path):
    """Greedy, in float32: what is said is what transformers says with these weights, or with this adapter."""
    best, latest, base = tmp_path / "best.json", tmp_path / "latest.json", rundir.path.parent / "model"
    before = {path: path.read_bytes() for path in rundir.path.rglob("*") if path.is_file()}
    evaluated("best", "--run", rundir.path, "--out", best)
    said = evaluated("latest", "--run", rundir.path, "--out", latest, "--against", best)
    assert {path: path.read_bytes() for path in rundir.path.rglob("*") if path.is_file()} == before, "it only reads"
    assert (read(best).snapshot, read(best).step, read(latest).step) == (snapshot_id(1, 1), 1, 2)
    for out, model in ((best, AutoModelForCausalLM.from_pretrained(rundir.best)), (latest, adapted(base))):
        rows = sorted(read_metrics(out.with_suffix(".jsonl")), key=lambda row: row["row"])
        assert len(rows) == 24 and len(read(out).prompts) == 24
        completions = [row["completion"].rstrip("\ufffd") for row in rows]  # vLLM leaves out a torn last character
        expected = greedy(model, base, [row["prompt"] for row in rows])
        equal = sum(map(str.__eq__, completions, expected))
        assert equal >= 22 and any(completions)  # of 24: what is next to equally likely, another processor may say
    change = compare(read(best), read(latest))
    assert f"against {snapshot_id(1, 1)}: {change['difference']:+.3f} [" in said
    assert f"{change['wins']} prompts won, {change['losses']} lost" in said


def processes(word: str) -> list[psutil.Process]:
    """By a word in their environment; vLLM's overwrite theirs, so their ancestors' count too."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VESPER_TEST") == word and process.status() != psutil.STATUS_ZOMBIE:
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return [process for process in set(found) if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "number"), [("loading", signal.SIGINT), ("sampling", signal.SIGINT), ("sampling", signal.SIGKILL)]
)
def test_a_stop_leaves_no_process_and_no_result(rundir, tmp_path, moment, number):
    out, log = tmp_path / "never.json", tmp_path / "log"
    long = ["--set", "sampling.max_tokens=400", "--set", "eval.samples=64", "--set", "eval.temperature=1.0"]
    environment = os.environ | {"VESPER_TEST": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, *command("best", "--run", rundir.path, "--out", out, "--limit", "200", *long)]
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
    word = {"loading": "EngineCore", "sampling": "/200 prompts"}[moment]
    deadline = time.monotonic() + 600
    try:
        while word not in log.read_text() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert word in log.read_text(), log.read_text()[-3000:]
        started = processes(str(tmp_path))
        assert len(started) >= 3, "the check for leftovers would see nothing"
        process.send_signal(number)
        assert process.wait(200) == (130 if number == signal.SIGINT else -number), log.read_text()[-3000:]
    finally:
        process.kill()  # the others go with it
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive and not processes(str(tmp_path))
    assert not out.exists()
    if moment == "sampling":  # vLLM writes tracebacks of its own, in prefixed lines, and others while it loads
        assert "\nTraceback" not in log.read_text()


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_engine(monkeypatch):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the engine was loaded")

    monkeypatch.setattr("sampler.engine.AsyncLLM.from_engine_args", loaded)


def refused(rundir: RunDir, model: str, source: str = "word-problems:test", *overrides: str, against=None) -> str:
    candidate = find(model, rundir.path, None, list(overrides))
    with pytest.raises(UserError) as error:
        evaluate(candidate, source, 4, None, against)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_are_refused_before_the_engine_loads(rundir, tmp_path, no_engine, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bare.jsonl").write_text('{"question": "2 + 2?"}\n')
    (tmp_path / "holes.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n{"question": "3 + 3?"}\n')
    gsm8k = 'reward=[{function="gsm8k"}]'
    assert "no/such-model" in refused(rundir, "no/such-model")
    assert "is empty" in refused(rundir, "best", str(tmp_path / "empty.jsonl"))
    assert "needs the column 'answer'" in refused(rundir, "best", str(tmp_path / "bare.jsonl"), gsm8k)
    assert "has no gold answer" in refused(rundir, "best", str(tmp_path / "holes.jsonl"), gsm8k)
    assert "no held-out data" in refused(rundir, "best", "")


def test_an_adapter_of_another_base_is_refused(rundir, tmp_path, no_engine):
    other = make_model(tmp_path / "untied", tie=False)
    assert "was trained from another model than" in refused(
        rundir, "latest", "word-problems:test", f"model.path={other}"
    )


def test_other_prompts_are_refused_before_the_engine_loads(rundir, tmp_path, no_engine):
    from tests.test_evaluation import answered, evaluation

    before = evaluation([answered(0, [True])])
    assert "cannot compare: s00000003.i0001 answered 1 prompts of d" in refused(rundir, "best", against=before)


def test_a_damaged_snapshot_is_refused_before_the_engine_loads(rundir, no_engine):
    candidate = find("best", rundir.path, None, [])
    file = candidate.sealed.path / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(Corrupt, match="not the sealed"):
            evaluate(candidate, "word-problems:test", 4, None, None)
    finally:
        file.write_bytes(whole)


@pytest.mark.long
def test_a_reward_that_always_fails_gives_no_accuracy(rundir, tmp_path):
    (tmp_path / "broken.py").write_text("def broken(completions, **columns):\n    raise ValueError('no grader')\n")
    override = f'reward=[{{function="{tmp_path}/broken.py:broken"}}]'
    options = command("best", "--run", rundir.path, "--limit", "2", "--set", override, "--out", tmp_path / "out.json")
    done = warm.run(options, os.environ)
    assert done.returncode == 2 and not (tmp_path / "out.json").exists()
    assert "error: no prompt has a result: reward broken: error: ValueError: no grader" in done.stderr
