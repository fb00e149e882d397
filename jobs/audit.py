"""`diffsmooth audit`."""

from typing import TYPE_CHECKING, Any

import click

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import JSON, RUN_ARGUMENT, SET
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.errors import UserError

if TYPE_CHECKING:
    from diffsmooth.pipeline.audit import files, redraw
else:
    files = Later("diffsmooth.pipeline.audit.files")
    redraw = Later("diffsmooth.pipeline.audit.redraw")


@click.command("audit")
@RUN_ARGUMENT
@click.option("--spec", "spec_name", metavar="SPEC", help="Spec of the run, which says where data and weights are.")
@SET
@click.option(
    "--share", type=float, default=0.01, show_default=True, help="Smallest fraction of forged blocks to detect."
)
@click.option("--assurance", type=float, default=0.95, show_default=True, help="Probability of detecting it.")
@click.option("--blocks", type=click.IntRange(min=0), help="Number of blocks to cast again. [default: from --share]")
@click.option("--seed", type=int, help="Seed for choosing the blocks. [default: the system's randomness]")
@click.option("--commitment", metavar="HASH", help="Check the hash that was published before the first draw.")
@click.option("--root", metavar="HASH", help="Check every file against the seal with this published root.")
@click.option("--signers", metavar="FILE", help="Check that one of these SSH keys signed the seal: NAME KEYTYPE KEY.")
@JSON
def audit_command(
    run: str,
    spec_name: str | None,
    overrides: tuple[str, ...],
    commitment: str | None,
    root: str | None,
    signers: str | None,
    as_json: bool,
    **effort: Any,
) -> None:
    """Check RUN's files, and cast some of its blocks again. Exit status 1 if anything is wrong.

    \b
    diffsmooth audit runs/mnist --spec mnist --share 0.05
    """
    if spec_name is None and (effort["blocks"] or overrides):
        given = f"--blocks {effort['blocks']}" if effort["blocks"] else f"--set {overrides[0]}"
        raise UserError(f"{given} needs the spec of the run, which says where data and weights are; add --spec SPEC")
    spec = load_named(spec_name, overrides) if spec_name else None
    how = redraw.Effort(**effort)
    published = files.Published(commitment=commitment, root=root, signers=signers)
    found = redraw.audit(run, spec=spec, effort=how, published=published)
    conclude(found, as_json=as_json, complete=not found.findings)
