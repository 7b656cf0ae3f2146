"""One scenario for each row of docs/reliability.md that needs processes. Each is a run that must end well."""

import asyncio
import ctypes
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import sampler.weights
from protocol.evaluation import read
from protocol.metrics import read_metrics
from protocol.snapshot import listed, step_of
from tests.chaos import toy
from tests.chaos.cluster import Cluster
from tests.chaos.nemesis import DEAD_S

STEPS = 12
CHECKPOINT = 7
"""The seventh directory that a trainer seals is its first checkpoint: snapshots of steps 0 to 5 come before."""
Scenario = Callable[[Path, bool], None]
ROWS: dict[str, Scenario] = {}


class Skipped(Exception):
    """This machine cannot do it."""


def row(*names: str) -> Callable[[Scenario], Scenario]:
    def register(scenario: Scenario) -> Scenario:
        ROWS.update(dict.fromkeys(names, scenario))
        return scenario

    return register


def run_rows(only: list[str]) -> int:
    """Prints one JSON line for each row; a scenario that proves several runs once."""
    from tests.chaos.__main__ import directory

    done: dict[Scenario, dict] = {}
    for name, scenario in ROWS.items():
        if only and name not in only:
            continue
        if scenario not in done:
            began = time.monotonic()
            try:
                with directory(False) as (place, tmpfs):
                    scenario(place, tmpfs)
                result = {"ok": True}
            except Skipped as reason:
                result = {"ok": None, "why": str(reason)}
            except Exception as error:
                result = {"ok": False, "why": "".join(traceback.format_exception(error))[-1500:]}
            done[scenario] = result | {"seconds": round(time.monotonic() - began, 1)}
        sys.stdout.write(json.dumps({"row": name} | done[scenario]) + "\n")
        sys.stdout.flush()
    return 0 if all(result["ok"] is not False for result in done.values()) else 1


def check(cluster: Cluster, quarantined: int = 0) -> None:
    """The audit: nothing lost, nothing doubled, nothing left behind."""
    found = cluster.audit()
    assert (found["lost"], found["doubled"], found["quarantined"]) == (0, 0, quarantined), found
    left = cluster.leftovers()
    assert not left, left


def log(cluster: Cluster, kind: str) -> str:
    return (cluster.rundir.path.parent / f"{kind}.log").read_text()


def records(cluster: Cluster) -> list[dict]:
    return read_metrics(cluster.rundir.metrics / "trainer.jsonl")


def once(condition: Callable[[], bool], action: Callable[[], None]) -> Callable[[], None]:
    """Does something the first time that the condition holds."""
    done: list[bool] = []

    def each() -> None:
        if not done and condition():
            done.append(True)
            action()

    return each


def after(cluster: Cluster, steps: int, action: Callable[[], None]) -> Callable[[], None]:
    return once(lambda: cluster.steps() >= steps, action)


# -- A: the trainer dies ---------------------------------------------------------------------------------------------


def dies_at(*points: tuple[str, int], kind: str = "trainer") -> Scenario:
    """Every start of the worker is killed at the next of the points; then it is left in peace."""

    def scenario(place: Path, tmpfs: bool) -> None:
        left = list(points)
        with Cluster(place, steps=STEPS) as cluster:
            cluster.next_point = lambda of: left.pop(0) if of == kind and left else None
            cluster.run()
            assert cluster.hits.read_text().splitlines() == [point for point, _ in points]
            check(cluster)
            assert f"using s{STEPS:08d}" in log(cluster, "sampler")

    return scenario


