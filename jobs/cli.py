"""The command `diffsmooth` with its subcommands, from `certify` to `submit`.

It parses options and prints; each command's work is in a module of its own, imported when the command runs, so that
`--help` and the commands without networks start fast.

Exit status: 0 complete; 2 a mistake of the user; 1 our mistake, a failure of the environment, or incomplete; 130 and
143 stopped by Ctrl-C and SIGTERM, resumable.
"""

import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from diffsmooth.jobs.bench import bench_command
from diffsmooth.jobs.specs import SPECS, find_spec, is_training, load_named, load_named_training, load_shipped
from diffsmooth.pipeline.certify.kinds import CASCADE, KINDS, OF_ORDERS, TOP
from diffsmooth.pipeline.certify.units import UNITS
from diffsmooth.pipeline.errors import RunError, Stopped, UserError, printable, redacted
from diffsmooth.pipeline.show.tables import FORMATS
from diffsmooth.pipeline.spec import RunSpec


class _Main(click.Group):
    """Reports a user's mistake and a failure of the environment in one line each, with their exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(error, 2)
        except RunError as error:
            _fail(error, 1)
        except KeyboardInterrupt:
            click.echo("diffsmooth: stopped", err=True)
            sys.exit(130)


class _Formatter(logging.Formatter):
    """One line without secrets, also for messages of other packages."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redacted(super().format(record)))


def _fail(error: Exception, status: int) -> None:
    click.echo(printable(f"diffsmooth: {redacted(' '.join(str(error).split()))}"), err=True)
    sys.exit(status)


def _show_versions(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    gpus = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    click.echo(
        f"diffsmooth {importlib.metadata.version('diffsmooth')} (Python {platform.python_version()}, "
        f"torch {torch.__version__} with {cuda}, {gpus} here, Ray {importlib.metadata.version('ray')})"
    )
    context.exit()


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_versions,
              help="Show the versions of diffsmooth, Python, torch, CUDA and Ray, and exit.")  # fmt: skip
def main() -> None:
    """Certify image classifiers against l2 attacks with DiffSmooth and its relatives, on Ray.

    \b
    diffsmooth certify fashion           run the demo: no GPU, no download
    diffsmooth report runs/fashion       write everything about a run into one HTML file
    """
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("diffsmooth: %(message)s"))
    for module in (
        "diffsmooth.pipeline.storage.fetch",
        "diffsmooth.pipeline.data",
    ):  # downloads in progress, and the order of the classes
        logging.getLogger(module).setLevel(logging.INFO)


def _complete_spec(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    """The names of the shipped specs, then files."""
    names = [name for name in SPECS.names() if name.startswith(typed)]
    return [*map(CompletionItem, names), *([] if names else [CompletionItem(typed, type="file")])]


_SPECS = click.argument("specs", nargs=-1, required=True, metavar="SPEC...", shell_complete=_complete_spec)
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the spec. Can be repeated."
)
_YES = click.option("--yes", is_flag=True, help="Do not ask for confirmation before an expensive order.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON only on stdout.")
_PIXELS = click.option(
    "--pixels", metavar="C,H,W", help="Shape of the images, for l-infinity radii. [default: that of CIFAR-10, ImageNet]"
)
_COSTLY = click.option(
    "--costly",
    metavar="FILE",
    help="With --certificate cost: a cost matrix (.csv, a row per label) or lines such as 3 = [5, 7] (.toml).",
)
_ADDRESS = click.option("--address", help="Address of the Ray cluster. [default: RAY_ADDRESS, else start a local Ray]")
_ACTORS = click.option(
    "--actors", type=click.IntRange(min=1), help="Number of actors, one per device. [default: every GPU, else core]"
)
_ACCELERATOR = click.option(
    "--accelerator",
    "accelerators",
    multiple=True,
    metavar="NAME",
    help="Use GPUs of this type only, such as H100. Can be repeated. [default: any]",
)
_MEMORY = click.option(
    "--memory",
    "memory_gb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Main memory to reserve for each actor. [default: none]",
)
_CLUSTER_OPTIONS = ("address", "actors", "accelerators", "memory_gb", "batch_size", "quiet", "verbose")
_CAST_OPTIONS = [
    _SPECS,
    click.option(
        "--out",
        help="Folder, or s3://, gs:// or az:// URI of the run; with several specs, of all runs. [default: runs/NAME]",
    ),
    _ADDRESS,
    _ACTORS,
    _ACCELERATOR,
    _MEMORY,
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Draws per batch. [default: 64 on a CPU, the fastest that fits on a GPU]",
    ),
    click.option(
        "--part",
        metavar="I/K",
        help="Start with the I-th of K parts: K drivers share a run. [default: task of a SLURM array, else random]",
    ),
    click.option("--cpu", is_flag=True, help="Run on the CPU; same as --set compute.device=cpu."),
    _SET,
    click.option(
        "--fresh-seed",
        is_flag=True,
        help="Draw a new secret seed for this run, kept in run.json; same as --set smoothing.seed=random.",
    ),
    _YES,
    click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only."),
    click.option("-v", "--verbose", is_flag=True, help="Print more, including everything from Ray and its actors."),
    _JSON,
]


