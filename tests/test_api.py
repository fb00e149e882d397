"""`import diffsmooth as ds`: a model in memory, a spec on Ray, and stored runs."""

import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from torch import nn
from torch.utils.data import TensorDataset

import diffsmooth as ds
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.audit.redraw import Effort, audit
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.smoothing import build_base_classifier
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.votes.blocks import read_votes
from tests.models import half_space, make_run, with_memory

ROOT = Path(__file__).parent.parent
GREY = torch.tensor([100, 155]).repeat(4)[:, None, None, None].expand(8, 1, 4, 4) / 255
LABELS = torch.tensor([0, 1]).repeat(4)


class HalfSpace(nn.Module):
    """Class 1 if the mean pixel is above 1/2, with dropout that only matters in training mode."""

    def __init__(self, scale: float = 1e3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x_BCHW):
        margin_B = self.dropout(self.scale * (x_BCHW.mean(dim=(1, 2, 3)) - 0.5))
        return torch.stack([-margin_B, margin_B], dim=1)


def coordinates(votes: pd.DataFrame) -> pd.DataFrame:
    """Votes per sample, stage and class, however they are cut into blocks."""
    return votes.groupby(["sample", "label", "stage", "class"], as_index=False)["votes"].sum()


@pytest.mark.parametrize(
    ("model", "denoiser", "message"),
    [
        (with_memory(None, None), None, "differ by .* between two calls"),
        (HalfSpace(), lambda x, sigma: x[:, :, :2], r"the denoiser returned shape \(1, 1, 2, 4\) for images of shape"),
        (HalfSpace(), lambda x: x, r"the denoiser cannot process images of shape \(1, 4, 4\) \(TypeError"),
    ],
)
def test_parts_that_are_no_f_are_refused(model, denoiser, message):
    with pytest.raises(UserError, match=message):
        ds.certify(model, GREY, LABELS, sigma=0.25, denoiser=denoiser)


def test_a_half_space_gets_its_exact_radius():
    """The certified radius is below the true distance to the boundary, and close to it at n = 20,000."""
    result = ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=20_000, batch_size=500)
    distance = 4 * np.abs(GREY[:, 0, 0, 0].numpy() - 0.5)
    radius = result.certificates["radius"].to_numpy()
    assert result.complete
    assert (radius <= distance).all()
    assert (radius > 0.9 * distance).all()
    assert result.accuracy_at(0.3) == 1.0
    assert result.accuracy_at(0.5) == 0.0
    assert result.curve.acr == pytest.approx(radius.mean())


@pytest.mark.parametrize("name", ["mnist-cohen-0.50", "mnist-diffsmooth-0.50"])
def test_votes_equal_those_of_the_command(name, tmp_path, monkeypatch):
    """For the same f, images, seed and batch size; the run on disk is made by a worker, as on a cluster."""
    changes = ["compute.device=cpu", "smoothing.n=200", "smoothing.block.estimation=100", "data.samples=0:3"]
    spec = load_named(name, changes)
    threads = torch.get_num_threads()
    make_run(spec, tmp_path / "run", samples=3)  # sets one thread
    f, data = build_base_classifier(spec, "cpu"), open_dataset(spec.data)
    images = torch.from_numpy(np.stack([data[index].image_CHW for index in range(3)]))
    labels = [data[index].label for index in range(3)]
    smoothing = {"m": spec.smoothing.m, "local_sigma": spec.smoothing.local_sigma, "denoiser": f.denoiser}
    result = ds.certify(f.classifier, images, labels, sigma=0.5, n=200, batch_size=16, **smoothing)
    torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(coordinates(result.votes), coordinates(read_votes(str(tmp_path / "run"))))


def test_the_model_is_evaluated_and_its_mode_is_restored():
    model = HalfSpace().train()
    model.dropout.eval()
    first = ds.certify(model, GREY, LABELS, sigma=0.25, n=100, batch_size=7).votes
    assert (model.training, model.dropout.training) == (True, False)
    pd.testing.assert_frame_equal(first, ds.certify(model, GREY, LABELS, sigma=0.25, n=100, batch_size=64).votes)


@pytest.mark.parametrize(
    "source",
    [
        lambda: (GREY, LABELS),
        lambda: (GREY.numpy(), LABELS.tolist()),
        lambda: ((GREY * 255).round().to(torch.uint8), LABELS),
        lambda: (TensorDataset(GREY, LABELS), None),
        lambda: (list(GREY), LABELS.numpy()),
    ],
    ids=["tensors", "arrays", "bytes", "data set", "lists"],
)
def test_images_may_be_tensors_arrays_or_a_data_set(source):
    images, labels = source()
    result = ds.certify(HalfSpace(), images, labels, sigma=0.25, n=100)
    assert result.certificates["label"].tolist() == LABELS.tolist()
    expected = ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=100)
    pd.testing.assert_frame_equal(result.votes, expected.votes)


