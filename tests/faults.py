"""The table of faults: `tests/faults.toml` joined with the tests that carry `@pytest.mark.fault("E1", "E4")`.

    python -m tests.faults        writes the table into docs/reliability.md

Tests are found by reading their source, so that the table is the same where vLLM or a GPU is missing.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import msgspec
from msgspec import Struct

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = "| | fault | what you get | proof |\n|---|---|---|---|\n"


class Fault(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row. open: why no test proves it. first: promised for the first release."""

    row: str
    fault: str
    result: str
    open: str | None = None
    first: bool = False


def faults() -> list[Fault]:
    tables = tomllib.loads((ROOT / "tests" / "faults.toml").read_text())
    return msgspec.convert(tables["fault"], list[Fault])


def proofs(directory: Path = ROOT / "tests") -> dict[str, list[str]]:
    """Row -> `test_x.py::test_name`, in the order of the files."""
    found: dict[str, list[str]] = {}
    for path in sorted(directory.rglob("test_*.py")):
        for name, rows in marked(ast.parse(path.read_text())):
            for row in rows:
                found.setdefault(row, []).append(f"{path.relative_to(directory)}::{name}")
    return found


def marked(tree: ast.Module) -> list[tuple[str, list[str]]]:
    """Tests of a module and their rows: their own decorators' and those of the module's `pytestmark`."""
    common = [
        row
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)
        for mark in ast.walk(node.value)
        for row in rows_of(mark)
    ]
    tests = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    own = {test.name: [row for mark in test.decorator_list for row in rows_of(mark)] for test in tests}
    return [(name, [*common, *rows]) for name, rows in own.items()]


def rows_of(node: ast.AST) -> list[str]:
    """The rows in `pytest.mark.fault(...)`; none in anything else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
        return [ast.literal_eval(argument) for argument in node.args]
    return []


def table() -> str:
    known, proven = faults(), proofs()
    covered = sum(fault.row in proven for fault in known)
    lines = [f"| {one.row} | {one.fault} | {one.result} | {evidence(one, proven)} |\n" for one in known]
    return f"{covered} of {len(known)} rows are proven by a test.\n\n{HEAD}{''.join(lines)}"


def evidence(fault: Fault, proven: dict[str, list[str]]) -> str:
    tests = [test.partition("::") for test in proven.get(fault.row, [])]
    links = [f"[{Path(file).stem}::{name}](../tests/{file})" for file, _, name in tests]
    return "<br>".join(links) or f"open: {fault.open}"


def page(text: str) -> str:
    """The page with the table as it should be now."""
    pattern = re.compile(f"(?<={re.escape(START)}).*(?={re.escape(END)})", re.DOTALL)
    assert pattern.search(text), f"{PAGE} lacks the lines {START.strip()} and {END.strip()}"
    return pattern.sub(lambda _: table(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    sys.stdout.write(table().partition("\n")[0] + "\n")
