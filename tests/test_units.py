"""Units of a radius: each conversion against perturbations, and what it needs to know."""

import math
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from diffsmooth.jobs.cli import main
from diffsmooth.jobs.places import images_of, parse_images
from diffsmooth.pipeline.certify.curve import table_radii
from diffsmooth.pipeline.certify.units import UNITS, Images, converted, factor
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import StoredRun, read_result
from diffsmooth.pipeline.show.tables import render
from diffsmooth.pipeline.spec import load_spec
from tests.models import make_run
from tests.test_tables import LOW

IMAGES = Images(shape_CHW=(3, 8, 8), std=(0.2, 0.5, 0.25))


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("l2", 1), ("l2-255", 255), ("l2-normalized", 2), ("linf", 192**-0.5), ("linf-255", 255 * 192**-0.5)],
)
def test_factors(unit, expected):
    assert factor(unit, IMAGES) == pytest.approx(expected)


@pytest.mark.parametrize("unit", UNITS)
def test_no_perturbation_within_a_converted_radius_leaves_the_ball(unit):
    """Random and extreme perturbations at the converted radius have an l2 norm of at most r in [0, 1] pixels."""
    generator, r = np.random.Generator(np.random.Philox(key=1)), 0.7
    std_C11 = np.reshape(IMAGES.std, (3, 1, 1))
    widest = np.zeros((3, 8, 8))
    widest[1] = 1  # the channel with the largest std
    norms = []
    for direction in (*generator.standard_normal((50, 3, 8, 8)), np.ones((3, 8, 8)), widest):
        length = np.abs(direction).max() if unit.startswith("linf") else np.sqrt((direction**2).sum())
        perturbation = direction / length * r * factor(unit, IMAGES)
        perturbation = perturbation / 255 if unit.endswith("255") else perturbation
        perturbation = perturbation * std_C11 if unit == "l2-normalized" else perturbation
        norms.append(math.sqrt((perturbation**2).sum()))
    assert max(norms) == pytest.approx(r)  # and the bound is attained


def test_a_converted_curve_has_the_same_accuracies():
    curve = converted(LOW, "linf", IMAGES)
    scale = factor("linf", IMAGES)
    assert curve.at(np.array([0.4, 0.5, 0.51]) * scale).tolist() == LOW.at([0.4, 0.5, 0.51]).tolist()
    assert curve.acr == pytest.approx(LOW.acr * scale)
    assert converted(LOW, "l2", Images()) is LOW
    grid = converted(replace(LOW, tested=np.array([0.4, 0.5])), "l2-255", Images())
    assert grid.at(grid.tested).tolist() == LOW.at([0.4, 0.5]).tolist()


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit != "l2"])
@pytest.mark.parametrize("form", ["text", "markdown", "latex", "html", "csv"])
def test_every_format_names_the_unit(unit, form):
    text = render([converted(LOW, unit, IMAGES)], form)
    assert UNITS[unit].split(" radius")[1] in text
    norm = "infty" if form == "latex" and unit.startswith("linf") else UNITS[unit].split()[0].lower()
    assert norm.replace("l2", "ell_2" if form == "latex" else "l2") in text


def test_tables_have_round_radii_in_every_unit():
    for unit in UNITS:
        radii = table_radii([converted(LOW, unit, IMAGES)])
        assert 4 <= len(radii) <= 13
        assert radii[-1] <= LOW.max_radius * factor(unit, IMAGES)


def test_what_a_conversion_needs_is_asked_for():
    with pytest.raises(UserError, match="--unit linf needs the shape of the images; add --pixels C,H,W"):
        factor("linf", Images())
    with pytest.raises(UserError, match="--unit l2-normalized needs the std"):
        factor("l2-normalized", Images())
    for pixels in ("3,32", "3,32,0", "3,32,1.5", "a", "3,32,nan", ""):
        with pytest.raises(UserError, match="--pixels"):
            parse_images(pixels, None)
    with pytest.raises(UserError, match="--std 0,1 must be numbers above 0"):
        parse_images(None, "0,1")


def test_the_shape_of_cifar10_and_imagenet_is_known(raw_spec, tmp_path):
    make_run(load_spec(raw_spec), tmp_path / "run", samples=2)
    run = StoredRun.open(str(tmp_path / "run")).run

    def with_data(**changes):
        data = run.spec.data.model_copy(update=changes)
        return run.model_copy(update={"spec": run.spec.model_copy(update={"data": data})})

    assert images_of(run, Images()).shape_CHW is None
    assert images_of(run, IMAGES).shape_CHW == (3, 8, 8)
    assert images_of(with_data(name="cifar10"), Images()).shape_CHW == (3, 32, 32)
    imagenet = with_data(name="imagenet", split="val", crop=224, resize=256)
    assert images_of(imagenet, Images()).shape_CHW == (3, 224, 224)
    assert images_of(with_data(name="mnist", split="heldout"), Images()).shape_CHW is None  # data.path may differ
    with pytest.raises(UserError, match="the images of cifar10 are 3,32,32"):
        images_of(with_data(name="cifar10"), IMAGES)


def test_the_command_converts_the_radii(raw_spec, tmp_path):
    make_run(load_spec(raw_spec), tmp_path / "run")
    words = ["--unit", "linf", "--pixels", "1,4,4", "--grid", "0:0.1:0.05", "--format", "csv"]
    result = CliRunner().invoke(main, ["curve", str(tmp_path / "run"), *words])
    assert result.exit_code == 0, result.output
    rows = [line.split(",") for line in result.stdout.splitlines()[1:]]
    curve = read_result(str(tmp_path / "run")).result.curve
    assert [float(row[3]) for row in rows] == curve.at(4 * np.array([0, 0.05, 0.1])).tolist()
    refused = CliRunner().invoke(main, ["curve", str(tmp_path / "run"), "--unit", "linf"])
    assert refused.exit_code == 2
    assert "--pixels" in refused.stderr
