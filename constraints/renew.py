"""Writes a constraint file: exact versions of all that pyproject.toml asks for, directly or not.

    python -m constraints.renew cpu        what this environment has; run the tests in it before
    python -m constraints.renew trainer    the same, for the trainer alone
    python -m constraints.renew gpu        what pip would choose on this machine; downloads metadata, no packages

Versions that a person has not looked at are not tested versions: read the difference before it is kept.
"""

import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from install import CONSTRAINTS, WORKERS, plan_for

HEADS = {
    "cpu": "Both workers without a GPU, and the tests, which ran with exactly these versions.",
    "trainer": "The trainer alone, with newer torch and transformers than vLLM takes: test_two_environments.py trains.",
    "gpu": "Both workers on Linux with NVIDIA GPUs. pip finds that they go together; not run on a GPU yet.",
}
NOTES = {
    "cpu": ["Not named: torchvision, torchaudio and torchcodec, which install.py takes out again."],
    "trainer": [],
    "gpu": [
        "torch 2.13 is built for CUDA 13.0: NVIDIA driver 580 or newer (nvidia-smi shows it).",
        "Not in it, because optional: flash-attn, liger-kernel; install them with this file as --constraint, too.",
    ],
}


UNNAMED = {"setuptools"}
"""vLLM bounds it differently for each Python."""


def wanted(name: str) -> list[str]:
    """Requirements of the extras that install.py would take."""
    workers = ("trainer",) if name == "trainer" else WORKERS
    project = tomllib.loads((CONSTRAINTS.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = [line for extra in plan_for(name == "gpu", workers).extras for line in extras[extra]]
    return [*project["dependencies"], *found]


def installed(lines: Iterable[str]) -> dict[str, str]:
    """Name -> version in this environment, of these requirements and all that they require in turn."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(line), {""}) for line in lines]
    while left:
        requirement, asked = left.pop()
        name = canonicalize_name(requirement.name)
        applies = not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in asked)
        new = {(name, extra) for extra in (requirement.extras or {""})} - seen
        if not applies or not new:
            continue
        seen |= new
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # taken out on purpose, or a build for another machine
        found[name] = distribution.version
        left += [(Requirement(line), {"", *requirement.extras}) for line in distribution.requires or []]
    return found


def resolved(lines: Iterable[str]) -> dict[str, str]:
    """Name -> version that pip would install into an empty environment of this Python."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *lines], stdout=subprocess.PIPE, text=True, check=True)
    items = json.loads(done.stdout)["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in items}


def main(kind: str) -> None:
    versions = resolved(wanted(kind)) if kind == "gpu" else installed(wanted(kind))
    if kind == "gpu" and "+cpu" in versions["torch"]:
        sys.exit("pip is configured to prefer CPU builds of torch; set PIP_CONFIG_FILE=/dev/null for this command")
    versions = {name: version for name, version in versions.items() if name not in UNNAMED}
    made = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    head = [HEADS[kind], f"Made by `make constraints-{kind}` with {made}.", *NOTES[kind]]
    lines = [f"# {line}" for line in head] + [f"{name}=={versions[name]}" for name in sorted(versions)]
    path = CONSTRAINTS / f"{kind}.txt"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(versions)} packages")


if __name__ == "__main__":
    main(sys.argv[1])
