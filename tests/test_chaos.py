"""The faults that need processes, each as a run of its own, and a short campaign of random ones.

`make chaos` runs the same campaign at any length.
"""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]
FAULTS = 40


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """One process for all: it imports the engines' libraries once and forks every worker."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--rows"], capture_output=True, text=True, timeout=900, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, done.stderr[-3000:]
    return {one["row"]: one for one in found}


NAMES = [
    "A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "A12", "A13", "A14", "A16",
    "B1", "B2", "B3", "B6", "C1", "C2", "C3", "C4", "C5", "C6", "D1", "D2", "D3", "D5", "G1", "G2", "G15", "H3", "I10",
    "J1", "J2", "J3", "L4", "N1", "N2", "N3", "N4",
    "evaluation",
]  # fmt: skip


@pytest.mark.fault("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "A12", "A13", "A14", "A16")
@pytest.mark.fault("B1", "B2", "B3", "B6", "C1", "C2", "C3", "C4", "C5", "C6", "D1", "D2", "D3", "D5")
@pytest.mark.fault("G1", "G2", "G15", "H3", "I10", "J1", "J2", "J3", "L4", "N1", "N2", "N3", "N4")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_survives(rows, name):
    if rows[name]["ok"] is None:
        pytest.skip(rows[name]["why"])
    assert rows[name]["ok"], rows[name]["why"]


def test_no_scenario_is_forgotten(rows):
    assert set(rows) == set(NAMES)


def test_a_short_campaign_of_random_faults_loses_and_doubles_nothing():
    command = [sys.executable, "-m", "tests.chaos", "--faults", str(FAULTS), "--seed", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-2]
    assert "lost 0  doubled 0  stalls 0  orphan processes 0" in summary
