"""The shipped specs and trainings are what they were: existing runs of them resume, and results can be repeated.

shipped_specs.json has, for each name, the votes_id without weights and the sha256 of all values. It was written once,
when every spec was a file of its own. A deliberate change of a value changes its line; a votes_id never changes.
"""

import hashlib
import json
from pathlib import Path

import pytest

from diffsmooth.jobs.specs import SPECS, TRAININGS
from diffsmooth.pipeline.spec import load_spec, votes_id
from diffsmooth.pipeline.training.settings import load_training

FROZEN = json.loads(Path(__file__).with_name("shipped_specs.json").read_text())


def digest(spec) -> str:
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def test_every_shipped_spec_is_frozen():
    names = {path.stem for path in SPECS.glob("*.toml")} | {f"training/{one.stem}" for one in TRAININGS.glob("*.toml")}
    assert names == set(FROZEN)


@pytest.mark.parametrize("name", FROZEN)
def test_a_shipped_spec_keeps_its_votes_id_and_its_values(name):
    frozen_id, frozen_values = FROZEN[name]
    if name.startswith("training/"):
        assert digest(load_training(TRAININGS / f"{name.removeprefix('training/')}.toml")) == frozen_values
        return
    spec = load_spec(SPECS / f"{name}.toml")
    assert votes_id(spec, {}) == frozen_id
    assert digest(spec) == frozen_values
