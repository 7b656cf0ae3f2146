"""The rules of the house that a reader can rely on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = {
    "protocol": set(),
    "policy": {"protocol"},
    "sampler": {"protocol", "policy"},
    "doctor": {"protocol"},
    "trainer": {"protocol", "policy", "doctor"},
    "launch": {"protocol", "policy", "sampler", "doctor", "trainer"},
}
HEAVY = {"torch", "vllm", "deepspeed", "transformers"}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "recv_pyobj",
    "send_pyobj",
    "broadcast_object_list",
    "scatter_object_list",
    "gather_object",
    "eval",
    "exec",
}


def sources(room: str) -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(Path(room).rglob("*.py"))]


def imported(tree: ast.Module) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room):
    for path, tree in sources(room):
        wrong = (imported(tree) & set(ROOMS)) - ROOMS[room] - {room}
        assert not wrong, f"{path} imports {wrong}"


def test_the_protocol_needs_no_engine():
    for path, tree in sources("protocol"):
        assert not imported(tree) & (HEAVY | {"peft"}), path


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("vllm", {"sampler/engine.py", "sampler/worker.py"}),
        ("deepspeed", {"trainer/engine.py"}),
        ("zmq", {"protocol/channel.py", "protocol/keys.py"}),
    ],
)
def test_each_engine_is_named_in_its_own_file(library, files):
    found = {str(path) for room in ROOMS for path, tree in sources(room) if library in imported(tree)}
    assert found == files


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_unpickled_and_no_data_is_run_as_code(room):
    for path, tree in sources(room):
        assert not imported(tree) & FORBIDDEN, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                own_eval = isinstance(node.func, ast.Attribute) and name == "eval"  # module.eval() of torch
                assert name not in FORBIDDEN_CALLS or own_eval, f"{path}:{node.lineno} {name}"


@pytest.mark.parametrize("module", ["sampler", "trainer", "launch"])
def test_help_imports_no_engine(module):
    """And so it answers at once."""
    code = f"""
import runpy, sys
sys.argv = ['{module}', '--help']
try: runpy.run_module('{module}', run_name='__main__')
except SystemExit: pass
print(sorted({HEAVY} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]"), out[-300:]
    assert "usage" in out


def test_the_loops_stay_short():
    for path, name in (("trainer/loop.py", "train"), ("sampler/loop.py", "sample")):
        [function] = [n for n in ast.walk(ast.parse(Path(path).read_text())) if getattr(n, "name", "") == name]
        assert function.end_lineno - function.lineno < 40, path


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    for module in ("sampler", "trainer"):
        command = [sys.executable, "-m", module, "--run", str(tmp_path / "run"), "--set", "trainer.stepz=3"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.strip().startswith("error: ") and "\n" not in done.stderr.strip()


WALL_CLOCK = {"time", "time_ns", "ctime", "localtime", "gmtime", "now", "today", "utcnow", "strftime"}
FILE_TIMES = {"st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "st_atime", "getmtime", "getctime"}


def uses(path: Path, modules: set[str], names: set[str]) -> set[str]:
    """`module.name` of these modules in a file, however they were imported."""
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names]
    found = {ast.unparse(node) for node in nodes if ast.unparse(node.value).split(".")[-1] in modules}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] in modules:
            found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name in names}
    return found


@pytest.mark.fault("M1", "M3")
def test_no_decision_hangs_on_the_wall_clock():
    """It jumps, and differs between hosts. Deadlines, leases and beats use time.monotonic, which does neither."""
    rooms = ("protocol", "policy", "sampler", "trainer")
    clocks = {path: uses(path, {"time", "datetime", "date"}, WALL_CLOCK) for room in rooms for path, _ in sources(room)}
    named = {str(path): found - {"datetime.time"} for path, found in clocks.items()}  # that one is a type
    assert {path: found for path, found in named.items() if found} == {
        "protocol/metrics.py": {"time.time"},  # when a record was written, for people
        "protocol/failure.py": {"time.strftime", "time.time_ns"},  # when a run failed; a name for the file put aside
    }


@pytest.mark.fault("M3")
def test_no_decision_hangs_on_the_times_of_files():
    """Another host, or the file server, wrote them by its own clock."""
    found = {}
    for room in ("protocol", "policy", "sampler", "trainer"):
        for path, tree in sources(room):
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            found |= {str(path): names & FILE_TIMES} if names & FILE_TIMES else {}
    assert found == {"policy/embedded.py": {"st_mtime_ns"}}  # whether a local .gguf file is still the one converted


def test_the_wall_clock_would_be_seen(tmp_path):
    (tmp_path / "a.py").write_text(
        "import time\nfrom time import time_ns as n\nimport datetime\nx = datetime.datetime.now()\n"
    )
    found = uses(tmp_path / "a.py", {"time", "datetime", "date"}, WALL_CLOCK)
    assert found == {"time.time_ns", "datetime.datetime.now"}
