"""The command `diffsmooth`: plan, certify, predict, status, analyze, audit, curve, report, bench, submit.

Exit status: 0 complete; 2 the user's mistake; 1 ours, the surroundings', or incomplete; 130 and 143 stopped by
Ctrl-C and SIGTERM, resumable.
"""

import importlib.metadata
import json
import logging
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from jobs import certify as certification
from jobs.curve import compare
from pipeline.certify import CERTIFICATES, Certificate
from pipeline.errors import RunError, UserError
from pipeline.spec import load_spec
from pipeline.tables import FORMATS

SPECS = Path(__file__).parent / "specs"


class _Main(click.Group):
    """Turns a user's mistake into one line and exit status 2, the surroundings' failures into exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(error, 2)
        except RunError as error:
            _fail(error, 1)


def _fail(error: Exception, status: int) -> None:
    click.echo(f"diffsmooth: {' '.join(str(error).split())}", err=True)
    sys.exit(status)


def find_spec(name: str) -> Path:
    """A spec's path: a file, or the name of one that ships with the package."""
    shipped = SPECS / f"{name}.toml"
    path = Path(name)
    if path.is_file() or not shipped.is_file():
        if not path.exists():
            names = ", ".join(sorted(path.stem for path in SPECS.glob("*.toml")))
            raise UserError(f"{name}: no such spec; give the path of a TOML file or a shipped name: {names}")
        return path
    return shipped


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
    diffsmooth certify mnist             the demo: no GPU, nothing downloaded
    diffsmooth report runs/mnist         all of it in one HTML file
    """
    logging.basicConfig(level=logging.WARNING, format="diffsmooth: %(message)s")
    for told in ("pipeline.storage.fetch", "pipeline.data"):  # downloads under way, and the order of the classes
        logging.getLogger(told).setLevel(logging.INFO)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # own package.module:function are found from the working folder


def _complete_spec(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    """The shipped specs' names, then files."""
    names = sorted(path.stem for path in SPECS.glob("*.toml") if path.stem.startswith(typed))
    return [*map(CompletionItem, names), *([] if names else [CompletionItem(typed, type="file")])]


