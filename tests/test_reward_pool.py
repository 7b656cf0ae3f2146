"""Real processes under real bad functions: each ends in time, is named, never becomes a 0."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from protocol.errors import UserError
from protocol.recipe import Reward
from sampler.rewards import process
from sampler.rewards.pool import RewardFailed, RewardPool, Score

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 0.4
FUNCTIONS = """
import asyncio, ctypes, itertools, json, os, re, subprocess, sys, time

def loop(completions, **columns):
    while True:
        pass

def regex(completions, **columns):
    re.match(r"(a+)+$", "a" * 60 + "b")

def c_loop(completions, **columns):
    all(itertools.repeat(True))  # holds the interpreter lock: no signal, no thread gets in

def asleep(completions, **columns):
    time.sleep(60)

def exit_now(completions, **columns):
    os._exit(3)

def crash(completions, **columns):
    ctypes.string_at(0)

def raises(completions, **columns):
    if completions:
        raise KeyError("gold")

def leaves(completions, **columns):
    sys.exit("enough")

def bomb(completions, **columns):
    return [bytearray(1 << 40)]

def sub_processes(completions, pids, **columns):
    ours = [subprocess.Popen(["sleep", "300"], start_new_session=own) for own in (False, True)]
    with open(pids[0] + ".part", "w") as file:
        file.write(" ".join(str(pid) for pid in (os.getpid(), *(one.pid for one in ours))))
    os.rename(pids[0] + ".part", pids[0])
    while True:
        pass

def forks(completions, pids, **columns):
    for _ in range(5):
        os.fork()
    os.getpid() == os.getsid(0) or os.setsid()
    with open(pids[0], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(60)

def chain(completions, pids, **columns):
    if os.fork():
        time.sleep(60)
    begin = time.monotonic()
    while time.monotonic() < begin + 20:
        os.setsid()
        with open(pids[0], "a") as file:
            file.write(f"{os.getpid()}\\n")
        if os.fork():
            os._exit(0)
        time.sleep(0.002)
    os._exit(0)

def deserter(completions, pids, **columns):
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    with open(pids[0], "w") as file:
        file.write(str(child.pid))
    os._exit(3)

def crowd(completions, pids, **columns):
    children = [subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(30)]
    with open(pids[0], "w") as file:
        file.write(" ".join(str(child.pid) for child in children))
    time.sleep(60)

def endless_file(completions, **columns):
    with open("large", "w") as file:
        file.truncate(1 << 40)  # a hole, if it were allowed

def handles(completions, **columns):
    raise ValueError([os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1]])

def text(completions, **columns):
    return ["1.0" for _ in completions]

def nan(completions, **columns):
    return [float("nan") for _ in completions]

def infinite(completions, **columns):
    return [1e400 for _ in completions]

def short(completions, **columns):
    return [1.0]

def nothing(completions, **columns):
    pass

def huge(completions, **columns):
    return [10 ** 400 for _ in completions]

def never(completions, **columns):
    return [None for _ in completions]

def first_only(completions, **columns):
    return [1.0] + [None] * (len(completions) - 1)

def length(completions, scale=1.0):
    return [scale * len(text[-1]["content"]) for text in completions]

async def waits(prompts, completions, **columns):
    await asyncio.sleep(0.01)
    return [True, 2][: len(completions)]

def chatty(completions, **columns):
    print("{'values': [9]}")
    os.write(1, b'{"values": [9]}\\n')
    subprocess.run(["echo", "noise"])
    return [float(len(sys.stdin.read()))] * len(completions)

def seen(completions, **columns):
    raise ValueError(json.dumps([dict(os.environ), os.getcwd(), os.listdir()]))

def echo(prompts, completions, **columns):
    raise ValueError(json.dumps([prompts, completions, columns]))

def identity(completions, **columns):
    return [os.getpid()] * len(completions)

def slow_for(completions, seconds, **columns):
    time.sleep(seconds[0])
    return [seconds[0]] * len(completions)
