"""Who gets in, what hostile bytes and files can do, and where secrets may be. SECURITY.md says it in words."""

import ast
import base64
import contextlib
import gc
import hmac
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
import zmq.utils.z85
from hypothesis import given
from hypothesis import strategies as st
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from protocol import codec
from protocol.channel import Hub
from protocol.errors import NoCheckpoint, UserError
from protocol.keys import Keys, open_keys
from protocol.messages import Agreement, Beat, Bye, DataSet, Hello, Pulse
from protocol.resolve import load
from protocol.rundir import RunDir
from protocol.snapshot import Corrupt, Manifest, open_sealed, seal, staging, step_of, write_hashed
from tests.groups import make_group
from trainer.accept import problem
from trainer.desk import Desk
from trainer.exam import Plan

PACKAGES = ("protocol", "policy", "sampler", "trainer", "launch")
REFUSED = {
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
    zmq.Event.DISCONNECTED,
}
MIB = 1 << 20


@pytest.fixture
def keys(tmp_path) -> Keys:
    return open_keys(tmp_path / "keys")


@pytest.fixture
def hub(keys) -> Iterator[Hub]:
    with Hub(keys, "127.0.0.1", 0) as opened:
        yield opened


class Client:
    """A bare DEALER that connects once and knows how that ended. curve: (server, public, secret) or None."""

    def __init__(self, address: str, curve: tuple[bytes, bytes, bytes] | None) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if curve:
            self.socket.curve_serverkey, self.socket.curve_publickey, self.socket.curve_secretkey = curve
        self._monitor = self.socket.get_monitor_socket()
        self.socket.connect(address)

    def say(self, word: str) -> None:
        """Said to nobody where the connection has been refused already."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(codec.encode(Bye(session=word)), zmq.DONTWAIT)

    def refused(self, timeout_s: float = 30.0) -> bool:
        """Whether the other side ended the connection or the handshake within this time."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0 and self._monitor.poll(int(left * 1000)):
            if recv_monitor_message(self._monitor)["event"] in REFUSED:
                return True
        return False

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
        self._context.term()


def listed(keys: Keys) -> tuple[bytes, bytes, bytes]:
    return keys.hub_public, keys.sampler_public, keys.sampler_secret


def curve(kind: str, keys: Keys) -> tuple[bytes, bytes, bytes] | None:
    public, secret = zmq.curve_keypair()
    return {
        "listed key": listed(keys),
        "unlisted key": (keys.hub_public, public, secret),
        "wrong server key": (public, keys.sampler_public, keys.sampler_secret),
        "NULL": None,
    }[kind]


