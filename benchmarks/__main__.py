"""`python -m benchmarks`: one command per benchmark, run from a clone."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.driver import bench_driver
from benchmarks.fleet import bench_simulation, describe_simulation
from benchmarks.sampling import INVENTED, describe_modes, population_of_log, simulate_modes
from benchmarks.speed import bench_speed, print_figures
from benchmarks.storage import bench_storage
from benchmarks.suite import SUITES, print_suite, run_suite
from diffsmooth.jobs.bench import speed_options
from diffsmooth.jobs.console import note
from diffsmooth.jobs.places import writing
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.cost.speed import Effort, Pipeline
from diffsmooth.pipeline.errors import RunError, UserError

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON only on stdout.")


class _Group(click.Group):
    """Reports a user's mistake with status 2, and a failure of the environment with status 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except UserError as error:
            raise click.UsageError(str(error)) from error
        except RunError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Measure the networks, the driver, the storage and the sampling modes of diffsmooth."""


@main.command()
@speed_options
@click.option("--profile", is_flag=True, help="Also measure what the device does, by kind of kernel.")
def speed(
    spec: str,
    cpu: bool,
    overrides: tuple[str, ...],
    sizes: tuple[int, ...],
    precisions: tuple[str, ...],
    threads: int,
    rounds: int,
    draws: int,
    as_json: bool,
    profile: bool,
) -> None:
    """Measure SPEC as `diffsmooth bench` does, also against the published algorithm, and where its time goes."""
    loaded = load_named(spec, (*overrides, "compute.device=cpu") if cpu else overrides)
    figures = bench_speed(
        Pipeline(loaded, threads=threads),
        batch_sizes=sizes,
        precisions=precisions,
        effort=Effort(rounds=rounds, agreement_draws=draws),
        with_profile=profile,
    )
    if as_json:
        click.echo(json.dumps(figures.to_json(), indent=2))
    else:
        print_figures(figures, Console())


@main.command()
@click.argument("name", type=click.Choice(list(SUITES)))
@click.option("--output", metavar="FILE", help="Also write all figures to this file, as JSON.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of all specs.")
@_JSON
def suite(name: str, output: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure several networks in all precisions, in under 9 minutes."""
    with writing("--output", output) if output else nullcontext() as path:
        if path is not None:
            Path(path).touch()  # a path that cannot be written is refused now
        settings = SUITES[name].settings(overrides)
        figures = run_suite(settings, on_row=lambda row: note(f"{row.title}: {row.reason or 'measured'}"))
        text = json.dumps(figures.to_json(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        print_suite(figures, Console())


@main.command()
@click.option("--tasks", type=click.IntRange(min=1), default=2000, show_default=True, help="Number of tasks.")
@_JSON
def driver(tasks: int, as_json: bool) -> None:
    """Measure the driver's own time per task on a local Ray, with a base classifier that does nothing."""
    _show(bench_driver(tasks), as_json)


@main.command()
@click.argument("uri")
@click.option("--blocks", type=click.IntRange(min=1), default=10_000, show_default=True, help="Number of blocks.")
@_JSON
def storage(uri: str, blocks: int, as_json: bool) -> None:
    """Write small blocks below URI, and time listing, resuming and reading them."""
    _show(bench_storage(uri, blocks), as_json)


@main.command()
@_JSON
def fleet(as_json: bool) -> None:
    """Simulate ImageNet on 8 to 1,024 spot GPUs, with the real scheduler but without Ray."""
    costs = bench_simulation()
    _show_all(costs, describe_simulation(costs), as_json)


@main.command()
@click.option(
    "--log", "logs", type=(str, float, int, float), multiple=True, metavar="FILE SIGMA N ALPHA",
    help="Samples of a log in Cohen's layout, instead of invented ones. Can be repeated.",
)  # fmt: skip
@_JSON
def sampling(logs: tuple[tuple[str, float, int, float], ...], as_json: bool) -> None:
    """Simulate how many draws the sampling modes save."""
    populations = [population_of_log(*log) for log in logs] or INVENTED
    costs = [cost for n in (10_000, 100_000) for cost in simulate_modes(n, populations)]
    _show_all(costs, describe_modes(costs), as_json)


def _show(cost: Any, as_json: bool) -> None:
    click.echo(json.dumps(asdict(cost), indent=2) if as_json else cost.describe())


def _show_all(costs: Sequence[Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps([asdict(cost) for cost in costs], indent=2) if as_json else text)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