"""

LINE = str(FUNCTIONS.partition("raise KeyError")[0].count("\n") + 1)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def with_pool(rewards: list[Reward], use: Callable[[RewardPool], Awaitable], workers: int = 1, **settings):
    async def main():
        async with RewardPool(rewards, workers, **settings) as pool:
            return await use(pool)

    return asyncio.run(main())


def score(rewards: list[Reward], completions=("#### 4", "#### 5"), columns=None, **settings) -> Score:
    prompt = [{"role": "user", "content": "2 + 2?"}]
    columns = {"answer": "#### 4"} if columns is None else columns
    return with_pool(rewards, lambda pool: pool.score(prompt, list(completions), columns), **settings)


def failure(reward: Reward, **settings) -> RewardFailed:
    with pytest.raises(RewardFailed) as failed:
        score([reward], **settings)
    return failed.value


def gone(pid: int) -> bool:
    """Within two seconds; a zombie that nobody has buried yet counts as gone."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_rewards_are_weighted_sums_and_each_function_is_kept(mine):
    rewards = [Reward(function="gsm8k"), Reward(function=f"{mine}:length", weight=0.5)]
    got = score(rewards, ["#### 4", "#### 55"])
    assert got.by_function == {"gsm8k": [1.0, 0.0], "length": [6.0, 7.0]}
    assert got.rewards == [4.0, 3.5]


def test_options_reach_the_function(mine):
    rewards = [
        Reward(function="gsm8k", options={"correct": 1.0, "wrong": -1.0}),
        Reward(function=f"{mine}:length", options={"scale": 2.0}),
    ]
    assert score(rewards).by_function == {"gsm8k": [1.0, -1.0], "length": [12.0, 12.0]}


def test_a_function_that_does_not_apply_is_left_out_of_the_sum(mine):
    got = score([Reward(function="gsm8k"), Reward(function=f"{mine}:first_only", weight=10)])
    assert got.by_function["first_only"] == [1.0, None]
    assert got.rewards == [11.0, 0.0]


def test_a_completion_to_which_nothing_applies_fails_the_group(mine):
    failed = failure(Reward(function=f"{mine}:never"))
    assert (failed.function, failed.kind) == ("never", "not_applicable")
    assert failure(Reward(function=f"{mine}:first_only")).why.endswith("completion 1")


def test_an_unreadable_gold_answer_fails_the_group_instead_of_marking_it_wrong():
    assert failure(Reward(function="gsm8k"), columns={"answer": "?"}).kind == "not_applicable"


def test_asynchronous_functions_and_whole_numbers_are_welcome(mine):
    assert score([Reward(function=f"{mine}:waits")]).rewards == [1.0, 2.0]


def test_functions_get_conversations_and_columns_as_lists(mine):
    failed = failure(Reward(function=f"{mine}:echo"), completions=["x", "y"], columns={"answer": 7})
    assert (
        '[[[{"role": "user", "content": "2 + 2?"}], [{"role": "user", "content": "2 + 2?"}]], '
        '[[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]], '
        '{"answer": [7, 7]}]'
    ) in failed.why


def test_text_behind_a_plain_prompt_stays_text():
    use = lambda pool: pool.score("2 + 2?", ["#### 4"], {"answer": "4"})  # noqa: E731
    assert with_pool([Reward(function="gsm8k")], use).rewards == [1.0]


@pytest.mark.fault("K1")
@pytest.mark.parametrize("name", ["loop", "regex", "c_loop", "asleep"])
def test_a_hung_function_is_killed_in_time_and_its_worker_replaced(mine, name):
    async def use(pool: RewardPool):
        start = time.monotonic()
        with pytest.raises(RewardFailed) as failed:
            await pool.score("", ["x"], {"answer": "4"})
        assert (failed.value.function, failed.value.kind) == (name, "timeout")
        assert DEADLINE_S <= time.monotonic() - start < DEADLINE_S + 60
        again = asyncio.create_task(pool.score("", ["x"], {"answer": "4"}))
        with pytest.raises(RewardFailed, match="timeout"):
            await again
        return pool.counters()

    counters = with_pool([Reward(function=f"{mine}:{name}", timeout_s=DEADLINE_S)], use)
    assert counters[f"{name}/timeouts"] == 2
    assert counters[f"{name}/values"] == 0