row("A1")(dies_at(("before protocol.channel.Hub.__init__", 1), ("after protocol.channel.Hub.__init__", 1)))
row("A2")(dies_at(("before trainer.store.Store.publish", 1), ("before protocol.rundir.RunDir.write_endpoint", 1)))
row("A3")(dies_at(("before trainer.ledger.Ledger.take", 5), ("after trainer.ledger.Ledger.grant", 3)))
row("A4")(dies_at(("before tests.chaos.toy.ToyPolicy.update", 3)))
row("A5")(dies_at(("after tests.chaos.toy.ToyPolicy._add", 3)))
row("A6")(dies_at(("after tests.chaos.toy.ToyPolicy.update", 2), ("before trainer.inbox.Inbox.commit", 3)))
row("A7")(dies_at(*[("before os.fsync@protocol.disk.write_new", hit) for hit in (1, 2, 4)]))
row("A8")(dies_at(("before os.rename@protocol.snapshot.seal", 3)))
row("A9")(dies_at(("after os.rename@protocol.snapshot.seal", 3)))
row("A12")(dies_at(("before protocol.rundir.RunDir.write_endpoint", 2), ("before trainer.inbox.Inbox.finish", 1)))


@row("A10", "A11")
def dies_in_a_checkpoint(place: Path, tmpfs: bool) -> None:
    """The resumed step is the one of the newest complete checkpoint, whatever was being written."""
    points = [
        ("before tests.chaos.toy.ToyPolicy.save", 1),
        ("after tests.chaos.toy.ToyPolicy.save", 1),
        ("before os.rename@protocol.snapshot.seal", CHECKPOINT),
        ("after os.rename@protocol.snapshot.seal", CHECKPOINT),
        ("after os.rename@protocol.snapshot.remove", 1),
        ("before os.rename@protocol.snapshot.remove", 1),
    ]
    left = list(points)
    with Cluster(place, steps=3 * STEPS, **{"trainer.keep_checkpoints": 1}) as cluster:
        expected: list[int] = []

        def next_point(kind: str) -> tuple[str, int] | None:
            if kind == "trainer":
                saved = listed(cluster.rundir.checkpoints)
                expected.extend([int(saved[-1].name[1:9])] if saved else [])
                return left.pop(0) if left else None
            return None

        cluster.next_point = next_point
        cluster.run()
        assert cluster.hits.read_text().splitlines() == [point for point, _ in points]
        resumed = [
            int(line.rsplit(" ", 1)[1]) for line in log(cluster, "trainer").splitlines() if "resumed from" in line
        ]
        assert resumed == expected and resumed, (resumed, expected)
        check(cluster)


@row("A13")
def another_rank_is_killed(place: Path, tmpfs: bool) -> None:
    """The first rank must not wait for it: all end within a minute, with the reason, and the next start goes on."""
    with Cluster(place, steps=STEPS, ranks=2) as cluster:
        cluster.run(after(cluster, 4, lambda: cluster.signal(cluster.trainer.pids[1], signal.SIGKILL)))
        assert cluster.restarts["trainer"] >= 1
        check(cluster)
        said = (next((cluster.rundir.logs).glob("failed-*.md"))).read_text()
        assert "trainer rank 0 failed first" in said and "another rank is gone" in said, said


@row("A14")
def one_rank_raises(place: Path, tmpfs: bool) -> None:
    def broken() -> None:
        update = toy.ToyPolicy.update

        def raising(self: toy.ToyPolicy) -> bool:
            if self.steps_done == 3 and self._ranks.rank == 1:
                raise ZeroDivisionError("a bug in one rank")
            return update(self)

        toy.ToyPolicy.update = raising

    with Cluster(place, steps=STEPS, ranks=2) as cluster:
        cluster.trainer = cluster.start_trainer(broken)
        cluster.run()
        assert ("trainer", 1) in cluster.exits
        check(cluster)
        said = next(cluster.rundir.logs.glob("failed-*.md")).read_text()
        assert "trainer rank 1 failed first" in said and "ZeroDivisionError: a bug in one rank" in said, said


@row("A16")
def the_run_moves_elsewhere(place: Path, tmpfs: bool) -> None:
    """Only the run directory is left of a machine: everything that a resume needs is in it."""
    with Cluster(place, steps=STEPS) as cluster:
        cluster.run(after(cluster, 7, lambda: cluster.abandon()), until=lambda: cluster.abandoned)
        cluster.proxied = False  # it only knows the old place
        cluster.move_to(place / "elsewhere")
        cluster.run()
        check(cluster)


