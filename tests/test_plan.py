"""Cost estimates: published FLOPs, arithmetic by hand, and no need for weights or data."""

import io
import json
import re

import pytest
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from diffsmooth.jobs.cli import main
from diffsmooth.jobs.plan import parse_gpus, print_plans
from diffsmooth.jobs.specs import SPECS, TRAININGS, load_named
from diffsmooth.pipeline.cost.flops import GPUS, flops_per_draw, plan
from diffsmooth.pipeline.cost.probe import with_weights_at_hand
from diffsmooth.pipeline.cost.training import plan_training
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models import classifiers
from diffsmooth.pipeline.models.classifiers import resolve_classifier
from diffsmooth.pipeline.models.denoisers import DENOISERS, resolve_denoiser
from diffsmooth.pipeline.spec import Normalize, load_spec
from diffsmooth.pipeline.training.settings import load_training

PUBLISHED = [name for name in SPECS.names() if name.startswith(("cifar10-", "imagenet-"))]


def cost(name, **changes):
    overrides = [f"{key}={value}" for key, value in changes.items()]
    spec = load_named(name, overrides)
    return plan(spec, prices={"H100": 2.0, "T4": None}, utilization=0.5).to_json()


# GFLOP of one forward pass: the denoiser as published minus the savings of merged doublings, all copies' classifier
FLOPS = [
    ("cifar10-cohen-0.50", 0, 0.51),
    ("cifar10-diffsmooth-0.50", 16.8 - 0.9, 5 * 0.51),
    ("imagenet-cohen-0.50", 0, 8.2),
    ("imagenet-diffsmooth-0.50-local-0.26", 1713 - 84, 5 * 123),
]


@pytest.mark.parametrize(("name", "denoiser", "classifier"), FLOPS)
def test_flops_equal_those_of_the_published_networks(name, denoiser, classifier):
    pytest.importorskip("timm")
    found = cost(name)["gflop_per_draw"]
    assert found["denoiser"] == pytest.approx(denoiser, rel=0.01)
    assert found["classifier"] == pytest.approx(classifier, rel=0.02)


def test_hours_dollars_and_blocks_equal_a_calculation_by_hand():
    found = cost("imagenet-cohen-1.00", **{"smoothing.precision": "bf16"})
    draws = 500 * 100_100
    assert (found["samples"], found["draws"], found["blocks"]) == (500, draws, 500 * (1 + 10))
    assert found["total_flop"] == pytest.approx(draws * found["gflop_per_draw"]["classifier"] * 1e9)
    h100, t4 = found["costs"]
    assert h100["gpu_hours"] == pytest.approx(found["total_flop"] / (989e12 * 0.5 * 3600))
    assert h100["dollars"] == pytest.approx(2 * h100["gpu_hours"])
    assert (t4["gpu_hours"], t4["dollars"]) == (None, None)  # it does not support bf16
    assert 3.81 < found["largest_radius"] < 3.8116


def test_steps_of_the_denoiser_multiply_its_cost():
    one, four = (cost("cifar10-diffsmooth-0.50", **{"denoiser.steps": steps}) for steps in (1, 4))
    assert four["gflop_per_draw"]["denoiser"] == pytest.approx(4 * one["gflop_per_draw"]["denoiser"])


def test_there_is_a_spec_for_each_published_number():
    methods = ("cohen", "smoothadv", "dds", "diffsmooth", "local-0.26", "rrcm", "dmae")
    assert len(PUBLISHED) == 2 * 3 * len(methods) + 3  # and apndc on CIFAR-10
    for name in PUBLISHED:
        spec = load_named(name)
        resolve_denoiser(spec)
        if spec.classifier.arch != "transformers":  # needs its folder
            resolve_classifier(spec)
        assert f"{spec.smoothing.sigma:.2f}" in name
        assert spec.smoothing.local_sigma == (0.26 if "local" in name else 0.25 if "diffsmooth" in name else 0)