@pytest.mark.fault("K2", "K3", "K4")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", r"KeyError: 'gold' \(mine.py:LINE\)"),
        ("leaves", "SystemExit: enough"),
        ("bomb", "MemoryError"),
        ("exit_now", r"the process ended \(exit code 3\)"),
        ("crash", r"the process ended \(killed by SIG(SEGV|BUS)\)"),
        ("text", r"value 0 is '1.0' \(str\), expected float, int or None"),
        ("nan", "value 0 is nan, expected a finite number"),
        ("infinite", "value 0 is inf"),
        ("huge", "OverflowError"),
        ("short", "1 values for 2 completions"),
        ("nothing", "returned NoneType, expected a list"),
    ],
)
def test_a_bad_function_fails_its_group_by_name_and_the_pool_goes_on(mine, name, why):
    async def use(pool: RewardPool):
        for _ in range(2):
            with pytest.raises(RewardFailed, match=why.replace("LINE", LINE)) as failed:
                await pool.score("", ["x", "y"], {})
            assert (failed.value.function, failed.value.kind) == (name, "error")
        return pool.counters()

    counters = with_pool([Reward(function=f"{mine}:{name}")], use)
    assert counters == {
        f"{name}/values": 0,
        f"{name}/not_applicable": 0,
        f"{name}/errors": 2,
        f"{name}/timeouts": 0,
    }


@pytest.mark.fault("K2")
def test_memory_taken_bit_by_bit_ends_at_the_limit(mine):
    mine.write_text("def grow(completions):\n    kept = []\n    while True: kept.append(bytearray(1 << 20))\n")
    failed = failure(Reward(function=f"{mine}:grow"), memory_bytes=200 << 20)
    assert failed.kind == "error"
    assert "MemoryError" in failed.why


def test_children_of_a_killed_function_die_with_it(mine, tmp_path):
    pids = tmp_path / "pids"
    reward = Reward(function=f"{mine}:sub_processes", timeout_s=1.5)
    assert failure(reward, columns={"pids": str(pids)}).kind == "timeout"
    family = [int(pid) for pid in pids.read_text().split()]
    assert len(family) == 3  # the worker, a child, a child in another session
    assert all(gone(pid) for pid in family)


@pytest.mark.fault("K2")
def test_a_storm_of_forks_ends_with_the_function(mine, tmp_path):
    """Thirty-two processes in sessions of their own, none of them a child that anybody waits for."""
    pids = tmp_path / "pids"
    reward = Reward(function=f"{mine}:forks", timeout_s=2.0)
    assert failure(reward, columns={"pids": str(pids)}).kind == "timeout"
    storm = [int(pid) for pid in pids.read_text().split()]
    assert len(storm) == 32
    assert all(gone(pid) for pid in storm)


@pytest.mark.fault("K2")
@pytest.mark.parametrize("attempt", range(3))
def test_who_forks_and_exits_all_the_time_ends_with_the_function(mine, tmp_path, attempt):
    """Each process in a session of its own; while one is left, the file grows."""
    pids = tmp_path / "pids"
    assert failure(Reward(function=f"{mine}:chain", timeout_s=1.5), columns={"pids": str(pids)}).kind == "timeout"
    chain = pids.read_text().split()
    time.sleep(0.3)
    assert pids.read_text().split() == chain
    assert len(chain) > 3
    assert all(gone(int(pid)) for pid in chain)


@pytest.mark.fault("K2")
def test_a_child_of_a_function_that_ended_its_own_process_dies_too(mine, tmp_path):
    pids = tmp_path / "pids"
    failed = failure(Reward(function=f"{mine}:deserter"), columns={"pids": str(pids)})
    assert failed.why == "the process ended (exit code 3)"
    assert gone(int(pids.read_text()))


