"""Writes `replay.json` anew, after a change of the arithmetic that was meant:  python -m tests.golden"""

import json
import tempfile
from pathlib import Path

from tests.golden.tiny import FILE, OBJECTIVES, record, replay


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        recorded = ["--replay", str(record(Path(directory)))]
        lines = {
            name: replay(Path(directory) / name, *recorded, "--set", f"objective.name={name}")[1:-1]
            for name in OBJECTIVES
        }
    for line in (line for steps in lines.values() for line in steps):
        del line["weights"]
    steps = {name: ",\n  ".join(json.dumps(line) for line in lines[name]) for name in OBJECTIVES}
    parts = [f'"{name}": [\n  {steps[name]}\n]' for name in OBJECTIVES]
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"written: {FILE.name}; look at what changed before you commit it")


if __name__ == "__main__":
    main()