# -- B: a sampler dies -----------------------------------------------------------------------------------------------

row("B1")(
    dies_at(
        ("before sampler.answer.Answerer.answer", 1),
        ("before tests.chaos.toy.ToyEngine.generate", 3),
        ("after tests.chaos.toy.ToyEngine.generate", 3),
        ("after protocol.channel.Uplink.send", 6),
        ("before sampler.session.Session.on", 6),
        kind="sampler",
    )
)
row("B2")(
    dies_at(
        ("before sampler.weights.Weights.load", 2),
        ("before tests.chaos.toy.ToyEngine.switch", 1),
        ("after tests.chaos.toy.ToyEngine.switch", 2),
        kind="sampler",
    )
)


@row("B3")
def nobody_samples_for_a_while(place: Path, tmpfs: bool) -> None:
    """First the trainer alone, then everybody, then a trainer alone again, then samplers before their trainer."""
    with Cluster(place, steps=STEPS, ranks=2, samplers=0) as cluster:
        times = iter([DEAD_S * 2])
        began = time.monotonic()
        wait = once(lambda: time.monotonic() - began > next(times, 0), lambda: setattr(cluster, "wanted_samplers", 1))

        def leave() -> None:
            cluster.wanted_samplers, left = 0, list(cluster.samplers)
            for job in left:
                cluster.signal(job.pids[0], signal.SIGTERM)
            cluster.come_back = time.monotonic() + 2 * DEAD_S

        go = after(cluster, 6, leave)
        back = once(
            lambda: cluster.come_back is not None and time.monotonic() > cluster.come_back,
            lambda: setattr(cluster, "wanted_samplers", 2),
        )
        cluster.run(lambda: (wait(), go(), back()))
        assert cluster.restarts["trainer"] == 0, "an idle trainer has ended"
        check(cluster)


@row("N4")
def samplers_come_first(place: Path, tmpfs: bool) -> None:
    with Cluster(place, steps=STEPS, samplers=2) as cluster:
        cluster.samplers = [cluster.start_sampler(), cluster.start_sampler()]
        time.sleep(2 * DEAD_S)
        cluster.run()
        assert cluster.restarts["sampler"] == 0
        check(cluster)


@row("B6")
def samplers_come_and_go(place: Path, tmpfs: bool) -> None:
    with Cluster(place, steps=60) as cluster:
        churn = [0.0, 0]

        def each() -> None:
            if time.monotonic() > churn[0] and churn[1] < 20:
                churn[0], churn[1] = time.monotonic() + 0.3, churn[1] + 1
                cluster.wanted_samplers = cluster.dice.choice([1, 2, 4])
                for job in cluster.samplers[cluster.wanted_samplers :]:
                    cluster.signal(job.pids[0], signal.SIGTERM)

        cluster.run(each)
        assert cluster.restarts["trainer"] == 0
        check(cluster)


# -- C: pauses and hangs ---------------------------------------------------------------------------------------------


def pause(cluster: Cluster, pid: int, seconds: float) -> Callable[[], None]:
    """Stops a process now; the result, asked again and again, lets it go on."""
    cluster.signal(pid, signal.SIGSTOP)
    until = time.monotonic() + seconds
    return once(lambda: time.monotonic() > until, lambda: cluster.signal(pid, signal.SIGCONT))


