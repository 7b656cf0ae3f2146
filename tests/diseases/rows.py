"""Word problems of three steps with large numbers, far beyond a model of 135 million parameters."""

import json
import random
from pathlib import Path

TEMPLATES = (
    (
        "A farm has {a} rows of {b} trees. A storm takes {c} trees, then the farmer plants {d} in each of {e} fields. "
        "How many trees are there?",
        lambda a, b, c, d, e: a * b - c + d * e,
    ),
    (
        "A school buys {a} boxes of {b} pens and {d} bags of {e} pens, and gives {c} pens away. How many are left?",
        lambda a, b, c, d, e: a * b + d * e - c,
    ),
    (
        "A train makes {a} trips with {b} people each and {d} trips with {e} people each; {c} of them ride free. "
        "How many people pay?",
        lambda a, b, c, d, e: a * b + d * e - c,
    ),
)


def write_hard_rows(path: Path, count: int = 200) -> None:
    """The same rows each time, in GSM8K's form."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        question, solve = rng.choice(TEMPLATES)
        numbers = {"a": rng.randint(23, 97), "b": rng.randint(34, 98), "c": rng.randint(111, 666)}
        numbers |= {"d": rng.randint(12, 49), "e": rng.randint(13, 59)}
        rows.append({"question": question.format(**numbers), "answer": f"#### {solve(**numbers)}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
