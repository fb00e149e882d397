"""`diffsmooth bench`."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from diffsmooth.jobs.options import SET
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.errors import UserError


@click.command("bench")
@click.argument("spec", required=False)
@click.option("--cpu", is_flag=True, help="Run on the CPU; same as --set compute.device=cpu.")
@SET
@click.option(
    "--batch-size", "sizes", multiple=True, type=click.IntRange(min=1), help="Batch size to try. Can be repeated."
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    help="Further precision to measure. Can be repeated.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of a CPU.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Rounds; each side is measured once per round.",
)
@click.option(
    "--draws", type=click.IntRange(min=1), default=200, show_default=True, help="Draws on which votes are compared."
)
@click.option("--profile", is_flag=True, help="With SPEC: also measure what the device does, by kind of kernel.")
@click.option(
    "--tasks",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Without SPEC: number of tasks to schedule.",
)
@click.option("--simulate", is_flag=True, help="Simulate ImageNet on 8 to 1,024 spot GPUs, without Ray.")
@click.option("--sampling", is_flag=True, help="Simulate how many draws the sampling modes save.")
@click.option(
    "--log",
    "logs",
    type=(str, float, int, float),
    multiple=True,
    metavar="FILE SIGMA N ALPHA",
    help="With --sampling: samples of a log in Cohen's layout, instead of invented ones.",
)
@click.option("--suite", type=click.Choice(["gpu", "cpu"]), help="Measure several networks, in under 9 minutes.")
@click.option("--output", metavar="FILE", help="With --suite: also write all figures as JSON.")
@click.option("--storage", metavar="URI", help="Write blocks below URI, and time listing, resuming and reading.")
@click.option(
    "--blocks", type=click.IntRange(min=1), default=10_000, show_default=True, help="Number of blocks for --storage."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only on stdout.")
def bench_command(spec: str | None, as_json: bool, **options: Any) -> None:
    """Measure the speed of SPEC against its bare networks and the published algorithm, and compare their votes.

    Without SPEC, measure the driver's own time per task on a local Ray, with a base classifier that does nothing.

    \b
    diffsmooth bench cifar10-diffsmooth-0.50 --precision bf16 --precision tf32
    diffsmooth bench --suite gpu --output gpu.json
    diffsmooth bench --storage s3://BUCKET/bench --blocks 100000
    """
    others = [f"--{name}" for name in ("simulate", "sampling", "suite", "storage") if options[name]]
    if len(chosen := [*([] if spec is None else [spec]), *others]) > 1:
        raise UserError(f"{' and '.join(chosen)} are separate benchmarks; choose one")
    suite, output = options.pop("suite"), options.pop("output")
    if output is not None and suite is None:
        raise UserError(f"--output {output} belongs to --suite; add --suite gpu, or use --json")
    if options["logs"] and not options["sampling"]:
        raise UserError(f"--log {options['logs'][0][0]} belongs to --sampling; add --sampling")
    if suite is not None:
        _bench_suite(suite, output, as_json, options["overrides"])
        return
    if spec is not None:
        _bench_spec(spec, as_json, **options)
        return
    costs, text = _bench_part(**options)
    rows = [asdict(cost) for cost in costs] if isinstance(costs, list) else asdict(costs)
    click.echo(json.dumps(rows, indent=2) if as_json else text)


def _bench_spec(spec: str, as_json: bool, *, cpu: bool, overrides: tuple[str, ...], **options: Any) -> None:
    from rich.console import Console

    from diffsmooth.jobs.bench.speed import Effort, bench_speed, print_speed

    figures = bench_speed(
        load_named(spec, (*overrides, "compute.device=cpu") if cpu else overrides),
        batch_sizes=options["sizes"],
        precisions=options["precisions"],
        threads=options["threads"],
        effort=Effort(rounds=options["rounds"], agreement_draws=options["draws"]),
        with_profile=options["profile"],
    )
    if as_json:
        click.echo(json.dumps(figures.to_json(), indent=2))
    else:
        print_speed(figures, Console())


def _bench_suite(name: str, output: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    from rich.console import Console

    from diffsmooth.jobs.bench.suite import SUITES, print_suite, run_suite
    from diffsmooth.jobs.console import note
    from diffsmooth.jobs.places import writing

    with ExitStack() as stack:
        path = None if output is None else Path(stack.enter_context(writing("--output", output)))
        if path is not None:
            path.touch()  # a path that cannot be written is refused now
        settings = SUITES[name].settings(overrides)
        figures = run_suite(settings, on_row=lambda row: note(f"{row.title}: {row.reason or 'measured'}"))
        text = json.dumps(figures.to_json(), indent=2)
        if path is not None:
            path.write_text(text + "\n", encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        print_suite(figures, Console())


def _bench_part(
    *,
    simulate: bool,
    sampling: bool,
    storage: str | None,
    logs: tuple[tuple[str, float, int, float], ...],
    **options: Any,
) -> tuple[Any, str]:
    """The costs of one part of the system, and the same in words."""
    from diffsmooth.jobs.bench.driver import bench_driver
    from diffsmooth.jobs.bench.fleet import bench_simulation, describe_simulation
    from diffsmooth.jobs.bench.modes import INVENTED, describe_modes, population_of_log, simulate_modes
    from diffsmooth.jobs.bench.storage import bench_storage

    if sampling:
        populations = [population_of_log(*log) for log in logs] or INVENTED
        modes = [cost for n in (10_000, 100_000) for cost in simulate_modes(n, populations)]
        return modes, describe_modes(modes)
    if simulate:
        fleets = bench_simulation()
        return fleets, describe_simulation(fleets)
    cost = bench_storage(storage, options["blocks"]) if storage else bench_driver(options["tasks"])
    return cost, cost.describe()
