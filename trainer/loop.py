"""GRPO, seen from the trainer: wait for groups, learn from them, publish what came of it."""

from protocol.recipe import Recipe
from trainer.engine import Policy
from trainer.loss import objective_loss
from trainer.parts import Examiner, Keeper, SourceT
from trainer.record import Record


def train(
    policy: Policy, inbox: SourceT, store: Keeper[SourceT], exams: Examiner, record: Record, recipe: Recipe
) -> bool:
    """Trains until `trainer.steps`, or until `eval.patience` ends; False when asked to stop before.

    waits for: groups in `inbox.take`, which samplers end by answering leases, or a stop signal
    produces:  one snapshot a step (samplers load it), a checkpoint now and then (a restart loads it), one record
    ends when: all steps are done, held-out accuracy rises no more, or a stop was asked for between two steps
    """
    while policy.steps_done < recipe.trainer.steps and not exams.over:
        groups = inbox.take(recipe.trainer.prompts_per_step)
        if groups is None:
            return False
        batch = policy.batch(groups)
        for micro in policy.accumulate(batch.micro_batches):
            logprobs, entropies = policy.logprobs(micro)
            loss, figures = objective_loss(logprobs, entropies, micro, recipe.objective)
            policy.backward(loss)
            record.add(figures)
        if policy.update():
            inbox.commit(store.publish(policy), policy.steps_done)  # now, and only now, the groups are trained
            store.keep(policy.steps_done, groups)
            record.step(policy, batch, inbox)
            store.checkpoint(policy, inbox)
            exams.look(policy)
        else:  # not finite on some rank: no rank has stepped
            record.skipped(policy, batch)
            store.quarantine(policy, groups, inbox)
    return True
