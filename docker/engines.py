"""Installs one worker's engine and libraries into an image, and nothing of the project itself: a change of its sources
then installs nothing again. install.py's plan names the extras; both images take the versions that go together.

    python docker/engines.py cpu sampler math          constraints/cpu.txt; the plan's extras, and `math`
    CONSTRAINTS=constraints/trainer.txt python docker/engines.py cpu trainer          other exact versions
"""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from install import CONSTRAINTS, CPU_INDEX, TORCH_FACTS, InstallError, Plan, check_torch, engine_imports, plan_for

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]


def requirements(extras: list[str]) -> list[str]:
    """The project's own dependencies and those of `extras`, as pyproject.toml has them."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return project["dependencies"] + [line for name in extras for line in project["optional-dependencies"][name]]


def cpu_torch(constraints: Path) -> str:
    """The CPU build of the torch that the constraints name."""
    [line] = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
    return line.removesuffix("+cpu") + "+cpu"


def install(plan: Plan, extras: list[str], constraints: Path) -> None:
    """The CPU build of torch comes first: else the CUDA build is pulled in, which is ten times as large."""
    if not plan.gpu:
        torch = [*PIP, "install", cpu_torch(constraints)]
        if subprocess.run(torch, check=False).returncode != 0:
            subprocess.run([*torch, "--index-url", CPU_INDEX], check=True)
    subprocess.run([*PIP, "install", "--constraint", str(constraints), *requirements(extras)], check=True)
    if plan.unwanted:
        subprocess.run([*PIP, "uninstall", "--yes", *plan.unwanted], check=True)


def verify(plan: Plan) -> None:
    """Raises InstallError. A machine that builds for GPUs may have none: there only torch's build is looked at."""
    facts = subprocess.run([sys.executable, "-c", TORCH_FACTS], check=True, capture_output=True, text=True).stdout
    check_torch(facts.splitlines()[-1], plan.gpu)
    for name, statement in {} if plan.gpu else engine_imports(plan).items():
        if subprocess.run([sys.executable, "-c", statement], check=False).returncode != 0:
            raise InstallError(f"importing {name} failed")


def main(engine: str, worker: str, *extras: str) -> None:
    if engine not in ("cpu", "gpu"):
        sys.exit(f"ENGINE={engine}: expected cpu or gpu")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        sys.exit("BASE has no headers of Python, which Triton and torch.compile need; on Debian: libpython3.11-dev")
    plan = plan_for(engine == "gpu", (worker,))
    constraints = Path(os.environ.get("CONSTRAINTS") or CONSTRAINTS / f"{engine}.txt")
    if not constraints.is_file():
        sys.exit(f"{constraints} is not there; name another file with --build-arg CONSTRAINTS=...")
    install(plan, [*plan.extras, *extras], constraints)
    try:
        verify(plan)
    except InstallError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