def next_word(hub: Hub, timeout_s: float = 20.0) -> str | None:
    """The session in the next message that the hub takes for one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        heard = hub.receive(0.2)
        if heard:
            return heard[1].session
    return None


def still_serves(hub: Hub, keys: Keys) -> bool:
    """Whether a listed client is heard, and nobody before it: what was sent earlier was not delivered."""
    with Client(hub.address, listed(keys)) as client:
        client.say("honest")
        return next_word(hub) == "honest"


# -- O1, O2: who gets in -----------------------------------------------------------------------------------------


@pytest.mark.fault("O1")
@pytest.mark.parametrize("kind", ["unlisted key", "wrong server key", "NULL"])
def test_the_hub_refuses_whoever_is_not_listed(kind, hub, keys):
    with Client(hub.address, curve(kind, keys)) as client:
        client.say("intruder")
        assert client.refused()
        assert still_serves(hub, keys)
    assert hub.malformed == 0


@pytest.mark.fault("O1")
def test_the_hub_hears_a_listed_key(hub, keys):
    with Client(hub.address, curve("listed key", keys)) as client:
        client.say("ours")
        assert next_word(hub) == "ours"


@contextlib.contextmanager
def bare_server(keys: Keys, *, handler: bool, domain: str, enforce: bool) -> Iterator[tuple[zmq.Socket, str]]:
    """A CURVE server as one might configure it; the Hub is handler, domain "rl", enforce."""
    with zmq.Context() as context:
        authenticator = ThreadAuthenticator(context) if handler else None
        if authenticator:
            authenticator.start()
            authenticator.configure_curve(domain="rl", location=str(keys.clients))
        server = context.socket(zmq.ROUTER)
        server.setsockopt(zmq.LINGER, 0)
        server.curve_server, server.curve_secretkey = True, keys.hub_secret
        if domain:  # empty is libzmq's default and cannot be set
            server.setsockopt_string(zmq.ZAP_DOMAIN, domain)
        server.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, int(enforce))
        server.bind("tcp://127.0.0.1:*")
        try:
            yield server, server.getsockopt_string(zmq.LAST_ENDPOINT)
        finally:
            server.close()
            if authenticator:
                authenticator.stop()


@pytest.mark.fault("O1", "O2")
@pytest.mark.parametrize(
    ("handler", "domain", "enforce", "kind", "delivered"),
    [
        (True, "rl", True, "listed key", True),
        (True, "rl", True, "unlisted key", False),
        (True, "rl", True, "wrong server key", False),
        (True, "rl", True, "NULL", False),
        (False, "", False, "unlisted key", True),  # libzmq's default
        (False, "rl", False, "unlisted key", True),
        (False, "rl", True, "listed key", False),  # fails closed
        (False, "rl", True, "unlisted key", False),
        (True, "", True, "unlisted key", True),
        (False, "", False, "wrong server key", False),  # CURVE itself holds in every state
        (False, "", False, "NULL", False),
    ],
)
def test_only_handler_and_domain_and_enforcement_together_keep_strangers_out(
    handler, domain, enforce, kind, delivered, keys
):
    """Each row that delivers to a stranger is one way to get this wrong."""
    with (
        bare_server(keys, handler=handler, domain=domain, enforce=enforce) as (server, address),
        Client(address, curve(kind, keys)) as client,
    ):
        client.say("x")
        if delivered:
            assert server.poll(20_000)
        else:
            assert client.refused()
            assert not server.poll(0)


@pytest.mark.fault("O2")
def test_without_the_thread_that_checks_keys_nobody_new_gets_in(hub, keys):
    with Client(hub.address, listed(keys)) as before:
        before.say("before")
        assert next_word(hub) == "before"
        hub._authenticator.stop()
        with Client(hub.address, listed(keys)) as late:
            late.say("late")
            assert late.refused()
        before.say("again")
        assert next_word(hub) == "again"


@pytest.mark.fault("O1")
def test_the_hub_speaks_curve_and_demands_its_domain(hub):
    assert hub._socket.get(zmq.MECHANISM) == zmq.CURVE
    assert hub._socket.get(zmq.ZAP_DOMAIN).rstrip(b"\0") == b"rl"
    assert hub._socket.get(zmq.ZAP_ENFORCE_DOMAIN) == 1
    assert hub._authenticator.is_alive()


def run_python(code: str, *arguments: str, timeout_s: float = 120.0) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_process_with_a_hub_listens_on_one_socket_and_that_is_the_configured_one(tmp_path):
    out = run_python(
        """
        import sys, json, psutil
        from pathlib import Path
        from protocol.channel import Hub
        from protocol.keys import open_keys
        with Hub(open_keys(Path(sys.argv[1])), "127.0.0.1", 0) as hub:
            sockets = psutil.Process().net_connections("inet")
            print(json.dumps([hub.address, [f"tcp://{one.laddr.ip}:{one.laddr.port}" for one in sockets]]))
        """,
        str(tmp_path / "keys"),
    )
    address, sockets = json.loads(out)
    assert sockets == [address] and address.startswith("tcp://127.0.0.1:")


WILDCARDS = [
    *("0.0.0.0", "*", "::", "[::]", "0", "00", "0x0", "0.0", "000.000.000.000", "0.0.0.0.", " 0.0.0.0 ", ""),
    *("::0", "[::0]", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0", "[::ffff:0:0]", "::%lo"),
]


@pytest.mark.parametrize("address", WILDCARDS)
def test_every_spelling_of_all_addresses_is_refused(address):
    with pytest.raises(UserError, match="listens everywhere"):
        load(None, [f"network.bind='{address}'"])


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.7", "localhost", "node-7.cluster", "eth0", "::1", "0.example"]
)
def test_an_address_or_a_name_of_this_machine_is_allowed(address):
    assert load(None, [f"network.bind='{address}'"]).network.bind == address


@pytest.mark.parametrize("address", ["0x0", "0", "*"])
def test_the_hub_itself_refuses_what_turns_out_to_be_all_addresses(address, keys):
    """As a host name might."""
    with pytest.raises(UserError, match="listens everywhere"):
        Hub(keys, address, 0)


# -- O3: replay --------------------------------------------------------------------------------------------------


class Recorder:
    """A TCP proxy for one connection that remembers what the client said."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.said = b""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(None)
        with client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=(server, client))
            back.start()
            while data := self._read(client):
                self.said += data
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self._read(source):
                sink.sendall(data)

    def _read(self, source: socket.socket) -> bytes:
        with contextlib.suppress(OSError):
            return source.recv(65536)
        return b""

    def close(self) -> None:
        """After the client has left."""
        self._thread.join(timeout=40)
        self._listener.close()


