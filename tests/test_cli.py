"""What all commands share: logging that obeys nobody, errors in one line."""

import logging

import pytest

from protocol.cli import PlainFormatter


@pytest.mark.fault("O7")
@pytest.mark.parametrize("hostile", ["\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\r00:00:00 I all is well", "\x08\x08\x08"])
def test_what_a_model_wrote_commands_no_terminal(hostile):
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "a sampler says %s.", (hostile,), None)
    line = PlainFormatter("%(message)s").format(record)
    assert line.isprintable() and line.startswith("a sampler says ") and "\\x" in line


def test_a_line_stays_readable():
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "größer\tals 2 %s\nzweite Zeile", ("€",), None)
    assert PlainFormatter("%(message)s").format(record) == "größer\tals 2 €\nzweite Zeile"
