"""The clusters on AWS and Google Cloud, and SkyPilot's job, checked offline.

ray-cluster.yaml: by Ray's schema, EC2's parameter model and a bootstrap on moto. cluster/gcp: by Ray's schema, and by
evaluating its IAM conditions. cluster/skypilot: by the fields that SkyPilot's schema has.
"""

import copy
import fnmatch
import json
import os
import re
import shlex
from pathlib import Path

import boto3
import botocore.session
import click
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws

from diffsmooth.jobs.cli import main
from diffsmooth.pipeline.attack.record import Attack
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage import store as storage
from tests.models import make_run

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
TYPES = CONFIG["available_node_types"]
GCP = yaml.safe_load((ROOT / "cluster/gcp/ray-cluster.gcp.yaml").read_text())
WORKERS = {name: one for name, one in TYPES.items() if name != CONFIG["head_node_type"]}


def check_schema(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def check_ec2(node_config) -> str:
    """The mistakes that EC2's model of RunInstances finds in a node_config; empty if there are none."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape).generate_report()


@pytest.mark.parametrize("config", [CONFIG, GCP], ids=["aws", "gcp"])
def test_ray_accepts_the_configuration(config):
    check_schema(config)


@pytest.mark.parametrize("config", [CONFIG, GCP], ids=["aws", "gcp"])
@pytest.mark.parametrize("change", [{"idle_timeout": 5}, {"head_node_type": "nobody"}, {"max_workers": "many"}])
def test_schema_check_finds_mistakes(config, change):
    with pytest.raises(Exception, match=r"idle_timeout|nobody|many|head_node_type"):
        check_schema({**config, **change})


@pytest.mark.parametrize("name", TYPES)
def test_ec2_accepts_every_node(name):
    assert check_ec2(TYPES[name]["node_config"]) == ""


def test_ec2_check_finds_mistakes():
    assert "InstanceTyp" in check_ec2({"InstanceTyp": "m6i.xlarge"})
    assert check_ec2({"InstanceMarketOptions": "spot"})


@mock_aws(config={"iam": {"load_aws_managed_policies": True}})
def test_bootstrap_prepares_a_launch(tmp_path, monkeypatch):
    """`ray up` sets up IAM, key pair, subnets and security group on a mocked AWS."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", CONFIG["provider"]["region"])
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    os.makedirs(tmp_path / ".ssh")
    os.makedirs(tmp_path / ".ray")
    (tmp_path / ".ray" / "auth_token").write_text("token")
    text = json.dumps(CONFIG).replace("sg-0a1b2c3d4e5f67890", closed_security_group())
    from ray.autoscaler._private.commands import _bootstrap_config

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # Ray waits for AWS to propagate its new role
    config = _bootstrap_config(check_schema(json.loads(text)), no_config_cache=True)
    for name, one in WORKERS.items():
        found = config["available_node_types"][name]["node_config"]
        assert found["SubnetIds"]
        assert found["IamInstanceProfile"] == one["node_config"]["IamInstanceProfile"]
    # Ray made no role with full rights, and no security group that is open to the internet
    assert [role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"] if "ray" in role["RoleName"]] == []
    groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    assert not [one for one in groups if "0.0.0.0/0" in json.dumps(one["IpPermissions"])]


def closed_security_group() -> str:
    """The security group of docs/cluster.md, in the default VPC of the mocked AWS; returns its id."""
    ec2 = boto3.client("ec2")
    vpc = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="diffsmooth", Description="d", VpcId=vpc)["GroupId"]
    pairs = [{"GroupId": group}]
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": pairs}])
    return group


