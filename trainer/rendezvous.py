"""The trainer's ranks find each other: who they are, where they are, and whether gloo connects them.

Ranks that wait for one another say so, and do not wait for ever. What goes wrong on clusters is told from what each
rank writes into torch's key-value store, before any group exists: a rank that did not come, an address that others
cannot reach.
"""

import contextlib
import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

# torch documents TCPStore, and forgets it in __all__.
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store

from protocol.errors import PortBusy, RunError, UserError
from trainer.notes import Absent, Notes
from trainer.place import Place

log = logging.getLogger(__name__)

COME_S = 600.0
"""For the slowest node to start its ranks."""
CONNECT_S = 60.0
"""For ranks that are all there to connect to each other."""
LOOK_S = 2.0
"""For a process that closed its connections to be gone."""
REMOTE = re.compile(r"\[(?:::ffff:)?([0-9a-fA-F.:]+)\]:\d+")
"""How gloo's errors name the other side."""


class Peer(msgspec.Struct, frozen=True):
    """One rank, as it sees itself."""

    rank: int
    host: str
    pid: int
    address: str
    """From which it reaches rank 0."""
    gloo: str
    """Interface or address on which gloo listens."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.address})"

    @property
    def loopback(self) -> bool:
        """Whether other machines cannot reach it."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.gloo).is_loopback
        return self.gloo == "lo"


def meet(place: Place, come_s: float = COME_S, connect_s: float = CONNECT_S) -> tuple[Notes, list[Peer]]:
    """The store through which ranks leave notes, and all ranks in their order. Called by all, before any group.

    Raises UserError for an address that cannot be, PortBusy, RunError where some did not come in `come_s` or gloo does
    not connect them in `connect_s`.
    """
    own, at = _here(place), f"{place.address}:{place.port}"
    if place.world > 1:
        log.info("rank %d of %d: meeting the others at %s, for up to %.0f s", place.rank, place.world, at, come_s)
    store = PrefixStore("vesper", _open_store(place, at, come_s))
    numbers = [f"rank {rank}" for rank in range(place.world)]
    try:
        peers = Notes(store, place.rank, numbers).swap("meeting", own, Peer, come_s)
    except Absent as error:
        raise RunError(
            f"not all of {place.world} ranks came to {at} in {come_s:.0f} s: {error.names} did not; start the trainer "
            "on every node"
        ) from None
    _refuse_loopback(peers)
    _connect(store, place, peers, connect_s)
    return Notes(store, place.rank, list(map(str, peers))), peers


def _open_store(place: Place, at: str, seconds: float) -> Store:
    """torch's own, which does not wait for all ranks here: rank 0 could not say which of them are missing."""
    try:
        return TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0 and not place.agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        said = str(error).splitlines()[0]
        if "EADDRINUSE" in said:
            raise PortBusy(
                f"another process listens on port {place.port}, where the ranks should meet: set another one"
            ) from None
        raise RunError(
            f"rank {place.rank} on {socket.gethostname()} finds no rank 0 at {at} ({said}): is it started, is "
            "MASTER_ADDR an address of its node that this one reaches, does a firewall close the port?"
        ) from None


def _here(place: Place) -> Peer:
    host = socket.gethostname()
    address = _own_address(place)
    # torch's gloo takes the host name's address, and the loopback where that has none.
    named = "127.0.0.1"
    with contextlib.suppress(OSError):
        named = socket.getaddrinfo(host, None)[0][4][0]
    gloo = os.environ.get("GLOO_SOCKET_IFNAME", str(named))
    return Peer(rank=place.rank, host=host, pid=os.getpid(), address=address, gloo=gloo)


def _own_address(place: Place) -> str:
    """Of the interface towards rank 0. Nothing is sent."""
    try:
        family, _, _, _, there = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as towards:
            towards.connect(there)
            return towards.getsockname()[0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR={place.address}: {error}; expected rank 0's node by name or address") from None


def _refuse_loopback(peers: Sequence[Peer]) -> None:
    apart = len({peer.host for peer in peers}) > 1
    wrong = [peer for peer in peers if apart and peer.loopback]
    if wrong:
        raise UserError(
            f"{wrong[0]}: gloo would listen on {wrong[0].gloo}, which other nodes do not reach. {_interfaces(peers)}"
        )


def _connect(store: Store, place: Place, peers: Sequence[Peer], seconds: float) -> None:
    """A group of gloo's own that adds up one number: what cannot connect is told now, not after half an hour."""
    limit = timedelta(seconds=seconds)
    try:
        group = dist.ProcessGroupGloo(PrefixStore("connection", store), place.rank, place.world, limit)
        # torch's stub has the method for groups of ranks, not for the backends below them.
        group.allreduce([torch.ones(1)]).wait()  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError as error:
        raise RunError(
            f"gloo does not connect the {place.world} ranks within {seconds:.0f} s: one has ended since, or is not "
            f"reached. {_interfaces(peers)} It said: {str(error).splitlines()[0][:300]}"
        ) from None


def _interfaces(peers: Sequence[Peer]) -> str:
    tried = ", ".join(f"{peer.host} {peer.gloo} (reaches rank 0 from {peer.address})" for peer in _one_a_node(peers))
    return (
        "On every node set GLOO_SOCKET_IFNAME, and on GPUs NCCL_SOCKET_IFNAME, to the network interface between the "
        f"nodes (`ip -br address` lists them). Tried: {tried}."
    )


def nodes(peers: Sequence[Peer]) -> str:
    """Example: `4 ranks on 2 nodes: n1 (0, 1), n2 (2, 3)`."""
    hosts = [peer.host for peer in _one_a_node(peers)]
    ranks = [", ".join(str(peer.rank) for peer in peers if peer.host == host) for host in hosts]
    shown = ", ".join(f"{host} ({some})" for host, some in zip(hosts, ranks, strict=True))
    return f"{len(peers)} ranks on {len(hosts)} node{'s' * (len(hosts) > 1)}: {shown}"


def _one_a_node(peers: Sequence[Peer]) -> list[Peer]:
    return list({peer.host: peer for peer in reversed(peers)}.values())[::-1]


def gone(peers: Sequence[Peer], rank: int, said: str, look_s: float = LOOK_S) -> list[Peer]:
    """Who broke the connection that an error of gloo's speaks of, as far as rank `rank` can tell.

    On its own node a rank's process is looked at, for `look_s` as it may still be ending; the address in the error
    leaves the ranks of one node.
    """
    others = [peer for peer in peers if peer.rank != rank]
    near = [peer for peer in others if peer.host == peers[rank].host]
    far = [peer for peer in others if peer not in near]
    remote = REMOTE.search(said)
    there = [peer for peer in others if remote and peer.address == remote[1]]
    deadline = time.monotonic() + look_s
    while not (dead := [peer for peer in near if not _alive(peer.pid)]):
        if any(peer in far for peer in there) or time.monotonic() > deadline:
            return there or far or near
        time.sleep(0.1)
    return dead


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