@pytest.mark.fault("K2")
def test_too_many_processes_end_the_function_before_its_deadline(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "MAX_PROCESSES", 20)
    pids = tmp_path / "pids"
    failed = failure(Reward(function=f"{mine}:crowd", timeout_s=60), columns={"pids": str(pids)})
    assert failed.kind == "error"
    assert "more than 20 processes" in failed.why
    assert all(gone(int(pid)) for pid in (pids.read_text().split() if pids.exists() else []))


def test_processes_that_cannot_be_ended_are_a_warning_and_the_worker_still_ends(mine, monkeypatch, caplog):
    async def in_vain(worker: int) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(process, "end_descendants", in_vain)
    monkeypatch.setattr(process, "KILL_S", 1.0)
    worker = int(score([Reward(function=f"{mine}:identity")]).rewards[0])
    assert "do not end" in caplog.text
    assert gone(worker)


def test_an_error_keeps_the_worker_and_a_cancelled_call_does_not(mine):
    rewards = [Reward(function=f"{mine}:identity"), Reward(function=f"{mine}:slow_for")]

    async def use(pool: RewardPool):
        first = await pool.score("", ["x"], {"seconds": 0})
        with pytest.raises(RewardFailed, match="TypeError"):
            await pool.score("", ["x"], {"seconds": "soon"})
        kept = await pool.score("", ["x"], {"seconds": 0})
        call = asyncio.create_task(pool.score("", ["x"], {"seconds": 30}))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        replaced = await pool.score("", ["x"], {"seconds": 0})
        return [got.by_function["identity"][0] for got in (first, kept, replaced)]

    first, kept, replaced = with_pool(rewards, use)
    assert first == kept != replaced
    assert gone(int(kept))


@pytest.mark.fault("K5")
def test_prints_of_a_function_reach_neither_the_protocol_nor_its_empty_stdin(mine, capfd):
    assert score([Reward(function=f"{mine}:chatty")]).rewards == [0.0, 0.0]
    written = capfd.readouterr()
    assert "noise" in written.err
    assert written.out == ""


@pytest.mark.fault("K5")
def test_the_functions_environment_holds_no_secret_and_no_file(mine, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    why = failure(Reward(function=f"{mine}:seen")).why
    assert "PATH" in why
    assert "secret" not in why
    assert os.getcwd() not in why.rpartition("}")[2]
    assert "[]]" in why


@pytest.mark.fault("K5")
def test_no_open_file_of_the_sampler_reaches_a_function(mine, tmp_path):
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)
        why = failure(Reward(function=f"{mine}:handles")).why
    assert "/dev/null" in why
    assert "secret" not in why


@pytest.mark.fault("K5")
def test_no_file_of_a_function_grows_without_end(mine):
    assert "File too large (mine.py:" in failure(Reward(function=f"{mine}:endless_file")).why


@pytest.mark.fault("K5")
def test_a_completion_that_is_code_is_text_to_the_built_in_functions(tmp_path):
    code = f"__import__('os').system('touch {tmp_path}/run')"
    said = [text.format(code) for text in ("#### {}", "<answer>{}</answer>", "\\boxed{{{}}}", "<answer>$({})</answer>")]
    got = score([Reward(function="gsm8k"), Reward(function="format_think_answer")], said, {"answer": "#### 987654321"})
    assert got.by_function["gsm8k"] == [0.0] * 4
    assert list(tmp_path.iterdir()) == []


def test_groups_are_scored_side_by_side_by_as_many_workers(mine):
    async def use(pool: RewardPool):
        start = time.monotonic()
        await asyncio.gather(*(pool.score("", ["x"], {"seconds": 3.0}) for _ in range(4)))
        return time.monotonic() - start

    assert with_pool([Reward(function=f"{mine}:slow_for")], use, workers=4) < 9.0


def test_two_functions_of_one_name_are_told_apart(mine, tmp_path):
    (tmp_path / "other.py").write_text("def length(completions):\n    return [7] * len(completions)\n")
    rewards = [Reward(function=f"{mine}:length"), Reward(function=f"{tmp_path}/other.py:length")]
    assert score(rewards).by_function == {"length": [6.0, 6.0], "length_2": [7.0, 7.0]}


