"""How any reward function has to behave: it answers, in time, and the same when it is asked again."""

from sampler.rewards.bench import ENOUGH
from sampler.rewards.bench_trials import Trials, rank
from sampler.rewards.bench_verdict import Verdict, best, described, reached, shown

SLOW = 0.25
"""Share of `timeout_s` that a call may take."""


def errors(trials: Trials) -> Verdict:
    broken = trials.broken
    if not broken:
        return Verdict(check="errors", outcome="pass", words="no text of the usual kind raised, timed out or hung")
    first = broken[0]
    end = "; no more were tried" if len(broken) >= ENOUGH else ""
    words = f"{len(broken)} texts have no value{end}: {first.why}"
    return Verdict(check="errors", outcome="fail", words=words, example=f"{first.name}: {shown(first.text)}")


def spread(trials: Trials) -> Verdict:
    values = {value for row in trials.rows for value in row.values.values() if value is not None}
    if len(values) > 1:
        words = f"{len(values)} different, from {min(values):g} to {max(values):g}, all finite"
        return Verdict(check="values", outcome="pass", words=words)
    words = f"every text scores {values.pop():g}: nothing to learn from" if values else "no text has a value"
    return Verdict(check="values", outcome="fail", words=words)


def not_applicable(trials: Trials) -> Verdict | None:
    none = [(name, row) for row in trials.rows for name, value in row.values.items() if value is None]
    count = sum(len(row.values) for row in trials.rows)
    if not none:
        return None
    words = f"{len(none)} of {count} texts: where no other function applies, such a group has no reward"
    return Verdict(check="not applicable", outcome="warn", words=words, example=described(none[0]))


def hostile(trials: Trials) -> Verdict:
    if trials.attacked:
        first = trials.attacked[0]
        names = ", ".join(one.name.partition("/")[2] for one in trials.attacked)
        words = f"{names}: no value. {first.why}"
        return Verdict(check="hostile", outcome="fail", words=words, example=f"{first.name}: {shown(first.text)}")
    seconds, name = trials.slowest
    rows = trials.rows if trials.kind == "correctness" else []
    paid = [(name, row) for row in rows for name in row.under("hostile/") if reached(trials, row, name)]
    held = [(name, row, value) for row in rows for name, value in row.under("holds gold/").items()]
    paid += [(name, row) for name, row, value in held if rank(value) > best(trials, row)]
    if paid:
        words = f"{len(paid)} texts reach or beat the right answer"
        return Verdict(check="hostile", outcome="fail", words=words, example=described(paid[0]))
    words = f"none raised, hung or paid; slowest {seconds * 1000:.1f} ms ({name.partition('/')[2]})"
    slow = seconds > SLOW * trials.reward.timeout_s
    return Verdict(check="hostile", outcome="warn" if slow else "pass", words=words)


def repeats(trials: Trials) -> Verdict | None:
    ways = {way: found for way, found in trials.repeats.items() if way != "alone"}
    if not ways:
        return None
    changed = {way: found for way, found in ways.items() if found}
    if not changed:
        return Verdict(check="repeats", outcome="pass", words=f"the same values {', '.join(ways)}")
    words = ", ".join(f"{len(found)} values change {way}" for way, found in changed.items())
    return Verdict(check="repeats", outcome="fail", words=words, example=described(next(iter(changed.values()))[0]))


def group(trials: Trials) -> Verdict | None:
    if "alone" not in trials.repeats or any(trials.repeats[way] for way in trials.repeats if way != "alone"):
        return None  # what changes by itself says nothing about the group
    changed = trials.repeats["alone"]
    if not changed:
        return Verdict(check="group", outcome="pass", words="a completion's value does not depend on the others")
    words = f"{len(changed)} values depend on the other completions of the group; is that meant?"
    return Verdict(check="group", outcome="warn", words=words, example=described(changed[0]))


def latency(trials: Trials) -> Verdict | None:
    if not trials.seconds:
        return None
    times = sorted(seconds for seconds, _ in trials.seconds)
    count, total = sum(size for _, size in trials.seconds), sum(times)
    at = [times[min(len(times) - 1, int(part * len(times)))] * 1000 for part in (0.5, 0.99)]
    words = (
        f"a group: p50 {at[0]:.1f} ms, p99 {at[1]:.1f}, max {times[-1] * 1000:.1f}; a completion: "
        f"{total / count * 1000:.2f} ms; {len(times) / total:.0f} groups/s"
    )
    slow = times[-1] > SLOW * trials.reward.timeout_s
    return Verdict(check="latency", outcome="warn" if slow else "pass", words=words)