def test_configuration_follows_good_practice():
    head = TYPES[CONFIG["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert len({one["node_config"]["InstanceType"] for one in WORKERS.values()}) >= 3
    for one in WORKERS.values():
        assert one["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert "IamInstanceProfile" in one["node_config"]
    start = " ".join(CONFIG["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0 --num-gpus=0" in start
    assert any("--shm-size" in option for option in CONFIG["docker"]["run_options"])
    assert re.search(r":\d+\.\d+\.\d+-py3\d+-gpu$", CONFIG["docker"]["image"])


def test_every_node_has_a_role_and_a_closed_network_and_ray_requires_a_token():
    for one in TYPES.values():
        node = one["node_config"]
        assert node["IamInstanceProfile"]
        assert node["SecurityGroupIds"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert "--env RAY_AUTH_MODE=token" in CONFIG["docker"]["run_options"]
    assert CONFIG["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 /home/ray/.ray/auth_token" in CONFIG["setup_commands"]
    commands = CONFIG["head_start_ray_commands"] + CONFIG["worker_start_ray_commands"]
    for command in (one for one in commands if "ray start" in one):
        assert command.startswith("export RAY_AUTH_MODE=token;")


def test_secrets_are_neither_committed_nor_sent_to_the_nodes():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".env", "*.pem", "*.key", "id_rsa*", "id_ed25519*"} <= set(ignored)
    assert ".gitignore" in CONFIG["rsync_filter"]
    assert ".env" in CONFIG["rsync_exclude"]
    # these patterns also apply to the SSH key and the token, which Ray must send
    for name in ("ray-autoscaler_1_us-west-2.pem", "auth_token"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in CONFIG["rsync_exclude"])


def policy(name: str) -> list[dict]:
    return json.loads((ROOT / "cluster" / "aws" / name).read_text())["Statement"]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allows(action: str, key: str, *, conditional: bool = False) -> bool:
    """Whether the nodes' policy allows an action on an object, with or without If-None-Match."""
    for one in policy("iam-policy.json"):
        needed = one.get("Condition", {}).get("Null", {}).get("s3:if-none-match")
        assert set(one.get("Condition", {})) <= {"Null"}
        if action in listed(one["Action"]) and (needed is None or conditional):
            for resource in listed(one["Resource"]):
                if fnmatch.fnmatchcase(f"arn:aws:s3:::BUCKET/{key}", resource):
                    return True
    return False


@pytest.fixture
def written(raw_spec, tmp_path, monkeypatch):
    """The keys that a run and an attack create, and those that they replace."""
    created, replaced = [], []
    for method, keys in (("put_if_absent", created), ("replace", replaced)):
        original = getattr(storage.FolderStore, method)

        def call(self, key, data, original=original, keys=keys):
            keys.append(f"runs/experiment/a/{key}")
            return original(self, key, data)

        monkeypatch.setattr(storage.FolderStore, method, call)
    planned = {"mode": "planned", "max_acr_loss": 0.05}
    spec = load_spec(raw_spec | {"smoothing": raw_spec["smoothing"] | {"n": 2000, "n0": 200}, "sampling": planned})
    make_run(spec, tmp_path / "run")
    assert any(key.endswith("plan.json") for key in created)
    attack = Attack(attack="pgd", eps=[1.0], votes_id="0" * 32)
    created += [f"runs/experiment/a/{key}" for key in (attack.key, attack.sample_key(3))]
    replaced.append(f"runs/experiment/a/{attack.table_key}")
    return created, [*replaced, "runs/a/progress.json", "runs/a/cascade.json"]


def test_the_nodes_can_write_what_a_run_writes_and_replace_only_derived_files(written):
    created, replaced = written
    for key in created:
        assert allows("s3:PutObject", key, conditional=True), key
        assert not allows("s3:PutObject", key), key
        assert allows("s3:DeleteObject", key) == ("/probe-" in key)
    for key in replaced:
        assert allows("s3:PutObject", key), key
    for key in ("models/net.pt", "data/test.parquet", "runs/a/run.json"):
        assert allows("s3:GetObject", key)
    for key in ("models/net.pt", "data/test.parquet", "elsewhere/x"):
        assert not allows("s3:PutObject", key, conditional=True)
    assert not allows("s3:GetObject", "elsewhere/x")


def test_the_nodes_policy_lists_without_a_condition():
    """Without s3:ListBucket, or with a condition on its prefix, S3 answers 403 instead of 404 for an absent object."""
    (listing,) = [one for one in policy("iam-policy.json") if one["Action"] == "s3:ListBucket"]
    assert "Condition" not in listing


def test_the_heads_policy_is_limited_to_this_cluster():
    statements = policy("head-policy.json")
    worker = next(iter(WORKERS.values()))["node_config"]["IamInstanceProfile"]["Name"]
    for one in statements:
        actions = listed(one["Action"])
        assert not any("*" in action for action in actions)
        if one["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions)
        if "ec2:TerminateInstances" in actions:
            assert one["Condition"]["StringEquals"] == {"aws:ResourceTag/ray-cluster-name": CONFIG["cluster_name"]}
        if actions == ["iam:PassRole"]:
            assert one["Resource"].endswith(f":role/{worker}")
    (launch,) = [one for one in statements if one["Sid"] == "LaunchWorkersOfTheseTypes"]
    allowed = launch["Condition"]["StringLike"]["ec2:InstanceType"]
    for one in WORKERS.values():
        assert any(fnmatch.fnmatch(one["node_config"]["InstanceType"], pattern) for pattern in allowed)
    assert launch["Condition"]["StringEquals"] == {"aws:RequestTag/ray-cluster-name": CONFIG["cluster_name"]}


# Google Cloud

GCP_TYPES = GCP["available_node_types"]
GCP_WORKERS = {name: one for name, one in GCP_TYPES.items() if name != GCP["head_node_type"]}
# what CEL, the language of IAM conditions, is used for, and the same in Python
CEL = (
    (r"resource\.(name|type)\.startsWith\((\"[^\"]*\")\)", r"\1.startswith(\2)"),
    (r"resource\.(name|type)\.endsWith\((\"[^\"]*\")\)", r"\1.endswith(\2)"),
    (r"resource\.(name|type)\.extract\(\"([^\"{]*)\{rest\}\"\)", r'\1.partition("\2")[2]'),
    (r"resource\.(name|type)", r"\1"),
    (r"&&", "and"),
    (r"\|\|", "or"),
)


def gcp(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster/gcp" / name).read_text())


def applies(condition: str, name: str, type: str = "storage.googleapis.com/Object") -> bool:
    """Whether a role applies to a resource by its condition."""
    expression = gcp(condition)["expression"]
    for pattern, python in CEL:
        expression = re.sub(pattern, python, expression)
    return bool(eval(expression, {"__builtins__": {}}, {"name": name, "type": type}))


def test_the_nodes_on_google_cloud_replace_only_derived_files(written):
    """To replace an object that exists, a node must have the permissions to create and to delete it."""
    assert set(gcp("worker-role.yaml")["includedPermissions"]) == {
        f"storage.objects.{one}" for one in ("create", "get", "list")
    }
    assert gcp("derived-role.yaml")["includedPermissions"] == ["storage.objects.delete"]
    created, replaced = written
    for key in created:
        assert applies("derived-condition.yaml", f"projects/_/buckets/BUCKET/objects/{key}") == ("/probe-" in key), key
    for key in replaced:
        assert applies("derived-condition.yaml", f"projects/_/buckets/BUCKET/objects/{key}"), key
    for key in ("models/curve.csv", "data/test.parquet", "runs/a/seals/001.sha256", "runs/a/attacks/x/attack.json"):
        assert not applies("derived-condition.yaml", f"projects/_/buckets/BUCKET/objects/{key}")
    assert not applies("derived-condition.yaml", "projects/_/buckets/OTHER/objects/runs/a/votes.parquet")


def test_the_head_on_google_cloud_is_limited_to_nodes_of_this_cluster():
    permissions = gcp("head-role.yaml")["includedPermissions"]
    assert all(one.startswith("compute.") and "*" not in one for one in permissions)
    zone = "projects/PROJECT/zones/us-central1-a"
    instance, disk = "compute.googleapis.com/Instance", "compute.googleapis.com/Disk"
    ours = f"ray-{GCP['cluster_name']}-worker-1a2b3c4d-compute"  # as Ray names its nodes
    assert applies("head-condition.yaml", f"{zone}/instances/{ours}", instance)
    assert applies("head-condition.yaml", f"{zone}/disks/{ours}", disk)
    assert applies(
        "head-condition.yaml", "projects/PROJECT/regions/r/subnetworks/diffsmooth", "compute.googleapis.com/Subnetwork"
    )
    for name in ("database", "ray-other-worker-1a2b3c4d-compute"):
        assert not applies("head-condition.yaml", f"{zone}/instances/{name}", instance)
        assert not applies("head-condition.yaml", f"{zone}/disks/{name}", disk)


def test_the_cluster_on_google_cloud_follows_good_practice():
    head = GCP_TYPES[GCP["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "scheduling" not in head["node_config"]  # on demand
    assert len({one["node_config"]["machineType"] for one in GCP_WORKERS.values()}) >= 3
    for one in GCP_WORKERS.values():
        assert one["resources"]["GPU"] == 1
        assert one["labels"]["ray.io/accelerator-type"]  # for certify --accelerator
        assert one["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    accounts = {name: one["node_config"]["serviceAccounts"][0]["email"] for name, one in GCP_TYPES.items()}
    assert {email.partition("@")[0] for email in accounts.values()} == {"diffsmooth-head", "diffsmooth-worker"}
    assert [name for name, email in accounts.items() if email.startswith("diffsmooth-head")] == [GCP["head_node_type"]]
    for one in GCP_TYPES.values():  # else Ray takes the first network, which may be open to the internet
        assert one["node_config"]["networkInterfaces"][0]["subnetwork"].endswith("/diffsmooth")


def test_both_clouds_use_one_image_and_the_same_commands():
    for key in ("cluster_name", "docker", "file_mounts", "rsync_exclude", "rsync_filter", "setup_commands"):
        assert GCP[key] == CONFIG[key], key
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert GCP[key] == CONFIG[key], key


# SkyPilot

SKY = yaml.safe_load((ROOT / "cluster/skypilot/certify.yaml").read_text())


def test_the_job_of_skypilot_resumes_but_not_after_a_user_error():
    resources = SKY["resources"]
    assert resources["use_spot"] is True
    assert len(resources["accelerators"]) >= 3
    assert set(resources["accelerators"].values()) == {1}
    codes = resources["job_recovery"]["recover_on_exit_codes"]
    assert codes == [1, 143]
    assert "max_restarts_on_errors" not in resources["job_recovery"]  # it would also restart after status 2
    # the fields of SkyPilot 0.14 that the file may use; anything else is a typo
    assert set(SKY) <= {"name", "workdir", "resources", "envs", "secrets", "setup", "run"}
    assert set(resources) <= {"accelerators", "use_spot", "cpus", "memory", "disk_size", "image_id", "job_recovery"}
    assert resources["image_id"] == f"docker:{CONFIG['docker']['image']}"


def test_the_command_of_the_job_parses_and_gets_the_signals():
    variables = {name for name in ("SPEC", "OUT") if SKY["envs"][name] is None}  # null: must be given
    assert variables == {"SPEC", "OUT"}
    *_, line = SKY["run"].strip().splitlines()
    words = shlex.split(line.replace("$SPEC", "mnist").replace("$OUT", "s3://BUCKET/run"))
    assert words[:3] == ["exec", "diffsmooth", "certify"]
    main.get_command(click.Context(main), "certify").make_context("certify", words[3:])