def raw_connection(hub: Hub) -> socket.socket:
    host, _, port = hub.address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def hung_up(connection: socket.socket) -> bool:
    """Whether the hub ends the connection; raises TimeoutError if it keeps it for half a minute."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.fault("O3")
@pytest.mark.parametrize("chunk", [1 << 20, 64], ids=["at once", "piece by piece"])
def test_a_replayed_session_delivers_nothing(chunk, hub, keys):
    recorder = Recorder(hub.address)
    with Client(recorder.address, listed(keys)) as client:
        for word in ("one", "two"):
            client.say(word)
            assert next_word(hub) == word
    recorder.close()
    assert b"CURVE" in recorder.said and len(recorder.said) > 500
    with raw_connection(hub) as thief:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(recorder.said), chunk):
                thief.sendall(recorder.said[start : start + chunk])
        assert hung_up(thief)
    assert still_serves(hub, keys)
    assert hub.malformed == 0


# -- O4: names and links -----------------------------------------------------------------------------------------

PART = st.sampled_from(["..", ".", "", "/", "etc", "s00000001.i0001", "\0", "\n", "a", "~", "C:", "\\"])
PATHLIKE = st.text(max_size=80) | st.lists(PART, max_size=5).map("/".join)


@pytest.mark.fault("O4")
@given(PATHLIKE)
def test_a_snapshot_named_by_the_network_lies_in_the_snapshots_directory_or_is_malformed(name):
    """As a sampler uses a Pulse: `snapshots / pulse.snapshot`."""
    frame = msgspec.msgpack.encode({"type": "pulse", "snapshot": name, "manifest_sha256": "h"})
    snapshots = Path("/run/snapshots")
    try:
        pulse = codec.decode_down(frame)
    except codec.Malformed:
        return
    assert isinstance(pulse, Pulse)
    assert Path(os.path.normpath(snapshots / pulse.snapshot)).parent == snapshots


@pytest.mark.fault("O4")
@pytest.mark.parametrize(
    "name", ["../s00000001.i0001", "/tmp/s00000001.i0001", "s00000001.i0001/", "s00000001.i0001\n"]
)
def test_a_snapshot_id_with_a_path_in_it_is_malformed(name):
    with pytest.raises(codec.Malformed):
        codec.decode_down(msgspec.msgpack.encode({"type": "pulse", "snapshot": name, "manifest_sha256": "h"}))


@pytest.mark.fault("O4")
@given(PATHLIKE)
def test_an_id_has_a_step_or_is_refused(name):
    try:
        assert step_of(name) >= 0
    except ValueError:
        return
    assert name.count("/") == 0 and name[0] in "sc"


@pytest.mark.fault("O4")
@given(PATHLIKE)
def test_a_manifest_names_files_below_it_or_is_corrupt(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("sealed") / "s00000001.i0001"
    path.mkdir()
    manifest = {"kind": "full", "run_id": "r", "id": "s", "parent": None, "step": 1, "incarnation": 1, "model": "m"}
    files = {name: {"size": 1, "sha256": "x"}}
    (path / "manifest.json").write_bytes(msgspec.json.encode(manifest | {"files": files}))
    try:
        sealed = open_sealed(path)
    except Corrupt:
        return
    for found in sealed.manifest.files:
        assert Path(os.path.normpath(path / found)).is_relative_to(path) and found not in ("", ".")


def sealed_directory(parent: Path, data: bytes = b"weights", key: bytes | None = None) -> tuple[Path, str]:
    name = "s00000001.i0001"
    with staging(parent, name) as aside:
        (aside / "ds").mkdir()
        files = {"ds/model": write_hashed(aside / "ds" / "model", data)}
        manifest = Manifest(
            kind="full", run_id="r", id=name, parent=None, step=1, incarnation=1, model="m", files=files
        )
        return parent / name, seal(aside, parent / name, manifest, key)


@pytest.mark.fault("O4")
@pytest.mark.parametrize("name", ["manifest.json", "ds/model"])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "device"])
def test_only_a_regular_file_is_read(name, kind, tmp_path):
    """A link might lead anywhere, a pipe would be waited for, a device has no end."""
    path, sha256 = sealed_directory(tmp_path)
    (path / name).rename(tmp_path / "elsewhere")
    if kind == "link":
        (path / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "directory":
        (path / name).mkdir()
    else:
        (path / name).symlink_to("/dev/zero")
    gc.collect()  # what other tests left open
    before = psutil.Process().num_fds()
    for _ in range(5):
        with pytest.raises(Corrupt):
            open_sealed(path, sha256).read("ds/model")
    assert psutil.Process().num_fds() <= before


@pytest.mark.fault("O4")
@pytest.mark.parametrize("linked", ["s00000001.i0001", "s00000001.i0001/ds"])
def test_a_linked_directory_shows_the_announced_bytes_or_none(linked, tmp_path):
    (tmp_path / "other").mkdir()
    other, _ = sealed_directory(tmp_path / "other", b"hostile")
    path, sha256 = sealed_directory(tmp_path)
    (tmp_path / linked).rename(tmp_path / "moved")
    (tmp_path / linked).symlink_to(other / Path(linked).relative_to("s00000001.i0001"))
    with pytest.raises(Corrupt):
        open_sealed(path, sha256).read("ds/model")


@pytest.mark.fault("O4", "F6")
@pytest.mark.parametrize(
    "data",
    [
        b'{"kind":"full","run_id":"\xff"}',
        b'{"files":{"a":{"size":1,"sha256":"x","z":' + b"[" * 100_000,
        b"[" * MIB,
        b"",
        b"\0" * 1000,
        b'{"kind":"full","run_id":"r","id":"s","parent":null,"step":' + b"9" * 5000 + b"}",
    ],
    ids=["not UTF-8", "deep in an unknown field", "deep", "empty", "zeros", "a huge step"],
)
def test_a_hostile_manifest_is_corrupt_even_where_its_hash_is_right(data, tmp_path):
    path = tmp_path / "s00000001.i0001"
    path.mkdir()
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(Corrupt):
        open_sealed(path)


@pytest.mark.fault("O4", "F6")
@pytest.mark.parametrize("data", [b'{"address":"\xff"', b'{"z":' + b"[" * 100_000, b"", b"[]", b"\0"])
def test_a_hostile_endpoint_is_no_endpoint(data, tmp_path):
    """Whoever can write the run directory can stop samplers from finding the trainer, but not crash them."""
    rundir = RunDir(tmp_path)
    (tmp_path / "endpoint.json").write_bytes(data)
    assert rundir.read_endpoint() is None


# -- O5: no code from data ---------------------------------------------------------------------------------------


@pytest.mark.fault("O5")
def test_nothing_that_reads_the_network_or_the_disk_unpickles(tmp_path):
    """The same work twice: once to import what is imported late, then with every way to unpickle shut.

    The audit hook sees also what was imported by name before: `pickle.find_class`, `marshal.loads`, `exec`, `compile`.
    """
    out = run_python(
        """
        import io, marshal, pickle, sys, _pickle
        from pathlib import Path
        import torch
        from tests.security_tour import tour

        tour(Path(sys.argv[1]) / "first")
        called = []

        def shut(*_, **__):
            called.append("shut")
            raise AssertionError("unpickled")

        for module in (pickle, _pickle):
            for name in ("load", "loads", "Unpickler"):
                setattr(module, name, shut)
        marshal.loads = marshal.load = torch.load = torch.serialization.load = shut

        def hook(event, arguments):
            if event in ("pickle.find_class", "marshal.loads", "exec", "compile", "os.system", "subprocess.Popen"):
                called.append(event)
                raise AssertionError(event)

        sys.addaudithook(hook)
        read = tour(Path(sys.argv[1]) / "second")
        assert not called, called
        for attempt in (lambda: eval("1"), lambda: pickle.loads(b"")):
            try:
                attempt()
            except AssertionError:
                continue
            raise SystemExit("the hooks do not see")
        print(read)
        """,
        str(tmp_path),
    )
    assert int(out) >= 20


FORBIDDEN_CALLS = {"compile", "__import__", "torch.load", "torch.package", "np.load", "numpy.load", "joblib.load"}
FORBIDDEN_CALLS |= {"yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "commands.getoutput"}
FORBIDDEN_IMPORTS = {"joblib", "yaml", "pty", "code", "codeop"}
ALLOWED = {
    "sampler/rewards/loader.py: importlib.import_module",
    "sampler/rewards/loader.py: exec_module",
    "trainer/advantage.py: exec_module",
}
"""The user's own reward functions: SECURITY.md."""


