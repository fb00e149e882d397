"""The work of `attack`: search adversarial images of a run's g, prove them with fresh votes, store and show them."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from diffsmooth.cluster.allocation import part_of
from diffsmooth.cluster.attacker import block_of
from diffsmooth.cluster.cast import Outcome, Work
from diffsmooth.cluster.scheduler import Scheduler
from diffsmooth.cluster.worker import Setup
from diffsmooth.jobs.costs import warn_of_cost
from diffsmooth.jobs.watch import ClusterOptions, Watch, stop_on_signals
from diffsmooth.pipeline.attack.gap import Gap, Robustness
from diffsmooth.pipeline.attack.record import FOLDER, Attack, attacked, claim_attack
from diffsmooth.pipeline.attack.request import AttackRequest, attack_of
from diffsmooth.pipeline.data.sets import dataset_id
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.attacked import Attacked, chosen_samples, default_alpha, finish
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.smoothing import check_spec
from diffsmooth.pipeline.spec import RunSpec
from diffsmooth.pipeline.votes.blocks import Votes

logger = logging.getLogger(__name__)


class _Ready(NamedTuple):
    """A run and an attack on it that passed all checks."""

    stored: StoredRun
    spec: RunSpec
    attack: Attack
    wanted: list[int]
    missing: list[int]


def attack_run(
    run_uri: str,
    spec: RunSpec,
    request: AttackRequest,
    options: ClusterOptions,
    confirm: Callable[[str], None] = logger.warning,
) -> Attacked:
    """Attack samples of a run on the cluster; those that are finished are not attacked again.

    `spec` says where the data and weights of the run are. `confirm` gets a warning about a search of many GPU-hours.

    Raises: UserError, RunError; Stopped after SIGTERM or Ctrl-C. Mistakes are refused before any draw.
    """
    ready = _prepare(run_uri, spec, request)
    seconds = 0.0
    if ready.missing:
        warn_of_cost([(ready.spec, len(ready.missing) * ready.attack.passes)], confirm)
        outcome = _search(ready, options)
        seconds = outcome.seconds
        for task, error in outcome.set_aside:
            logger.error("gave up after %d attempts: sample %d; %s", task.attempts, task.blocks[0].sample, error)
    found = finish(ready.stored, ready.attack, ready.wanted, seconds)
    if not options.quiet:
        print_attack(found, Console())
    elif found.gap is not None and (warning := found.gap.warning()):
        logger.error("%s", warning)
    return found


def _prepare(run_uri: str, spec: RunSpec, request: AttackRequest) -> _Ready:
    """Check everything, and store the settings."""
    stored = StoredRun.open(run_uri)
    run, store = stored.run, stored.store
    seeded = run.seeded(spec)
    checked = check_spec(seeded)
    if checked.votes_id != run.votes_id:
        raise UserError(f"--spec {spec.name} is not the spec of this run (votes_id {run.votes_id})")
    data = checked.data
    if any(order.data_id not in (None, dataset_id(data)) for order in stored.orders.values()):
        raise UserError(
            f"{store.uri}: the data set differs from that of the run (its size or some of its samples); use the same "
            "data set"
        )
    wanted = chosen_samples(stored, request.samples, data)
    attack = attack_of(request, run, alpha=default_alpha(stored), pixels=data[wanted[0]].image_CHW.size)
    store.prepare()
    claim_attack(store, attack)
    done = set(attacked(store, attack))
    return _Ready(stored, seeded, attack, wanted, [sample for sample in wanted if sample not in done])


def _search(ready: _Ready, options: ClusterOptions) -> Outcome:
    """Attack the missing samples on the cluster."""
    run, store, attack = ready.stored.run, ready.stored.store, ready.attack
    setup = Setup(ready.spec, store.location, run.votes_id, options.batch_size, attack=attack)
    blocks = [block_of(sample, attack) for sample in ready.missing]
    device = ready.spec.compute.device
    key = f"{FOLDER}/{attack.id}/progress.json"
    with (
        options.connect(device) as cluster,
        stop_on_signals(cluster.stop),  # after ray.init, which installs handlers of its own
        Watch(f"attack {attack.id}", _Tally(), store, options.quiet, key=key) as watch,
    ):
        scheduler = Scheduler(part=part_of(None, os.environ))
        return cluster.cast(Work(setup=setup, blocks=blocks), scheduler=scheduler, listeners=[watch])


class _Tally:
    """Counts samples that are proven wrong."""

    def __init__(self) -> None:
        self._samples = self._wrong = 0

    def add(self, new: Votes) -> None:
        self._samples += 1
        self._wrong += new.label not in new.counts

    def describe(self) -> str:
        return f"{self._samples} samples, {self._wrong} proven wrong within the largest eps" if self._samples else ""


def print_attack(found: Attacked, console: Console) -> None:
    """Print the table of an attack, what resists, and contradictions."""
    attack = found.attack
    console.print(_samples_table(found), highlight=False)
    lines = [
        f"attack {attack.id}: {len(found.samples)} samples, at most {attack.gradients:,} gradients and "
        f"{attack.votes:,} votes each, alpha = {attack.alpha:g}",
        f"{found.run_uri}/{FOLDER}/{attack.id}: table.parquet, samples/",
    ]
    if missing := len(set(found.wanted) - {one.sample for one in found.samples}):
        lines.append(f"{missing} samples are not attacked yet; run the same command again")
    console.out("\n".join(lines), highlight=False)
    if found.gap is not None and len(found.gap.table):
        console.print(_gap_table(found.gap, attack.eps), highlight=False)
    if found.robustness:
        console.print(_robustness_table(found.robustness), highlight=False)
    if found.gap is not None and (warning := found.gap.warning()):
        logger.error("%s", warning)


def _samples_table(found: Attacked) -> Table:
    table = Table(title="nearest image that is proven wrong", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in ("sample", "label", "lower", "upper", "class", "n_y", "n_c", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    lowers = {} if found.gap is None else dict(zip(found.gap.table["sample"], found.gap.table["lower"], strict=True))
    for sample, rows in found.table.groupby("sample"):
        proven = rows[rows["proven"]]
        row = (proven if len(proven) else rows).iloc[-1]
        lower = lowers.get(sample, -1.0)
        cells = [row["class"], row["n_y"], row["n_c"], f"{row['p_value']:.1g}"] if len(proven) else ["-"] * 4
        table.add_row(
            str(sample), str(row["label"]),
            "-" if lower < 0 else f"{math.floor(1000 * lower) / 1000:.3f}",
            "-" if math.isinf(row["upper"]) else f"{math.ceil(1000 * row['upper']) / 1000:.3f}",
            *map(str, cells),
        )  # fmt: skip
    return table


def _gap_table(gap: Gap, eps: Sequence[float]) -> Table:
    table = Table(title="share of the attacked samples, %", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    radii = [0.0, *sorted(eps)]
    for heading in ("radius", *(f"{radius:.4g}" for radius in radii)):
        table.add_column(heading, justify="right", no_wrap=True)
    certified = [100 * gap.certified(radius) for radius in radii]
    resisted = [100 * gap.resisted(radius) for radius in radii]
    gaps = [upper - lower for upper, lower in zip(resisted, certified, strict=True)]
    for name, values in (("certified", certified), ("resisted", resisted), ("gap", gaps)):
        table.add_row(name, *(f"{value:.1f}" for value in values))
    return table


def _robustness_table(rows: Sequence[Robustness]) -> Table:
    title = f"accuracy at the images found, in % [95 % interval]; the worst of {rows[0].queries} noisy queries"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in ("eps", "robust accuracy (empirical)", "average", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in reversed(rows):
        table.add_row(
            f"{one.eps:.4g}",
            f"{100 * one.robust_accuracy:.1f}",
            f"{100 * one.average:.1f} [{100 * one.average_lower:.1f}, {100 * one.average_upper:.1f}]",
            f"{100 * one.worst:.1f} [{100 * one.worst_lower:.1f}, {100 * one.worst_upper:.1f}]",
        )
    return table