@row("C1")
def a_sampler_sleeps(place: Path, tmpfs: bool) -> None:
    """Shorter than dead_s and longer: in the second case its leases go to the other sampler.

    That one sleeps a little too: alone it could finish the run before the first is missed.
    """
    with Cluster(place, steps=100, samplers=2) as cluster:
        resume: list[Callable[[], None]] = []

        def sleep(number: int, seconds: float) -> None:
            resume.append(pause(cluster, cluster.samplers[number].pids[0], seconds))

        short = after(cluster, 3, lambda: sleep(0, 0.4 * DEAD_S))
        long = after(cluster, 20, lambda: (sleep(0, 2.5 * DEAD_S), sleep(1, 1.75 * DEAD_S)))
        cluster.run(lambda: (short(), long(), *[again() for again in resume]))
        assert cluster.restarts == {"trainer": 0, "sampler": 0}, cluster.restarts
        assert "was silent for 2 s" in log(cluster, "trainer")
        check(cluster)


@row("C2")
def the_trainer_sleeps(place: Path, tmpfs: bool) -> None:
    with Cluster(place, steps=STEPS, samplers=2) as cluster:
        resume: list[Callable[[], None]] = []
        stop = after(cluster, 4, lambda: resume.append(pause(cluster, cluster.trainer.pids[0], 3 * DEAD_S)))
        cluster.run(lambda: (stop(), *[again() for again in resume]))
        assert cluster.restarts == {"trainer": 0, "sampler": 0}, "somebody ended"
        assert "the trainer is silent" in log(cluster, "sampler")
        check(cluster)


@row("C3")
def a_trainer_wakes_up_after_its_successor_has_started(place: Path, tmpfs: bool) -> None:
    """It must step down before it writes anything, exit code 75, and nothing of it may end in the run."""
    with Cluster(place, steps=40) as cluster:
        old: list[int] = []
        woken: list[float] = []

        def supersede() -> None:
            old.append(cluster.trainer.pids[0])
            cluster.signal(old[0], signal.SIGSTOP)
            cluster.zombies.append(cluster.trainer)
            cluster.trainer = cluster.start_trainer()
            woken.append(time.monotonic() + 2.0)

        go = after(cluster, 8, supersede)
        wake = once(lambda: bool(woken) and time.monotonic() > woken[0], lambda: cluster.signal(old[0], signal.SIGCONT))
        cluster.run(lambda: (go(), wake()))
        assert ("trainer", 75) in cluster.exits, cluster.exits
        check(cluster)


@row("H3")
def two_trainers_of_one_run(place: Path, tmpfs: bool) -> None:
    """The later one wins and the earlier one steps down, also while it waits for samplers that have left it."""
    with Cluster(place, steps=40) as cluster:

        def second() -> None:
            cluster.zombies.append(cluster.trainer)
            cluster.trainer = cluster.start_trainer()

        cluster.run(after(cluster, 8, second))
        assert ("trainer", 75) in cluster.exits, cluster.exits
        check(cluster)


def engine_that(stops: Callable[[toy.ToyEngine], object], name: str) -> Callable[[], None]:
    """The first sampler's engine does something instead of its tenth group."""

    def prepare() -> None:
        think, calls = toy.ToyEngine._think, [0]

        async def thinking(self: toy.ToyEngine) -> None:
            calls[0] += 1
            if calls[0] == 10:
                found = stops(self)
                if hasattr(found, "__await__"):
                    await found
            await think(self)

        toy.ToyEngine._think = thinking

    prepare.__name__ = name
    return prepare


@row("C4")
def a_sampler_holds_the_interpreter_lock(place: Path, tmpfs: bool) -> None:
    """ZeroMQ's own thread goes on answering pings; only the missing beats tell."""
    with Cluster(place, steps=40) as cluster:
        stuck = engine_that(lambda engine: ctypes.PyDLL(None).sleep(int(3 * DEAD_S)), "stuck")
        cluster.samplers = [cluster.start_sampler(work=stuck)]
        cluster.run(after(cluster, 2, lambda: setattr(cluster, "wanted_samplers", 2)))
        assert "was silent for 2 s" in log(cluster, "trainer")
        check(cluster)


