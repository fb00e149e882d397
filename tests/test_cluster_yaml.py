"""ray-cluster.yaml, checked offline against Ray's schema, EC2's parameter model and a bootstrap on moto."""

import copy
import json
import os
import re
from pathlib import Path

import boto3
import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
TYPES = CONFIG["available_node_types"]
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


def test_ray_accepts_the_configuration():
    check_schema(CONFIG)


@pytest.mark.parametrize("change", [{"idle_timeout": 5}, {"head_node_type": "nobody"}, {"max_workers": "many"}])
def test_schema_check_finds_mistakes(change):
    with pytest.raises(Exception, match=r"idle_timeout|nobody|many|head_node_type"):
        check_schema({**CONFIG, **change})


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
    from ray.autoscaler._private.commands import _bootstrap_config

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # Ray waits for AWS to propagate its new role
    config = _bootstrap_config(check_schema(CONFIG), no_config_cache=True)
    for name, one in WORKERS.items():
        found = config["available_node_types"][name]["node_config"]
        assert found["SubnetIds"]
        assert found["SecurityGroupIds"]
        assert found["IamInstanceProfile"] == one["node_config"]["IamInstanceProfile"]


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


def test_iam_policy_allows_exactly_what_storage_needs():
    policy = json.loads((ROOT / "cluster" / "aws" / "iam-policy.json").read_text())
    allowed = {
        action
        for statement in policy["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    assert allowed == {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
    # without s3:ListBucket, or with a condition on its prefix, S3 answers 403 instead of 404 for an absent object
    (listing,) = [one for one in policy["Statement"] if one["Action"] == "s3:ListBucket"]
    assert "Condition" not in listing
    (delete,) = [one for one in policy["Statement"] if one["Action"] == "s3:DeleteObject"]
    assert delete["Resource"].endswith("/probe-*")  # votes are never deleted