def runs_data_as_code(tree: ast.Module) -> set[str]:
    """What tests/test_house.py does not look for: loads, shells, dynamic imports. Names as they are written."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS}
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.endswith((".import_module", ".exec_module", ".run_path")):
                found.add(name.rpartition("spec.loader.")[2])
            if any(key.arg == "shell" and ast.unparse(key.value) != "False" for key in node.keywords):
                found.add(f"{name}(shell=...)")
            if any(
                key.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(key.value) != "False"
                for key in node.keywords
            ):
                found.add(f"{name} of code")
    return found


@pytest.mark.fault("O5")
def test_no_source_loads_code_from_data_or_starts_a_shell():
    found = set()
    for package in PACKAGES:
        for path in sorted(Path(package).rglob("*.py")):
            found |= {f"{path}: {name}" for name in runs_data_as_code(ast.parse(path.read_text()))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import yaml",
        "torch.load(path)",
        "np.load(path)",
        "compile(text, 'a', 'exec')",
        "__import__(name)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "importlib.import_module(name)",
        "np.memmap; np.lib.npyio.open_memmap(p, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
    ],
)
def test_the_search_sees_what_it_looks_for(code):
    assert runs_data_as_code(ast.parse(code))


# -- O5: the exception, DeepSpeed's checkpoints ------------------------------------------------------------------


class OneRank:
    """trainer.ranks.Ranks of a single process."""

    first, rank, world = True, 0, 1

    def max(self, values: list[int]) -> list[int]:
        return values

    def broadcast(self, data: bytes | None, size: int) -> bytes:
        assert data is not None and len(data) == size
        return data


class StubInbox:
    def state(self) -> dict:
        return {"ledger": None}


class StubPolicy:
    """Writes what DeepSpeed writes, by its file names; `loaded` says what would have been unpickled."""

    def __init__(self, steps_done: int = 1) -> None:
        self.steps_done, self.recipe = steps_done, load(None)
        self.loaded: list[Path] = []

    def save(self, directory: Path, tag: str) -> None:
        (directory / tag).mkdir()
        (directory / tag / "mp_rank_00_model_states.pt").write_bytes(b"weights" * 100)
        (directory / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"moments" * 100)

    def load(self, directory: Path, tag: str) -> None:
        self.loaded.append(directory / tag)


def checkpoints(tmp_path: Path, keys: Keys):
    from trainer.checkpoint import Checkpoints  # deepspeed: seconds

    rundir = RunDir(tmp_path / "run")
    rundir.make()
    return Checkpoints(rundir, keys, OneRank(), 1, "m"), rundir.checkpoints


@pytest.fixture
def saved(tmp_path, keys):
    """A sound checkpoint: (who resumes, its directory)."""
    store, directory = checkpoints(tmp_path, keys)
    store.save(StubPolicy(), StubInbox())
    [path] = [one for one in directory.iterdir() if one.name.startswith("c")]
    return store, path


@pytest.mark.fault("O5")
def test_a_sound_checkpoint_is_loaded(saved):
    store, path = saved
    policy = StubPolicy()
    assert store.resume(policy) is not None
    assert policy.loaded == [path / "ds"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def sign_as_another_run(path: Path) -> None:
    manifest = path / "manifest.json"
    others = open_keys(path.parent / "others")
    signature = hmac.new(others.checkpoint, manifest.read_bytes(), "sha256").hexdigest()
    (path / "manifest.hmac").write_text(signature)


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


WEIGHTS_FILE = "ds/mp_rank_00_model_states.pt"
TAMPERING = {
    "a changed byte of the weights": lambda path: flip(path / WEIGHTS_FILE),
    "a changed byte of the optimizer": lambda path: flip(path / "ds/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "a changed byte of the state": lambda path: flip(path / "state.json"),
    "a changed byte of the manifest": lambda path: flip(path / "manifest.json"),
    "a changed step in the manifest": lambda path: rewrite(path / "manifest.json", b'"step": 1', b'"step": 9'),
    "no signature": lambda path: (path / "manifest.hmac").unlink(),
    "an empty signature": lambda path: (path / "manifest.hmac").write_bytes(b""),
    "a changed signature": lambda path: flip(path / "manifest.hmac"),
    "another run's signature": sign_as_another_run,
    "a file that is shorter": lambda path: os.truncate(path / WEIGHTS_FILE, 10),
    "a file that is gone": lambda path: (path / WEIGHTS_FILE).unlink(),
    "a link in place of a file": lambda path: link(path / WEIGHTS_FILE),
    "a file beside the signed ones": lambda path: (path / "ds/mp_rank_!_model_states.pt").write_bytes(b"hostile"),
}


@pytest.mark.fault("O5")
@pytest.mark.parametrize("tampering", TAMPERING.values(), ids=TAMPERING.keys())
def test_a_checkpoint_that_was_touched_is_never_unpickled(tampering, saved):
    """DeepSpeed finds files by pattern, so one that nobody signed would be loaded too."""
    store, path = saved
    tampering(path)
    policy = StubPolicy()
    with pytest.raises(NoCheckpoint):
        store.resume(policy)
    assert policy.loaded == []


@pytest.mark.fault("O5")
def test_a_checkpoint_of_another_run_is_never_unpickled(tmp_path, saved):
    _, path = saved
    stranger, directory = checkpoints(tmp_path / "strange", open_keys(tmp_path / "strange-keys"))
    path.rename(directory / path.name)
    policy = StubPolicy()
    with pytest.raises(NoCheckpoint):
        stranger.resume(policy)
    assert policy.loaded == []


# -- O6: secrets -------------------------------------------------------------------------------------------------


def spellings(secret: bytes) -> set[bytes]:
    """Of a CURVE secret in Z85, or of raw bytes."""
    raw = zmq.utils.z85.decode(secret) if len(secret) == 40 else secret
    return {secret, raw, raw.hex().encode(), secret.hex().encode(), base64.b64encode(raw), repr(raw)[2:-1].encode()}


def secrets_of(keys: Keys) -> set[bytes]:
    return {text for secret in (keys.hub_secret, keys.sampler_secret, keys.checkpoint) for text in spellings(secret)}


@pytest.mark.fault("O6")
def test_no_secret_shows_in_arguments_environment_output_or_files(tmp_path):
    """A session at log level DEBUG, with a refused stranger and a crash that prints the keys."""
    keys = open_keys(tmp_path / "keys")
    command = [sys.executable, "-m", "tests.security_tour", str(tmp_path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout and child.stdin
    try:
        said = b""
        while b"session over" not in said:
            line = child.stdout.readline()
            assert line, said.decode(errors="replace")[-3000:]
            said += line
        process = psutil.Process(child.pid)
        shown = [*process.cmdline(), *(f"{name}={value}" for name, value in process.environ().items())]
        rest, _ = child.communicate(b"crash now\n", timeout=60)
    finally:
        child.kill()
        child.wait()
    said += rest
    assert b"DENIED" in said and b"Traceback" in said and b"Keys(" in said, said.decode(errors="replace")[-3000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name not in ("keys", "clients")]
    assert len(files) >= 3
    everything = b"\n".join([said, *(text.encode(errors="surrogateescape") for text in shown)])
    everything += b"".join(path.read_bytes() for path in files)
    assert keys.hub_public in everything, "the search would not find what is there"
    assert not [text for text in secrets_of(keys) if text in everything]


@pytest.mark.fault("O6")
def test_keys_print_without_their_secrets(keys):
    shown = f"{keys!r} {keys} {keys.run_id}".encode()
    assert not [text for text in secrets_of(keys) if text in shown]


SECRET_FILES = ["hub.key_secret", "sampler.key_secret", "checkpoint.key", "."]


@pytest.mark.fault("O6")
def test_keys_are_private_from_the_first_moment_whatever_the_umask_is(tmp_path):
    before = os.umask(0)
    try:
        open_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / "keys" / name).stat().st_mode & 0o777 for name in SECRET_FILES}
    assert modes == dict.fromkeys(SECRET_FILES, 0o600) | {".": 0o700}


@pytest.mark.fault("O6")
@pytest.mark.parametrize("name", SECRET_FILES)
@pytest.mark.parametrize("bit", [0o040, 0o020, 0o010, 0o004, 0o002, 0o001])
def test_keys_that_others_can_reach_are_refused(name, bit, tmp_path):
    open_keys(tmp_path / "keys")
    path = tmp_path / "keys" / name
    path.chmod((path.stat().st_mode & 0o777) | bit)
    with pytest.raises(UserError, match="chmod"):
        open_keys(tmp_path / "keys")


@pytest.mark.fault("O6")
def test_workers_that_start_together_make_one_set_of_keys(tmp_path):
    code = (
        "import sys, hashlib; from pathlib import Path; from protocol.keys import open_keys; sys.stdin.readline();"
        "k = open_keys(Path(sys.argv[1])); print(k.run_id, hashlib.sha256(k.hub_secret + k.checkpoint).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "keys")]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(4)
        ]
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert len(set(said)) == 1 and len(said[0].split()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


# -- F4, F5, D7: floods ------------------------------------------------------------------------------------------


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.fault("F4")
def test_a_giant_frame_ends_its_peer_and_nobody_else(hub, keys):
    with Client(hub.address, listed(keys)) as other, Client(hub.address, listed(keys)) as giant:
        other.say("before")
        giant.say("small")
        assert {next_word(hub), next_word(hub)} == {"before", "small"}
        giant.socket.send(bytes(codec.MAX_FRAME + 1), copy=False)
        assert giant.refused()
        other.say("after")
        assert next_word(hub) == "after"
    assert hub.malformed == 0


@pytest.mark.fault("F5")
def test_a_message_of_many_frames_is_one_malformed_message(hub, keys):
    with Client(hub.address, listed(keys)) as client:
        client.socket.send_multipart([b"x"] * 1000)
        client.say("after")
        assert next_word(hub) == "after"
    assert hub.malformed == 1


@pytest.mark.fault("F5")
def test_a_peer_without_a_key_cannot_fill_the_memory(hub, keys):
    """An endless message of many frames: NULL is refused before its first frame is kept."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    frame = b"\x03" + MIB.to_bytes(8, "big") + bytes(MIB)  # long, and more follow
    before = resident()
    with raw_connection(hub) as attacker:
        with contextlib.suppress(ConnectionError):
            attacker.sendall(greeting)
            for _ in range(200):
                attacker.sendall(frame)
        assert hung_up(attacker)
    assert resident() - before < 50 * MIB
    assert still_serves(hub, keys)


