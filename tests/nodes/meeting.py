"""One rank that only meets the others: prints who they are, or fails as a trainer would.

RANK=0 ... python -m tests.nodes.meeting COME_S CONNECT_S
"""

import logging
import sys

from protocol.cli import exit_with, log_to_console
from trainer.place import here
from trainer.rendezvous import meet, nodes

log = logging.getLogger(__name__)


def main() -> int:
    log_to_console("meeting")
    _, peers = meet(here(), *map(float, sys.argv[1:]))
    log.info("%s", nodes(peers))
    return 0


if __name__ == "__main__":
    exit_with(main)
