"""The examples run, and agree with the commands."""

import importlib.util
from pathlib import Path

import pytest

import diffsmooth as ds
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.smoothing import build_base_classifier
from diffsmooth.pipeline.votes.blocks import read_votes
from tests.models import make_run

PAGE = Path(__file__).parent.parent / "examples" / "diffsmooth_on_one_page.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location(PAGE.stem, PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["fashion", "mnist-cohen-1.00"])
def test_the_method_on_one_page_equals_the_votes_and_the_certificates_of_a_worker(page, name, tmp_path):
    spec = load_named(name, ["compute.device=cpu", "smoothing.n=1000"])
    make_run(spec, tmp_path / "run", samples=6)
    votes = read_votes(str(tmp_path / "run")).set_index(["sample", "stage", "class"]).votes
    certificates = ds.open_run(str(tmp_path / "run")).certificates().set_index("sample")
    f, data = build_base_classifier(spec, "cpu"), open_dataset(spec.data)
    noise = page.Noise.of(spec.smoothing)
    for index, expected in certificates.iterrows():
        image_CHW = data[index].image_CHW
        found = page.certify(f, image_CHW, index, spec.smoothing)
        assert found == (expected.top_class, expected.n_A, expected.p_A_lower, expected.radius)
    counts_K = page.sample_under_noise(f, image_CHW, index, noise, "selection", spec.smoothing.n0)
    assert {k: count for k, count in enumerate(counts_K.tolist()) if count} == votes[index, "selection"].to_dict()


def test_the_method_on_one_page_prints_a_certificate(page, capsys):
    page.main("mnist-cohen-0.50", "3")
    assert capsys.readouterr().out.splitlines()[0] == (
        "sample 3 of mnist-cohen-0.50 with label 3: 999 of 1000 votes for class 3"
    )