@pytest.mark.fault("D7")
def test_scanners_and_floods_leave_the_service_working_and_the_memory_flat(hub, keys):
    openings = [
        b"",
        b"\0" * 64,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\xff" + bytes(8) + b"\x7f",  # half a greeting
        b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32),  # and no HELLO
        b"\xff"
        + bytes(8)
        + b"\x7f\x03\x00"
        + b"CURVE".ljust(20, b"\0")
        + bytes(32)
        + b"\x04\xc8\x05HELLO"
        + bytes(194),
        os.urandom(5000),
    ]
    before = resident()
    with Client(hub.address, listed(keys)) as client:
        client.say("before")
        assert next_word(hub) == "before"
        for number in range(2000):
            with raw_connection(hub) as scanner, contextlib.suppress(ConnectionError):
                scanner.sendall(openings[number % len(openings)])
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(raw_connection(hub)) for _ in range(100)]
            for number, scanner in enumerate(held):
                scanner.sendall(openings[5 + number % 2])
            client.say("during")
            assert next_word(hub) == "during"
            assert still_serves(hub, keys)
    assert resident() - before < 50 * MIB
    assert hub.malformed == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("D7")
def test_half_a_handshake_is_ended(hub, keys):
    with raw_connection(hub) as half:
        half.settimeout(300)
        half.sendall(b"\xff" + bytes(8) + b"\x7f")
        assert hung_up(half)
    assert still_serves(hub, keys)


