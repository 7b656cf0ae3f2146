"""One rank of the trainer: puts the parts together, lets them run, takes them apart."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from doctor.learning_rate import learning_rate_advice
from policy.agreement import agree
from policy.model import load_tokenizer
from protocol.channel import Hub
from protocol.cli import log_to_console
from protocol.disk import write_atomic
from protocol.errors import StorageError
from protocol.keys import open_keys
from protocol.messages import DataSet, Split
from protocol.metrics import MetricsWriter
from protocol.mirror import mirrored
from protocol.process import die_with_parent, on_stop_signal, watch_ancestors
from protocol.recipe import Recipe
from protocol.rundir import Endpoint, RunDir
from protocol.snapshot import sweep
from trainer.arithmetic import arithmetic
from trainer.checkpoint import Checkpoints, State
from trainer.checkup import Checkup
from trainer.desk import Desk
from trainer.engine import Policy
from trainer.exams import Exams
from trainer.inbox import Inbox
from trainer.loop import train
from trainer.place import here
from trainer.publish import Publisher
from trainer.ranks import Ranks
from trainer.record import Record
from trainer.roll_call import call_roll, fetch
from trainer.shortage import shortage_explained
from trainer.store import Store
from trainer.stream import StreamWriter

log = logging.getLogger(__name__)

ORPHAN_S = 120.0
"""For the last checkpoint of a rank whose launcher was killed."""


def run(rundir: RunDir, recipe: Recipe, make_policy: Callable[..., Policy] = Policy) -> int:
    """The whole life of one rank. 0 when the run is complete, or was asked to stop and has saved."""
    stop = begin("trainer", rundir)
    with shortage_explained(recipe), Ranks(recipe.trainer.backend, recipe.trainer.threads) as ranks:
        call_roll(ranks, rundir, recipe)
        keys, directory = open_keys(rundir.keys), fetch(ranks, recipe.model)
        # Bind before claiming the incarnation: a second trainer on this port must not fence the first one.
        hub = Hub(keys, recipe.network.bind, recipe.network.port) if ranks.first else None
        incarnation = ranks.max([rundir.claim_incarnation() if ranks.first else 0])[0]
        tokenizer = load_tokenizer(directory)
        agreement = agree(keys.run_id, directory, tokenizer, recipe)
        desk = Desk(recipe=recipe, agreement=agreement, incarnation=incarnation) if ranks.first else None
        mirrors = mirrored(rundir, recipe.tracking, first=ranks.first)
        with mirrors, Inbox(ranks, desk, hub, stop, rundir) as inbox:
            policy = make_policy(recipe, directory, ranks)
            checkpoints = Checkpoints(rundir, keys, ranks, incarnation, agreement.model)
            restore(checkpoints.resume(policy), desk, inbox)
            inbox.serve()  # only now that the history is known which samplers must fit
            if ranks.first:
                sweep(rundir.snapshots, incarnation)
                sweep(rundir.checkpoints, incarnation)
            publisher = Publisher(rundir, keys.run_id, incarnation, tokenizer)
            stream = StreamWriter(rundir.stream, incarnation, on=recipe.trainer.keep_stream)
            if ranks.first:
                stream.abandon(policy.steps_done)
            store = Store(rundir, publisher, checkpoints, stream, recipe.trainer, first=ranks.first)
            inbox.commit(store.publish(policy), policy.steps_done)
            if hub:
                announce(rundir, hub, incarnation)
            with MetricsWriter(rundir.metrics / "trainer.jsonl" if ranks.first else Path(os.devnull)) as writer:
                checkup = Checkup(rundir, recipe, policy.steps_done) if ranks.first else None
                record = Record(writer, ranks, store, checkup)
                record.start(policy.steps_done)
                exams = Exams(rundir, recipe, inbox, record, ranks, step=policy.steps_done)
                complete = whole_run(policy, inbox, store, exams, record, recipe)
            store.checkpoint(policy, inbox, now=True)
            if checkup:
                checkup.end()
            if ranks.first:
                tell_solved(rundir, inbox.solved())
            if hub and complete:
                announce(rundir, hub, incarnation, steps=recipe.trainer.steps)
            inbox.finish(final=complete)
            if inbox.broken:
                raise inbox.broken
    log.info("%s after %d steps", "complete" if complete else "stopped, resumable", policy.steps_done)
    return 0


def begin(name: str, rundir: RunDir) -> threading.Event:
    """What the process of any rank needs: a log, a run directory, an end with its launcher, and the event that a stop
    signal sets."""
    place = here()
    log_to_console(f"{name}.{place.rank}")
    stop = threading.Event()
    on_stop_signal(stop.set)
    die_with_parent()
    watch_ancestors(place.ancestors, lambda: orphaned(stop))
    rundir.make()
    return stop


def orphaned(stop: threading.Event) -> None:
    """The launcher is gone: save and end like after a signal, and end in any case."""
    log.warning("the launcher is gone: saving and ending")
    stop.set()
    time.sleep(ORPHAN_S)
    os.kill(os.getpid(), signal.SIGKILL)


def whole_run(policy: Policy, inbox: Inbox, store: Store, exams: Exams, record: Record, recipe: Recipe) -> bool:
    """Held-out accuracy before, training, held-out accuracy after. False when asked to stop."""
    log.info("%s", arithmetic(recipe))
    advice = learning_rate_advice(recipe)
    if advice:
        log.warning("%s", advice)
    exams.look(policy)
    if not train(policy, inbox, store, exams, record, recipe):
        return False
    if exams.over:
        log.info("no better weights in %d evaluations: training ends; `best` links to the best", recipe.eval.patience)
    return exams.finish(policy)


def restore(state: State | None, desk: Desk | None, inbox: Inbox) -> None:
    """Continues the history that a checkpoint ends."""
    if state is None:
        return
    log.info("resumed from step %d", state.step)
    inbox.exams = state.inbox["exams"]
    if desk and state.inbox["ledger"]:
        desk.sets = msgspec.convert(state.inbox["sets"], dict[Split, DataSet])
        desk.open_ledger(desk.sets["train"].rows).restore(state.inbox["ledger"])
        desk.solved.restore(state.inbox.get("solved", {}))


def announce(rundir: RunDir, hub: Hub, incarnation: int, steps: int = 0) -> None:
    """Tells samplers where to connect or, with the number of steps, that the run is complete. Raises Superseded."""
    rundir.refuse_if_superseded(incarnation)
    endpoint = Endpoint(address=hub.address, incarnation=incarnation, host=socket.gethostname(), steps=steps)
    rundir.write_endpoint(endpoint)
    if not steps:
        log.info("listening on %s, run directory %s", hub.address, rundir.path)


def tell_solved(rundir: RunDir, rows: dict[str, list[int]]) -> None:
    """Prompts that teach nothing any more, or never did, for a better data set next time."""
    path = rundir.metrics / "prompts.json"
    try:
        write_atomic(path, msgspec.json.encode(rows))
    except StorageError as error:
        log.error("%s", error)
    counts = {name: len(found) for name, found in rows.items()}
    log.info(
        "of %d prompts %d were always solved, %d never; the rows are in %s",
        sum(counts.values()), counts["always"], counts["never"], path,
    )  # fmt: skip
