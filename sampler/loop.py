"""GRPO, seen from a sampler: a lease comes in, a group of rewarded completions goes out; weights change in between."""

import asyncio

from protocol.messages import Lease, Pulse, Split
from protocol.snapshot import Corrupt
from sampler.answer import Answerer
from sampler.link import Link
from sampler.weights import Weights


async def sample(trainer: Link, weights: Weights, answerer: Answerer) -> None:
    """Answers every lease at once and side by side: the engine is kept full, no group waits for another.

    waits for: leases and weight notices from the trainer, which ends the wait with Stop
    produces:  one Group (or Failure) for each lease
    ends when: the trainer stops the run, `trainer.stop` is called, or a task fails
    """

    async def load(pulse: Pulse) -> None:
        try:
            await weights.load(pulse)
            trainer.loaded()
        except Corrupt as error:  # the old weights stay in use
            trainer.unreadable(pulse, str(error))

    async def answer(split: Split, group_id: int, row: int) -> None:
        trainer.answer(await answerer.answer(split, group_id, row))

    async with asyncio.TaskGroup() as tasks:
        running: set[asyncio.Task] = set()
        async for message in trainer.messages():
            match message:
                case Pulse():
                    work = [load(message)]
                case Lease():
                    work = [answer(message.split, group_id, row) for group_id, row in message.items]
            running = {task for task in running if not task.done()} | {tasks.create_task(job) for job in work}
        for task in running:
            task.cancel()