def test_two_functions_of_one_file_share_what_it_holds(tmp_path):
    code = "held = []\ndef first(completions):\n    held.append(4)\n    return [0, 0]\n"
    code += "def second(completions):\n    return held * 2\n"
    (tmp_path / "both.py").write_text(code)
    rewards = [Reward(function=f"{tmp_path}/both.py:{name}") for name in ("first", "second")]
    assert score(rewards).rewards == [4.0, 4.0]


def test_a_module_is_found_where_the_sampler_was_started(tmp_path, monkeypatch):
    (tmp_path / "pkg_of_rewards").mkdir()
    (tmp_path / "pkg_of_rewards/good.py").write_text("def f(completions):\n    return [3, 3]\n")
    monkeypatch.chdir(tmp_path)
    assert score([Reward(function="pkg_of_rewards.good:f")]).rewards == [3.0, 3.0]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("def other(): pass", r"has no function 'f'; it has: other"),
        ("f = 3", r"has no function 'f'; it has none"),
        (
            "\nimport no_such_thing",
            r"import fails: ModuleNotFoundError: .*no_such_thing.*mine.py:2",
        ),
        ("raise SystemExit('not today')", "import fails: SystemExit: not today"),
        ("import os\nos._exit(4)", r"ended during the import.*exit code 4"),
        ("def f(completions): pass", "no parameter for the option 'k'"),
    ],
)
def test_a_reward_that_cannot_be_imported_ends_the_start_in_one_line(mine, code, complaint):
    mine.write_text(code)
    with pytest.raises(UserError, match=complaint) as refused:
        score([Reward(function=f"{mine}:f", options={"k": 1})])
    assert "\n" not in str(refused.value)


def test_an_infinite_weight_is_refused():
    with pytest.raises(UserError, match="weight = inf"):
        RewardPool([Reward(function="gsm8k", weight=float("inf"))], 1)


def test_a_column_that_a_function_needs_is_missed_at_the_start():
    async def use(pool: RewardPool):
        pool.check_columns({"answer": "4"})
        with pytest.raises(UserError, match=r"gsm8k needs the column 'answer'.*has: question, level"):
            pool.check_columns({"question": "?", "level": 1})

    with_pool([Reward(function="gsm8k"), Reward(function="format_think_answer")], use)


def test_leaving_the_pool_leaves_no_process_and_no_directory(mine, tmp_path, monkeypatch):
    async def use(pool: RewardPool):
        got = await pool.score("", ["x"], {})
        return int(got.rewards[0])

    homes = tmp_path / "homes"  # of this test alone: another file may run beside it
    homes.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(homes))
    seen = []

    async def look(pool: RewardPool):
        seen.extend(homes.glob("reward-*"))
        return await use(pool)

    assert gone(with_pool([Reward(function=f"{mine}:identity")], look))
    assert seen and not list(homes.iterdir())


def test_a_killed_sampler_takes_its_hung_workers_along(mine, tmp_path):
    sampler = f"""
import asyncio
from protocol.recipe import Reward
from sampler.rewards.pool import RewardPool
async def main():
    rewards = [Reward(function={f"{mine}:identity"!r}), Reward(function={f"{mine}:c_loop"!r})]
    async with RewardPool(rewards[:1], 1) as pool:
        print(int((await pool.score("", ["x"], {{}})).rewards[0]), flush=True)
        async with RewardPool(rewards[1:], 1) as hung:
            print(next(iter(hung._running))._process.pid, flush=True)
            await hung.score("", ["x"], {{}})
asyncio.run(main())
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed process tidies nothing up
    with subprocess.Popen(
        [sys.executable, "-c", sampler],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        pids = [int(process.stdout.readline()) for _ in range(2)]
        time.sleep(0.2)  # into the C loop
        process.send_signal(signal.SIGKILL)
    assert all(gone(pid) for pid in pids)