def test_the_flops_of_a_small_network_are_not_rounded_to_nothing():
    line = plan(load_named("fashion"), prices={}, utilization=0.4).describe()[1]
    denoiser, classifier = re.search(r"GFLOP per draw: denoiser (\S+), classifier (\S+) \(5 copies\)", line).groups()
    assert float(denoiser) > 0
    assert float(classifier) > 0


def test_draws_are_estimated_for_an_own_function_whose_flops_are_unknown(raw_spec):
    found = plan(load_spec(raw_spec), prices=dict.fromkeys(GPUS), utilization=0.4).to_json()
    assert found["draws"] == 8 * 250
    assert found["image_shape"] == [1, 4, 4]


def test_a_probe_measures_the_cpu_with_random_weights_if_there_are_none():
    specs = {name: load_named(name) for name in ("mnist-dds-0.50", "cifar10-cohen-0.50")}
    found = {name: plan(spec, prices={}, utilization=0.4, probe=True) for name, spec in specs.items()}
    assert [one.cpu.random_weights for one in found.values()] == [[], ["classifier"]]
    for one in found.values():
        assert one.cpu_hours == pytest.approx(one.draws / one.cpu.draws_per_second_and_core / one.cpu.cores / 3600)
        assert one.cpu.cores >= 1
        assert one.to_json()["cpu_hours"] == one.cpu_hours > 0


def test_an_own_function_is_probed(raw_spec):
    estimate = plan(load_spec(raw_spec), prices={"H100": None}, utilization=0.4, probe=True)
    console = Console(file=io.StringIO(), width=200)
    print_plans([estimate], console)
    (row,) = [line for line in console.file.getvalue().splitlines() if line.strip().startswith("CPU, ")]
    assert row.strip().endswith("< 1 min")


def test_short_times_and_the_row_without_a_probe():
    arguments = ["plan", "mnist-cohen-0.50", "mnist-dds-0.50", "--gpu", "H100"]
    rows = {line.split()[0]: line for line in CliRunner().invoke(main, arguments).output.splitlines() if line.strip()}
    assert rows["CPU"].count("use --probe") == 3  # two specs and their sum
    assert rows["H100"].count("< 1 min") == 3


def test_gpus_and_prices_are_checked():
    assert parse_gpus(["h100=2.50", "T4"]) == {"H100": 2.5, "T4": None}
    assert list(parse_gpus([])) == list(GPUS)
    wrong_options = {
        "H101": "the peak of H101 is unknown; choose one of",
        "H100=x": "must be a number",
        "H100=-1": "must be a number",
        "H100=nan": "must be a number",
    }
    for wrong, message in wrong_options.items():
        with pytest.raises(UserError, match=message):
            parse_gpus([wrong])


def test_the_command_prints_text_or_json():
    arguments = ["plan", "cifar10-cohen-0.25", "cifar10-diffsmooth-0.25", "--gpu", "A100=1.5"]
    text = CliRunner().invoke(main, arguments).output
    assert "500 samples x 100,100 draws = at most 50,050,000 draws" in text
    assert "A100" in text
    assert "$" in text
    plans = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert [one["name"] for one in plans] == ["cifar10-cohen-0.25", "cifar10-diffsmooth-0.25"]
    missing = CliRunner().invoke(main, ["certify", "cifar10-cohen-0.25", "--cpu", "--set", "data.name=mnist"])
    assert missing.exit_code == 2


HIDDEN = 8


@pytest.fixture
def two_layers(monkeypatch):
    """The architecture `two`: 784 -> HIDDEN -> 10. Returns the FLOPs of its layers for one image."""
    identity = classifiers.Input(Normalize(mean=[0.0], std=[1.0]))

    def make(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, num_classes))

    monkeypatch.setitem(classifiers.CLASSIFIERS, "two", classifiers.Architecture(make, identity))
    return 2 * 784 * HIDDEN, 2 * HIDDEN * 10


