"""Which diseases are recorded, and how one catches them."""

from dataclasses import dataclass, field

QUICK = [
    "eval.before=false",
    "eval.after=false",
    'data.eval=""',
    "trainer.gpus=1",
    "trainer.prompts_per_step=4",
    "trainer.checkpoint_every=1000",
]
"""A step in seconds, on two cores."""


def rewarded(*names: str) -> str:
    functions = ", ".join(f'{{function = "tests/diseases/rewards.py:{name}"}}' for name in names)
    return f"reward=[{functions}]"


@dataclass(frozen=True, kw_only=True)
class Disease:
    """One recording. `@warm`, `@endless` and `@hard` in its settings are made by record.py."""

    caught: str
    """In nature."""
    recipe: str = "recipes/demo.toml"
    settings: list[str]
    shows: frozenset[str] = field(default_factory=frozenset)
    """Rules that must speak; none where the run is healthy."""
    may: frozenset[str] = field(default_factory=frozenset)
    """Rules that may speak too: true as well, or a consequence."""


DEAD = frozenset({"dead groups: all wrong", "loss 0", "rewards constant"})
"""What is true as well where no completion earns anything."""

MADE_UP = {
    "loss 0": "follows from dead groups, which are said in its place",
    "entropy collapse": "four runs of up to 40 steps ended between 0.06 and 0.9 nats, above what is called a collapse",
    "repetition": "needs completions of hundreds of words, which two cores do not sample in minutes",
    "text after the end": "the recording missing_stop shows it, and its cause is said in its place",
    "rewards constant": "follows from the reward alone, whatever the model does",
}
"""Rules of which only tests/test_doctor_rules.py has a stream, and why."""

