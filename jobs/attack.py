"""`diffsmooth attack`."""

from typing import TYPE_CHECKING, Any

import click

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import (
    ACCELERATOR,
    ACTORS,
    ADDRESS,
    CPU,
    JSON,
    MEMORY,
    QUIET,
    RUN_ARGUMENT,
    SET,
    VERBOSE,
    YES,
    ask_unless,
    batch_size,
    on_device,
)
from diffsmooth.jobs.specs import load_named, load_shipped
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import RunSpec

if TYPE_CHECKING:
    from diffsmooth.jobs import attacking, watch
    from diffsmooth.pipeline.attack import request
    from diffsmooth.pipeline.results import stored
else:
    attacking = Later("diffsmooth.jobs.attacking")
    request = Later("diffsmooth.pipeline.attack.request")
    stored = Later("diffsmooth.pipeline.results.stored")
    watch = Later("diffsmooth.jobs.watch")

_CLUSTER_OPTIONS = ("address", "actors", "accelerators", "memory_gb", "batch_size", "verbose")


@click.command("attack")
@RUN_ARGUMENT
@click.option(
    "--spec", "spec_name", metavar="SPEC", help="Spec of the run, which says where data and weights are. [default: a "
    "shipped one]",
)  # fmt: skip
@SET
@click.option(
    "--attack",
    default="pgd",
    show_default=True,
    metavar="NAME",
    help="pgd, apgd, diffhammer, votes (no gradients), random, foolbox.attacks.NAME, or package.module:function.",
)
@click.option(
    "--eps", type=float, multiple=True, help="l2 distance to try, in [0, 1] pixels. Can be repeated. [default: 8 sigma "
    "and its halves down to sigma / 2]",
)  # fmt: skip
@click.option("--samples", metavar="START:STOP:STEP", help="Samples to attack. [default: those of the first order]")
@click.option(
    "--refine",
    type=int,
    help="Bisections between the smallest eps that succeeds and the next smaller one. [default: 5]",
)
@click.option("--steps", type=int, help="Gradient steps per eps. [default: 10]")
@click.option("--draws", type=int, help="Noise draws per gradient. [default: 32]")
@click.option("--restarts", type=int, help="Further random starts per eps. [default: 0]")
@click.option("--n0", type=int, help="Selection draws at each image that is tried. [default: 500]")
@click.option("--n", type=int, help="Judging draws at each image that is judged. [default: 1000]")
@click.option("--alpha", type=float, help="Error probability of an upper bound. [default: that of the first order]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the attack's own noise.")
@ADDRESS
@ACTORS
@ACCELERATOR
@MEMORY
@batch_size("the largest that fits")
@CPU
@YES
@QUIET
@VERBOSE
@JSON
def attack_command(
    run: str,
    spec_name: str | None,
    overrides: tuple[str, ...],
    cpu: bool,
    yes: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Bound the radius of RUN's samples from above, by a search for nearby images that g classifies wrongly.

    Fresh votes prove that g is wrong at each image found. Run it again to resume.

    Exit status 1 if samples are missing, or if an upper bound contradicts a certificate.

    \b
    diffsmooth attack runs/mnist --samples 0:10
    diffsmooth attack runs/mnist --attack apgd --eps 0.5 --eps 1.0
    """
    spec = _spec_of_run(run, spec_name, on_device(overrides, cpu))
    how = {name: given.pop(name) for name in _CLUSTER_OPTIONS}
    options = watch.ClusterOptions(quiet=quiet or as_json, **how)
    found = attacking.attack_run(run, spec, request.AttackRequest(**given), options, confirm=ask_unless(yes))
    contradicted = found.gap is not None and bool(found.gap.contradictions)
    conclude(found, as_json=as_json, show=None, complete=found.complete and not contradicted)


def _spec_of_run(run: str, spec_name: str | None, overrides: tuple[str, ...]) -> RunSpec:
    """The spec that says where the data and weights of a run are. Raises: UserError if none is given or shipped."""
    if spec_name is not None:
        return load_named(spec_name, overrides)
    name = stored.StoredRun.open(run).run.name
    spec = load_shipped(name, overrides)
    if spec is None:
        raise UserError(f"{run} is a run of {name}, which is no shipped spec; name its spec with --spec SPEC")
    return spec
