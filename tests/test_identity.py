"""Who may join a run: only the same run, protocol, model, tokenizer and data, on one port with one trainer."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from policy.agreement import agree
from protocol import codec
from protocol.channel import Hub, Uplink
from protocol.cli import exit_with
from protocol.errors import Rejected, Superseded, UserError
from protocol.keys import open_keys
from protocol.messages import PROTOCOL, Agreement, DataSet, Hello, Rejection, Welcome
from protocol.recipe import Data
from protocol.resolve import load
from protocol.rundir import RunDir, resolve_recipe
from sampler.prompts import fingerprint, load_prompts
from sampler.session import Load, Session
from tests.tiny import make_model, make_tokenizer
from trainer.desk import Desk

RECIPE = load(None, ["data.system=", "data.max_prompt_tokens=4096"])
NOBODY = DataSet(rows=5, fingerprint="")
ROWS = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ours(model) -> Agreement:
    return agree("run", model, make_tokenizer(), RECIPE)


def verdict(trainer: Agreement, sampler: Agreement, theirs: DataSet = NOBODY, known: DataSet | None = None):
    """What the trainer answers to a sampler's hello; `known` is the data that the run has so far."""
    desk = Desk(recipe=RECIPE, agreement=trainer, incarnation=1)
    desk.sets = {"train": known, "eval": NOBODY} if known else {}
    hello = Hello(session="one", agreement=sampler, train=theirs, eval=NOBODY)
    return desk.on(b"peer", hello, 0.0)[0][1]


# -- H1: another run ---------------------------------------------------------------------------------------------


@pytest.mark.fault("H1")
def test_a_sampler_of_another_run_is_refused_by_the_run_id_and_ends_with_3_for_good(ours):
    answer = verdict(ours, msgspec.structs.replace(ours, run_id="older"))
    assert answer == Rejection(why="run_id differs: the trainer has run, this sampler older")
    session = Session("one", RECIPE.network, ours, {"train": NOBODY, "eval": NOBODY}, lambda _: Load(None, 0, 0), {})
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: session.on(answer))
    assert ended.value.code == Rejected.exit_code == 3


@pytest.mark.fault("H1")
def test_the_keys_of_another_run_open_nothing(tmp_path):
    """So a sampler whose run directory was left by an older run is not even heard."""

    async def knocks(keys, tries: int) -> bool:
        uplink = Uplink(keys, hub.address)
        sent = False
        while tries and not sent:
            sent, tries = await uplink.send(Hello(session="x", agreement=agreed, train=NOBODY, eval=NOBODY)), tries - 1
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # what was sent leaves before the socket is closed
        uplink.close()
        return sent

    agreed = Agreement(protocol=1, run_id="r", model="m", tokenizer="t", vocabulary=1, group_size=1, recipe="c")
    older, newer = open_keys(tmp_path / "older"), open_keys(tmp_path / "newer")
    assert older.run_id != newer.run_id
    with Hub(newer, "127.0.0.1", 0) as hub:
        asyncio.run(knocks(older, tries=20))
        assert hub.receive(0.2) is None
        assert asyncio.run(knocks(newer, tries=300)) and hub.receive(15.0)


# -- H2, H3: two trainers ----------------------------------------------------------------------------------------


@pytest.mark.fault("H2")
def test_a_second_trainer_on_a_taken_port_ends_with_69_and_claims_nothing(tmp_path, model):
    """A real trainer process. Had it claimed an incarnation first, the running trainer would have given up for it."""
    run = RunDir(tmp_path / "run")
    run.make()
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    with Hub(open_keys(run.keys), "127.0.0.1", 0) as hub, socket.socket() as free:
        first = run.claim_incarnation()
        free.bind(("127.0.0.1", 0))
        place["MASTER_PORT"] = free.getsockname()[1]
        free.close()
        port = hub.address.rpartition(":")[2]
        command = [sys.executable, "-m", "trainer", "--run", str(run.path), "--set", f"network.port={port}"]
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command += ["--set", f"model.path={model}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 69, done.stderr[-2000:]
    assert f"error: port {port} on 127.0.0.1 is taken" in done.stderr
    assert run.newest_incarnation() == first
    run.refuse_if_superseded(first)


@pytest.mark.fault("H3")
def test_of_trainers_in_one_run_directory_only_the_last_to_claim_may_write(tmp_path):
    """Before every write of weights each looks for a higher number than its own."""
    run = RunDir(tmp_path)
    run.make()
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: RunDir(tmp_path).claim_incarnation(), range(40)))
    assert sorted(claimed) == list(range(1, 41))  # no number was given twice
    for number in range(1, 40):
        with pytest.raises(Superseded, match=f"incarnation 40 took over .*; this is {number}") as caught:
            run.refuse_if_superseded(number)
        assert caught.value.exit_code == 75
    run.refuse_if_superseded(40)


