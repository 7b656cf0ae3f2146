"""Python programs that start in a moment: forked from a process that has imported the engines' libraries already.

Importing torch, transformers and DeepSpeed costs a rank six seconds of a core; importing vLLM costs a sampler eight.
Most tests start several of them. `Warm(["-m", "trainer", ...])` runs the same program with the same arguments in a
child of `multiprocessing`'s fork server. The programs that such a child starts in turn are forked from it, so that the
tree of processes, their sessions and what ends with what are those of the real commands. vLLM's engine process is
started by vLLM itself, as always.

Three things differ. Variables that a library reads when it is imported have no effect, for example OMP_NUM_THREADS and
PYTHONWARNINGS. Functions of `atexit` are not called. The command line and the environment in /proc are those of the
fork server. A warm process knows no GPU, so where there is one `start` and `run` take a new Python.

Tests of how a command is started use `subprocess`: `tests/test_end_to_end.py` has both kinds.
"""

import atexit
import inspect
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from protocol.process import visible_gpus

FORKED = ("trainer", "sampler", "launch", "deepspeed.launcher.launch", "tests.")
"""Modules that are forked when a warm process starts them. Others are started as always: the processes that run reward
functions, for example, must be small and new."""
CALL = inspect.signature(subprocess.Popen._execute_child)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.libraries"])


class Warm:
    """A running program. It has the methods of `subprocess.Popen` that tests need.

    words: what stands after `python` on the command line. output, errors: files that the program appends to.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], output: Path, errors: Path | None = None
    ) -> None:
        self.args = list(words)
        files = (str(output), str(errors or output))
        self._process = _context.Process(target=_begin, args=(self.args, dict(environment), files))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started above"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(words: Sequence[str], environment: Mapping[str, str], output: Path) -> Warm | subprocess.Popen:
    """Starts a program in a session of its own; its output and errors go to one file."""
    if not visible_gpus():
        return Warm(words, environment, output)
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=file, env=environment, start_new_session=True
        )


Done = subprocess.CompletedProcess[str]


def run(words: Sequence[str], environment: Mapping[str, str], timeout: float = 600.0) -> Done:
    """Runs a program to its end. Raises subprocess.TimeoutExpired after it has killed it."""
    if visible_gpus():
        command = [sys.executable, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place, "output"), Path(place, "errors")
        output.touch()
        errors.touch()
        program = Warm(words, environment, output, errors)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        return Done(list(words), code, output.read_text(), errors.read_text())


def _begin(words: list[str], environment: dict[str, str], files: tuple[str, str]) -> None:
    """Runs the program in a child of the fork server."""
    from tests.libraries import SET_BY_IMPORTS

    os.setsid()
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment | SET_BY_IMPORTS)  # what the imports have found stays true
    subprocess.Popen = _ForkingPopen
    _forget_the_parent()
    _run(words)


def _run(words: Sequence[str]) -> None:
    """Does what `python WORDS` does after its start."""
    left = list(words)
    if left[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # pyright: ignore[reportAttributeAccessIssue]
        left.pop(0)
    if left[0] == "-m":
        sys.argv = left[1:]
        runpy.run_module(left[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = left
        runpy.run_path(left[0], run_name="__main__")


class _ForkingPopen(subprocess.Popen):
    """Forks this process instead of starting a new Python, where the command is one of ours."""

    def _execute_child(self, *arguments) -> None:
        call = CALL.bind(self, *arguments).arguments
        if not _is_forked(call["args"]):
            super()._execute_child(*arguments)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _in_child(lambda: _run(call["args"][1:]), call)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[end] for end in ends))


def _is_forked(command: object) -> bool:
    """A process with threads does not fork: what a thread has locked would stay locked in the child."""
    if not isinstance(command, list) or command[0] != sys.executable or threading.active_count() > 1:
        return False
    words = [word for word in command[1:] if word != "-u"]
    return len(words) > 1 and words[0] == "-m" and words[1].startswith(FORKED)


def _in_child(work: Callable[[], None], call: Mapping) -> None:
    """Makes the fork like a process that was just started, does the work, and never returns."""
    code = 1
    try:
        for descriptor, end in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if call[end] not in (-1, descriptor):
                os.dup2(call[end], descriptor)
        _let_go_of_files()
        if call["start_new_session"]:
            os.setsid()
        if call["cwd"]:
            os.chdir(call["cwd"])
        if call["env"] is not None:
            environment = dict(call["env"])
            os.environ.clear()
            os.environ.update(environment)
        _forget_the_parent()
        if call["preexec_fn"]:
            call["preexec_fn"]()
        work()
        code = 0
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _let_go_of_files() -> None:
    """Makes the parent's open files and sockets /dev/null here.

    They are not closed: objects that were copied by the fork will close their numbers later, and a number that was
    free until then could be that of a new socket.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and os.path.exists(f"/proc/self/fd/{name}"):
            os.dup2(null, int(name))


def _forget_the_parent() -> None:
    """Removes the handlers of signals, of the log and of the exit that the parent had set."""
    atexit._clear()
    logging.getLogger().handlers.clear()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    print(error.code, file=sys.stderr)  # noqa: T201
    return 1