@row("C5")
def an_engine_gives_no_more_tokens(place: Path, tmpfs: bool) -> None:
    """Its beats go on. The sampler itself ends with 71 after lease_s, and a new one answers what it held."""
    with Cluster(place, steps=STEPS) as cluster:
        cluster.samplers = [cluster.start_sampler(work=engine_that(lambda engine: asyncio.sleep(10_000), "silent"))]
        cluster.run()
        assert ("sampler", 71) in cluster.exits, cluster.exits
        check(cluster)


# -- D: the network --------------------------------------------------------------------------------------------------


@row("D1", "D5")
def resets_and_flapping(place: Path, tmpfs: bool) -> None:
    with Cluster(place, steps=60, samplers=2) as cluster:
        due = [0.0, 0]

        def each() -> None:
            if time.monotonic() > due[0] and due[1] < 25:
                due[0], due[1] = time.monotonic() + 0.3, due[1] + 1
                cluster.proxy("reset")

        cluster.run(each)
        assert cluster.restarts == {"trainer": 0, "sampler": 0}
        check(cluster)


@row("D2", "D3")
def partitions_longer_than_dead_s(place: Path, tmpfs: bool) -> None:
    """Both ways, then each way alone: what was sent before arrives late and is answered `duplicate`."""
    with Cluster(place, steps=120) as cluster:
        holes = [after(cluster, 10 + 30 * i, lambda way=way: cluster.proxy(f"hole {2.2 * DEAD_S} {way}"))
                 for i, way in enumerate(("both", "up", "down"))]  # fmt: skip
        cluster.run(lambda: [hole() for hole in holes])
        assert cluster.restarts == {"trainer": 0, "sampler": 0}
        assert "silent" in log(cluster, "trainer") + log(cluster, "sampler")
        check(cluster)


# -- G: the disk -----------------------------------------------------------------------------------------------------


def filled(cluster: Cluster, steps: int, last: int) -> Callable[[], None]:
    """Leaves no byte on the run's disk from one step to another (as the trainer counts them, not its record)."""
    balloon = cluster.rundir.path / "balloon"

    def blow() -> None:
        with balloon.open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                cluster.full_since = time.monotonic()

    full = after(cluster, steps, blow)
    empty = once(
        lambda: cluster.full_since is not None and time.monotonic() - cluster.full_since > last, balloon.unlink
    )
    return lambda: (full(), empty())


@row("G15")
def every_checkpoint_is_spoiled(place: Path, tmpfs: bool) -> None:
    """Exit code 74, at once, and nothing is started over; what was spoiled is still there to be restored."""
    with Cluster(place, steps=3 * STEPS) as cluster:
        cluster.run(after(cluster, 12, cluster.abandon), until=lambda: cluster.abandoned)
        saved = {path: (path / "state.json").read_bytes() for path in listed(cluster.rundir.checkpoints)}
        for path, data in saved.items():
            (path / "state.json").write_bytes(data[:-1] + b"!")
        cluster.trainer = cluster.start_trainer()
        cluster.run(until=lambda: not cluster.trainer.alive)
        assert list(cluster.trainer.codes.values()) == [74]
        assert "Restore a checkpoint from a backup" in (cluster.rundir.path / "FAILED.md").read_text()
        for path, data in saved.items():
            (path / "state.json").write_bytes(data)
        cluster.trainer = None
        cluster.run()
        check(cluster)


@row("G1", "G2", "L4")
def the_disk_is_full(place: Path, tmpfs: bool) -> None:
    """Training goes on without the snapshots and checkpoints that cannot be written, or ends with 73 and resumes."""
    if not tmpfs:
        raise Skipped("mounting a small tmpfs needs root")
    with Cluster(place, steps=60, **{"trainer.max_staleness": 2}) as cluster:
        cluster.run(filled(cluster, 8, 2))
        said = log(cluster, "trainer")
        assert "samplers go on with" in said, "no snapshot was left out"
        assert "No space left on device" in said
        assert ("trainer", 73) in cluster.exits or "trying again after the next step" in said
        check(cluster)