# -- H4: the endpoint --------------------------------------------------------------------------------------------


@pytest.mark.fault("H4")
@pytest.mark.parametrize("address", ["ipc:///tmp/vesper.sock", "/tmp/vesper.sock", "inproc://hub"])
def test_only_tcp_can_be_bound_so_no_socket_file_can_be_taken_over(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        Hub(open_keys(tmp_path / "keys"), address, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


# -- H5: versions of the protocol --------------------------------------------------------------------------------


@pytest.mark.fault("H5")
@pytest.mark.parametrize(("trainer", "sampler"), [(1, 2), (2, 1), (1, 1), (2, 2)])
def test_another_version_is_refused_and_both_are_named(ours, trainer, sampler):
    one, other = (msgspec.structs.replace(ours, protocol=version) for version in (trainer, sampler))
    answer = verdict(one, other)
    if trainer == sampler:
        assert isinstance(answer, Welcome)
    else:
        assert answer == Rejection(why=f"protocol differs: the trainer has {trainer}, this sampler {sampler}")


@pytest.mark.fault("H5")
def test_a_hello_with_fields_of_a_later_version_is_refused_and_not_dropped(ours):
    """Dropped as malformed, that sampler would wait for an hour and never learn why."""
    later = {
        "type": "hello",
        "session": "one",
        "agreement": {"protocol": PROTOCOL + 1, "run_id": "run", "quantization": [8, {"a": None}]},
        "shards": {"train": 3},
    }
    hello = codec.decode_up(msgspec.msgpack.encode(later))
    assert verdict(ours, hello.agreement).why.endswith(f"the trainer has {PROTOCOL}, this sampler {PROTOCOL + 1}")
    later["agreement"]["protocol"] = PROTOCOL
    with pytest.raises(codec.Malformed):
        codec.decode_up(msgspec.msgpack.encode(later))


# -- H6, H8, I5: model, tokenizer, template, data ----------------------------------------------------------------


def changed_tokenizer(change) -> PreTrainedTokenizerFast:
    """`change` gets the tokenizer's JSON."""
    tokenizer = make_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    change(described)
    changed = Tokenizer.from_str(json.dumps(described))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=changed, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = tokenizer.chat_template
    return fast


@pytest.mark.fault("H6")
@given(st.integers(0, 10_000), st.sampled_from("abc {}\n"))
def test_one_changed_character_of_the_chat_template_is_refused(model, ours, place, character):
    tokenizer = make_tokenizer()
    template = tokenizer.chat_template
    place %= len(template)
    tokenizer.chat_template = template[:place] + character + template[place + 1 :]
    answer = verdict(ours, agree("run", model, tokenizer, RECIPE))
    if tokenizer.chat_template == template:
        assert isinstance(answer, Welcome)
    else:
        assert isinstance(answer, Rejection) and answer.why.startswith("tokenizer differs")


@pytest.mark.fault("H6")
def test_another_vocabulary_or_end_token_is_refused(model, ours):
    more = make_tokenizer()
    more.add_tokens(["<one more>"])
    other_end = make_tokenizer()
    other_end.eos_token = "<|im_start|>"
    for tokenizer in (more, other_end):
        assert verdict(ours, agree("run", model, tokenizer, RECIPE)).why.startswith("tokenizer differs")


@pytest.mark.fault("H6")
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "rms_norm_eps"])
def test_another_model_configuration_is_refused(tmp_path, model, ours, key):
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: config[key] * 2}))
    answer = verdict(ours, agree("run", tmp_path, make_tokenizer(), RECIPE))
    assert isinstance(answer, Rejection) and answer.why.startswith(("model differs", "vocabulary differs"))


def data_set(directory: Path, rows: list[dict], tokenizer) -> DataSet:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(str(path), 0, Data(system="", max_prompt_tokens=4096), tokenizer)
    return DataSet(rows=len(prompts), fingerprint=fingerprint(prompts))