# -- F6: what the decoder stands ---------------------------------------------------------------------------------

GROUP = msgspec.to_builtins(make_group(0, lengths=[2, 2]))
BEAT = {"type": "beat", "session": "x", "snapshot": None, "want": 0, "held": [], "progress": 0}
HELLO = {
    "type": "hello",
    "session": "x",
    "agreement": dict.fromkeys(("run_id", "model", "tokenizer", "recipe"), "")
    | {"protocol": 1, "vocabulary": 320, "group_size": 2},
    "train": {"rows": 1, "fingerprint": ""},
    "eval": {"rows": 1, "fingerprint": ""},
}
NESTED = msgspec.Raw(b"\x91" * MIB)
EMPTY_LISTS = msgspec.Raw(b"\xdd" + (20 * MIB).to_bytes(4, "big") + b"\x90" * (20 * MIB))
ARRAY_4G, MAP_4G, BIN_4G, STR_4G = (msgspec.Raw(code + b"\xff" * 4) for code in (b"\xdd", b"\xdf", b"\xc6", b"\xdb"))
EXT, TIMESTAMP = msgspec.msgpack.Ext(5, b"x" * 100), msgspec.Raw(b"\xd6\xff" + bytes(4))


def first_completion(**fields: object) -> dict:
    return GROUP | {"completions": [GROUP["completions"][0] | fields, GROUP["completions"][1]]}


