"""Trains a real model into a disease and keeps the stream.

python -m tests.diseases.record truncation /tmp/truncation
python -m tests.diseases.record drift /tmp/drift --warm runs/demo/best
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from policy.embedded import NAME, embedded
from protocol.cli import exit_with
from protocol.errors import UserError
from tests.diseases import STREAMS
from tests.diseases.compact import compact
from tests.diseases.rows import write_hard_rows
from tests.diseases.table import DISEASES

LIMIT_S = 420.0
"""A stream that ends there shows its disease, too."""


def main() -> int:
    flags = argparse.ArgumentParser("tests.diseases.record", description=__doc__.splitlines()[0])
    flags.add_argument("name", choices=DISEASES)
    flags.add_argument("out", type=Path, help="run directory; may be deleted afterwards")
    flags.add_argument("--warm", type=Path, default=Path("runs/demo/best"), help="a model that `make demo` trained")
    flags.add_argument("--only-compact", action="store_true", help="of the run that is in OUT")
    options = flags.parse_args()
    disease, out = DISEASES[options.name], options.out.resolve()
    aside = out.with_name(out.name + ".made")
    made = {"@warm": aside / "warm", "@endless": aside / "smollm2-without-end", "@hard": aside / "hard.jsonl"}
    if not options.only_compact:
        make(aside, options.warm if any("@warm" in setting for setting in disease.settings) else None)
        train(disease.recipe, out, [place(setting, made) for setting in disease.settings])
    shown = summary(out)
    size = compact(out, STREAMS / f"{options.name}.tar.xz", {str(path): path.name for path in made.values()})
    print(f"{options.name}: {size} bytes, {shown}")
    return 0


def place(setting: str, made: dict[str, Path]) -> str:
    """The setting with the paths of what was made."""
    for sign, path in made.items():
        setting = setting.replace(sign, str(path))
    return setting


def make(aside: Path, warm: Path | None) -> None:
    """The rows and the models that some diseases need. Raises UserError where `warm` is no model."""
    aside.mkdir(parents=True, exist_ok=True)
    write_hard_rows(aside / "hard.jsonl")
    without_end(aside / "smollm2-without-end")
    if warm and not (warm / "config.json").is_file():
        raise UserError(f"--warm {warm}: no model there; run `make demo` first, or name another")
    if warm:  # a snapshot's manifest is its own, and that of no other
        shutil.copytree(warm, aside / "warm", ignore=shutil.ignore_patterns("manifest.*"), dirs_exist_ok=True)


def without_end(target: Path) -> None:
    """The demo's model, whose files name `<|endoftext|>` as the end; its turns close with `<|im_end|>`."""
    source = embedded(NAME)
    shutil.copytree(source, target, dirs_exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((source / name).read_text())
        changed = {"eos_token_id": 0, "pad_token_id": 0, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        settings |= {key: value for key, value in changed.items() if key in settings}
        (target / name).write_text(json.dumps(settings))


def train(recipe: str, out: Path, settings: list[str]) -> None:
    """Both workers, for LIMIT_S at most; how the run ends is part of the disease."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    run = subprocess.Popen([sys.executable, "-m", "launch", recipe, "--run", str(out), *overrides])
    try:
        run.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        run.terminate()  # it saves a checkpoint and ends both workers
        run.wait()


def summary(run: Path) -> str:
    """Of the last step, for whoever records. Raises UserError where nothing was trained: that is no stream."""
    path = run / "metrics" / "trainer.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    steps = [record for record in records if record["kind"] == "step"]
    if not steps and not any(record["kind"] == "skipped" for record in records):
        raise UserError(f"{run}: no step was trained, so nothing is kept; see {run}/logs and FAILED.md")
    last = steps[-1] if steps else {}
    shown = ("reward", "accuracy", "frac_reward_zero_std", "completions/clipped_ratio", "entropy")
    return f"{len(steps)} steps, " + ", ".join(f"{name} {last.get(name, float('nan')):.3f}" for name in shown)


if __name__ == "__main__":
    exit_with(main)
