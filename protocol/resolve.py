"""TOML and flags -> Recipe; and back, for the run directory.

Defaults < recipe file < `--set table.key=value`. Everything is checked here, once, before any model loads.
"""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli_w
from msgspec.structs import replace

from protocol.checks import check
from protocol.dtypes import faster_dtype
from protocol.errors import UserError
from protocol.recipe import Recipe


def load(path: Path | None, overrides: Sequence[str] = (), dtype: str | None = None) -> Recipe:
    """The recipe in `path` (None: all defaults) with `table.key=value` overrides applied.

    dtype: that `model.dtype = "auto"` becomes; None: the one that is faster here.
    Raises UserError for an unreadable file, an unknown key, a wrong type or a contradiction.
    """
    tables = _read(path) if path else {}
    for override in overrides:
        _override(tables, override)
    try:
        recipe = msgspec.convert(tables, type=Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise UserError(f"recipe {path or '(defaults)'}: {_explain(str(error))}") from None
    if recipe.model.dtype == "auto":
        recipe = replace(recipe, model=replace(recipe.model, dtype=dtype or faster_dtype()))
    check(recipe)
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as TOML, every default spelled out; `load` of it gives an equal recipe."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(recipe)))


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # too long a number, too deep an array
        raise UserError(f"recipe {path} is no valid TOML: {error}") from None


def _override(tables: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last:
        raise UserError(f"--set {override!r}: expected table.key=value, for example trainer.steps=40")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise UserError(f"--set {override!r}: {parent} is no table")
    try:
        tables[last] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        tables[last] = text.strip()  # a bare word is a string, as on any command line


def _explain(message: str) -> str:
    """Adds the nearest known key to msgspec's message about an unknown one."""
    unknown = re.search(r"unknown field `(\w+)`(?: - at `\$\.?(\w*))?", message)
    if not unknown:
        return message
    table = getattr(Recipe(), unknown[2] or "", Recipe())
    known = getattr(table, "__struct_fields__", Recipe.__struct_fields__)
    near = difflib.get_close_matches(unknown[1], known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
    return f"{message}; {hint}"


def _without_none(value: Any) -> Any:
    """value: of what TOML can hold, and None."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def fingerprint(recipe: Recipe) -> str:
    """Of what sampler and trainer must hold to be the same; paths and sizes of either side are left out."""
    shared = {name: msgspec.to_builtins(getattr(recipe, name)) for name in ("seed", "lora", "sampling", "reward")}
    shared["eval"] = {name: getattr(recipe.eval, name) for name in ("temperature", "top_p", "samples", "extractors")}
    shared["reference"] = recipe.objective.kl_beta > 0 and not recipe.lora.rank
    shared["refill"], shared["sft"] = recipe.trainer.refill > 0, recipe.objective.name == "sft"
    shared["quantize"] = recipe.model.quantize
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