DISEASES: dict[str, Disease] = {
    "truncation": Disease(
        caught="max_tokens is taken from a toy setting: every answer is cut before it says anything.",
        settings=[*QUICK, "sampling.max_tokens=6", "trainer.steps=8"],
        shows=frozenset({"truncation trap"}),
        may=DEAD,
    ),
    "missing_stop": Disease(
        caught="The model's files name another end than its chat template, as Qwen2.5's base models do.",
        settings=[*QUICK, 'model.path="@endless"', "sampling.max_tokens=96", "trainer.steps=5"],
        shows=frozenset({"no end"}),
        may=frozenset({"text after the end", "truncation trap", "repetition"}) | DEAD,
    ),
    "extraction": Disease(
        caught="The worked example does not show the mark that the reward looks for.",
        settings=[
            *QUICK,
            'data.prefix=[{role = "user", content = "Tom has 60 plums and buys 30 more. How many plums has Tom?"}, '
            '{role = "assistant", content = "60 + 30 = 90"}]',
            "trainer.steps=8",
        ],
        shows=frozenset({"extraction failed"}),
        may=DEAD,
    ),
    "dead_wrong": Disease(
        caught="The problems are far too hard for the model.",
        settings=[*QUICK, 'model.path="@warm"', 'data.train="@hard"', "sampling.max_tokens=48", "trainer.steps=8"],
        shows=frozenset({"dead groups: all wrong"}),
        may=DEAD,
    ),
    "dead_right": Disease(
        caught="The reward asks for something that the model does anyway.",
        settings=[*QUICK, 'model.path="@warm"', rewarded("brief"), "trainer.steps=8"],
        shows=frozenset({"dead groups: all right"}),
        may=frozenset({"loss 0", "rewards constant"}),
    ),
    "ladder": Disease(
        caught="A little reward for the form alone, on problems that are too hard: only the form is learned.",
        settings=[
            *QUICK,
            'data.train="@hard"',
            rewarded("ladder"),
            "sampling.max_tokens=48",
            "optimizer.learning_rate=5e-5",
            "trainer.steps=16",
        ],
        shows=frozenset({"reward trap"}),
        may=frozenset({"loss 0", "rewards constant", "dead groups: all right", "entropy collapse"}),
    ),
    "form": Disease(
        caught="The same with two functions: that for the form rises, that for the answer stays where it is.",
        settings=[
            *QUICK,
            'data.train="@hard"',
            'reward=[{function = "gsm8k"}, {function = "tests/diseases/rewards.py:marked", weight = 0.5}]',
            "sampling.max_tokens=48",
            "optimizer.learning_rate=5e-5",
            "trainer.steps=16",
        ],
        shows=frozenset({"reward trap"}),
        may=frozenset({"loss 0", "rewards constant", "entropy collapse"}),
    ),
    "accuracy_down": Disease(
        caught="A second reward outweighs the first: shorter answers are easy, right ones are not.",
        settings=[
            'model.path="@warm"',
            'reward=[{function = "gsm8k", weight = 0.0}, {function = "tests/diseases/rewards.py:short"}]',
            "eval.every=3",
            "data.eval_limit=100",
            "trainer.gpus=1",
            "trainer.checkpoint_every=1000",
            "trainer.prompts_per_step=4",
            "trainer.steps=12",
        ],
        shows=frozenset({"reward up, accuracy down"}),
        may=frozenset({"entropy collapse", "loss 0", "rewards constant"}),
    ),
    "length": Disease(
        caught="The reward grows with length.",
        settings=[
            *QUICK,
            rewarded("long"),
            "sampling.max_tokens=96",
            "optimizer.learning_rate=5e-5",
            "trainer.prompts_per_step=2",
            "trainer.steps=12",
        ],
        shows=frozenset({"length explosion"}),
        # "reward trap": true, the full score goes to answers that are wrong
        may=frozenset({"truncation trap", "repetition", "text after the end", "loss 0", "rewards constant"})
        | {"reward trap"},
    ),
    "nan": Disease(
        caught="A reward divides by almost nothing: the advantage is more than a float32 holds.",
        settings=[
            *QUICK,
            rewarded("near"),
            'objective.advantage="mean"',
            "trainer.prompts_per_step=1",  # more of them, and no step would be finite
            "sampling.group_size=4",
            "trainer.steps=12",
        ],
        shows=frozenset({"not finite"}),
        may=frozenset({"slow trainer"}),  # four completions a step leave the sampler idle
    ),
    "careless_reward": Disease(
        caught="The reward function takes for granted how an equation is written.",
        settings=[*QUICK, 'model.path="@warm"', rewarded("careless"), "trainer.steps=6"],
        shows=frozenset({"reward failures"}),
        may=frozenset({"dead groups: all right"}),
    ),
    "drift": Disease(
        caught="top_k looks harmless, and trains another policy than the one that samples.",
        settings=[
            *QUICK,
            "sampling.top_k=5",
            "sampling.temperature=1.3",
            "objective.recompute_old_logprobs=true",
            'objective.correction="none"',
            "trainer.steps=8",
        ],
        shows=frozenset({"drift"}),
        may=frozenset({"truncation trap"}),
    ),
    "slow_trainer": Disease(
        caught="Activations are computed twice and old log-probs once more, in passes of one row.",
        settings=[
            *QUICK,
            "trainer.gradient_checkpointing=true",
            "trainer.tokens_per_micro_batch=128",
            "objective.recompute_old_logprobs=true",
            "trainer.steps=8",
        ],
        shows=frozenset({"slow trainer"}),
        may=frozenset({"truncation trap"}),
    ),
    "stale": Disease(
        caught="max_staleness is raised for speed, and the learning rate is not lowered.",
        settings=[
            *QUICK,
            "trainer.max_staleness=6",
            "trainer.prompts_per_step=2",
            "optimizer.learning_rate=1e-4",
            "trainer.steps=12",
        ],
        shows=frozenset({"stale weights"}),
        may=frozenset({"learning rate", "drift", "slow trainer", "truncation trap", "dead groups: all wrong"}),
    ),
    "rate": Disease(
        caught="A learning rate for adapters is used for full fine-tuning.",
        settings=[*QUICK, "optimizer.learning_rate=1e-3", "trainer.steps=6"],
        shows=frozenset({"learning rate"}),
        may=frozenset({"repetition", "truncation trap", "entropy collapse", "length explosion", "no end", "drift"})
        | DEAD,
    ),
    "rate_lora": Disease(
        caught="A learning rate for full fine-tuning is used for adapters: nothing moves.",
        settings=[
            *QUICK,
            'model.path="@warm"',
            "lora.rank=16",
            "optimizer.learning_rate=1e-6",
            "trainer.steps=8",
        ],
        # the machine had other work while this was recorded, and the trainer waited for 73 % of its time
        shows=frozenset({"learning rate", "slow sampler"}),
        may=frozenset({"dead groups: all right"}),
    ),
    "healthy": Disease(caught="The demo.", settings=["data.eval_limit=150", "eval.every=10"]),
    "healthy_sft": Disease(
        caught="The demo's warm start.", recipe="recipes/demo-sft.toml", settings=["data.eval_limit=100"]
    ),
    "healthy_lora": Disease(
        caught="The demo with adapters.",
        settings=["lora.rank=16", "optimizer.learning_rate=4e-4", "data.eval_limit=100", "trainer.steps=12"],
    ),
}
