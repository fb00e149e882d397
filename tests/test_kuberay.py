"""The RayJob manifest and the image: they match the schema, use one Ray version, and retry the right failures."""

import copy
import os
import re
import signal
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
HEAD_ACCOUNT, WORKER_ACCOUNT, NETWORK, JOB = yaml.safe_load_all((ROOT / "cluster/kuberay/rayjob.yaml").read_text())
SCHEMA = yaml.safe_load((ROOT / "tests/kuberay_schema.yaml").read_text())
SPEC = JOB["spec"]
CLUSTER = SPEC["rayClusterSpec"]
SCRIPT = ROOT / "cluster/kuberay/certify.sh"


def test_schema_accepts_the_manifest():
    jsonschema.validate(JOB, SCHEMA)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("spec", "backoffLimit", "backofLimit"),
        ("spec", "activeDeadlineSeconds", "activeDeadlineSecond"),
        ("spec.deletionStrategy", "deletionRules", "deletionRule"),
        ("spec.deletionStrategy.deletionRules.0.condition", "ttlSeconds", "ttlSecondsAfterFinished"),
        ("spec.rayClusterSpec", "enableInTreeAutoscaling", "enableInTreeAutoScaling"),
        ("spec.rayClusterSpec.autoscalerOptions", "version", "autoscalerVersion"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "maxReplicas", "maxReplica"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec", "serviceAccountName", "serviceAccount_name"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0", "volumeMounts", "volumeMount"),
    ],
)
def test_schema_catches_typos(path, old, new):
    changed = copy.deepcopy(JOB)
    table = changed
    for part in path.split("."):
        table = table[int(part) if part.isdigit() else part]
    table[new] = table.pop(old)
    with pytest.raises(jsonschema.ValidationError, match=f"'{new}' was unexpected|'{old}' is a required"):
        jsonschema.validate(changed, SCHEMA)


@pytest.mark.parametrize("value", [0, "0", {"num-cpus": 0}])
def test_schema_catches_wrong_types(value):
    """Ray's start parameters are strings, even if they look like numbers."""
    changed = copy.deepcopy(JOB)
    changed["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, SCHEMA)


def test_manifest_follows_good_practice():
    assert SPEC["backoffLimit"] > 0
    assert CLUSTER["enableInTreeAutoscaling"]
    assert CLUSTER["headGroupSpec"]["rayStartParams"].items() >= {"num-cpus": "0", "num-gpus": "0"}.items()
    env_vars = yaml.safe_load(SPEC["runtimeEnvYAML"])["env_vars"]
    pods = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        assert pod["restartPolicy"] == "Never"
        assert pod["terminationGracePeriodSeconds"] >= int(env_vars["RAY_JOB_STOP_WAIT_TIME_S"])
        (volume,) = [one for one in pod["volumes"] if one["emptyDir"].get("medium") == "Memory"]
        assert {"name": volume["name"], "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    (workers,) = CLUSTER["workerGroupSpecs"]
    assert workers["minReplicas"] == 0
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_every_end_of_the_job_deletes_the_cluster():
    rules = SPEC["deletionStrategy"]["deletionRules"]
    ends = {(one["condition"].get("jobStatus"), one["condition"].get("jobDeploymentStatus")) for one in rules}
    assert ends == {("SUCCEEDED", None), ("FAILED", None), (None, "Failed")}
    assert {one["policy"] for one in rules} == {"DeleteCluster"}  # the autoscaler would restore deleted workers
    with pytest.raises(jsonschema.ValidationError, match="should not be valid under"):
        jsonschema.validate({**JOB, "spec": {**SPEC, "shutdownAfterJobFinishes": True}}, SCHEMA)


def test_a_node_is_drained_before_kubernetes_kills_its_pod():
    from ray._private import ray_constants

    (workers,) = CLUSTER["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    env = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S < drain < pod["terminationGracePeriodSeconds"]


PODS = [group["template"] for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"])]


def test_pods_have_no_rights_that_they_do_not_need():
    accounts = [pod["spec"]["serviceAccountName"] for pod in PODS]
    assert accounts == [HEAD_ACCOUNT["metadata"]["name"], WORKER_ACCOUNT["metadata"]["name"]]
    assert len(set(accounts)) == 2
    assert WORKER_ACCOUNT["automountServiceAccountToken"] is False
    assert PODS[1]["spec"]["automountServiceAccountToken"] is False  # no credentials of the API server
    for pod in PODS:
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            written = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert written == ["/dev/shm", "/tmp", "/home/ray/.cache"]


def test_only_pods_of_the_job_and_the_operator_reach_ray():
    assert CLUSTER["authOptions"] == {"mode": "token"}
    spec = NETWORK["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    for pod in PODS:
        assert spec["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (rule,) = spec["ingress"]
    for source in rule["from"]:
        assert source["podSelector"]["matchLabels"]  # an empty selector would admit every pod
        assert "ipBlock" not in source


def test_one_ray_and_one_python_everywhere():
    image = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())["docker"]["image"]
    ray, python = re.fullmatch(r"rayproject/ray:(.+)-(py\d+)-gpu", image).groups()
    recipe = (ROOT / "cluster/image/Dockerfile").read_text()
    assert f"ARG RAY_VERSION={ray}\n" in recipe
    assert f"ARG PYTHON={python}\n" in recipe
    assert "FROM rayproject/ray:${RAY_VERSION}-${PYTHON}-gpu\n" in recipe
    assert CLUSTER["rayVersion"] == ray
    for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        assert re.fullmatch(r".+@sha256:[0-9a-f]{64}", group["template"]["spec"]["containers"][0]["image"])


def test_image_is_not_root_and_holds_no_secret():
    lines = (ROOT / "cluster/image/Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
    assert not [line for line in lines if re.search(r"(?i)secret|password|access_key|token", line)]
    for line in lines:  # each copied path exists, and the ignore file does not exclude it
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}\n" in (ROOT / "cluster/image/Dockerfile.dockerignore").read_text()


@pytest.fixture
def fake(tmp_path):
    """A fake `diffsmooth` that prints its arguments and ends with the status in END."""
    command = tmp_path / "diffsmooth"
    command.write_text(
        '#!/bin/sh\ntrap "exit 143" TERM\necho "$@"\n[ "$END" = wait ] && sleep 20 & wait\nexit "$END"\n'
    )
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("status", "passed_on"), [(0, 0), (1, 1), (143, 143), (130, 130), (2, 0)])
def test_only_status_2_is_not_retried(fake, status, passed_on):
    ended = subprocess.run(
        [SCRIPT, "my spec", "--out", "s3://b/a"], env={**fake, "END": str(status)}, capture_output=True, text=True
    )
    assert ended.returncode == passed_on
    assert ended.stdout == "certify my spec --out s3://b/a\n"
    assert ("NOT CERTIFIED" in ended.stderr) == (status == 2)


def test_stop_waits_for_certify_and_returns_its_status(fake):
    process = subprocess.Popen(
        [SCRIPT, "mnist"], env={**fake, "END": "wait"}, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "certify mnist\n"  # its handler of SIGTERM is installed
    os.killpg(process.pid, signal.SIGTERM)  # as Ray does: to the entrypoint and all its children
    assert process.wait(10) == 143
