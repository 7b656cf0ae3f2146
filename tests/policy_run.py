"""One rank that trains a tiny model on made-up groups; `test_policy.py` starts it as real processes.

    RANK=0 WORLD_SIZE=1 ... python -m tests.policy_run SETTINGS.json

The first rank prints one JSON line a step: rows, gradient, its norm, KL, a checksum of the weights.
"""

import json
import os
import sys
import threading
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_grad

from policy.model import load_tokenizer
from protocol.channel import Hub
from protocol.keys import open_keys
from protocol.messages import Agreement, DataSet
from protocol.metrics import MetricsWriter
from protocol.resolve import load
from protocol.rundir import RunDir
from tests.groups import make_group
from trainer.checkpoint import Checkpoints
from trainer.desk import Desk
from trainer.engine import Policy
from trainer.inbox import Inbox
from trainer.loss import objective_loss
from trainer.publish import Publisher
from trainer.ranks import Ranks
from trainer.record import Record
from trainer.store import Store
from trainer.stream import StreamWriter


def groups(step: int, recipe) -> list:
    """The same for every number of ranks; of different lengths, and one without signal."""
    reference = recipe.objective.kl_beta > 0 and not recipe.lora.rank
    some = [make_group(5 * step + n, rewards=[0.0, 1.0, 0.5, 2.0], reference=reference) for n in range(4)]
    return [*some, make_group(5 * step + 4, rewards=[1.0] * 4, reference=reference)]


def main(settings: dict) -> None:
    recipe = load(None, settings["overrides"])
    rundir = RunDir(Path(settings["run"]))
    with Ranks(recipe.trainer.backend, threads=1) as ranks:
        if ranks.first:
            rundir.make()
            open_keys(rundir.keys)
        ranks.max([0])  # the keys are there
        keys = open_keys(rundir.keys)
        hub = Hub(keys, "127.0.0.1", 0) if ranks.first else None
        agreed = Agreement(protocol=1, run_id="r", model="m", tokenizer="t", vocabulary=320, group_size=4, recipe="c")
        desk = Desk(recipe=recipe, agreement=agreed, incarnation=1) if ranks.first else None
        if desk:
            desk.sets = {"train": DataSet(rows=100, fingerprint="f"), "eval": DataSet(rows=0, fingerprint="e")}
            desk.open_ledger(100)
        with Inbox(ranks, desk, hub, threading.Event(), rundir) as inbox:
            inbox.serve()
            policy = Policy(recipe, Path(recipe.model.path), ranks)
            incarnation = settings.get("incarnation", 1)
            checkpoints = Checkpoints(rundir, keys, ranks, incarnation, "m")
            checkpoints.resume(policy)
            publisher = Publisher(rundir, keys.run_id, incarnation, load_tokenizer(Path(recipe.model.path)))
            stream = StreamWriter(rundir.stream, incarnation, on=False)
            store = Store(rundir, publisher, checkpoints, stream, recipe.trainer, first=ranks.first)
            store.publish(policy)
            if settings.get("full_disk") == ranks.rank:
                fill_disk_once()
            while policy.steps_done < settings["steps"]:
                record = step(policy, store, inbox, ranks, recipe, settings.get("spoil", {}))
                if ranks.first:
                    sys.stdout.write(json.dumps(record) + "\n")


def fill_disk_once() -> None:
    """On this rank alone: the next file that DeepSpeed writes fails as torch fails on a full disk."""
    writer = TorchCheckpointEngine.save

    def full(self, *arguments) -> None:
        TorchCheckpointEngine.save = writer
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    TorchCheckpointEngine.save = full


def spoiled(logprobs: torch.Tensor, loss: torch.Tensor, what: str) -> torch.Tensor:
    """The loss, after something that a GPU or a formula may do has happened to it or to its gradient."""
    if what == "gradient":
        logprobs.register_hook(lambda gradient: gradient * torch.inf)
    return loss + torch.tensor(torch.nan) if what == "loss" else loss


def step(policy: Policy, store: Store, inbox: Inbox, ranks: Ranks, recipe, spoil: dict) -> dict:
    spoil_now = spoil and policy.steps_done == spoil["after"] and policy.skipped < spoil["times"]
    spoil_now = spoil_now and ranks.rank == spoil["rank"]
    record = Record(MetricsWriter(Path(os.devnull)), ranks, store)
    batch = policy.batch(groups(policy.steps_done, recipe))
    for micro in policy.accumulate(batch.micro_batches):
        logprobs, entropies = policy.logprobs(micro)
        loss, figures = objective_loss(logprobs, entropies, micro, recipe.objective)
        policy.backward(spoiled(logprobs, loss, spoil["what"]) if spoil_now else loss)
        record.add(figures)
    gradient = [safe_get_full_grad(p) for p in policy.model.parameters() if p.requires_grad]
    flat = torch.cat([g.flatten().double() for g in gradient if g is not None]) if gradient[0] is not None else None
    done = policy.update()
    if done:
        store.publish(policy)
        store.checkpoint(policy, inbox)
    checksum = {name: float(tensor.double().abs().sum()) for name, tensor in policy.weights() if tensor.numel()}
    measured = record.measured()
    return {
        "step": policy.steps_done,
        "done": done,
        "unsaved": store.unsaved,
        "rows": len(batch.micro_batches),
        "grad_norm": policy.grad_norm,
        "gradient": None if flat is None else flat[:: max(1, len(flat) // 2000)].tolist(),
        "norm": None if flat is None else float(flat.norm()),
        "kl": measured.get("kl"),
        "learning_rate": policy.learning_rate,
        "weights": sum(checksum.values()),
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