def test_a_pil_image_without_a_label_is_certified():
    from PIL import Image

    images = [Image.fromarray(np.full((4, 4, 3), 200, np.uint8))]
    certificates = ds.certify(HalfSpace(), images, sigma=0.25, n=100).certificates
    assert certificates[["label", "prediction"]].to_numpy().tolist() == [[-1, 1]]


def test_a_stored_run_resumes_and_grows(tmp_path):
    home = str(tmp_path / "run")
    ds.certify(HalfSpace(), GREY[:4], LABELS[:4], sigma=0.25, n=1000, out=home)
    blocks = {path: path.stat().st_mtime_ns for path in Path(home, "votes").rglob("*.parquet")}
    grown = ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=1000, out=home)
    assert {path: path.stat().st_mtime_ns for path in blocks} == blocks
    whole = ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=1000)
    pd.testing.assert_frame_equal(grown.votes, whole.votes)
    with pytest.raises(ds.UserError, match="holds another run: weights"):
        ds.certify(HalfSpace(2.0), GREY, LABELS, sigma=0.25, n=1000, out=home)


def test_the_result_is_that_of_the_order_that_was_asked_for(tmp_path):
    home = str(tmp_path / "run")
    for alpha, order in ((0.001, "001"), (0.01, "002"), (0.001, "001")):
        found = ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=1000, alpha=alpha, out=home).certificates
        assert set(zip(found["alpha"], found["order"], strict=True)) == {(alpha, order)}


@pytest.mark.parametrize("n", [1000, 2000])
def test_other_images_are_refused_before_they_are_mixed_with_a_stored_run(tmp_path, n):
    home = str(tmp_path / "run")
    ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=1000, out=home)
    with pytest.raises(ds.UserError, match=r"image 0 or its label is not that of the run; .* with out="):
        ds.certify(HalfSpace(), GREY.flip(0), LABELS.flip(0), sigma=0.25, n=n, out=home)
    assert len(ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=2000, out=home).certificates) == len(GREY)


def test_a_sealed_block_that_is_deleted_and_cast_again_is_sealed_again(tmp_path):
    """Its file is another one, and its votes may differ on another device."""
    home = tmp_path / "run"
    ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=1000, out=str(home))
    (home / "votes" / "estimation" / "1-0.parquet").unlink()
    ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=1000, out=str(home))
    assert audit(str(home), spec=None, effort=Effort()).findings == []


def test_the_cost_certificate_of_an_unlabelled_run_is_refused(tmp_path):
    (tmp_path / "costly.toml").write_text("0 = [1]\n")
    ds.certify(HalfSpace(), GREY, sigma=0.25, n=1000, out=str(tmp_path / "run"))
    with pytest.raises(ds.UserError, match="--certificate cost needs labels"):
        ds.analyze(str(tmp_path / "run"), certificate="cost", costly=str(tmp_path / "costly.toml"))


def test_a_stored_run_of_a_callable_needs_an_identity(tmp_path):
    model = half_space(None, None)
    with pytest.raises(ds.UserError, match=r"the classifier is a function.*identity="):
        ds.certify(model, GREY, LABELS, sigma=0.25, n=100, out=str(tmp_path / "run"))
    result = ds.certify(model, GREY, LABELS, sigma=0.25, n=100, out=str(tmp_path / "run"), identity="half-space")
    assert result.complete
    run = ds.open_run(str(tmp_path / "run"))
    pd.testing.assert_frame_equal(run.votes(), result.votes)


def test_an_open_run_gives_votes_certificates_curve_status_and_report(raw_spec, tmp_path):
    spec = load_spec(raw_spec)
    store = make_run(spec, tmp_path / "run")
    run = ds.open_run(store.uri)
    assert run.orders == ["001"]
    assert run.votes()["votes"].sum() == 8 * 250
    assert run.certificates()["status"].eq("certified").all()
    assert run.curve("001").acr == run.curve().acr > 0
    assert run.status().orders["001"].draws_missing == 0
    run.report(str(tmp_path / "report.html"), spec=spec)
    assert "half-space" in (tmp_path / "report.html").read_text()
    again = ds.analyze(store.uri, alpha=0.01)
    assert again.certificates["post_hoc"].all()
    with pytest.raises(ds.UserError, match="no run here"):
        ds.open_run(str(tmp_path / "nowhere"))


def test_a_planned_order_is_analysed_only_once_its_plan_is_stored(raw_spec, tmp_path):
    """An order with an empty plan could never be completed."""
    store = make_run(load_spec(raw_spec | {"sampling": {"mode": "planned"}}), tmp_path / "run")
    plan = tmp_path / "run" / "orders" / "001" / "plan.json"
    plan.rename(tmp_path / "plan.json")
    with pytest.raises(ds.UserError, match="8 samples, the first 0, have no plan yet; run certify again"):
        ds.analyze(store.uri, alpha=0.01)
    (tmp_path / "plan.json").rename(plan)
    assert ds.analyze(store.uri, alpha=0.01).complete