def _casts_votes(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_CAST_OPTIONS):
        command = option(command)
    return command


@main.command()
@_casts_votes
@click.option(
    "--certificate",
    type=click.Choice([name for name in OF_ORDERS if KINDS[name].has_radius]),
    default=TOP,
    show_default=True,
    help="What to claim: top bounds the top class only, multiclass also the others, cost excludes costly errors.",
)
@_COSTLY
def certify(certificate: str, costly: str | None, **options: Any) -> None:
    """Cast votes, compute bounds and radii, draw the curve. Run it again to resume or to grow a run.

    \b
    diffsmooth certify mnist
    diffsmooth certify my.toml --out runs/a --set smoothing.sigma=1.0
    """
    _cast(certificate, costly, **options)


@main.command()
@_casts_votes
def predict(**options: Any) -> None:
    """Cast votes and predict with abstention (Cohen's PREDICT). Storage, resume and growth work as in certify.

    \b
    diffsmooth predict mnist --set smoothing.n=100 --set smoothing.block.estimation=100
    """
    _cast("predict", None, **options)


def _cast(
    certificate: str,
    costly: str | None,
    *,
    specs: tuple[str, ...],
    out: str | None,
    cpu: bool,
    overrides: tuple[str, ...],
    fresh_seed: bool,
    yes: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    from diffsmooth.jobs.certify import Options, certify_all
    from diffsmooth.jobs.specs import home_of, load_specs

    if verbose:
        logging.getLogger().setLevel(logging.INFO)
    overrides += ("compute.device=cpu",) if cpu else ()
    overrides += ("smoothing.seed=random",) if fresh_seed else ()
    loaded = load_specs(specs, overrides)
    wanted = [(spec, home_of(spec, out, several=len(loaded) > 1)) for spec in loaded]
    how = Options(certificate=certificate, costly=costly, quiet=as_json or quiet, verbose=verbose, **options)
    results, stopped_by = [], None
    try:
        for result in certify_all(wanted, how, confirm=_ask_unless(yes)):
            results.append(result)
    except Stopped as stopped:
        stopped_by = stopped.signal
    if as_json:
        click.echo(json.dumps([result.to_json() for result in results], indent=2))
    if stopped_by is not None:
        click.echo("diffsmooth: stopped; run the same command to resume", err=True)
        sys.exit(128 + stopped_by)
    sys.exit(0 if all(result.complete for result in results) else 1)


def _ask_unless(yes: bool) -> Callable[[str], None]:
    """What to do with a warning about an expensive order: ask for confirmation on a terminal, print it elsewhere."""

    def confirm(warning: str) -> None:
        if yes:
            return
        if sys.stdin.isatty() and sys.stderr.isatty():
            if not click.confirm(f"diffsmooth: {warning}. Continue?", err=True):
                raise UserError("aborted; nothing was started; use --yes to skip this prompt")
        else:
            click.echo(f"diffsmooth: {warning} (use --yes to suppress this warning)", err=True)

    return confirm


@main.command()
@click.argument("run")
@_JSON
def status(run: str, as_json: bool) -> None:
    """Show what is committed and what is missing in RUN, from its files alone.

    \b
    diffsmooth status s3://BUCKET/runs/a
    """
    from diffsmooth.jobs.console import print_status
    from diffsmooth.pipeline.results.stored import StoredRun

    found = StoredRun.open(run).status()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_status(found)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--alpha", type=float, help="Error probability of a certificate. [default: the first order's]")
@click.option("--n0", type=int, help="Number of selection draws. [default: the first order's]")
@click.option("--n", type=int, help="Number of estimation draws. [default: the first order's]")
@click.option(
    "--certificate",
    type=click.Choice(list(KINDS)),
    help="What to claim; cascade is one certificate over several RUNs. [default: the first order's]",
)
@_COSTLY
@click.option(
    "--out", metavar="FOLDER", help="With --certificate cascade: folder or s3://BUCKET/PREFIX. [default: runs/cascade]"
)
@click.option(
    "--export-tsv",
    metavar="FILE",
    help="Also write the certificates as a log in Cohen's layout, radii rounded down to 6 decimals.",
)
@_JSON
def analyze(runs: tuple[str, ...], out: str | None, export_tsv: str | None, as_json: bool, **request: Any) -> None:
    """Certify RUN's votes with other settings: no draws, no GPU. A second look is marked post hoc.

    \b
    diffsmooth analyze runs/mnist --alpha 0.01
    diffsmooth analyze runs/mnist-cohen-* --certificate cascade --out runs/cohen-cascade
    """
    if request["certificate"] == CASCADE:
        _analyze_cascade(runs, out or "runs/cascade", export_tsv, as_json, **request)
        return
    if len(runs) > 1 or out:
        reason = "several runs are analyzed together" if len(runs) > 1 else "--out is available"
        raise UserError(f"{reason} only with --certificate cascade; give one RUN without --out")
    from diffsmooth.jobs import analyze as command

    result = command.analyze(runs[0], command.Request(**request), export_tsv=export_tsv, quiet=as_json)
    if as_json:
        click.echo(json.dumps(result.summary().to_json(), indent=2))
    sys.exit(0 if not result.curve.incomplete else 1)


def _analyze_cascade(
    runs: tuple[str, ...], out: str, export_tsv: str | None, as_json: bool, *, costly: str | None, **request: Any
) -> None:
    from diffsmooth.jobs.cascade import cascade, print_cascade, write_cascade
    from diffsmooth.jobs.places import writing
    from diffsmooth.pipeline.show.logs import write_log

    if costly:
        raise UserError("--costly belongs to --certificate cost; remove it")
    found = cascade(runs, alpha=request["alpha"], n0=request["n0"], n=request["n"])
    home = write_cascade(found, out)
    if export_tsv:
        with writing("--export-tsv", export_tsv) as path:
            Path(path).write_text(write_log(found.certificates))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_cascade(found, home)
    sys.exit(0 if found.complete else 1)


@main.command()
@click.argument("run")
@click.option("--sign", "key_file", metavar="KEY", help="Sign the seal with this SSH key (ssh-keygen -Y sign).")
@click.option("--sample", type=click.IntRange(min=0), help="Print the proof of this sample as JSON; seal nothing.")
@_JSON
def seal(run: str, key_file: str | None, sample: int | None, as_json: bool) -> None:
    """Commit to run.json, orders, plans and blocks of RUN by one hash, the root. certify does so when it ends.

    \b
    diffsmooth seal runs/mnist
    diffsmooth seal runs/mnist --sign ~/.ssh/id_ed25519
    """
    from diffsmooth.jobs import seal as command

    if sample is not None:
        click.echo(command.prove_sample(run, sample).model_dump_json(indent=2))
        return
    done = command.seal(run, key_file)
    click.echo(json.dumps(done.to_json(), indent=2) if as_json else printable(str(done)), nl=as_json)


@main.command()
@click.argument("run")
@click.option("--spec", "spec_name", metavar="SPEC", help="Spec of the run, which says where data and weights are.")
@_SET
@click.option(
    "--share", type=float, default=0.01, show_default=True, help="Smallest fraction of forged blocks to detect."
)
@click.option("--assurance", type=float, default=0.95, show_default=True, help="Probability of detecting it.")
@click.option("--blocks", type=click.IntRange(min=0), help="Number of blocks to cast again. [default: from --share]")
@click.option("--seed", type=int, help="Seed for choosing the blocks. [default: the system's randomness]")
@click.option("--commitment", metavar="HASH", help="Check the hash that was published before the first draw.")
@click.option("--root", metavar="HASH", help="Check every file against the seal with this published root.")
@click.option("--signers", metavar="FILE", help="Check that one of these SSH keys signed the seal: NAME KEYTYPE KEY.")
@_JSON
def audit(
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
    from diffsmooth.jobs import audit as command

    how = command.Effort(**effort)
    if spec_name is None and (how.blocks or overrides):
        given = f"--blocks {how.blocks}" if how.blocks else f"--set {overrides[0]}"
        raise UserError(f"{given} needs the spec of the run, which says where data and weights are; add --spec SPEC")
    spec = load_named(spec_name, overrides) if spec_name else None
    published = command.Published(commitment=commitment, root=root, signers=signers)
    found = command.audit(run, spec=spec, effort=how, published=published)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else printable(str(found)), nl=as_json)
    sys.exit(1 if found.findings else 0)


@main.command()
@click.argument("run")
@click.option(
    "--spec", "spec_name", metavar="SPEC", help="Spec of the run, which says where data and weights are. [default: a "
    "shipped one]",
)  # fmt: skip
@_SET
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
@click.option("--refine", type=int, help="Bisections between the last eps that succeeds and the next. [default: 5]")
@click.option("--steps", type=int, help="Gradient steps per eps. [default: 10]")
@click.option("--draws", type=int, help="Noise draws per gradient. [default: 32]")
@click.option("--restarts", type=int, help="Further random starts per eps. [default: 0]")
@click.option("--n0", type=int, help="Selection draws at each image that is tried. [default: 500]")
@click.option("--n", type=int, help="Judging draws at each image that is judged. [default: 1000]")
@click.option("--alpha", type=float, help="Error probability of an upper bound. [default: that of the first order]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the attack's own noise.")
@_ADDRESS
@_ACTORS
@_ACCELERATOR
@_MEMORY
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Draws per batch. [default: 64 on a CPU, the largest on a GPU]"
)
@click.option("--cpu", is_flag=True, help="Run on the CPU; same as --set compute.device=cpu.")
@_YES
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option("-v", "--verbose", is_flag=True, help="Print more, including everything from Ray and its actors.")
@_JSON
def attack(
    run: str, spec_name: str | None, overrides: tuple[str, ...], cpu: bool, yes: bool, as_json: bool, **given: Any
) -> None:
    """Bound the radius of RUN's samples from above: search images that g gets wrong, and prove them by fresh votes.

    Exit status 1 if samples are missing, or if an upper bound contradicts a certificate. Run it again to resume.

    \b
    diffsmooth attack runs/mnist --samples 0:10
    diffsmooth attack runs/mnist --attack apgd --eps 0.5 --eps 1.0
    """
    from diffsmooth.jobs.attack import Request, attack_run
    from diffsmooth.jobs.watch import ClusterOptions

    if given["verbose"]:
        logging.getLogger().setLevel(logging.INFO)
    overrides += ("compute.device=cpu",) if cpu else ()
    spec = _spec_of_run(run, spec_name, overrides)
    how = {name: given.pop(name) for name in _CLUSTER_OPTIONS}
    options = ClusterOptions(**{**how, "quiet": how["quiet"] or as_json})
    try:
        found = attack_run(run, spec, Request(**given), options, confirm=_ask_unless(yes))
    except Stopped as stopped:
        click.echo("diffsmooth: stopped; run the same command to resume", err=True)
        sys.exit(128 + stopped.signal)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    contradicted = found.gap is not None and bool(found.gap.contradictions)
    sys.exit(0 if found.complete and not contradicted else 1)


def _spec_of_run(run: str, spec_name: str | None, overrides: tuple[str, ...]) -> RunSpec:
    """The spec that says where the data and weights of a run are. Raises: UserError if none is given or shipped."""
    from diffsmooth.pipeline.results.stored import StoredRun

    if spec_name:
        return load_named(spec_name, overrides)
    name = StoredRun.open(run).run.name
    shipped = load_shipped(name, overrides)
    if shipped is None:
        raise UserError(f"{run} is a run of {name}, which is no shipped spec; name its spec with --spec SPEC")
    return shipped


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN_OR_LOG...")
@click.option("--order", "order_name", help="Name of the order in each run. [default: the first]")
@click.option("--grid", metavar="START:STOP:STEP", help="Radii, as exact decimals up to STOP. [default: round radii]")
@click.option("--float-grid", is_flag=True, help="Use numpy.arange in floats for --grid, as published tables do.")
@click.option(
    "--format", "form", type=click.Choice(list(FORMATS)), default="text", show_default=True, help="Format of the table."
)
@click.option("--output", metavar="FILE", help="Write the table to this file. [default: stdout]")
@click.option("--plot", "picture", metavar="FILE", help="Draw the curves into a .png, .pdf or .svg file.")
@click.option("--envelope", is_flag=True, help="Add the best curve at each radius, and its name; not a classifier.")
@click.option("--cascade", is_flag=True, help="Add one certificate over the sigmas of the runs, and the envelope.")
@click.option(
    "--unit",
    type=click.Choice(list(UNITS)),
    default="l2",
    show_default=True,
    help="Convert the radii: other pixel scales, or the l-infinity norm.",
)
@_PIXELS
@click.option("--std", metavar="S,S,S", help="With --unit l2-normalized: std per channel of the normalisation.")
def curve(sources: tuple[str, ...], **layout: Any) -> None:
    """Compare runs and published logs in one table and one picture.

    A folder, s3://BUCKET/PREFIX or hf://datasets/ORG/NAME is a run, a file is a log in Cohen's layout. NAME=PATH names
    a curve, LOG@SIGMA gives the sigma of a log.

    \b
    diffsmooth curve runs/mnist-cohen-0.50 runs/mnist-diffsmooth-0.50 --plot curves.png
    diffsmooth curve runs/my-0.50 Cohen=sigma_0.50@0.5 --grid 0:1.5:0.25 --format latex
    """
    from diffsmooth.jobs import curve as command

    command.curve(sources, command.Layout(**layout))


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN_OR_LOG...")
@click.option("--order", "order_name", help="Name of the order in each run. [default: the first]")
@click.option("--grid", metavar="START:STOP:STEP", help="Radii, as exact decimals up to STOP. [default: round radii]")
@click.option("--output", metavar="FILE", help="Write to this file. [default: stdout]")
@_JSON
def compare(
    sources: tuple[str, ...], order_name: str | None, grid: str | None, output: str | None, as_json: bool
) -> None:
    """Test which of two or more runs certifies more of the samples that they share.

    Prints differences of certified accuracy (exact McNemar test) and of ACR (BCa bootstrap), with intervals that hold
    for all radii and pairs at once, and the number of samples that would show a difference of 1 point.

    \b
    diffsmooth compare runs/mnist-diffsmooth-0.50 runs/mnist-cohen-0.50 --grid 0:1.5:0.25
    """
    from diffsmooth.jobs import compare as command

    command.print_comparison(
        command.compare_sources(sources, order_name=order_name, grid=grid), as_json=as_json, output=output
    )


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN...")
@click.option("--order", "order_name", help="Name of the order in each run. [default: the first]")
@click.option(
    "--spec", "specs", multiple=True, metavar="SPEC", help="Spec of a run, for pictures. [default: a shipped one]"
)
@_SET
@click.option(
    "--samples", "each", type=click.IntRange(min=0), default=3, show_default=True, help="Samples to show of each kind."
)
@_PIXELS
@click.option(
    "--output", default="report.html", show_default=True, metavar="FILE", help="Write the report to this file."
)
def report(
    sources: tuple[str, ...], specs: tuple[str, ...], overrides: tuple[str, ...], output: str, **options: Any
) -> None:
    """Write one HTML file with curves, radii, classes, pictures, guarantees, and how the run was made.

    NAME=RUN names a run. Exit status 1 if samples are incomplete.

    \b
    diffsmooth report runs/mnist
    diffsmooth report runs/mnist-*-0.50 --output mnist.html
    """
    from diffsmooth.jobs import report as command

    loaded = [load_named(name, overrides) for name in specs]
    complete = command.report(sources, specs=loaded, shipped=load_shipped, output=output, **options)
    click.echo(printable(f"{output}: report"))
    sys.exit(0 if complete else 1)


@main.command()
@click.argument("run")
@click.argument("place", metavar="hf://datasets/ORG/NAME")
@click.option(
    "--commit", "--no-pr", "directly", is_flag=True, help="Commit to the repository instead of opening a pull request."
)
@click.option(
    "--model", metavar="hf://ORG/NAME", help="Also open a pull request that adds the results to this model's page."
)
@click.option("--no-attacks", is_flag=True, help="Leave out attacks, which contain perturbed images of the data set.")
@click.option("--dry-run", metavar="FOLDER", help="Write what would be published to a new folder; upload nothing.")
@_JSON
def publish(run: str, place: str, no_attacks: bool, as_json: bool, **options: Any) -> None:
    """Publish a complete RUN, so that anyone can audit it: votes, certificates, seals, a report and a card.

    \b
    diffsmooth publish runs/mnist hf://datasets/ORG/NAME
    diffsmooth publish runs/mnist hf://datasets/ORG/NAME --dry-run published
    diffsmooth audit hf://datasets/ORG/NAME
    """
    from diffsmooth.jobs import publish as command

    done = command.publish(run, place, attacks=not no_attacks, **options)
    click.echo(json.dumps(done.to_json(), indent=2) if as_json else printable(str(done)), nl=as_json)


@main.command()
@_SPECS
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME[=PRICE]",
    help="GPU type and its price in dollars per hour. [default: all known types]",
)
@click.option(
    "--utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Fraction of the GPU's peak that the networks reach.",
)
@click.option(
    "--attack", "of_attack", is_flag=True, help="Estimate `diffsmooth attack` with its default settings instead; a "
    "gradient counts as three draws.",
)  # fmt: skip
@click.option(
    "--probe", is_flag=True, help="Measure f on this machine's CPU, with random weights if the weights are not here.",
)  # fmt: skip
@_SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON only on stdout.")
def plan(
    specs: tuple[str, ...],
    gpus: tuple[str, ...],
    utilization: float,
    of_attack: bool,
    probe: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Estimate draws, FLOPs, GPU-hours and dollars of SPEC before anything is started; needs no weights.

    SPEC may also be a training.

    \b
    diffsmooth plan imagenet-diffsmooth-0.50 --gpu H100=2.50 --gpu A100=1.60
    diffsmooth plan my-training.toml
    """
    from rich.console import Console

    from diffsmooth.jobs import plan as planning
    from diffsmooth.jobs.plan_training import plan_training

    prices = planning.parse_gpus(gpus)
    passes = planning.attack_passes() if of_attack else None
    plans: list[planning.Estimate] = []
    for name in specs:
        if not is_training(name):
            spec = load_named(name, overrides)
            plans.append(planning.plan(spec, prices=prices, utilization=utilization, passes=passes, probe=probe))
        elif of_attack:
            raise UserError(f"--attack does not apply to {name}, which is a training; remove one of them")
        else:
            training = load_named_training(name, overrides)
            plans.append(plan_training(training, prices=prices, utilization=utilization, probe=probe))
    if as_json:
        click.echo(json.dumps([one.to_json() for one in plans], indent=2))
    else:
        planning.print_plans(plans, Console())


main.add_command(bench_command)


@main.command()
@_SPECS
@click.option("--address", help="Dashboard of the cluster, http://HEAD:8265. [default: RAY_API_SERVER_ADDRESS]")
@click.option("--out", help="s3://, gs:// or az:// URI of the run; with several specs, of all their runs.")
@click.option("--shared", is_flag=True, help="--out is a folder that all nodes of the cluster share.")
@_ACTORS
@_ACCELERATOR
@_MEMORY
@click.option("--batch-size", type=click.IntRange(min=1), help="Draws per batch.")
@click.option("--cpu", is_flag=True, help="Run on the CPU; same as --set compute.device=cpu.")
@_SET
@_YES
@click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="Environment variable of the job. [default: none]")
@click.option("--wait", is_flag=True, help="Wait for the job to finish, and exit with its status.")
@click.option("--follow", is_flag=True, help="Like --wait, and show the driver's log.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only on stdout; the log goes to stderr.")
def submit(
    specs: tuple[str, ...],
    address: str | None,
    out: str | None,
    shared: bool,
    actors: int | None,
    accelerators: tuple[str, ...],
    memory_gb: float | None,
    batch_size: int | None,
    cpu: bool,
    overrides: tuple[str, ...],
    yes: bool,
    env: tuple[str, ...],
    wait: bool,
    follow: bool,
    as_json: bool,
) -> None:
    """Certify as a Ray job with its driver on the cluster. Submit it again to resume or to grow a run.

    \b
    diffsmooth submit imagenet-diffsmooth-0.50 --address http://HEAD:8265 --out s3://BUCKET/runs/a --follow
    """
    from diffsmooth.jobs import submit as submission

    logging.getLogger("diffsmooth.jobs.submit").setLevel(logging.INFO)
    options = [] if actors is None else [f"--actors={actors}"]
    options += [f"--accelerator={name}" for name in accelerators]
    options += [] if memory_gb is None else [f"--memory={memory_gb:g}"]
    options += [] if batch_size is None else [f"--batch-size={batch_size}"]
    options += ["--cpu"] if cpu else []
    named = [submission.NamedSpec(name, find_spec(name)) for name in specs]
    request = submission.Submission(specs=named, out=out, shared=shared, overrides=overrides, options=options, env=env)
    server, submitted = submission.submit(address, request, confirm=_ask_unless(yes))
    for line in submission.how_to(server, submitted.submission_id):
        click.echo(line, err=as_json)
    status = 0
    try:
        if follow:
            submission.follow(server, submitted.submission_id, lambda text: click.echo(text, nl=False, err=as_json))
        if follow or wait:
            submitted, status = submission.wait(server, submitted.submission_id)
    except KeyboardInterrupt:
        click.echo("diffsmooth: stopped waiting; the job continues", err=True)
        status = 130
    if as_json:
        click.echo(json.dumps(submitted._asdict()))
    sys.exit(status)


@main.command()
@click.argument("training", metavar="TRAINING")
@click.option("--out", help="Folder or s3://BUCKET/PREFIX of the training. [default: trainings/NAME]")
@click.option("--address", help="Address of the Ray cluster; trains on it. [default: train in this process]")
@click.option(
    "--workers",
    metavar="K[:L]",
    help="Train on Ray with K workers, or K to L as nodes come and go. [default: this process]",
)
@_SET
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@_JSON
def train(
    training: str,
    out: str | None,
    address: str | None,
    workers: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a denoiser or a classifier, and write a spec that certifies it. Run it again to resume.

    \b
    diffsmooth train my-training.toml --out trainings/mine
    diffsmooth certify trainings/mine/certify.toml
    """
    from diffsmooth.jobs import train as command

    spec = load_named_training(training, overrides)
    home = out or f"trainings/{spec.name}"
    try:
        row = command.train(spec, home, address=address, workers=workers, quiet=quiet or as_json)
    except Stopped as stopped:
        click.echo("diffsmooth: stopped; run the same command to resume", err=True)
        sys.exit(128 + stopped.signal)
    if as_json:
        click.echo(json.dumps({"out": home, **row}, indent=2))
    elif not quiet:
        click.echo(printable(command.closing(spec, home)))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that lets SHELL complete commands, options and shipped specs.

    \b
    diffsmooth completion bash >> ~/.bashrc
    diffsmooth completion zsh >> ~/.zshrc
    diffsmooth completion fish > ~/.config/fish/completions/diffsmooth.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "diffsmooth", "_DIFFSMOOTH_COMPLETE").source())


if __name__ == "__main__":
    main()
