"""What a reward function pays for: one check for each way in which such functions go wrong."""

from collections.abc import Callable

from sampler.rewards.bench_conduct import errors, group, hostile, latency, not_applicable, repeats, spread
from sampler.rewards.bench_trials import Row, Trials, rank
from sampler.rewards.bench_verdict import Verdict, best, described, having, mean, reached, share

RIGHT = ("gold/", "working/", "holds gold/", "guess/right")
"""Names of texts that may score as right ones, or higher: a longer one for example."""


def judged(trials: Trials) -> list[Verdict]:
    """All that applies, in the order of a table."""
    checks: list[Callable[[Trials], Verdict | None]] = [errors, repeats]
    if not any(row.values for row in trials.rows):
        return [errors(trials)]
    if trials.kind == "correctness":
        checks += [gold, working, demonstration, wrong, partial, never_right, prompt, example, empty, guessing]
    else:
        checks += [empty_highest] if trials.asked else [shape, empty_highest]
    checks += [spread, not_applicable, hostile, group, latency]
    return [verdict for check in checks if (verdict := check(trials))]


def gold(trials: Trials) -> Verdict | None:
    """The best form of the right answer scores as high as any text that is not right, or higher."""
    if not trials.forms:
        return Verdict(
            check="gold", outcome="fail", words="no row has a right answer to try; data.answer names the column"
        )
    name = f"gold/{trials.forms[0]}"
    rows = [row for row in trials.rows if name in row.values]
    low = [(name, row) for row in rows if row.values[name] is None or rank(row.values[name]) < most_undeserved(row)]
    words = f"scores {mean(rows, name)} on average as {', '.join(trials.forms)}"
    others = {form.removeprefix("gold/") for row in rows for form in row.under("gold/")} - set(trials.forms)
    if others:
        less = (f"{form} {mean(rows, f'gold/{form}')}" for form in sorted(others))
        words += f"; less as {', '.join(less)}"
    return share("gold", low, len(rows), words, "something else scores higher, or it does not apply")


def working(trials: Trials) -> Verdict | None:
    """In one of the forms at least: a bare number is none any more behind a sentence."""
    rows = having(trials, "working/")
    low = []
    for row in rows:
        behind = row.under("working/")
        name = max(behind, key=lambda name: rank(behind[name]))
        bare = max(rank(row.values.get(name.replace("working", "gold"))) for name in behind)
        low += [(name, row)] if rank(behind[name]) < bare else []
    words = "the right answer counts also behind a sentence with other numbers"
    return share("working", low, len(rows), words, "it counts less behind other numbers")


def demonstration(trials: Trials) -> Verdict | None:
    name = "gold/demonstration"
    rows = having(trials, name)
    low = [(name, row) for row in rows if rank(row.values[name]) < best(trials, row)]
    return share("demonstration", low, len(rows), "scores as the right answer", "scores less", worst="warn")


def wrong(trials: Trials) -> Verdict | None:
    return reaches(trials, "wrong", "wrong/", "a wrong answer scores less than the right one")


def partial(trials: Trials) -> Verdict | None:
    paid = [(name, row) for row in trials.rows for name, value in row.under("wrong/").items() if (value or 0) > 0]
    if not paid:
        return None
    most = max(row.values[name] or 0.0 for name, row in paid)
    words = (
        f"{len(paid)} wrong answers score up to {most:g}: as the recipe's first function it would count them as right "
        "(more than 0), and a model may settle there"
    )
    return Verdict(check="partial", outcome="warn", words=words, example=described(paid[0]))


def never_right(trials: Trials) -> Verdict | None:
    low = [(name, row) for row in trials.rows for name in row.under("gold/") if best(trials, row) <= 0]
    if not low:
        return None
    words = "right answers score 0 or less: as the recipe's first function it would count none as right (more than 0)"
    return Verdict(check="sign", outcome="warn", words=words, example=described(low[0]))


def prompt(trials: Trials) -> Verdict | None:
    return undeserved(trials, "prompt", "text of the prompt")


def example(trials: Trials) -> Verdict | None:
    return undeserved(trials, "example", "the prompt's example answer")


def empty(trials: Trials) -> Verdict | None:
    """More than 0 counts as right."""
    found = [(name, row) for row in trials.rows for name in row.under("empty/")]
    paid = [(name, row) for name, row in found if (row.values[name] or 0) > 0 or reached(trials, row, name)]
    bad = "an empty completion earns something (does the function read the prompt?)"
    return share("empty", paid, len(found), "an empty completion earns nothing", bad)


def guessing(trials: Trials) -> Verdict | None:
    """Naming all numbers must not pay, and of two answers one place at most."""
    rows = having(trials, "guess/")
    paid = [(names[0], row) for row in rows if (names := paying_guesses(trials, row))]
    return share("guessing", paid, len(rows), "of several answers not any one counts", "rows where several answers pay")


def paying_guesses(trials: Trials, row: Row) -> list[str]:
    both = ("guess/right first", "guess/right last")
    paid = [name for name in row.under("guess/every") if reached(trials, row, name)]
    return paid + [both[0]] * all(reached(trials, row, name) for name in both)


def shape(trials: Trials) -> Verdict:
    if any(row.under("wrong/") for row in trials.rows):
        words = "this is no correctness reward: right answers score no higher than wrong ones"
    else:
        words = "the rows have no answers: whether right ones score higher could not be tried"
    words += ". If it should be one, --kind correctness says where it fails"
    return Verdict(check="kind", outcome="warn", words=words)


def empty_highest(trials: Trials) -> Verdict | None:
    highest = max((rank(value) for row in trials.rows for value in row.values.values()), default=0.0)
    paid = [(name, row) for row in trials.rows for name, value in row.under("empty/").items() if value == highest]
    if not paid:
        return None
    words = f"an empty completion scores {highest:g}, the highest value of all: alone, it teaches to say nothing"
    return Verdict(check="empty", outcome="warn", words=words, example=described(paid[0]))


def undeserved(trials: Trials, check: str, what: str) -> Verdict | None:
    """fail: more than a wrong answer, or as much as the right one. warn: more than 0, which counts as right."""
    found = [(name, row) for row in trials.rows for name in row.under(f"{check}/")]
    paid = [(name, row) for name, row in found if (row.values[name] or 0) > 0 or reached(trials, row, name)]
    much = [(name, row) for name, row in paid if reached(trials, row, name) or rank(row.values[name]) > most_wrong(row)]
    bad = f"{what} earns " + ("something" if much else "as much as a wrong answer")
    return share(check, much or paid, len(found), f"{what} earns nothing", bad, worst="fail" if much else "warn")


def most_undeserved(row: Row) -> float:
    return max((rank(value) for name, value in row.values.items() if not name.startswith(RIGHT)), default=0.0)


def most_wrong(row: Row) -> float:
    return max(map(rank, row.under("wrong/").values()), default=float("-inf"))


def reaches(trials: Trials, check: str, prefix: str, words: str) -> Verdict | None:
    found = [(name, row) for row in trials.rows for name in row.under(prefix)]
    paid = [(name, row) for name, row in found if reached(trials, row, name)]
    return share(check, paid, len(found), words, "as high as the right answer")
