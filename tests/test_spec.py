"""Specs: what is refused, with which message, and what the votes_id depends on."""

import copy

import pytest

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import load_spec, votes_id


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("smoothing.sgima=1.0", r"smoothing\.sgima = 1\.0: unknown key; the nearest valid key is smoothing\.sigma"),
        ("smoothing.sigma=abc", r"smoothing\.sigma = 'abc'.*valid number"),
        ("smoothing.sigma=-1", r"smoothing\.sigma = -1.*greater than 0"),
        ("smoothing.n=250", r"n = 250 is not a multiple of the estimation block length 100; use 200 or 300"),
        ("smoothing.n0=10", r"n0 = 10 is not a multiple of the selection block length 50; use 50"),
        ("smoothing.alpha=0.7", r"alpha = 0\.7 must be above 0 and below 0\.5"),
        ("smoothing.m=3", r"m = 3 copies with local_sigma = 0"),
        ("smoothing={sigma=100.0, noise_grid=65535}", r"noise_grid = 65535 with sigma = 100 exceeds 2\^24 steps"),
        ("data.num_classes=1", r"data\.num_classes = 1"),
        ("smoothing.precision=fp8", r"smoothing\.precision = 'fp8'"),
        ("compute.device=tpu", r"compute\.device = 'tpu'"),
        ("denoiser.arch=unet", r"\[denoiser\.unet\]"),
        ("name=a/b", r"name = 'a/b'"),
        ("classifier.normalize=foo", r"classifier\.normalize = 'foo': input should be 'cifar10', 'imagenet'"),
        ("classifier.normalize={mean=[1.0]}", r"classifier\.normalize\.std is missing"),
        ("classifier.normalize={mean=[1.0], std=[0.0]}", r"\[classifier\.normalize\].*one std above 0 for each mean"),
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


def test_votes_id_depends_only_on_what_can_change_a_vote(raw_spec):
    before = votes_id(load_spec(raw_spec), {"classifier": "w"})
    same = ["name=other", "data.samples=0:3", "smoothing.n=400", "smoothing.n0=100", "smoothing.alpha=0.01",
            "compute.device=cuda", "classifier.checkpoint=elsewhere.pt", "data.path=elsewhere.parquet"]  # fmt: skip
    assert votes_id(load_spec(raw_spec, same), {"classifier": "w"}) == before
    others = ["smoothing.sigma=0.3", "smoothing.seed=1", "smoothing.block.estimation=50", "smoothing.precision=bf16",
              "smoothing.local_seed=1", "data.split=train", "classifier.normalize=half"]  # fmt: skip
    for other in others:
        assert votes_id(load_spec(raw_spec, [other]), {"classifier": "w"}) != before, other
    assert votes_id(load_spec(raw_spec), {"classifier": "v"}) != before
    said = ["smoothing.m=1", "smoothing.precision=fp32", "data.split=test"]  # defaults, written out
    assert votes_id(load_spec(raw_spec, said), {"classifier": "w"}) == before


def test_a_spec_given_as_a_dict_is_not_changed(raw_spec):
    before = copy.deepcopy(raw_spec)
    load_spec(raw_spec, ["smoothing.sigma=1.0"])
    assert raw_spec == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deeply|not valid TOML"),
        ("a = " + "9" * 5000, "not valid TOML|unknown key|is missing"),
        ("name = 'a'\nsmoothing = 3", "smoothing = 3: must be a table|is missing"),
        ("name = '" + "a" * 100_000 + "'", "name = 'aaaa.*"),
        ("name = 'a\x00'", "not valid TOML"),
        ("\xff\xfe", "not valid TOML"),
    ],
)
def test_hostile_files_are_refused_with_one_short_line(tmp_path, text, message):
    path = tmp_path / "hostile.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        load_spec(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "/dev/null/a"])
def test_impossible_paths_are_refused(path):
    with pytest.raises(UserError):
        load_spec(path)