def training(loss, **changes):
    raw = {
        "name": "tiny",
        "task": "classifier",
        "data": {"name": "mnist", "split": "heldout"},
        "classifier": {"arch": "two"},
        "classifier_loss": {"sigmas": [0.5], **loss},
        "training": {"steps": 30, "batch": 40, "checkpoints": 3},
        **changes,
    }
    return plan_training(load_training(raw), prices={"H100": 2.0}, utilization=0.5).to_json()


def flop_per_image(estimate):
    return estimate["gflop_per_image"]["step"] * 1e9


def test_the_flops_of_a_training_equal_a_calculation_by_hand(two_layers):
    first, second = two_layers
    forward, gradient = first + second, first + 2 * second  # no gradient with respect to the images
    assert flop_per_image(training({})) == pytest.approx(forward + gradient)
    assert flop_per_image(training({"copies": 3})) == pytest.approx(3 * (forward + gradient))
    attack = 5 * 2 * forward  # each step goes back to the images, and to no weight
    attacked = training({"copies": 2, "confidence": {"steps": 5}})
    assert flop_per_image(attacked) == pytest.approx(2 * (forward + gradient + attack + forward + gradient))


def test_the_denoiser_is_part_of_the_cost_of_a_training_on_denoised_images(two_layers):
    spec = load_named("mnist-dds-0.50")
    denoiser = spec.denoiser.model_dump(exclude_unset=True)
    noisy, denoised = training({}), training({"images": "denoised"}, denoiser=denoiser)
    added = flop_per_image(denoised) - flop_per_image(noisy)
    assert added == pytest.approx(flops_per_draw(spec, (1, 28, 28), 10).denoiser)


def test_images_hours_and_dollars_of_a_training_equal_a_calculation_by_hand(two_layers):
    found = training({})
    assert (found["images"], found["validation_images"]) == (950, 50)  # of 1,000, every 20th is held out
    forward = sum(two_layers)
    measured = 3 * 50 * 2 * forward  # clean and noisy, at each checkpoint
    assert found["total_flop"] == pytest.approx(30 * 40 * flop_per_image(found) + measured)
    (h100,) = found["costs"]
    assert h100["gpu_hours"] == pytest.approx(found["total_flop"] / (67e12 * 0.5 * 3600))
    assert h100["dollars"] == pytest.approx(2 * h100["gpu_hours"])


def test_the_command_plans_trainings_and_specs_together(tmp_path):
    text = CliRunner().invoke(main, ["plan", "fashion-classifier-0.50", "mnist-cohen-0.50", "--gpu", "H100"]).output
    assert "1,000 steps x 128 images = 128,000 images, 2.33 epochs of 55,000" in text
    assert "mnist-cohen-0.50: " in text
    file = tmp_path / "mine.toml"
    file.write_text(TRAININGS.text("fashion-classifier-0.50"))
    probed = CliRunner().invoke(main, ["plan", str(file), "--probe", "--json", "--set", "training.steps=10"])
    (estimate,) = json.loads(probed.output)
    assert estimate["cpu_hours"] > 0
    refused = CliRunner().invoke(main, ["plan", str(file), "--attack"])
    assert (refused.exit_code, "--attack does not apply" in refused.output) == (2, True)


def test_a_denoiser_without_weights_is_not_said_to_have_random_ones(monkeypatch):
    class Formula:
        def __init__(self, spec):
            pass

        def ids(self):
            return {}

    monkeypatch.setitem(DENOISERS, "formula", Formula)
    spec = load_named("mnist-cohen-0.50", ["denoiser.arch=formula"])
    assert with_weights_at_hand(spec) == (spec, [])
    missing = load_named("cifar10-dds-0.50", ["denoiser.checkpoint='/no/such/file.pt'"])
    assert "denoiser" in with_weights_at_hand(missing)[1]
