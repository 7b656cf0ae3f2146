"""Rows of a data set, wherever they come from: files, a hub, a directory, or problems made on the spot."""

import json
import re
from pathlib import Path

from protocol.errors import UserError

SPLITS = ("train", "test", "validation", "dev")
PROBLEMS = {"train": 4000, "test": 400}
PROBLEMS_SEED = 0
"""Fixed: the recipe's seed orders the data, it does not change them."""


def load_rows(source: str, limit: int) -> list[dict]:
    """The first `limit` rows (0: all) of a file, of `word-problems[:split]`, or of a data set.

    Files are .jsonl and .parquet; a data set is a directory or a hub id, `name[:config][:split]`.
    A single part behind the name is the split if it is called train, test, validation or dev, also
    with a slice (`train[:-100]`, as the library `datasets` reads it), else the config. Raises UserError
    if nothing readable is there.
    """
    name, *parts = re.split(r":(?![^\[\]]*\])", source)  # not at the colon of a slice
    suffix, stop = Path(source).suffix, limit or None
    if name == "word-problems":
        return _problems(source, parts[0] if parts else "train", limit)[:stop]
    try:
        if suffix == ".jsonl":
            return _jsonl(Path(source).expanduser(), stop)
        if suffix == ".parquet":
            return _parquet(Path(source).expanduser(), stop)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot read the data set {source}: {why}") from None
    if suffix in (".json", ".csv", ".tsv", ".txt", ".gz"):
        raise UserError(f"{source}: {suffix} is not read; convert it to .jsonl or .parquet")
    return _dataset(source, name, parts, stop)


def _problems(source: str, split: str, limit: int) -> list[dict]:
    from sampler.problems import problems

    if split not in PROBLEMS:
        raise UserError(f"{source}: no split {split!r}; there are {', '.join(PROBLEMS)}")
    return problems(split, PROBLEMS_SEED, max(limit, PROBLEMS[split]))


def _jsonl(path: Path, stop: int | None) -> list[dict]:
    rows: list[dict] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if len(rows) == stop:
            break
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON: {error}") from None
        if not isinstance(row, dict | None):
            raise UserError(f"{path}: line {number} is no JSON object: {line!r:.60}")
        rows += [row] if row is not None else []
    return rows


def _parquet(path: Path, stop: int | None) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:  # the system's own words if it cannot be opened
            return parquet.read_table(file).slice(0, stop).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file: {error}") from None


def _dataset(source: str, name: str, parts: list[str], stop: int | None) -> list[dict]:
    import datasets
    from datasets.exceptions import DatasetsError

    config = parts.pop(0) if parts and (len(parts) > 1 or parts[0].partition("[")[0] not in SPLITS) else None
    split = parts[0] if parts else "train"
    directory = Path(name).expanduser()
    if name.startswith(("/", ".", "~")) and not directory.is_dir():
        raise UserError(f"{source}: no directory {directory}")
    try:
        if (directory / "state.json").is_file():  # one split, written by `save_to_disk`
            table = datasets.load_from_disk(directory)
        elif (directory / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(directory / split)
        else:
            table = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"cannot load the data set {source}: {why:.300}") from None
    assert isinstance(table, datasets.Dataset), "one split was asked for"
    return table.select(range(min(stop or len(table), len(table)))).to_list()
