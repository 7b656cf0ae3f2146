"""Generated word problems in GSM8K's form: question, worked solution, last line ``#### N``.

One step each, addition, subtraction or multiplication of small numbers, so the reader must
choose the operation and then calculate. Two problems are of one split if they use the same
pair of numbers, so the held-out problems ask for sums, differences and products that no
training problem asks for: no question can be in both splits, whatever the seeds.
"""

import random
from itertools import combinations_with_replacement

NAMES = [
    "Ana",
    "Ben",
    "Dan",
    "Ella",
    "Finn",
    "Hugo",
    "Jack",
    "Kate",
    "Liam",
    "Max",
    "Nick",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Will",
]
THINGS = ["apples", "books", "coins", "pens", "cards", "shells", "stamps", "cookies", "balls", "pears", "boxes", "cups"]

# {n}, {m}: two names; {o}: a thing; {x}, {y}: the numbers, in the order of the solution.
TEMPLATES = {
    "+": (
        "{n} has {x} {o}. {m} gives {n} {y} more. How many {o} does {n} have?",
        "{n} has {x} {o} and {m} has {y}. How many {o} do they have together?",
        "{n} finds {x} {o} today and {y} tomorrow. How many {o} does {n} find?",
    ),
    "-": (
        "{n} has {x} {o} and gives {y} to {m}. How many {o} are left?",
        "{n} has {x} {o} and {m} has {y}. How many more {o} does {n} have?",
        "{n} had {x} {o} and lost {y}. How many {o} does {n} have now?",
    ),
    "*": (
        "{n} has {x} bags with {y} {o} each. How many {o} does {n} have?",
        "{n} makes {x} rows of {y} {o}. How many {o} are there?",
        "{n} buys {x} packs of {y} {o}. How many {o} does {n} buy?",
    ),
}


def _pairs(split: str, largest: int) -> list[tuple[int, int]]:
    """The unordered pairs of numbers 2..largest that belong to the split; every fourth is held out."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    pairs = list(combinations_with_replacement(range(2, 13), 2))
    random.Random(0).shuffle(pairs)  # a fixed cut, the same for every seed
    cut = len(pairs) // 4
    mine = pairs[:cut] if split == "test" else pairs[cut:]
    return [p for p in mine if p[1] <= largest]


def _problem(rng: random.Random, pairs: dict[str, list[tuple[int, int]]]) -> dict[str, str]:
    op = rng.choice("+-*")
    x, y = rng.sample(rng.choice(pairs[op]), 2)
    if op == "-":
        x = x + y
    n, m = rng.sample(NAMES, 2)
    question = rng.choice(TEMPLATES[op]).format(n=n, m=m, o=rng.choice(THINGS), x=x, y=y)
    result = {"+": x + y, "-": x - y, "*": x * y}[op]
    return {"question": question, "answer": f"{x} {op} {y} = {result}\n#### {result}"}


def problems(split: str, seed: int, count: int) -> list[dict[str, str]]:
    """`count` distinct problems of a split, "train" or "test", the same ones for the same seed."""
    pairs = {"+": _pairs(split, 12), "-": _pairs(split, 12), "*": _pairs(split, 9)}
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    for _ in range(100 * count):
        if len(rows) == count:
            return list(rows.values())
        row = _problem(rng, pairs)
        rows.setdefault(row["question"], row)
    raise ValueError(f"there are not {count} distinct problems")
