"""The arithmetic of `benchmarks.end_to_end`: records of steps -> rates, bounds and what stood still.

A window begins with the end of the last warm-up step and ends with the end of the last measured one. The system goes
on behind it: one that samples ahead has then as much in hand at the end as it had at the beginning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Of one run. Rates are means over the window's steps, shares are of its seconds. None: not recorded."""

    seconds: float
    steps: int
    rollouts: int
    tokens: float  # of completions
    waited: float | None  # share in which the trainer waited for groups
    published: float | None  # share in which it published weights
    idle: float | None = None  # share in which the sampler's engine had nothing to do
    wasted: float  # share of answered groups that were not trained
    staleness: float | None  # optimizer steps, mean over tokens
    dead: float | None  # share of groups without signal
    peak_gb: float = 0.0  # of all processes
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    """Processor seconds of a step, of each process with all that it started."""

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps

    @property
    def rate(self) -> float:
        """Rollouts a second."""
        return self.rollouts / self.seconds

    @property
    def token_rate(self) -> float:
        """Tokens of completions a second."""
        return self.tokens / self.seconds

    @property
    def signal_rate(self) -> float | None:
        """Rollouts a second of groups whose rewards differ."""
        return None if self.dead is None else self.rate * (1 - self.dead)

    def __str__(self) -> str:
        cpu = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.cpu_s.items())
        return f"{self.step_s:.2f} s a step, {self.rate:.2f} rollouts/s, cpu s a step: {cpu}"


def window(records: Sequence[dict], warm: int, steps: int, rollouts: int, engine: Sequence[dict] = ()) -> Window:
    """records: of metrics/trainer.jsonl or benchmarks.trl_step, in order. rollouts: of one step.

    engine: of metrics/sampler-*.jsonl. Raises ValueError where the records do not reach so far.
    """
    done = [record for record in records if record["kind"] == "step"]
    if warm < 1 or len(done) < warm + steps:
        raise ValueError(f"{len(done)} steps are recorded, expected {warm} for warming up (at least 1) and {steps}")
    begin, measured = done[warm - 1], done[warm : warm + steps]
    end = measured[-1]
    seconds = end["time_s"] - begin["time_s"]

    def a_step(name: str) -> float | None:
        values = [record[name] for record in measured if name in record]
        return sum(values) / steps if values else None

    def share(name: str) -> float | None:
        return None if (mean := a_step(name)) is None else mean * steps / seconds

    return Window(
        seconds=seconds,
        steps=steps,
        rollouts=steps * rollouts,
        tokens=steps * a_step("completions/tokens"),
        waited=share("time/wait_s"),
        published=share("time/publish_s"),
        idle=idle(engine, begin["time_s"], end["time_s"]),
        wasted=wasted(begin, end),
        staleness=a_step("staleness/mean"),
        dead=a_step("frac_reward_zero_std"),
    )


def wasted(begin: dict, end: dict) -> float:
    """Share of the groups answered between two records that the trainer did not accept."""
    prefix = "groups/train/"
    answered = {name: count - begin.get(name, 0.0) for name, count in end.items() if name.startswith(prefix)}
    everything = sum(answered.values())
    return 1 - answered.get(f"{prefix}accepted", 0.0) / everything if everything else 0.0


def idle(engine: Sequence[dict], begin: float, end: float) -> float | None:
    """Share of the time between the first and the last record within [begin, end] (epoch seconds) in which vLLM had no
    request; None where there are not two."""
    inside = [record for record in engine if "busy_s" in record and begin <= record["time_s"] <= end]
    if len(inside) < 2:
        return None
    first, last = inside[0], inside[-1]
    return 1 - (last["busy_s"] - first["busy_s"]) / (last["time_s"] - first["time_s"])


def bounds(rollouts: int, sampler_s: float, trainer_s: float) -> dict[str, float]:
    """Rollouts a second at most. rollouts: of one step. sampler_s, trainer_s: seconds of each alone for that step.

    shared: N / (G + L), both on the same cores. own: N / max(G, L), each on hardware of its own.
    """
    return {"shared": rollouts / (sampler_s + trainer_s), "own": rollouts / max(sampler_s, trainer_s)}


if __name__ == "__main__":
    raise SystemExit("a part of another benchmark: python -m benchmarks.end_to_end")