@row("I10")
def sampled_logprobs_are_plausible_and_wrong(place: Path, tmpfs: bool) -> None:
    """The trainer computes its own; the run says how far they are apart, step after step."""

    def biased() -> None:
        toy.ToyPolicy.logprobs = lambda self, micro: (micro.sampler_logprobs - 0.5, 0 * micro.sampler_logprobs)

    with Cluster(place, steps=STEPS) as cluster:
        cluster.trainer = cluster.start_trainer(biased)
        cluster.run()
        assert "drift: sampler and trainer differ by 0.50 nats a token" in log(cluster, "trainer")
        check(cluster)


# -- J: numerics -----------------------------------------------------------------------------------------------------


def spoiling(*groups: int) -> Callable[[], None]:
    return lambda: setattr(toy.ToyPolicy, "spoilt", frozenset(groups))


@row("J1")
def a_step_is_not_finite(place: Path, tmpfs: bool) -> None:
    """Its groups are kept aside, also across a restart, and never trained."""
    with Cluster(place, steps=STEPS, ranks=2) as cluster:
        cluster.trainer = cluster.start_trainer(spoiling(9))
        cluster.run(after(cluster, 8, lambda: cluster.signal(cluster.trainer.pids[0], signal.SIGTERM)))
        check(cluster, quarantined=4)
        [kept] = cluster.rundir.quarantine.iterdir()
        assert "skipped" in [record["kind"] for record in records(cluster)] and kept.stat().st_size > 100


@row("J2")
def every_step_is_not_finite(place: Path, tmpfs: bool) -> None:
    with Cluster(place, steps=STEPS, ranks=2) as cluster:
        cluster.trainer = cluster.start_trainer(spoiling(*range(20, 400)))
        cluster.run(until=lambda: bool(cluster.trainer and not cluster.trainer.alive))
        assert 76 in cluster.trainer.codes.values(), cluster.trainer.codes
        assert len(list(cluster.rundir.quarantine.iterdir())) == 3
        assert "Lower optimizer.learning_rate" in (cluster.rundir.path / "FAILED.md").read_text()
        cluster.trainer = None  # the user lowers it and starts again
        cluster.run()
        check(cluster)


@row("J3")
def weights_are_not_finite(place: Path, tmpfs: bool) -> None:
    def broken() -> None:
        weights = toy.ToyPolicy.weights

        def poisoned(self: toy.ToyPolicy):
            for name, tensor in weights(self):
                yield name, tensor / (0.0 if self.steps_done == 5 and name == "second" else 1.0)

        toy.ToyPolicy.weights = poisoned

    with Cluster(place, steps=STEPS) as cluster:
        cluster.trainer = cluster.start_trainer(broken)
        cluster.run(until=lambda: bool(cluster.trainer and not cluster.trainer.alive))
        assert list(cluster.trainer.codes.values()) == [76]
        assert max(path.name for path in listed(cluster.rundir.snapshots))[:9] == "s00000004"
        cluster.trainer = None
        cluster.run()
        check(cluster)


# -- N: stopping -----------------------------------------------------------------------------------------------------


@row("N1")
def slurm_warns_the_trainer(place: Path, tmpfs: bool) -> None:
    """SIGUSR1, then SIGTERM, then SIGTERM to one rank alone: all save where they are, exit 0, and lose no step."""
    with Cluster(place, steps=3 * STEPS, ranks=2) as cluster:
        for number, steps, ranks in (
            (signal.SIGUSR1, 6, (0, 1)),
            (signal.SIGTERM, 14, (0, 1)),
            (signal.SIGTERM, 22, (1,)),
        ):
            asked = lambda n=number, ranks=ranks: [cluster.signal(cluster.trainer.pids[rank], n) for rank in ranks]  # noqa: E731
            stop = after(cluster, steps, asked)
            cluster.run(stop, until=lambda: bool(cluster.trainer and not cluster.trainer.alive))
            assert set(cluster.trainer.codes.values()) == {0}
            assert int(listed(cluster.rundir.checkpoints)[-1].name[1:9]) == cluster.steps()
            cluster.trainer = None
        cluster.run()
        assert [record["step"] for record in records(cluster) if record["kind"] == "step"] == list(range(1, 37))
        check(cluster)


