"""What all commands share: logging that obeys nobody, errors in one line."""

import logging
import subprocess
import sys

import pytest

from protocol.cli import PlainFormatter


@pytest.mark.fault("O7")
@pytest.mark.parametrize(
    "hostile", ["\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\r00:00:00 I all is well", "\x08\x08\x08", "\u202eevil"]
)
def test_what_a_model_wrote_commands_no_terminal(hostile):
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "a sampler says %s.", (hostile,), None)
    line = PlainFormatter("%(message)s").format(record)
    assert line.isprintable() and line.startswith("a sampler says \\")


def test_a_line_stays_readable():
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "größer\tals 2 %s\nzweite Zeile", ("€",), None)
    assert PlainFormatter("%(message)s").format(record) == "größer\tals 2 €\nzweite Zeile"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('line ' * 20000)", 0, ""),  # nobody reads it
        ("raise BrokenPipeError('a worker is gone')", 1, "a worker is gone"),  # not ours: a bug, with its traceback
    ],
)
def test_output_that_nobody_reads_is_no_failure_and_another_broken_pipe_is(body, code, said):
    program = f"""
from protocol.cli import exit_with
def main():
    {body}
    return 0
exit_with(main)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True) as process:
        if not said:
            process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == code
    assert said in error and bool(error) == bool(said)
