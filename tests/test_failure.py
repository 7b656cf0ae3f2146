"""FAILED.md: the first failure of a run, in words that help."""

import logging
from pathlib import Path

import pytest

from protocol.errors import EngineDead, StorageError, Superseded
from protocol.failure import died, explained, failure, put_aside, write_failure


def test_the_first_failure_is_kept_with_its_last_lines_and_what_to_do(tmp_path):
    with pytest.raises(StorageError), explained(tmp_path, "trainer rank 0"):
        logging.getLogger("x").warning("the disk is nearly full")
        raise StorageError("cannot write s7: No space left on device")
    with pytest.raises(RuntimeError), explained(tmp_path, "trainer rank 1"):
        raise RuntimeError("Connection closed by peer")
    said = (tmp_path / "FAILED.md").read_text()
    assert said.startswith("# trainer rank 0 failed first\n\nexit code 73,")
    assert "No space left on device" in said and "W the disk is nearly full" in said and "Free space" in said
    assert "## trainer rank 1 failed later" in said and said.index("rank 0") < said.index("rank 1")
    assert failure(tmp_path, "trainer") == (73, "cannot write s7: No space left on device")
    assert failure(tmp_path, "sampler") is None


def test_a_bug_leaves_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), explained(tmp_path, "sampler engine 0"):
        1 / 0  # noqa: B018
    said = (tmp_path / "FAILED.md").read_text()
    assert "exit code 1," in said and "ZeroDivisionError: division by zero" in said and "test_failure.py" in said


def test_a_lost_rank_is_named_as_that(tmp_path):
    with pytest.raises(RuntimeError), explained(tmp_path, "trainer rank 0"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2346")
    assert "another rank is gone (killed, or out of memory?)" in (tmp_path / "FAILED.md").read_text()


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(0), Superseded("a newer one")])
def test_what_is_no_failure_leaves_nothing(tmp_path, ending):
    with pytest.raises(type(ending)), explained(tmp_path, "trainer rank 0"):
        raise ending
    assert not (tmp_path / "FAILED.md").exists()


def test_a_new_start_puts_aside_what_it_said_itself_and_nothing_else(tmp_path):
    write_failure(tmp_path, "sampler engine 10 on n1", 71, "vLLM died")
    for other in ("trainer", "sampler", "sampler engine 1", "sampler engine 10", "sampler engine 10 on n2"):
        put_aside(tmp_path, other)
        assert failure(tmp_path, "sampler") == (71, "vLLM died")
    put_aside(tmp_path, "sampler engine 10 on n1")
    assert not (tmp_path / "FAILED.md").exists()
    [kept] = (tmp_path / "logs").iterdir()
    assert "vLLM died" in kept.read_text()


def test_what_failed_first_takes_along_what_followed_and_what_followed_only_itself(tmp_path):
    for _ in range(2):
        write_failure(tmp_path, "trainer rank 1", 73, "No space left", ["# trainer rank 9 failed later"])
        write_failure(tmp_path, "sampler engine 0", 66, "no trainer")
        write_failure(tmp_path, "trainer rank 0", 1, "rank 1 is gone")
        put_aside(tmp_path, "sampler engine 0")
        assert failure(tmp_path, "sampler") is None and failure(tmp_path, "trainer") == (73, "No space left")
        assert "rank 1 is gone" in (tmp_path / "FAILED.md").read_text()
        put_aside(tmp_path, "trainer")
        assert not (tmp_path / "FAILED.md").exists()
    assert len(list((tmp_path / "logs").iterdir())) == 4


def test_a_later_failure_of_the_other_worker_can_still_be_read(tmp_path):
    """A sampler that died on Monday must not hide why the trainer ended on Friday."""
    write_failure(tmp_path, "sampler engine 0", 71, "vLLM died")
    write_failure(tmp_path, "trainer rank 0", 74, "none of 2 checkpoints is intact")
    assert failure(tmp_path, "trainer") == (74, "none of 2 checkpoints is intact")
    assert failure(tmp_path, "sampler") == (71, "vLLM died")


def test_a_full_disk_leaves_no_empty_file_that_would_hide_the_next_failure(tmp_path, monkeypatch):
    opened = Path.open

    def full(path, mode="r", *rest):
        file = opened(path, mode, *rest)
        if mode == "x":
            file.close()
            file = opened(Path("/dev/full"), "w")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        write_failure(tmp_path, "trainer rank 0", 73, "No space left on device")
    assert not (tmp_path / "FAILED.md").exists()


def test_what_a_model_or_a_peer_wrote_commands_no_terminal_and_stays_indented(tmp_path):
    write_failure(tmp_path, "trainer rank 0", 2, "bad \x1b[2J", ["one\n# sampler failed first", "\x1b[31m"])
    said = (tmp_path / "FAILED.md").read_text()
    assert "\x1b" not in said and "\n    # sampler failed first\n" in said


def test_a_run_directory_that_is_gone_hides_no_error(tmp_path):
    with pytest.raises(EngineDead), explained(tmp_path / "gone", "sampler engine 0"):
        raise EngineDead("vLLM died")


def test_a_child_that_was_killed_is_described():
    assert died(-9) == "was killed by SIGKILL (out of memory?)"
    assert died(-15) == "was killed by SIGTERM"
    assert died(3) == "ended with exit code 3"
