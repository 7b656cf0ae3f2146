"""What a check before training found, told line by line, and the exit code that follows from it."""

from dataclasses import dataclass, field

from protocol.cli import CONTROL


@dataclass(slots=True)
class Verdict:
    """`refused` cannot work; `doubtful` can, and is seldom meant."""

    refused: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)

    def say(self, title: str, text: str) -> None:
        print(f"{title:9} {text}".translate(CONTROL).rstrip(), flush=True)

    def end(self, good: str) -> int:
        """Says all of it. 0, or 2 where something was refused."""
        for title, lines in (("warning", self.doubtful), ("refused", self.refused)):
            for line in lines:
                self.say(title, line)
        if not self.refused:
            self.say("result", good + (", but look at the warnings" if self.doubtful else ""))
        return 2 if self.refused else 0
