"""The shipped specs and trainings are what they were: existing runs of them resume, and results can be repeated.

shipped_specs.json has, for each name, the votes_id without weights and the sha256 of all values. It was written once,
when every spec was a file of its own. A deliberate change of a value changes its line; a votes_id never changes.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffsmooth.jobs.specs import SPECS, TRAININGS, load_named, load_named_training, load_shipped
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import votes_id

FROZEN = json.loads(Path(__file__).with_name("shipped_specs.json").read_text())


def digest(spec) -> str:
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def test_a_family_gives_one_text_for_each_sigma():
    text = SPECS.text("cifar10-dmae-0.50")
    assert text.startswith("# DMAE ViT-B (Wu et al. 2023), CIFAR-10, sigma 0.50: ")
    assert 'name = "cifar10-dmae-0.50"\n\n[data]' in text
    assert "\nsigma = 0.50\n" in text
    assert "/vit_base_0.50.pth" in text


def test_the_file_of_a_family_is_refused_with_the_reason():
    with pytest.raises(UserError, match="only shipped specs come in families with `sigmas`; give the name of one"):
        load_named(str(SPECS.folder / "mnist-cohen.toml"))
    with pytest.raises(UserError, match="only shipped trainings come in families"):
        load_named_training(str(TRAININGS.folder / "mnist-classifier.toml"))


def test_a_spec_is_read_without_the_libraries_that_take_long_to_import():
    code = (
        "import sys; from diffsmooth.jobs.specs import load_named; load_named('cifar10-cohen-0.50'); "
        "assert not {'torch', 'ray', 'pandas', 'numpy', 'boto3', 'requests'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_messages_name_a_shipped_spec_without_its_path():
    with pytest.raises(UserError, match=r"^mnist-cohen-0\.50: smoothing\.sigma = -1: "):
        load_named("mnist-cohen-0.50", ["smoothing.sigma=-1"])
    with pytest.raises(UserError, match=r"^fashion-mixture: training\.steps = 0: "):
        load_named_training("fashion-mixture", ["training.steps=0"])


def test_every_shipped_spec_is_frozen():
    assert sorted([*SPECS.names(), *(f"training/{name}" for name in TRAININGS.names())]) == sorted(FROZEN)


@pytest.mark.parametrize("name", FROZEN)
def test_a_shipped_spec_keeps_its_votes_id_and_its_values(name):
    frozen_id, frozen_values = FROZEN[name]
    if name.startswith("training/"):
        assert digest(load_named_training(name.removeprefix("training/"))) == frozen_values
        return
    spec = load_shipped(name)
    assert votes_id(spec, {}) == frozen_id
    assert digest(spec) == frozen_values