@row("N2")
def a_sampler_is_asked_to_stop(place: Path, tmpfs: bool) -> None:
    with Cluster(place, steps=40, samplers=2) as cluster:
        stop = once(
            lambda: cluster.steps() >= 5 and log(cluster, "trainer").count(" joined (") >= 2,
            lambda: cluster.signal(cluster.samplers[0].pids[0], signal.SIGTERM),
        )
        cluster.run(stop)
        assert {code for kind, code in cluster.exits if kind == "sampler"} == {0}
        said = log(cluster, "trainer").partition("held-out accuracy after 40 steps")[0]
        assert "said goodbye" in said and "was silent" not in said
        check(cluster)


@row("C6")
def the_shared_disk_hangs(place: Path, tmpfs: bool) -> None:
    """A sampler that cannot see new snapshots goes on beating and sampling, and ends promptly when asked to."""

    def blind() -> None:
        real = sampler.weights.open_sealed

        def hidden(path: Path, *arguments):
            return real(path.with_name("s99999999.i0001") if path.name >= "s00000003" else path, *arguments)

        sampler.weights.open_sealed = hidden

    with Cluster(place, steps=STEPS, **{"trainer.max_staleness": 2}) as cluster:
        cluster.samplers = [cluster.start_sampler(work=blind)]
        late = cluster.samplers[0].pids[0]
        asked: list[float] = []
        said: list[str] = []
        stop = once(
            lambda: cluster.steps() >= 3 and time.monotonic() - cluster.steps_seen[-1][0] > 1.5 * DEAD_S,
            lambda: (asked.append(time.monotonic()), said.append(log(cluster, "trainer")), cluster.signal(late, 15)),
        )
        cluster.run(stop, until=lambda: bool(asked) and not any(late in job.alive for job in cluster.samplers))
        assert asked and time.monotonic() - asked[0] < 120, "it waited for the disk"
        assert "was silent" not in said[0], "its beats stopped"
        cluster.run()
        check(cluster)


@row("N3")
def asked_twice_to_stop(place: Path, tmpfs: bool) -> None:
    """The second signal ends a trainer at once, though its checkpoint would take minutes, and the run goes on."""

    def slow() -> None:
        toy.ToyPolicy.save = lambda self, directory, tag: time.sleep(300)

    with Cluster(place, steps=STEPS) as cluster:
        cluster.trainer = cluster.start_trainer(slow)
        asked: list[float] = []
        first = after(cluster, 3, lambda: (cluster.signal(cluster.trainer.pids[0], 15), asked.append(time.monotonic())))
        again = once(
            lambda: bool(asked) and time.monotonic() > asked[0] + 4.0,
            lambda: cluster.signal(cluster.trainer.pids[0], 15),
        )
        cluster.run(lambda: (first(), again()))
        assert ("trainer", -signal.SIGTERM) in cluster.exits
        check(cluster)


# -- and, without a fault, what runs beside training ------------------------------------------------------------------


@row("evaluation")
def each_exam_is_answered_with_one_version_while_training_goes_on(place: Path, tmpfs: bool) -> None:
    with Cluster(place, steps=12, samplers=2, **{"eval.every": 3}) as cluster:
        cluster.run()
        rundir = cluster.rundir
        found = {path.stem: read(path) for path in rundir.evals.iterdir()}
        assert sorted(map(step_of, found)) == [0, 3, 6, 9, 12]
        for name, result in found.items():
            assert [one.row for one in result.prompts] == [0, 1, 2, 3] and result.snapshot == name
        best = rundir.best.resolve()
        assert found[best.name].accuracy == max(result.accuracy for result in found.values())
        assert best in listed(rundir.snapshots)
        check(cluster)