@pytest.mark.fault("H6", "I5")
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("pre_tokenizer", {"add_prefix_space": True}),
        ("normalizer", {"type": "Replace", "pattern": {"String": "?"}, "content": "!"}),  # as many tokens, others
    ],
)
def test_a_tokenizer_that_cuts_text_otherwise_is_found_by_the_prompts_it_makes(tmp_path, model, ours, part, change):
    """Same words, same template: the handshake compares the token ids of all prompts as well."""
    other = changed_tokenizer(lambda described: described.update({part: (described[part] or {}) | change}))
    theirs = agree("run", model, other, RECIPE)
    assert theirs == ours
    known = data_set(tmp_path, ROWS, make_tokenizer())
    answer = verdict(ours, theirs, data_set(tmp_path, ROWS, other), known)
    assert isinstance(answer, Rejection) and answer.why.startswith("train data differ")


@pytest.mark.fault("H8", "I5")
@given(st.integers(0, 4), st.sampled_from(["question", "answer"]), st.integers(0, 30), st.characters(codec="ascii"))
def test_one_changed_character_of_the_data_is_refused(tmp_path_factory, ours, row, column, place, character):
    tokenizer, directory = make_tokenizer(), tmp_path_factory.mktemp("data")
    rows = [dict(one) for one in ROWS]
    text = rows[row][column]
    place %= len(text) + 1
    rows[row][column] = text[:place] + character + text[place + 1 :]
    answer = verdict(ours, ours, data_set(directory, rows, tokenizer), data_set(directory, ROWS, tokenizer))
    if rows == ROWS:
        assert isinstance(answer, Welcome)
    else:
        assert isinstance(answer, Rejection) and answer.why.startswith("train data differ: this run has 5 rows")


@pytest.mark.fault("H8")
def test_rows_in_another_order_or_number_are_other_data(tmp_path, ours):
    tokenizer = make_tokenizer()
    known = data_set(tmp_path, ROWS, tokenizer)
    for rows in (ROWS[::-1], ROWS[:-1], [*ROWS, ROWS[0]]):
        assert isinstance(verdict(ours, ours, data_set(tmp_path, rows, tokenizer), known), Rejection)


# -- H7: the recipe ----------------------------------------------------------------------------------------------

OTHER = {
    "seed": "seed=6",
    "model": "model.path=other",
    "lora": "lora.rank=8",
    "data": "data.train=other.jsonl",
    "sampling": "sampling.group_size=4",
    "reward": 'reward=[{function="format_think_answer"}]',
}


@pytest.mark.fault("H7")
@pytest.mark.parametrize("table", OTHER)
def test_what_the_history_hangs_on_cannot_change_and_both_values_are_shown(tmp_path, table):
    _, before = resolve_recipe(tmp_path / "run", None, [])
    after = load(None, [OTHER[table]])
    kept = (tmp_path / "run" / "recipe.toml").read_bytes()
    with pytest.raises(UserError, match=rf"another \[{table}\]") as caught:
        resolve_recipe(tmp_path / "run", None, [OTHER[table]])
    assert repr(getattr(before, table)) in str(caught.value) and repr(getattr(after, table)) in str(caught.value)
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == kept


@pytest.mark.fault("H7")
@pytest.mark.parametrize("override", ["trainer.steps=999", "optimizer.learning_rate=1e-5", "network.beat_s=1.0"])
def test_other_settings_may_change_when_a_run_is_resumed(tmp_path, override):
    resolve_recipe(tmp_path / "run", None, [])
    _, after = resolve_recipe(tmp_path / "run", None, [override])
    assert after == load(None, [override]) == load(tmp_path / "run" / "recipe.toml")


# -- H10: libraries ----------------------------------------------------------------------------------------------


@pytest.mark.fault("H10")
def test_the_versions_on_a_samplers_side_are_in_the_trainers_log(ours, caplog):
    caplog.set_level(logging.INFO)
    desk = Desk(recipe=RECIPE, agreement=ours, incarnation=1)
    hello = Hello(session="one", agreement=ours, train=NOBODY, eval=NOBODY, versions={"vllm": "0.32.1"})
    desk.on(b"peer", hello, 0.0)
    assert "'vllm': '0.32.1'" in caplog.text
