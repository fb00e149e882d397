"""`diffsmooth submit`."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import (
    ACCELERATOR,
    ACTORS,
    CPU,
    MEMORY,
    SET,
    SPEC_ARGUMENTS,
    YES,
    ask_unless,
    batch_size,
)
from diffsmooth.jobs.specs import find_spec, load_named

if TYPE_CHECKING:
    from diffsmooth.jobs import job_server, ship
else:
    job_server = Later("diffsmooth.jobs.job_server")
    ship = Later("diffsmooth.jobs.ship")


@click.command("submit")
@SPEC_ARGUMENTS
@click.option("--address", help="Dashboard of the cluster, http://HEAD:8265. [default: RAY_API_SERVER_ADDRESS]")
@click.option("--out", help="s3://, gs:// or az:// URI of the run; with several specs, of all their runs.")
@click.option("--shared", is_flag=True, help="--out is a folder that all nodes of the cluster share.")
@ACTORS
@ACCELERATOR
@MEMORY
@batch_size("the fastest that fits")
@CPU
@SET
@YES
@click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="Environment variable of the job. [default: none]")
@click.option("--wait", is_flag=True, help="Wait for the job to finish, and exit with its status.")
@click.option("--follow", is_flag=True, help="Like --wait, and show the driver's log.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only on stdout; the log goes to stderr.")
def submit_command(
    specs: tuple[str, ...],
    address: str | None,
    overrides: tuple[str, ...],
    yes: bool,
    wait: bool,
    follow: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Certify as a Ray job with its driver on the cluster. Submit it again to resume or to grow a run.

    \b
    diffsmooth submit imagenet-diffsmooth-0.50 --address http://HEAD:8265 --out s3://BUCKET/runs/a --follow
    """
    logging.getLogger("diffsmooth.jobs.ship").setLevel(logging.INFO)
    loaded = [(name, load_named(name, overrides)) for name in specs]
    request = ship.Submission(
        specs=[ship.NamedSpec(name, find_spec(name), spec) for name, spec in loaded],
        out=given["out"],
        shared=given["shared"],
        overrides=overrides,
        options=_passed_on(given),
        env=given["env"],
    )
    server, submitted = ship.submit(address, request, confirm=ask_unless(yes))
    for line in job_server.how_to(server, submitted.submission_id):
        click.echo(line, err=as_json)
    status = 0
    try:
        if follow:
            job_server.follow(server, submitted.submission_id, lambda text: click.echo(text, nl=False, err=as_json))
        if follow or wait:
            submitted, status = job_server.wait(server, submitted.submission_id)
    except KeyboardInterrupt:
        click.echo("diffsmooth: stopped waiting; the job continues", err=True)
        status = 130
    conclude(submitted, as_json=as_json, show=None, status=status)


def _passed_on(given: Mapping[str, Any]) -> list[str]:
    """The options of `certify` that the job gets as they were given."""
    options = [] if given["actors"] is None else [f"--actors={given['actors']}"]
    options += [f"--accelerator={name}" for name in given["accelerators"]]
    options += [] if given["memory_gb"] is None else [f"--memory={given['memory_gb']:g}"]
    options += [] if given["batch_size"] is None else [f"--batch-size={given['batch_size']}"]
    return [*options, "--cpu"] if given["cpu"] else options
