"""Recorded runs that show one disease each, made by training into it, and healthy ones beside them.

from tests.diseases import unpack
from tests.diseases.table import DISEASES
History.open(unpack("truncation", tmp_path))
"""

import tarfile
from pathlib import Path

STREAMS = Path(__file__).parent / "streams"


def unpack(name: str, directory: Path) -> Path:
    """The run directory `directory/name`: its recipe, metrics and rollouts, without weights."""
    run = directory / name
    with tarfile.open(STREAMS / f"{name}.tar.xz") as archive:
        archive.extractall(run, filter="data")
    return run


def recorded() -> list[str]:
    """Names of the streams that are there."""
    return sorted(path.name.removesuffix(".tar.xz") for path in STREAMS.glob("*.tar.xz"))
