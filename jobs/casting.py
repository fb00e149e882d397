"""The work of `certify` and `predict`: specs in, votes cast on the cluster, certificates and curves out."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from diffsmooth.cluster.allocation import part_of
from diffsmooth.cluster.cast import Outcome, Work
from diffsmooth.cluster.connect import check_device
from diffsmooth.cluster.scheduler import Part, Scheduler
from diffsmooth.cluster.worker import Setup
from diffsmooth.jobs.console import note
from diffsmooth.jobs.costs import warn_of_cost
from diffsmooth.jobs.hooks import tell_result
from diffsmooth.jobs.orders import print_order
from diffsmooth.jobs.watch import ClusterOptions, OrderTally, Watch, stop_on_signals
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.advice import warn_of_settings
from diffsmooth.pipeline.certify.kinds import TOP
from diffsmooth.pipeline.certify.orders import Order, order_of, read_costly, stored_hash
from diffsmooth.pipeline.certify.sampling import Sampler
from diffsmooth.pipeline.data.images import UNLABELLED
from diffsmooth.pipeline.data.sets import dataset_id, open_dataset, sample_indices
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import OrderResult, StoredRun
from diffsmooth.pipeline.smoothing import check_spec
from diffsmooth.pipeline.spec import RunSpec
from diffsmooth.pipeline.storage.published import PublishedStore
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.run import RUN_KEY, claim_seeded_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(ClusterOptions):
    """How to certify; the same for all specs of one call."""

    certificate: str = TOP
    costly: str | None = None  # the file of `orders.read_costly`
    part: str | None = None  # I/K of --part


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a call computed; the names are those that `--json` prints."""

    draws_cast: int
    seconds: float
    tasks: int
    tasks_lost: int
    blocks_computed_twice: int
    driver_ms_per_task: float

    @classmethod
    def of(cls, outcome: Outcome) -> "Effort":
        return cls(
            draws_cast=outcome.draws,
            seconds=round(outcome.seconds, 2),
            tasks=outcome.tasks,
            tasks_lost=outcome.lost,
            blocks_computed_twice=outcome.duplicates,
            driver_ms_per_task=round(1000 * outcome.driver_seconds / max(outcome.tasks, 1), 3),
        )


@dataclass(frozen=True, kw_only=True)
class Certified:
    """An order after a call of `certify_all`."""

    result: OrderResult
    effort: Effort | None  # None if nothing had to be cast

    @property
    def complete(self) -> bool:
        return self.result.curve.incomplete == 0

    def to_json(self) -> dict[str, Any]:
        return self.result.summary().to_json() | ({} if self.effort is None else asdict(self.effort))


class _Ready(NamedTuple):
    """A spec that passed all checks, the run that it belongs to, and what its order still needs."""

    spec: RunSpec
    stored: StoredRun
    order_name: str
    order: Order
    sampler: Sampler
    missing: list[Block]  # needed now; their votes may make more needed
    draws_left: int  # at most


def certify_all(
    wanted: Sequence[tuple[RunSpec, str]], options: Options, confirm: Callable[[str], None] = logger.warning
) -> Iterator[Certified]:
    """Certify specs one after another on the same actors, each in its storage; or predict, by the certificate.

    `wanted` are specs and the homes of their runs. All specs are checked before the cluster is used. `confirm` gets a
    warning about an order of many GPU-hours, and raises to refuse it.

    Raises: UserError, RunError; Stopped after SIGTERM or Ctrl-C.
    """
    part = part_of(options.part, os.environ)
    devices = {spec.compute.device for spec, _ in wanted}
    if len(devices) > 1:
        names = ", ".join(sorted(devices))
        raise UserError(f"compute.device differs between the specs ({names}); certify them in separate commands")
    runs = [_prepare(spec, home, options) for spec, home in wanted]
    if any(run.missing for run in runs):
        warn_of_cost([(run.spec, run.draws_left) for run in runs], confirm)
        yield from _cast_all(runs, devices.pop(), options, part)
    else:
        yield from (_finish(run, options) for run in runs)


def _cast_all(runs: Sequence[_Ready], device: str, options: Options, part: Part) -> Iterator[Certified]:
    last = max(index for index, run in enumerate(runs) if run.missing)
    with (
        options.connect(device) as cluster,
        stop_on_signals(cluster.stop),  # after ray.init, which installs handlers of its own
    ):
        for index, run in enumerate(runs):
            outcome = None
            if run.missing:
                store = run.stored.store
                setup = Setup(run.spec, store.location, run.stored.run.votes_id, options.batch_size)
                work = Work(setup=setup, blocks=run.missing, sampler=run.sampler, last=index == last)
                tally = OrderTally(run.order, run.stored.run.sigma)
                with Watch(run.spec.name, tally, store, options.quiet) as watch:
                    outcome = cluster.cast(work, scheduler=Scheduler(part=part), listeners=[watch])
                for task, error in outcome.set_aside:
                    logger.error("gave up after %d attempts: %s; %s", task.attempts, task.blocks[0], error)
            yield _finish(run, options, outcome)


def _finish(run: _Ready, options: Options, outcome: Outcome | None = None) -> Certified:
    result = run.stored.finish(run.order_name)
    print_order(result, quiet=options.quiet)
    tell_result(result)
    return Certified(result=result, effort=None if outcome is None else Effort.of(outcome))


def _prepare(spec: RunSpec, home: str, options: Options) -> _Ready:
    """Check a spec against its data, weights and storage, and place its order."""
    store = open_store(home)
    if isinstance(store, PublishedStore):
        store.prepare()  # refuses, before data and weights are fetched
    data = open_dataset(spec.data)
    samples = sample_indices(spec.data.samples, len(data))
    costly = read_costly(options.certificate, options.costly, data.num_classes)
    order = order_of(spec, samples, options.certificate, costly, dataset_id(data))
    needs_labels = "sampling.skip_wrong = true" if order.skip_wrong else f"--certificate {order.certificate}"
    if (order.skip_wrong or costly) and data[samples[0]].label == UNLABELLED:
        raise UserError(f"{needs_labels} needs labels, but the data set has none; use a labelled data set")
    warn_of_settings(spec, order)
    checked = check_spec(spec, data)
    if not store.exists(RUN_KEY):  # a complete run can be certified again without a device
        check_device(options.address, spec.compute.device)
    seeded, _ = claim_seeded_run(store, spec, checked.weights_ids, data.num_classes)
    stored = StoredRun(store)
    name, committed = stored.place(order), stored.committed()
    if spec.smoothing.seed == "random" and not options.quiet:
        first = next(iter(stored.orders))
        note(f"commitment: {stored_hash(store, first)} (sha256 of order {first}; publish it before the first draw)")
    sampler = stored.sampler(order, committed, name=name, plans=True)
    missing = sampler.start()
    left = sum(block.draws for block in order.blocks(stored.run.block) if block not in committed)
    return _Ready(seeded, stored, name, order, sampler, missing, left)
