"""`diffsmooth certify` and `diffsmooth predict`."""

from typing import TYPE_CHECKING, Any

import click

from diffsmooth.jobs.console import conclude, print_json
from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import (
    ACCELERATOR,
    ACTORS,
    ADDRESS,
    COSTLY,
    CPU,
    JSON,
    MEMORY,
    QUIET,
    SET,
    SPEC_ARGUMENTS,
    VERBOSE,
    YES,
    CertificateName,
    ask_unless,
    batch_size,
    on_device,
    together,
)
from diffsmooth.jobs.specs import home_of, load_specs
from diffsmooth.pipeline.errors import Stopped

if TYPE_CHECKING:
    from diffsmooth.jobs import casting
else:
    casting = Later("diffsmooth.jobs.casting")

_CAST_OPTIONS = together(
    SPEC_ARGUMENTS,
    click.option(
        "--out",
        help="Folder, or s3://, gs:// or az:// URI of the run; with several specs, of all runs. [default: runs/NAME]",
    ),
    ADDRESS,
    ACTORS,
    ACCELERATOR,
    MEMORY,
    batch_size("the fastest that fits"),
    click.option(
        "--part",
        metavar="I/K",
        help="Start with the I-th of K parts: K drivers share a run. [default: task of a SLURM array, else random]",
    ),
    CPU,
    SET,
    click.option(
        "--fresh-seed",
        is_flag=True,
        help="Draw a new secret seed for this run, kept in run.json; same as --set smoothing.seed=random.",
    ),
    YES,
    QUIET,
    VERBOSE,
    JSON,
)


@click.command("certify")
@_CAST_OPTIONS
@click.option(
    "--certificate",
    type=CertificateName(lambda kind: kind.has_radius and bool(kind.modes)),
    help="What to claim: top bounds the top class only, multiclass also the others, cost excludes costly errors. "
    "[default: top]",
)
@COSTLY
def certify_command(certificate: str | None, **options: Any) -> None:
    """Cast votes, compute bounds and radii, draw the curve. Run it again to resume or to grow a run.

    \b
    diffsmooth certify mnist
    diffsmooth certify my.toml --out runs/a --set smoothing.sigma=1.0
    """
    _cast(**options if certificate is None else {**options, "certificate": certificate})


@click.command("predict")
@_CAST_OPTIONS
def predict_command(**options: Any) -> None:
    """Cast votes and predict with abstention (Cohen's PREDICT). Storage, resume and growth work as in certify.

    \b
    diffsmooth predict mnist --set smoothing.n=100 --set smoothing.block.estimation=100
    """
    _cast(certificate="predict", **options)


def _cast(
    *,
    specs: tuple[str, ...],
    out: str | None,
    cpu: bool,
    overrides: tuple[str, ...],
    fresh_seed: bool,
    yes: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    overrides = on_device(overrides, cpu)
    overrides += ("smoothing.seed=random",) if fresh_seed else ()
    loaded = load_specs(specs, overrides)
    wanted = [(spec, home_of(spec, out, several=len(loaded) > 1)) for spec in loaded]
    how = casting.Options(quiet=as_json or quiet, **options)
    results: list[casting.Certified] = []
    try:
        for result in casting.certify_all(wanted, how, confirm=ask_unless(yes)):
            results.append(result)  # kept if a later spec is stopped
    except Stopped:
        if as_json:
            print_json(results)
        raise
    conclude(results, as_json=as_json, show=None, complete=all(result.complete for result in results))