@pytest.mark.usefixtures("ray_session")
def test_a_spec_is_certified_as_by_the_command(raw_spec, tmp_path):
    result = ds.certify(load_spec(raw_spec), out=str(tmp_path / "run"), actors=2, batch_size=16)
    assert result.complete
    make_run(load_spec(raw_spec), tmp_path / "plain")
    pd.testing.assert_frame_equal(result.votes, read_votes(str(tmp_path / "plain")))


def test_too_small_n_causes_a_warning(caplog):
    ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=5)
    assert "n = 5 is too small to certify" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": None}, "sigma is missing"),
        ({"images": None}, "images is missing"),
        ({"images": GREY[:0]}, "images is empty"),
        ({"labels": LABELS[:3]}, "8 images but 3 labels"),
        ({"labels": LABELS + 1}, "label 1 is 2; it must be a class between 0 and 1"),
        ({"labels": ["a"] * 8}, "label 0 is 'a'; it must be a whole number"),
        ({"images": GREY * 255}, "they must be in .0, 1.: divide them by 255, or move the"),
        ({"images": GREY / 0}, "must be in"),
        (
            {"images": [*GREY[:7], GREY[7, :, :3]]},
            r"image 7 has shape \(1, 3, 4\), another \(1, 4, 4\); all must be equal",
        ),
        ({"labels": [0.5] * 8}, "label 0 is 0.5; it must be a whole number"),
        ({"device": "gpu"}, "device = 'gpu' cannot be used here .*; use 'cpu', or"),
        ({"device": "meta:x"}, "device = 'meta:x' cannot be used here"),
        ({"images": GREY[:, 0]}, r"image 0 has shape \(4, 4\); it must be C x H x W"),
        ({"images": (GREY * 255).long()}, "they must be floats in .0, 1., or uint8"),
        ({"model": nn.Flatten()}, None),
        ({"model": nn.Linear(3, 2)}, "cannot classify an image of shape"),
        ({"model": lambda x_BCHW: 3}, "returns int for one image"),
        ({"model": 7}, "the model is a int; give a torch.nn.Module"),
        ({"sigma": -1.0}, "smoothing.sigma = -1.0"),
        ({"sigma": float("nan")}, "smoothing.sigma = nan"),
        ({"alpha": 0.7}, "alpha = 0.7"),
        ({"n": 0}, "smoothing.n = 0"),
        ({"m": 2}, "m = 2 copies with local_sigma = 0"),
    ],
)
def test_mistakes_are_refused_with_one_line(arguments, message):
    given = {"model": HalfSpace(), "images": GREY, "labels": LABELS, "sigma": 0.25, "n": 100, **arguments}
    model, images, labels = (given.pop(name) for name in ("model", "images", "labels"))
    if message is None:  # 16 pixels as the logits of 16 classes
        assert ds.certify(model, images, labels, **given).complete
        return
    with pytest.raises(ds.UserError, match=message) as error:
        ds.certify(model, images, labels, **given)
    assert "\n" not in str(error.value)


def test_a_spec_takes_no_images():
    with pytest.raises(ds.UserError, match="a spec has its own data and settings"):
        ds.certify("mnist", GREY, LABELS, sigma=0.25)


def test_a_fresh_notebook_certifies_a_torchvision_model_in_three_lines(tmp_path):
    """And functions that are defined in the notebook, which get a clear error only as the arch of a spec."""
    cells = [
        "import torch, torchvision, diffsmooth as ds\n"
        "images, labels = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)), [0] * 10\n"
        "result = ds.certify(torchvision.models.resnet18().eval(), images, labels, sigma=0.5, n=100, progress=True)",
        "assert len(result.certificates) == 10 and result.votes.votes.sum() == 10 * 200\nresult.curve.plot()\nresult",
        "def f(x):\n    return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)\n"
        "assert ds.certify(f, images, labels, sigma=0.25, n=100).complete",
        "spec = {'name': 'a', 'data': {'name': 'mnist', 'split': 'heldout', 'samples': '0:2'},\n"
        "        'classifier': {'arch': '__main__:f'}, 'smoothing': {'sigma': 0.5}, 'compute': {'device': 'cpu'}}\n"
        "from diffsmooth.pipeline.spec import load_spec\n"
        "try:\n    ds.certify(load_spec(spec), out='run')\nexcept ds.UserError as error:\n    print(error)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "<Result: 10 samples at sigma = 0.5" in str(notebook.cells[1].outputs)
    assert "image/png" in str(notebook.cells[1].outputs)
    assert ".py file" in notebook.cells[3].outputs[0]["text"]
    assert [path.name for path in tmp_path.iterdir()] == []


def test_importing_diffsmooth_is_light_and_lists_its_names():
    code = (
        "import sys, diffsmooth as ds; assert not {'torch', 'ray', 'pandas'} & sys.modules.keys(); "
        "assert all(getattr(ds, name) for name in dir(ds)); ds.lower_confidence_bound(9, 10, 0.01)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ds.nothing  # noqa: B018
