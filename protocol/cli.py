"""What both workers' command lines share: the flags, logging, and how an expected failure ends."""

import argparse
import contextlib
import logging
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from protocol.errors import RunError


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """Flags of every worker. Building it imports nothing heavy."""
    result = argparse.ArgumentParser(prog=program, description=description)
    result.add_argument("--run", type=Path, help="run directory (default: runs/NAME, NAME from the recipe)")
    result.add_argument("--recipe", type=Path, help="TOML file (default: the run's own, else Qwen2.5-1.5B on GSM8K)")
    result.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting"
    )
    return result


CONTROL = {code: f"\\x{code:02x}" for code in [*range(9), *range(11, 32), *range(127, 160)]}
CONTROL |= {code: f"\\u{code:04x}" for code in [0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]}
"""All control characters but tab and newline, and those that turn the direction of writing."""


class PlainFormatter(logging.Formatter):
    """What peers and models wrote may be logged: it must not command the terminal that shows it."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(CONTROL)


def log_to_console(name: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter(f"%(asctime)s {name} %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3", "filelock", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def exit_with(main: Callable[[], int]) -> None:
    """Runs a command. An expected failure is one line on stderr and its own exit code; a bug is a traceback."""
    try:
        code = main()
    except RunError as error:
        code = error.exit_code
        with contextlib.suppress(OSError):  # stderr may be a log on a full disk
            print(f"error: {str(error).translate(CONTROL)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        if not nobody_reads():
            raise
        code = 0
    sys.exit(code)


def nobody_reads() -> bool:
    """Whether standard output leads nowhere, as behind `| head`: then it has been read as far as anybody wanted."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
    return True
