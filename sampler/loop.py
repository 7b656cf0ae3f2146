"""GRPO, seen from a sampler: a lease comes in, a group of rewarded completions goes out; weights change in between."""

import asyncio

from protocol.messages import MAX_WHY, Failure, Lease, Pulse, Split
from sampler.answer import Answerer
from sampler.engine import Engine
from sampler.rewards.pool import RewardFailed
from sampler.session import Session


async def sample(session: Session, engine: Engine, answerer: Answerer) -> None:
    """Answers every lease at once and side by side: the engine is kept full, no group waits for another.

    waits for: leases and weight notices from the trainer, which ends the wait with Stop
    produces:  one Group (or Failure) for each lease
    ends when: the trainer stops the run, `session.stop` is called, or a task fails
    """

    async def load(pulse: Pulse) -> None:
        await engine.load(pulse)
        session.changed()

    async def answer(split: Split, group_id: int, row: int) -> None:
        try:
            await session.answer(await answerer.group(split, group_id, row))
        except RewardFailed as failure:
            await session.answer(
                Failure(session=session.name, split=split, group_id=group_id, why=str(failure)[:MAX_WHY])
            )

    async with asyncio.TaskGroup() as tasks:
        running: set[asyncio.Task] = set()
        async for message in session.messages():
            match message:
                case Pulse():
                    work = [load(message)]
                case Lease():
                    work = [answer(message.split, group_id, row) for group_id, row in message.items]
            running = {task for task in running if not task.done()} | {tasks.create_task(job) for job in work}
        for task in running:
            task.cancel()
