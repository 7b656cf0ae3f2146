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
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from protocol.errors import PortBusy, RunError, UserError
from trainer.place import Place

log = logging.getLogger(__name__)

COME_S = 600.0
"""For the slowest node to start its ranks."""
CONNECT_S = 60.0
"""For ranks that are all there to connect to each other."""
FAREWELL_S = 10.0
"""For all ranks to read what is in the store."""
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
        return False


def meet(place: Place, come_s: float = COME_S, connect_s: float = CONNECT_S) -> tuple[dist.Store, list[Peer]]:
    """torch's store that all ranks share, and all ranks in their order. Called by all of them, before any group.

    Raises PortBusy, UserError where gloo cannot connect them, RunError when some did not come in `come_s`.
    """
    at = f"{place.address}:{place.port}"
    if place.world > 1:
        log.info("rank %d of %d: meeting the others at %s, for up to %.0f s", place.rank, place.world, at, come_s)
    try:
        store, *_ = next(rendezvous("env://", place.rank, place.world, timeout=timedelta(seconds=come_s)))
        store = dist.PrefixStore("vesper", store)
        store.set(f"peer/{place.rank}", msgspec.json.encode(_here(place)))
        peers = [msgspec.json.decode(store.get(f"peer/{rank}"), type=Peer) for rank in range(place.world)]
        all_have_read(dist.PrefixStore("peers", store), place.rank, place.world)
    except dist.DistError as error:
        raise _absent(place, at, come_s, str(error).splitlines()[0]) from None
    _connect(store, place, peers, connect_s)
    return store, peers


def all_have_read(store: dist.Store, rank: int, world: int) -> None:
    """Rank 0, who serves the store, waits for the others: if it ended now, they would not learn why."""
    store.set(f"read/{rank}", "")
    if rank == 0:
        with contextlib.suppress(dist.DistError):
            store.wait([f"read/{other}" for other in range(world)], timedelta(seconds=FAREWELL_S))


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


def _absent(place: Place, at: str, seconds: float, said: str) -> RunError:
    if "EADDRINUSE" in said:
        return PortBusy(f"another process listens on port {place.port}, where the ranks should meet: set another one")
    if place.rank == 0:
        return RunError(
            f"not all of {place.world} ranks came to {at} in {seconds:.0f} s ({said}): start the trainer on every node"
        )
    return RunError(
        f"rank {place.rank} on {socket.gethostname()} finds no rank 0 at {at} ({said}): is it started, is MASTER_ADDR "
        "an address of its node that this one reaches, does a firewall close the port?"
    )


def _connect(store: dist.Store, place: Place, peers: Sequence[Peer], seconds: float) -> None:
    """A group of gloo's own that adds up one number: what cannot connect is told now, not after half an hour."""
    apart = len({peer.host for peer in peers}) > 1
    wrong = [peer for peer in peers if apart and peer.loopback]
    if wrong:
        raise UserError(
            f"{wrong[0]}: its host name means {wrong[0].gloo}, which other nodes do not reach. {_interfaces(peers)}"
        )
    limit = timedelta(seconds=seconds)
    try:
        group = dist.ProcessGroupGloo(dist.PrefixStore("trial", store), place.rank, place.world, limit)
        group.allreduce([torch.ones(1)]).wait()
    except RuntimeError as error:
        raise UserError(
            f"gloo does not connect the {place.world} ranks within {seconds:.0f} s. {_interfaces(peers)} "
            f"It said: {str(error).splitlines()[0][:300]}"
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
    return f"{len(peers)} ranks on {len(hosts)} nodes: {shown}"


def _one_a_node(peers: Sequence[Peer]) -> list[Peer]:
    return list({peer.host: peer for peer in reversed(peers)}.values())[::-1]


def gone(peers: Sequence[Peer], rank: int, said: str) -> list[Peer]:
    """Who broke the connection that an error of gloo's speaks of, as far as rank `rank` can tell.

    On its own node a rank's process is looked at; on another the address in the error leaves the ranks of one node.
    """
    others = [peer for peer in peers if peer.rank != rank]
    near = [peer for peer in others if peer.host == peers[rank].host]
    dead = [peer for peer in near if not _alive(peer.pid)]
    if dead:
        return dead
    far = [peer for peer in others if peer not in near]
    remote = REMOTE.search(said)
    there = [peer for peer in far if remote and peer.address == remote[1]]
    return there or far


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