BOMBS = {
    "nested arrays": NESTED,
    "nested arrays in a field": BEAT | {"held": NESTED},
    "nested arrays in an unknown field": BEAT | {"surprise": NESTED},
    "nested arrays in another version's hello": HELLO | {"agreement": {"protocol": 2, "z": NESTED}},
    "20 MB of empty lists": EMPTY_LISTS,
    "20 MB of empty lists in a field": BEAT | {"held": EMPTY_LISTS},
    "20 MB of empty lists for completions": GROUP | {"completions": EMPTY_LISTS},
    "20 MB of empty lists for spans": first_completion(spans=EMPTY_LISTS),
    "20 MB of empty lists in an unknown field": BEAT | {"surprise": EMPTY_LISTS},
    "20 MB of empty lists in another version's hello": HELLO | {"agreement": {"protocol": 2, "z": EMPTY_LISTS}},
    "4 G leases": BEAT | {"held": ARRAY_4G},
    "4 G completions": GROUP | {"completions": ARRAY_4G},
    "4 G rewards": first_completion(rewards=MAP_4G),
    "4 G versions": HELLO | {"versions": MAP_4G},
    "4 G bytes of prompt": GROUP | {"prompt": BIN_4G},
    "4 G bytes of name": BEAT | {"session": STR_4G},
    "a NaN reward": first_completion(reward=float("nan")),
    "an infinite reward": first_completion(reward=float("-inf")),
    "a huge span": first_completion(spans=[["s00000000.i0001", 0, (1 << 64) - 1]]),
    "a negative id": GROUP | {"group_id": -1},
    "an extension for a name": BEAT | {"session": EXT},
    "an extension for bytes": GROUP | {"prompt": EXT},
    "a timestamp for a number": GROUP | {"seconds": TIMESTAMP},
    "an extension in an unknown field": BEAT | {"surprise": EXT},
    "a name that is not UTF-8": BEAT | {"session": msgspec.Raw(b"\xa2\xff\xfe")},
    "no completions": GROUP | {"completions": []},
    "4097 completions": GROUP | {"completions": [GROUP["completions"][0]] * 4097},
    "a field twice, of two types": msgspec.Raw(b"\x83\xa4type\xa3bye\xa7session\xa1x\xa7session\x01"),
}


