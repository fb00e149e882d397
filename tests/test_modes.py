"""Each sampling mode through the whole pipeline on Ray: exact radii, fewer draws, the same decisions when resumed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffsmooth.jobs.analyze import Request, analyze
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.certify.orders import read_costly
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.run import RUN_KEY, read_run
from tests.test_end_to_end import certify, status, table

pytestmark = pytest.mark.usefixtures("ray_session")

DISTANCE = 4 * np.array([0.5 - 100 / 255, 155 / 255 - 0.5])  # of the two kinds of images from the boundary


def rows_of(home, order="001") -> pd.DataFrame:
    return pd.read_parquet(Path(home) / "orders" / order / "certificates.parquet")


def again(home, **request):
    """What `analyze --json` prints."""
    return analyze(str(home), Request(**request), quiet=True).summary().to_json()


def spec_of(raw_spec, sampling, **smoothing):
    raw_spec["smoothing"] |= {"n": 2000, **smoothing}
    return load_spec(raw_spec | {"sampling": sampling})


def test_skip_wrong_casts_no_estimation_draws_for_a_wrong_class(raw_spec, tmp_path):
    raw_spec["classifier"]["arch"] = "tests.models:upside_down"
    raw_spec["data"]["samples"] = "0:2"
    result = certify(spec_of(raw_spec, {"skip_wrong": True}), tmp_path / "run")
    assert (result["draws_cast"], result["skipped"], result["complete"]) == (100, 2, True)
    assert result["abstention_rate"] is None
    assert (rows_of(tmp_path / "run")["status"] == "skipped").all()
    assert status(tmp_path / "run")["orders"]["001"]["draws_missing"] == 0
    unlabelled = spec_of(raw_spec, {"skip_wrong": True})
    images = pd.read_parquet(raw_spec["data"]["path"]).drop(columns="label")
    images.to_parquet(tmp_path / "unlabelled.parquet")
    data = unlabelled.data.model_copy(update={"path": str(tmp_path / "unlabelled.parquet"), "num_classes": 2})
    with pytest.raises(UserError, match="skip_wrong = true needs labels"):
        certify(unlabelled.model_copy(update={"data": data}), tmp_path / "other")


def test_planned_mode_certifies_with_fresh_draws(raw_spec, tmp_path):
    """The radius is below the true distance; an interrupted run reuses all its blocks and makes the same plan."""
    spec = spec_of(raw_spec, {"mode": "planned", "max_acr_loss": 0.05}, n0=200)
    whole = certify(spec, tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    assert (rows["status"] == "certified").all()
    assert (rows["radius"] <= DISTANCE[rows["label"]]).all()
    assert whole["draws_used"] == whole["draws_cast"] == int(rows["n0"].sum() + rows["n"].sum())
    assert whole["draws_used"] < whole["draws_at_n"]
    votes = table(tmp_path / "whole")
    for row in rows.itertuples():  # bounded at full alpha, as fixed mode would with the same n
        drawn = votes[(votes["sample"] == row.sample) & (votes["stage"] == "estimation")]
        n_A = int(drawn.loc[drawn["class"] == row.top_class, "votes"].sum())
        assert (drawn["votes"].sum(), n_A) == (row.n, row.n_A)
        assert row.radius == certified_radius(n_A, row.n, 0.001, 0.25)
    for key in open_store(str(tmp_path / "whole")).keys("votes"):
        if "/0-" in key or key.endswith("-0.parquet"):
            (tmp_path / "whole" / key).unlink()  # as if they had never been committed
    (tmp_path / "whole" / "orders" / "001" / "plan.json").unlink()
    assert certify(spec, tmp_path / "whole")["draws_cast"] < whole["draws_cast"]
    pd.testing.assert_frame_equal(rows_of(tmp_path / "whole"), rows)
    pair = again(tmp_path / "whole", certificate="multiclass")
    assert pair["complete"]
    assert pair["post_hoc"]
    assert rows_of(tmp_path / "whole", "002")["n"].tolist() == rows["n"].tolist()


def test_grid_mode_certifies_at_its_radii_and_decides_the_same_when_resumed(raw_spec, tmp_path):
    radii = [0.0, 0.2, 0.3, 0.6]
    spec = spec_of(raw_spec, {"mode": "grid", "radii": radii}, n=10_000)
    whole = certify(spec, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    expected = np.array([max(radius for radius in radii if radius <= distance) for distance in DISTANCE])
    assert rows["radius"].tolist() == expected[rows["label"]].tolist()
    assert whole["acr"] is None
    assert list(whole["certified_accuracy"]) == ["0", "0.2", "0.3", "0.6"]
    assert whole["draws_used"] < 0.7 * whole["draws_at_n"]
    curve = pd.read_csv(tmp_path / "run" / "orders" / "001" / "curve.csv")
    assert curve["radius"].tolist() == radii
    keys = sorted(key for key in open_store(str(tmp_path / "run")).keys("votes") if "estimation" in key)
    for key in keys[::3]:  # as if they had never been committed
        (tmp_path / "run" / key).unlink()
    resumed = certify(spec, tmp_path / "run")
    assert 0 < resumed["draws_cast"] < whole["draws_cast"]
    pd.testing.assert_frame_equal(rows_of(tmp_path / "run"), rows)
    with pytest.raises(UserError, match="grid"):
        again(tmp_path / "run", certificate="multiclass")


def test_both_looks_of_a_split_alpha_are_one_claim(raw_spec, tmp_path):
    split = {500: 0.0005, 2000: 0.0005}
    first = certify(spec_of(raw_spec, {}, n=500, alpha=split), tmp_path / "run")
    second = certify(spec_of(raw_spec, {}, n=2000, alpha=split), tmp_path / "run")
    assert (first["order"], second["order"]) == ("001", "002")
    assert not second["post_hoc"]
    assert second["alpha"] == 0.001
    assert second["acr"] >= first["acr"]
    third = again(tmp_path / "run", alpha=0.001, n=2000)
    assert third["post_hoc"]


def test_the_cost_certificate_needs_the_costly_classes(raw_spec, tmp_path):
    costly = tmp_path / "costly.toml"
    costly.write_text("0 = [1]\n")
    result = certify(spec_of(raw_spec, {}), tmp_path / "run", certificate="cost", costly=str(costly))
    rows = rows_of(tmp_path / "run")
    assert rows[rows["label"] == 0]["status"].eq("certified").all()
    assert rows[rows["label"] == 1]["status"].eq("exempt").all()
    assert (result["samples"], result["certified_accuracy"]["0"]) == (4, 1.0)
    matrix = tmp_path / "matrix.csv"
    matrix.write_text("0,1\n0,0\n")
    repeated = again(tmp_path / "run", certificate="cost", costly=str(matrix))
    assert repeated["order"] == "001"  # the same costs, so the same order
    for text, message in (
        ("0 = [2]\n", "class 2 must be between 0 and 1"),
        ("1 = [1]\n", "of label 1 repeat a class or contain 1"),
        ("", "names no costly class"),
    ):
        costly.write_text(text)
        with pytest.raises(UserError, match=message):
            certify(spec_of(raw_spec, {}), tmp_path / "run", certificate="cost", costly=str(costly))
    with pytest.raises(UserError, match="belong together"):
        certify(spec_of(raw_spec, {}), tmp_path / "run", certificate="cost")
    for missing in ("no.csv", "no.toml"):
        with pytest.raises(UserError, match=r"no\.(csv not found|toml: cannot read it: No such file)"):
            read_costly("cost", str(tmp_path / missing), 2)


def test_a_random_seed_is_drawn_once_per_run(raw_spec, tmp_path):
    spec = spec_of(raw_spec, {}, n=200, seed="random")
    certify(spec, tmp_path / "a")
    seed = read_run(open_store(str(tmp_path / "a"))).seed
    assert seed.bit_length() > 64
    before = (tmp_path / "a" / RUN_KEY).read_bytes()
    assert "draws_cast" not in certify(spec, tmp_path / "a")
    assert (tmp_path / "a" / RUN_KEY).read_bytes() == before
    certify(spec, tmp_path / "b")
    assert read_run(open_store(str(tmp_path / "b"))).seed != seed
    certify(spec_of(raw_spec, {}, n=200, seed=seed), tmp_path / "c")
    pd.testing.assert_frame_equal(table(tmp_path / "a"), table(tmp_path / "c"))


def test_noise_on_a_grid_adds_without_rounding(raw_spec, tmp_path):
    """The noise consists of whole steps with a normal distribution, and images off the grid are refused."""
    steps = np.empty((200, 3, 8, 8), np.float32)
    Noise(0, 0.25, 255).fill(steps, "estimation", 0, range(200))
    plain = np.empty_like(steps)
    Noise(0, 0.25).fill(plain, "estimation", 0, range(200))
    assert (steps == np.rint(steps)).all()
    assert np.abs(steps / 255 - plain).max() <= 0.5 / 255 + 1e-6
    result = certify(spec_of(raw_spec, {}, noise_grid=255), tmp_path / "run")
    assert result["complete"]
    assert (rows_of(tmp_path / "run")["radius"] <= DISTANCE[rows_of(tmp_path / "run")["label"]]).all()
    with pytest.raises(UserError, match="noise_grid = 256"):
        certify(spec_of(raw_spec, {}, noise_grid=256), tmp_path / "off")
