"""A TCP proxy between samplers and trainer that resets, swallows and never explains."""

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

from protocol.rundir import RunDir


class Proxy:
    """Runs in a process of its own; obeys words written to `commands`: `reset`, `hole SECONDS up|down|both`."""

    def __init__(self, run: Path, listener: socket.socket, commands: int) -> None:
        self._rundir, self._listener, self._commands = RunDir(run), listener, commands
        self._writers: set[asyncio.StreamWriter] = set()
        self._deaf: dict[str, float] = {"up": 0.0, "down": 0.0}

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._commands, self._obey)
        server = await asyncio.start_server(self._accept, sock=self._listener)
        async with server:
            await server.serve_forever()

    def _obey(self) -> None:
        for line in os.read(self._commands, 4096).decode().splitlines():
            word, *rest = line.split()
            if word == "reset":
                for writer in list(self._writers):
                    _reset(writer)
            else:
                until = asyncio.get_running_loop().time() + float(rest[0])
                for way in ("up", "down") if rest[1] == "both" else (rest[1],):
                    self._deaf[way] = until

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        endpoint = self._rundir.read_endpoint()
        try:
            host, port = endpoint.address.removeprefix("tcp://").split(":")
            there, back = await asyncio.open_connection(host, int(port))
        except (OSError, AttributeError):
            writer.close()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._carry(reader, back, "up"), self._carry(there, writer, "down"))
        self._writers -= {writer, back}

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                while self._deaf[way] > asyncio.get_running_loop().time():
                    await asyncio.sleep(0.05)  # nothing is lost in TCP: it arrives late, or the peers give up before
                sink.write(data)
                await sink.drain()
        with contextlib.suppress(OSError):
            sink.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN: what is on its way is lost."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with contextlib.suppress(Exception):
        writer.transport.abort()


def run_proxy(run: Path, listener: socket.socket, commands: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asyncio.run(Proxy(run, listener, commands).serve())