@pytest.mark.fault("F6")
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_in_little_memory_and_time(bomb):
    """Malformed, or a sound refusal by its version, or a group that does not reach the loss."""
    frame = msgspec.msgpack.encode(bomb)
    began = time.process_time()
    tracemalloc.start()
    try:
        message = codec.decode_up(frame)
    except codec.Malformed:
        message = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * MIB, f"{peak >> 20} MiB for a frame of {len(frame) >> 20}"
    assert time.process_time() - began < 5.0
    if isinstance(message, Hello):
        assert message.agreement.protocol == 2
    elif message is not None:
        assert problem(message, completions=2, max_tokens=20, vocabulary=320, reference=False)


@pytest.mark.fault("F6")
def test_a_frame_above_the_limit_is_malformed_before_it_is_looked_at():
    with pytest.raises(codec.Malformed, match="limit"):
        codec.decode_up(bytes(codec.MAX_FRAME + 1))


AGREED = Agreement(protocol=1, run_id="r", model="m", tokenizer="t", vocabulary=320, group_size=2, recipe="c")
SANE = DataSet(rows=3, fingerprint="e")


@pytest.mark.fault("F6")
@pytest.mark.parametrize("rows", [0, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_impossible_data_sets_of_the_first_sampler_do_not_end_the_trainer(split, rows):
    """The first Hello says how many rows there are; whoever sends it, the hub thread must live."""
    desk = Desk(recipe=load(None, ["sampling.group_size=2"]), agreement=AGREED, incarnation=1)
    desk.pulse = Pulse(snapshot="s00000000.i0001", manifest_sha256="h")
    sets = {"train": SANE, "eval": SANE} | {split: DataSet(rows=rows, fingerprint="f")}
    frames = [
        codec.encode(Hello(session="x", agreement=AGREED, **sets)),
        codec.encode(Beat(session="x", snapshot=desk.pulse.snapshot, want=(1 << 64) - 1, held=[], progress=0)),
    ]
    for frame in frames:
        with contextlib.suppress(codec.Malformed):
            for _, letter in desk.on(b"p", codec.decode_up(frame), 0.0):
                assert codec.decode_down(codec.encode(letter)) == letter
    desk.tick(1.0)


@pytest.mark.fault("F6")
def test_every_lease_can_be_read_by_the_sampler_that_gets_it():
    """Also in an exam of more rows than one message may lease, by a sampler that wants them all."""
    desk = Desk(recipe=load(None, ["sampling.group_size=2"]), agreement=AGREED, incarnation=1)
    desk.pulse = Pulse(snapshot="s00000000.i0001", manifest_sha256="h")
    many = DataSet(rows=25_000, fingerprint="f")
    desk.on(b"p", Hello(session="x", agreement=AGREED, train=many, eval=many), 0.0)
    desk.start_exam(Plan(number=0, pulse=desk.pulse, alone=False))
    beat = Beat(session="x", snapshot=desk.pulse.snapshot, want=1 << 40, held=[], progress=0)
    for _, letter in desk.on(b"p", beat, 0.0):
        assert codec.decode_down(codec.encode(letter)) == letter


# -- H9: identities ----------------------------------------------------------------------------------------------

IDENTITY = {"IDENTITY", "ROUTING_ID", "CONNECT_ROUTING_ID", "CONNECT_RID", "ROUTER_HANDOVER", "identity", "routing_id"}


def sets_identity(tree: ast.Module) -> bool:
    """Any mention will do: of a constant of zmq, or of a socket's attribute."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return bool((attributes | imported) & IDENTITY)


@pytest.mark.fault("H9")
def test_no_socket_is_given_an_identity():
    """A second peer of the same identity would lock the first out, or be locked out by it."""
    found = [
        path
        for package in PACKAGES
        for path in Path(package).rglob("*.py")
        if sets_identity(ast.parse(path.read_text()))
    ]
    assert found == []
    assert sets_identity(ast.parse("socket.setsockopt(zmq.IDENTITY, b'x')"))
    assert sets_identity(ast.parse("socket.routing_id = b'x'"))


@pytest.mark.fault("H9")
def test_two_clients_of_one_key_are_two_peers(hub, keys):
    with Client(hub.address, listed(keys)) as one, Client(hub.address, listed(keys)) as two:
        peers = set()
        for client in (one, two):
            client.say("x")
            heard = hub.receive(20.0)
            assert heard
            peers.add(heard[0])
    assert len(peers) == 2
