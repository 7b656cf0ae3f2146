"""Which prompts are always solved, and which never: what a next data set should leave out, or make easier."""

from collections.abc import Mapping, Sequence

from protocol.messages import Group


class Solved:
    """Completions of each row of the training data, and those to which the first reward function gave more than 0."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}

    def add(self, group: Group) -> None:
        """Of every sound group, whether it is trained or not."""
        first = next(iter(group.completions[0].rewards))
        counts = self._counts.setdefault(group.row, [0, 0])
        counts[0] += len(group.completions)
        counts[1] += sum((completion.rewards[first] or 0.0) > 0 for completion in group.completions)

    def state(self) -> dict[str, list[int]]:
        """Row -> [completions, solved]."""
        return {str(row): counts for row, counts in sorted(self._counts.items())}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        self._counts = {int(row): list(counts) for row, counts in state.items()}

    def report(self) -> dict[str, list[int]]:
        """Rows by what became of them."""
        rows = sorted(self._counts)
        return {
            "always": [row for row in rows if self._counts[row][1] == self._counts[row][0]],
            "never": [row for row in rows if self._counts[row][1] == 0],
            "sometimes": [row for row in rows if 0 < self._counts[row][1] < self._counts[row][0]],
        }
