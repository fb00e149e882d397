"""Specs: what is refused and how it is said; what names a vote."""

import copy

import pytest

from pipeline.errors import UserError
from pipeline.spec import load_spec, votes_id


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("smoothing.sgima=1.0", r"smoothing\.sgima = 1\.0: unknown key; the nearest valid key is smoothing\.sigma"),
        ("smoothing.sigma=abc", r"smoothing\.sigma = 'abc'.*valid number"),
        ("smoothing.sigma=-1", r"smoothing\.sigma = -1.*greater than 0"),
        ("smoothing.n=250", r"n = 250 is not a multiple of the estimation block of 100 draws: take 200 or 300"),
        ("smoothing.n0=10", r"n0 = 10 is not a multiple of the selection block of 50 draws: take 50"),
        ("smoothing.alpha=0.7", r"alpha = 0\.7 must lie between 0 and 0\.5"),
        ("smoothing.m=3", r"m = 3 copies with local_sigma = 0"),
        ("smoothing.precision=fp8", r"smoothing\.precision = 'fp8'"),
        ("compute.device=tpu", r"compute\.device = 'tpu'"),
        ("denoiser.arch=unet", r"\[denoiser\.unet\]"),
        ("name=a/b", r"name = 'a/b'"),
        ("classifier.normalize=foo", r"classifier\.normalize = 'foo': input should be 'cifar10', 'imagenet'"),
        ("classifier.normalize={mean=[1.0]}", r"classifier\.normalize\.std is missing"),
        ("classifier.normalize={mean=[1.0], std=[0.0]}", r"\[classifier\.normalize\].*every std above 0"),
        ("smoothing=3", r"smoothing = 3: must be a table"),
        ("zzz=1", r"zzz = 1: unknown key; valid keys: name, data, denoiser, classifier, smoothing, sampling, compute$"),
        ("smoothing.sigma=nan", r"smoothing\.sigma = nan"),
        ("smoothing", r"section\.key=value"),
    ],
)
def test_mistakes_are_named(raw_spec, override, message):
    with pytest.raises(UserError, match=message) as error:
        load_spec(raw_spec, [override])
    assert "\n" not in str(error.value)


def test_missing_key_and_missing_file(raw_spec, tmp_path):
    del raw_spec["smoothing"]["sigma"]
    with pytest.raises(UserError, match=r"smoothing\.sigma is missing"):
        load_spec(raw_spec)
    with pytest.raises(UserError, match=r"nowhere\.toml: cannot read"):
        load_spec(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UserError, match=r"bad\.toml: not valid TOML"):
        load_spec(tmp_path / "bad.toml")


def test_relative_paths_belong_to_the_spec_file(tmp_path, monkeypatch):
    (tmp_path / "specs").mkdir()
    text = "name='a'\n[data]\nname='parquet'\npath='d.parquet'\n[classifier]\narch='a:b'\n[smoothing]\nsigma=1\n"
    (tmp_path / "specs" / "a.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert load_spec("specs/a.toml").data.path == str(tmp_path / "specs" / "d.parquet")
    assert load_spec("specs/a.toml", ["data.path=e.parquet"]).data.path == str(tmp_path / "e.parquet")


def test_votes_id_names_what_changes_a_vote_and_nothing_else(raw_spec):
    before = votes_id(load_spec(raw_spec), {"classifier": "w"})
    same = ["name=other", "data.samples=0:3", "smoothing.n=400", "smoothing.n0=100", "smoothing.alpha=0.01",
            "compute.device=cuda", "classifier.checkpoint=elsewhere.pt", "data.path=elsewhere.parquet"]  # fmt: skip
    assert votes_id(load_spec(raw_spec, same), {"classifier": "w"}) == before
    others = ["smoothing.sigma=0.3", "smoothing.seed=1", "smoothing.block.estimation=50", "smoothing.precision=bf16",
              "smoothing.local_seed=1", "data.split=train", "classifier.normalize=half"]  # fmt: skip
    for other in others:
        assert votes_id(load_spec(raw_spec, [other]), {"classifier": "w"}) != before, other
    assert votes_id(load_spec(raw_spec), {"classifier": "v"}) != before
    said = ["smoothing.m=1", "smoothing.precision=fp32", "data.split=test"]  # defaults, said aloud
    assert votes_id(load_spec(raw_spec, said), {"classifier": "w"}) == before


def test_a_spec_given_as_a_dict_is_not_changed(raw_spec):
    before = copy.deepcopy(raw_spec)
    load_spec(raw_spec, ["smoothing.sigma=1.0"])
    assert raw_spec == before
