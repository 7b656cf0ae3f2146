"""One HTML page about one run or several: opens anywhere, fetches nothing, runs no script."""

import argparse
import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from doctor.history import History
from launch.report.account import Account
from launch.report.compare import changed, different, matches
from launch.report.curves import curves
from protocol.cli import CONTROL
from protocol.disk import write_atomic
from protocol.errors import UserError
from protocol.resolve import dump

COLOURS = 8
"""Runs that the style sheet can tell apart."""
LONGEST = 2000
"""Characters of a text that are shown."""
HIDDEN = CONTROL | {code: f"\\u{code:04x}" for code in [0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]}
"""With the marks that would show a text in another order than it has."""


def main(arguments: list[str]) -> int:
    flags = argparse.ArgumentParser("launch report", description="Writes one HTML page about one run or several.")
    flags.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, running or finished")
    flags.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first RUN")
    options = flags.parse_args(arguments)
    out = options.out or options.runs[0] / "report.html"
    text = page(accounts(options.runs))
    write_atomic(out, text.encode(errors="backslashreplace"))
    print(f"report   {out} ({len(text) / 1e6:.1f} MB)")
    return 0


def accounts(paths: Sequence[Path]) -> list[Account]:
    """Raises UserError for what is no run, or is named twice, or for too many."""
    if len(paths) > COLOURS:
        raise UserError(f"{len(paths)} runs on one page cannot be told apart; name at most {COLOURS}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is named twice; name each run once")
    names = [path.resolve().name for path in paths]
    shown = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return [Account(name, at, History.open(path)) for at, (name, path) in enumerate(zip(shown, paths, strict=True))]


def page(runs: Sequence[Account]) -> str:
    style = (files("launch.report") / "templates" / "report.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            runs=runs,
            style=style,
            digest=digest,
            summary=together([run.summary() for run in runs]),
            chapters=curves(runs),
            different=different(runs),
            matches=matches(runs),
            together=together,
            changed=changed,
            dump=dump,
        )
    )


def together(tables: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Row -> its cell in each table, empty where a table has no such row."""
    rows = dict.fromkeys(row for table in sorted(tables, key=len, reverse=True) for row in table)
    return {row: [table.get(row, "") for table in tables] for row in rows}


def environment() -> Environment:
    """All that is put into the page is escaped, and shows its control characters."""
    made = Environment(
        loader=PackageLoader("launch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"short": short, "question": question}
    return made


def visible(value: object) -> object:
    return value if hasattr(value, "__html__") else str(value).translate(HIDDEN)


def short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]} [{len(text) - longest} more characters]"


def question(prompt: list[dict[str, str]] | str) -> str:
    """The last message of a prompt."""
    return prompt if isinstance(prompt, str) else prompt[-1].get("content", "") if prompt else ""
