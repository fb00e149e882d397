"""The benchmarks that need no Ray measure what they promise."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks.__main__ import main as laboratory
from benchmarks.literal import Literal
from benchmarks.profile import covered, kind_of, profile
from benchmarks.sampling import INVENTED, describe_modes, population_of_log, simulate_modes
from benchmarks.speed import PARTS, bench_speed, print_figures
from benchmarks.suite import SUITES, print_suite, run_suite
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.cost.speed import Effort, Pipeline
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.smoothing import build_base_classifier
from diffsmooth.pipeline.votes.blocks import read_votes

QUICK = Effort(rounds=2, seconds=0.05, agreement_draws=60)


def test_storage_is_measured_on_a_valid_run(tmp_path):
    answer = CliRunner().invoke(laboratory, ["storage", str(tmp_path), "--blocks", "30", "--json"])
    assert answer.exit_code == 0, answer.output
    figures = json.loads(answer.output)
    assert (figures["blocks"], figures["missing"]) == (30, 3)
    assert read_votes(figures["run"]).votes.sum() == 3 * 100 + 27 * 1000
    assert Path(figures["run"], "votes.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such spec"),
        (["mnist", "--set", "classifier.arch=nothing"], "'nothing' is unknown"),
        (["mnist", "--set", "compute.device=cuda"], "sees no GPU"),
        (["mnist", "--batch-size", "0"], "0 is not in the range"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_invalid_benchmarks_are_refused_with_one_line(arguments, message):
    for command in ((main, ["bench", *arguments]), (laboratory, ["speed", *arguments])):
        answer = CliRunner().invoke(*command)
        assert answer.exit_code == 2
        assert message in answer.output


def test_bench_prints_the_speed_of_a_spec_as_text_or_json():
    arguments = ["bench", "mnist-cohen-0.50", "--cpu", "--batch-size", "8", "--rounds", "1", "--draws", "20"]
    text = CliRunner().invoke(main, [*arguments, "--precision", "bf16"])
    assert text.exit_code == 0, text.output
    for words in (
        "pipeline over bare networks: ",
        "votes equal to those of bf16: ",
        "of a matrix product",
        "batch size",
    ):
        assert words in text.output
    figures = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert figures["draws_per_second"].keys() == {"bare", "pipeline"}
    assert figures["pipeline_over"].keys() == {"bare"}


def test_speed_of_the_embedded_networks():
    """Everything is measured, and the votes agree; the timings themselves are not checked."""
    before = torch.get_rng_state()
    spec = load_named("mnist", ["compute.device=cpu"])
    found = bench_speed(Pipeline(spec), batch_sizes=(4,), precisions=("bf16", "fp32"), effort=QUICK).to_json()
    json.dumps(found)
    figures = found["speed"]
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    assert (figures["random_weights"], figures["random_images"]) == ([], False)
    assert figures["draws_per_second"].keys() == {"bare", "pipeline", "literal"}
    assert figures["pipeline_over"]["bare"] > 0
    assert figures["pipeline_over"]["literal"] > 0
    assert list(found["share_of_time"]) == list(PARTS)
    assert sum(found["share_of_time"].values()) == pytest.approx(1)
    # 13 million multiply-adds minus the savings of the merged doubling
    assert figures["gflop_per_draw"]["denoiser"] == pytest.approx(0.0242, abs=0.0005)
    assert figures["agreement"]["literal"]["equal"] == figures["agreement"]["literal"]["draws"] == 60
    assert figures["agreement"]["literal"]["largest_difference"] < 1e-5
    assert figures["agreement"].keys() == {"literal", "bf16"}
    swept = {(one["side"], one["precision"]) for one in figures["sweep"]}
    assert swept == {("literal", "fp32"), *((side, one) for side in ("bare", "pipeline") for one in ("fp32", "bf16"))}


def test_missing_weights_are_replaced_by_random_ones():
    """The UNet learns its variance and resamples in residual blocks; its file does not exist."""
    changes = {"learn_sigma": True, "resblock_updown": True, "num_groups": 4}
    spec = load_named(
        "mnist",
        ["compute.device=cpu", "denoiser.checkpoint=/nowhere", "classifier.checkpoint=${NOT_SET_ANYWHERE}/a.pt"]
        + [f"denoiser.unet.{key}={json.dumps(value)}" for key, value in changes.items()],
    )
    figures = bench_speed(Pipeline(spec), batch_sizes=(8,), effort=QUICK).speed
    assert figures.random_weights == ["denoiser", "classifier"]
    assert figures.agreement["literal"].largest_difference < 1e-6


def test_a_network_whose_sizes_are_in_a_missing_file_is_refused():
    spec = load_named(
        "mnist-cohen-0.50",
        ["compute.device=cpu", "denoiser.arch=dncnn", "denoiser.checkpoint=/nowhere/dncnn.pt"],
    )
    with pytest.raises(UserError, match=r"the sizes of this network follow from its file.* download the file"):
        Pipeline(spec)


def test_random_images_are_on_the_grid_of_the_noise():
    """With smoothing.noise_grid the benchmark measures the f that certifies, so images off the grid are refused."""
    spec = load_named("cifar10-cohen-0.50", ["compute.device=cpu", "smoothing.noise_grid=255"])
    figures = bench_speed(Pipeline(spec), batch_sizes=(8,), effort=QUICK).speed
    assert figures.random_images
    assert figures.agreement["literal"].equal == figures.agreement["literal"].draws


def test_denoisers_that_the_published_algorithm_does_not_support_are_measured_without_it(caplog):
    spec = load_named("mnist", ["compute.device=cpu", "denoiser.steps=2"])
    figures = bench_speed(Pipeline(spec), batch_sizes=(8,), effort=QUICK).speed
    assert figures.pipeline_over.keys() == {"bare"}
    assert figures.agreement == {}
    assert "it is not measured" in caplog.text


def test_figures_are_printed_as_text():
    spec, text = load_named("fashion-cohen-0.50", ["compute.device=cpu"]), io.StringIO()
    figures = bench_speed(Pipeline(spec), batch_sizes=(8, 16), effort=QUICK, with_profile=True)
    assert not figures.speed.random_images
    print_figures(figures, Console(file=text))
    assert "pipeline over bare networks" in text.getvalue()
    assert "pipeline over literal: " in text.getvalue()
    assert "votes equal to those of literal: 60 of 60" in text.getvalue()
    for words in ("profile of 4 batches", "no operator runs", "convolution", "aten::"):
        assert words in text.getvalue()


def test_a_profile_explains_the_time_and_counts_the_traffic():
    """The traffic of a linear layer is that of its weight, bias, input and output."""
    layer, x = torch.nn.Linear(30, 20), torch.zeros(8, 30)
    with torch.inference_mode():
        found = profile(
            lambda size, number: [layer(x) for _ in range(number)],
            8, batches=3, scores=layer, x_BCHW=x, clock=time.perf_counter,
        )  # fmt: skip
    kinds = {kind.name: kind for kind in found.kinds}
    assert kinds["matrix product"].bytes_per_draw == 4 * (30 * 20 + 20 + 8 * 30 + 8 * 20) / 8
    assert kinds["matrix product"].calls >= 1
    assert sum(kind.share for kind in found.kinds) + found.idle == pytest.approx(1, abs=0.01)
    assert sum(found.slowest.values()) <= 1


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>", "copy"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
         "matrix product"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention and softmax"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention and softmax"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float)", "norm"),
        ("triton_red_fused_convolution_native_group_norm_silu_7", "norm"),
        ("triton_poi_fused_add_convolution_3", "pointwise and others"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu>", "pointwise and others"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::addmm", "matrix product"),
        ("aten::native_group_norm", "norm"),
        ("aten::cat", "copy"),
        ("aten::scatter_add_", "pointwise and others"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


def test_overlapping_kernels_are_counted_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0


def test_literal_scores_equal_those_of_f_and_each_draw_has_one_vote():
    spec = load_named("mnist")
    data, f = open_dataset(spec.data), build_base_classifier(spec, "cpu")
    literal = Literal(spec, torch.device("cpu"), (1, 28, 28), 10)
    x = torch.from_numpy(np.stack([data[index].image_CHW for index in range(40)]))
    assert torch.allclose(literal.scores(x) / 5, f(x), atol=1e-5)
    sure = int(f(x).max(dim=1).values.argmax())
    counts = literal.count(x[sure], 70, 32)
    assert counts.sum() == 70
    assert counts.argmax() == data[sure].label


def test_modes_save_draws_within_their_allowed_loss():
    """On the same samples, skipping loses nothing, a plan loses about its allowance, and each mode saves draws."""
    fewer = [one._replace(wrong_N=one.wrong_N[::3], beta_N2=one.beta_N2[::3]) for one in INVENTED]
    costs = {(cost.population, cost.mode): cost for cost in simulate_modes(10_000, fewer, seed=5)}
    for population in ("weak", "middling", "strong"):
        fixed, skip = costs[population, "fixed"], costs[population, "fixed, skip"]
        assert (fixed.saving, fixed.acr_lost, skip.acr_lost, skip.worst_points_lost) == (1, 0, 0, 0)
        planned = costs[population, "planned 1 %"].acr_lost
        assert planned is not None
        assert planned < 0.02
        for mode in ("fixed, skip", "planned 1 %", "grid", "grid, skip"):
            assert costs[population, mode].saving > 1
        assert costs[population, "grid"].acr_lost is None
        assert costs[population, "grid"].worst_points_lost < 2
    assert len(describe_modes(list(costs.values())).splitlines()) == 1 + len(costs)


def write_log(path, rows):
    lines = [f"{index}\t0\t{predict}\t{radius}\t0\t0:00:01" for index, (predict, radius) in enumerate(rows)]
    path.write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *lines]) + "\n")
    return path


def test_the_votes_of_a_log_follow_from_its_radii(tmp_path):
    """Radii of known counts, printed with three digits as in published logs."""
    counts = np.array([5_200, 5_400, 6_000, 7_000, 9_000, 9_990, 10_000])
    radii = certified_radius(counts, 10_000, 0.01, 0.25)
    rows = [(index % 2, f"{radius:.3}") for index, radius in enumerate(radii)]
    log = write_log(tmp_path / "log.tsv", [*rows, (-1, "0.0"), (-1, "0.0")])
    population = population_of_log(log, 0.25, 10_000, 0.01)
    a_N, b_N = population.beta_N2[:9].T
    p_N = a_N / (a_N + b_N)
    np.testing.assert_allclose(p_N[:7], (counts + 0.5) / 10_001, atol=1e-3)
    assert p_N[6] == 10_000.5 / 10_001
    assert 0 < p_N[8] < p_N[7] < 0.5
    assert population.wrong_N[:9].tolist() == [False, True, False, True, False, True, False, False, False]
    assert len(population.wrong_N) % 9 == 0
    (fixed, *_) = simulate_modes(1000, [population])
    assert (fixed.population, fixed.saving) == (str(log), 1)


@pytest.mark.parametrize(
    ("radius", "numbers", "message"),
    [
        ("0.7", ("0.25", "1000", "0.001"), "its largest radius is 0.7; it must be above 0 and at most 0.616"),
        ("0.0", ("0.25", "1000", "0.001"), "its largest radius is 0;"),
        ("0.5", ("0", "1000", "0.001"), "sigma must be above 0"),
        ("0.5", ("0.25", "100000000", "0.001"), "n a number up to 10,000,000"),
        ("0.5", ("0.25", "1000", "1"), "alpha between 0 and 1"),
    ],
)
def test_numbers_that_do_not_fit_a_log_are_refused(tmp_path, radius, numbers, message):
    log = write_log(tmp_path / "log.tsv", [(0 if float(radius) else -1, radius)])
    answer = CliRunner().invoke(laboratory, ["sampling", "--log", str(log), *numbers])
    assert answer.exit_code == 2
    assert message in answer.output


SMALL = [
    "compute.device=cpu", "smoothing.m=1", "denoiser.arch=unet",
    "denoiser.unet={model_channels=8, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[2], num_heads=1, "
    "num_groups=4, schedule='cosine', steps=100}",
    "classifier.arch=cifar_resnet20", "classifier.normalize=none",
]  # fmt: skip


def test_the_gpu_suite_runs_with_small_networks_on_the_cpu(monkeypatch):
    """A compiled row uses the batch size that its eager row found; torch.compile itself is replaced."""
    monkeypatch.setattr("benchmarks.suite._BATCH_SIZES", {"cpu": (2, 4)})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    settings = SUITES["gpu"].settings(SMALL)
    assert [(setting.spec.smoothing.precision, setting.mode) for setting in settings][:4] == [
        *[("bf16", "eager"), ("bf16", "CUDA graphs")] * 2,
    ]  # fmt: skip
    assert all(setting.spec.compute.compile == (setting.mode != "eager") for setting in settings)
    assert len({(spec.name, spec.smoothing.precision, mode) for spec, mode in settings}) == len(settings) == 3 * 4 * 3
    cifar10 = [setting for setting in settings if "cifar10" in setting.spec.name][:3]
    rows = []
    suite = run_suite(cifar10, effort=Effort(rounds=1, seconds=0.01, agreement_draws=20), on_row=rows.append)
    assert rows == suite.rows
    for row in suite.rows:
        assert row.reason is None, row
        assert row.figures.speed.draws_per_second["pipeline"] > 0
        assert ("literal" in row.figures.speed.draws_per_second) == (row.precision == "fp32")
    eager, graphs, *_ = suite.rows
    assert {one.batch_size for one in graphs.figures.speed.sweep} == {eager.figures.speed.batch_size["pipeline"]}
    console = Console(file=io.StringIO())
    print_suite(suite, console)
    assert console.file.getvalue().count("cifar10-diffsmooth-0.50") == 3
    json.dumps(suite.to_json(), allow_nan=False)


def test_a_suite_says_why_a_row_has_no_figures(monkeypatch):
    settings = SUITES["cpu"].settings()[:2]

    def fail(*_, **__):
        raise RuntimeError("the compiler failed\nat some place")

    monkeypatch.setattr("benchmarks.suite.bench_speed", fail)
    assert [row.reason for row in run_suite(settings).rows] == ["RuntimeError: the compiler failed"] * 2
    suite = run_suite(settings, seconds=-1)
    assert [row.reason for row in suite.rows] == ["not started within -1 s"] * 2
    console = Console(file=io.StringIO())
    print_suite(suite, console)
    assert "fashion-diffsmooth-0.50, fp32, eager: not started" in console.file.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_mistakes_with_suites_are_refused(tmp_path):
    for arguments, message in (
        (["gpu"], "sees no GPU"),
        (["cpu", "--output", str(tmp_path / "none" / "x.json")], "cannot write it"),
        (["mnist"], "'mnist' is not one of 'gpu', 'cpu'"),
    ):
        answer = CliRunner().invoke(laboratory, ["suite", *arguments])
        assert answer.exit_code == 2, answer.output
        assert message in answer.output