_SPECS = click.argument("specs", nargs=-1, required=True, metavar="SPEC...", shell_complete=_complete_spec)
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the spec; repeat it for more."
)
_YES = click.option(
    "--yes", is_flag=True, help=f"Do not ask before an order of over {certification.MANY_HOURS} GPU-hours."
)
_CAST_OPTIONS = [
    _SPECS,
    click.option(
        "--out",
        help="Home of the run, a folder or s3://BUCKET/PREFIX; with several specs, of their runs. [default: runs/NAME]",
    ),
    click.option("--address", help="Ray cluster to run on. [default: RAY_ADDRESS, else a local Ray]"),
    click.option(
        "--actors", type=click.IntRange(min=1), help="Actors, one a device. [default: every GPU, else every core]"
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Draws a batch. [default: 64 on a CPU, the fastest that fits on a GPU]",
    ),
    click.option("--cpu", is_flag=True, help="Run on the CPU; the same as --set compute.device=cpu."),
    _SET,
    _YES,
    click.option("-q", "--quiet", is_flag=True, help="Say nothing unless something is wrong."),
    click.option("-v", "--verbose", is_flag=True, help="Tell more, with all that Ray and its actors print."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout."),
]


def _casts_votes(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_CAST_OPTIONS):
        command = option(command)
    return command


@main.command()
@_casts_votes
@click.option(
    "--certificate",
    type=click.Choice([name for name in CERTIFICATES if name != "predict"]),
    default="top",
    show_default=True,
    help="What to claim: from the top class's votes alone, with the others' too, or that no error is a costly one.",
)
@click.option("--costly", metavar="FILE", help="With cost: .csv, a cost matrix, a row a label; or .toml, 3 = [5, 7].")
def certify(certificate: Certificate, costly: str | None, **options: Any) -> None:
    """Cast votes, bound them, draw the curve. Run it again to resume or to grow a run.

    \b
    diffsmooth certify mnist
    diffsmooth certify my.toml --out runs/a --set smoothing.sigma=1.0
    """
    _cast(certificate, costly, **options)


@main.command()
@_casts_votes
def predict(**options: Any) -> None:
    """Cast votes and predict with abstention (Cohen's PREDICT); stored, resumed and grown as certify does.

    \b
    diffsmooth predict mnist --set smoothing.n=100 --set smoothing.block.estimation=100
    """
    _cast("predict", None, **options)


def _cast(
    certificate: Certificate,
    costly: str | None,
    *,
    specs: tuple[str, ...],
    out: str | None,
    address: str | None,
    actors: int | None,
    batch_size: int | None,
    cpu: bool,
    overrides: tuple[str, ...],
    yes: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    if verbose:
        logging.getLogger().setLevel(logging.INFO)
    if cpu:
        overrides = (*overrides, "compute.device=cpu")
    loaded = [load_spec(find_spec(name), overrides) for name in specs]
    if len({spec.name for spec in loaded}) < len(loaded):
        raise UserError("several specs of one name would share a run: give each a name of its own")
    homes = [
        f"runs/{spec.name}" if out is None else f"{out.rstrip('/')}/{spec.name}" if len(loaded) > 1 else out
        for spec in loaded
    ]
    results, signal_number = certification.certify_all(
        list(zip(loaded, homes, strict=True)),
        certificate=certificate,
        costly=costly,
        address=address,
        actors=actors,
        batch_size=batch_size,
        quiet=as_json or quiet,
        verbose=verbose,
        on_stop=_handle_signals,
        confirm=_ask_unless(yes),
    )
    if as_json:
        click.echo(json.dumps(results, indent=2))
    if signal_number is not None:
        click.echo("diffsmooth: stopped; the same command goes on from here", err=True)
        sys.exit(128 + signal_number)
    sys.exit(0 if all(result["complete"] for result in results) else 1)


def _ask_unless(yes: bool) -> Callable[[str], None]:
    """What is done with a warning of a dear order: asked about on a terminal, said elsewhere."""

    def confirm(warning: str) -> None:
        if yes:
            return
        if sys.stdin.isatty() and sys.stderr.isatty():
            if not click.confirm(f"diffsmooth: {warning}. Go on?", err=True):
                raise UserError("not confirmed, and nothing was begun: --yes begins without asking")
        else:
            click.echo(f"diffsmooth: {warning} (--yes leaves this out)", err=True)

    return confirm


def _handle_signals(stop: Callable[[int], None]) -> None:
    """Call `stop` at the first SIGTERM or Ctrl-C; a second one ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        click.echo("diffsmooth: stopping; blocks in flight are finished first (again to stop at once)", err=True)
        stop(number)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


@main.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")
def status(run: str, as_json: bool) -> None:
    """What stands and what is missing in RUN, from its files alone.

    \b
    diffsmooth status s3://BUCKET/runs/a
    """
    facts = certification.run_status(run)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        certification.print_status(facts)


@main.command()
@click.argument("run")
@click.option("--alpha", type=float, help="Error probability of a certificate. [default: the first order's]")
@click.option("--n0", type=int, help="Selection draws to use. [default: the first order's]")
@click.option("--n", type=int, help="Estimation draws to use. [default: the first order's]")
@click.option("--certificate", type=click.Choice(CERTIFICATES), help="What to claim. [default: the first order's]")
@click.option("--costly", metavar="FILE", help="With cost: .csv, a cost matrix, a row a label; or .toml, 3 = [5, 7].")
@click.option(
    "--export-tsv",
    metavar="FILE",
    help="Write the certificates as a log in Cohen's layout too, radii rounded down to 6 decimals.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")
def analyze(
    run: str,
    alpha: float | None,
    n0: int | None,
    n: int | None,
    certificate: Certificate | None,
    costly: str | None,
    export_tsv: str | None,
    as_json: bool,
) -> None:
    """Another order from RUN's stored votes: no draws, no GPU. Marked post hoc where it is a second look.

    \b
    diffsmooth analyze runs/mnist --alpha 0.01
    """
    result = certification.analyze(
        run,
        alpha=alpha,
        n0=n0,
        n=n,
        certificate=certificate,
        costly=costly,
        export_tsv=export_tsv,
        quiet=as_json,
    )
    if as_json:
        click.echo(json.dumps(result, indent=2))
    sys.exit(0 if result["complete"] else 1)


@main.command()
@click.argument("run")
@click.option("--spec", "spec_name", metavar="SPEC", help="The run's spec, which tells where data and weights are.")
@_SET
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="A share of false blocks that is to be found ...",
)
@click.option(
    "--assurance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="... with this probability.",
)
@click.option("--blocks", type=click.IntRange(min=0), help="Blocks to cast again. [default: as --share needs]")
@click.option("--seed", type=int, help="Choose the blocks by this seed. [default: the system's randomness]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")
def audit(
    run: str,
    spec_name: str | None,
    overrides: tuple[str, ...],
    share: float,
    assurance: float,
    blocks: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Check a run's files, and cast some of its blocks again. Exit status 1 where anything is wrong.

    \b
    diffsmooth audit runs/mnist --spec mnist --share 0.05
    """
    from jobs import audit as auditing

    spec = load_spec(find_spec(spec_name), overrides) if spec_name else None
    facts = auditing.audit(run, spec=spec, share=share, assurance=assurance, blocks=blocks, seed=seed)
    click.echo(json.dumps(facts, indent=2) if as_json else auditing.report(facts), nl=as_json)
    sys.exit(1 if facts["findings"] else 0)


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN_OR_LOG...")
@click.option("--order", default=None, help="Which order of each run. [default: the first]")
@click.option("--grid", metavar="START:STOP:STEP", help="Radii: exact decimals up to STOP. [default: round ones]")
@click.option("--float-grid", is_flag=True, help="Radii as published tables have them: numpy.arange in floats.")
@click.option(
    "--format", "form", type=click.Choice(list(FORMATS)), default="text", show_default=True, help="The table's format."
)
@click.option("--output", metavar="FILE", help="Write the table to this file. [default: stdout]")
@click.option("--plot", "picture", metavar="FILE", help="Draw the curves: .png, .pdf or .svg.")
@click.option("--envelope", is_flag=True, help="Add the best of the curves at each radius, and whose it is.")
def curve(
    sources: tuple[str, ...],
    order: str | None,
    grid: str | None,
    float_grid: bool,
    form: str,
    output: str | None,
    picture: str | None,
    envelope: bool,
) -> None:
    """One table and one picture of several runs and published logs.

    A folder or s3://BUCKET/PREFIX is a run; a file is a log in Cohen's layout. NAME=PATH names a curve, LOG@SIGMA tells
    a log's sigma.

    \b
    diffsmooth curve runs/mnist-cohen-0.50 runs/mnist-diffsmooth-0.50 --plot curves.png
    diffsmooth curve runs/my-0.50 Cohen=sigma_0.50@0.5 --grid 0:1.5:0.25 --format latex
    """
    compare(
        sources,
        order_name=order,
        grid=grid,
        float_grid=float_grid,
        form=form,
        output=output,
        picture=picture,
        envelope=envelope,
    )


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN...")
@click.option("--order", help="Which order of each run. [default: the first]")
@click.option("--spec", "specs", multiple=True, metavar="SPEC", help="Of a run, for its pictures. [default: a shipped]")
@_SET
@click.option(
    "--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Pictures of so many of each kind."
)
@click.option("--output", default="report.html", show_default=True, metavar="FILE", help="Write the report here.")
def report(
    sources: tuple[str, ...],
    order: str | None,
    specs: tuple[str, ...],
    overrides: tuple[str, ...],
    samples: int,
    output: str,
) -> None:
    """One HTML file that holds all: curves, radii, classes, pictures, what is guaranteed, how it was made.

    NAME=RUN names a run. Exit status 1 where samples are incomplete.

    \b
    diffsmooth report runs/mnist
    diffsmooth report runs/mnist-*-0.50 --output mnist.html
    """
    from jobs import report as reporting

    complete = reporting.report(
        sources,
        order_name=order,
        specs=[load_spec(find_spec(name), overrides) for name in specs],
        shipped=lambda name: load_spec(SPECS / f"{name}.toml") if (SPECS / f"{name}.toml").is_file() else None,
        each=samples,
        output=output,
    )
    click.echo(f"{output}: the report")
    sys.exit(0 if complete else 1)


@main.command()
@_SPECS
@click.option(
    "--gpu", "gpus", multiple=True, metavar="NAME[=PRICE]", help="A GPU, with its dollars an hour. [default: all known]"
)
@click.option(
    "--utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the GPU's peak that is reached.",
)
@_SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")
def plan(
    specs: tuple[str, ...], gpus: tuple[str, ...], utilization: float, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Draws, FLOPs, GPU-hours and dollars of SPEC, before anything is launched; needs no weights.

    \b
    diffsmooth plan imagenet-diffsmooth-0.50 --gpu H100=2.50 --gpu A100=1.60
    """
    from rich.console import Console

    from jobs import plan as planning

    prices = planning.parse_gpus(gpus)
    loaded = [load_spec(find_spec(name), overrides) for name in specs]
    plans = [planning.plan(spec, prices=prices, utilization=utilization) for spec in loaded]
    if as_json:
        click.echo(json.dumps([one.to_json() for one in plans], indent=2))
    else:
        planning.print_plans(plans, Console())


@main.command()
@click.argument("spec", required=False)
@click.option("--cpu", is_flag=True, help="Run on the CPU; the same as --set compute.device=cpu.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of SPEC.")
@click.option("--batch-size", "sizes", multiple=True, type=click.IntRange(min=1), help="To try; repeat it for more.")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), help="To try too."
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of a CPU.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns that each side takes.")
@click.option("--draws", type=click.IntRange(min=1), default=200, show_default=True, help="To compare votes on.")
@click.option(
    "--tasks", type=click.IntRange(min=1), default=2000, show_default=True, help="Without SPEC: how many to schedule."
)
@click.option("--simulate", is_flag=True, help="Instead: ImageNet on 8 to 1,024 simulated spot GPUs; no Ray.")
@click.option("--sampling", is_flag=True, help="Instead: draws that the sampling modes save, on simulated samples.")
@click.option("--storage", metavar="URI", help="Instead: write blocks below URI and time listing, resume and table.")
@click.option(
    "--blocks", type=click.IntRange(min=1), default=10_000, show_default=True, help="How many, with --storage."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout.")
def bench(
    spec: str | None,
    cpu: bool,
    overrides: tuple[str, ...],
    sizes: tuple[int, ...],
    precisions: tuple[str, ...],
    threads: int,
    rounds: int,
    draws: int,
    tasks: int,
    simulate: bool,
    sampling: bool,
    storage: str | None,
    blocks: int,
    as_json: bool,
) -> None:
    """SPEC's votes against its bare networks and against the published algorithm: speed, and whether votes agree.

    Without SPEC: the driver's own time per task, with a base classifier that does nothing, on a local Ray.

    \b
    diffsmooth bench cifar10-diffsmooth-0.50 --precision bf16 --precision tf32
    diffsmooth bench --storage s3://BUCKET/bench --blocks 100000
    """
    asked = {spec: spec, "--simulate": simulate, "--sampling": sampling, "--storage": storage}
    if len(chosen := [str(name) for name, given in asked.items() if given]) > 1:
        raise UserError(f"{' and '.join(chosen)} are benchmarks apart: choose one")
    if spec is not None:
        from rich.console import Console

        from jobs.bench.speed import Effort, bench_speed, print_speed

        overrides += ("compute.device=cpu",) if cpu else ()
        figures = bench_speed(
            load_spec(find_spec(spec), overrides),
            batch_sizes=sizes,
            precisions=precisions,
            threads=threads,
            effort=Effort(rounds=rounds, agreement_draws=draws),
        )
        if as_json:
            click.echo(json.dumps(figures.to_json(), indent=2))
        else:
            print_speed(figures, Console())
        return
    rows: Any
    if sampling:
        from jobs.bench.modes import describe_modes, simulate_modes

        rows = [row for n in (10_000, 100_000) for row in simulate_modes(n)]
        text = describe_modes(rows)
    elif simulate:
        from jobs.bench.fleet import bench_simulation, describe_simulation

        rows = bench_simulation()
        text = describe_simulation(rows)
    elif storage:
        from jobs.bench.storage import bench_storage, describe_storage

        rows = bench_storage(storage, blocks)
        text = describe_storage(rows)
    else:
        from jobs.bench.driver import bench_driver, describe_driver

        rows = bench_driver(tasks)
        text = describe_driver(rows)
    click.echo(json.dumps(rows, indent=2) if as_json else text)


@main.command()
@_SPECS
@click.option("--address", help="The cluster's dashboard, http://HEAD:8265. [default: RAY_API_SERVER_ADDRESS]")
@click.option("--out", help="Home of the run, s3://BUCKET/PREFIX; with several specs, of their runs.")
@click.option("--shared", is_flag=True, help="--out is a folder that every node of the cluster sees.")
@click.option("--actors", type=click.IntRange(min=1), help="Actors, one a device. [default: every device]")
@click.option("--batch-size", type=click.IntRange(min=1), help="Draws a batch.")
@click.option("--cpu", is_flag=True, help="Run on the CPU; the same as --set compute.device=cpu.")
@_SET
@_YES
@click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="Give the job this variable. [default: none]")
@click.option("--wait", is_flag=True, help="Wait for the job's end, and end with its exit status.")
@click.option("--follow", is_flag=True, help="The same, with the driver's log.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout; a followed log goes to stderr.")
def submit(
    specs: tuple[str, ...],
    address: str | None,
    out: str | None,
    shared: bool,
    actors: int | None,
    batch_size: int | None,
    cpu: bool,
    overrides: tuple[str, ...],
    yes: bool,
    env: tuple[str, ...],
    wait: bool,
    follow: bool,
    as_json: bool,
) -> None:
    """Certify as a Ray job, whose driver runs on the cluster. Submit it again to resume or to grow a run.

    \b
    diffsmooth submit imagenet-diffsmooth-0.50 --address http://HEAD:8265 --out s3://BUCKET/runs/a --follow
    """
    from jobs import submit as submission

    logging.getLogger("jobs.submit").setLevel(logging.INFO)
    options = [] if actors is None else [f"--actors={actors}"]
    options += [] if batch_size is None else [f"--batch-size={batch_size}"]
    options += ["--cpu"] if cpu else []
    files = [(name, find_spec(name)) for name in specs]
    named = [(name, file, file.parent == SPECS and file != Path(name)) for name, file in files]
    order = submission.Order(named, out, shared, overrides, options, env)
    cluster, submitted = submission.submit(address, order, confirm=_ask_unless(yes))
    for line in submission.how_to(cluster, submitted.submission_id):
        click.echo(line, err=as_json)
    status = 0
    try:
        if follow:
            submission.follow(cluster, submitted.submission_id, lambda text: click.echo(text, nl=False, err=as_json))
        if follow or wait:
            submitted, status = submission.wait(cluster, submitted.submission_id)
    except KeyboardInterrupt:
        click.echo("diffsmooth: no longer waiting; the job goes on", err=True)
        status = 130
    if as_json:
        click.echo(json.dumps(submitted._asdict()))
    sys.exit(status)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that lets SHELL complete verbs, options and shipped specs.

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
