"""GRPO, seen from the trainer: wait for groups, learn from them, publish what came of it."""

from protocol.recipe import Recipe
from trainer.engine import Policy
from trainer.inbox import Inbox
from trainer.loss import grpo
from trainer.record import Record
from trainer.store import Store


def train(policy: Policy, inbox: Inbox, store: Store, record: Record, recipe: Recipe) -> bool:
    """Trains until `trainer.steps`; True when all of them are done, False when asked to stop before.

    waits for: groups in `inbox.take`, which samplers end by answering leases, or a stop signal
    produces:  one snapshot a step (samplers load it), a checkpoint now and then (a restart loads it), one record
    ends when: all steps are done, or a stop was asked for between two of them
    """
    while policy.steps_done < recipe.trainer.steps:
        groups = inbox.take(recipe.trainer.prompts_per_step)
        if groups is None:
            return False
        batch = policy.batch(groups)
        for micro in policy.accumulate(batch.micro_batches):
            logprobs, entropies = policy.logprobs(micro)
            loss, sums = grpo(logprobs, entropies, micro, recipe.objective)
            policy.backward(loss)
            record.add(sums)
        if policy.update():
            inbox.commit(store.publish(policy), policy.steps_done)  # now, and only now, the groups are trained
            record.step(policy, batch, inbox)
            store.checkpoint(policy, inbox)
        else:  # not finite on some rank: no rank has stepped
            record.skipped(policy, batch)
            store.quarantine(policy, groups, inbox)
    return True


def examine(policy: Policy, inbox: Inbox, record: Record) -> bool:
    """Has the announced weights answer the held-out prompts; False when asked to stop meanwhile."""
    groups = inbox.examine()
    if groups is None:
        return False
    record.exam(policy, groups, inbox)
    return True
