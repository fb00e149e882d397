"""What came of an attack on a run: its samples, upper radii beside the certified ones, and contradictions."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from diffsmooth.pipeline.attack.gap import Attacks, Gap, Robustness, gap_of, robustness
from diffsmooth.pipeline.attack.record import Attack, AttackedSample, read_samples, table_of, write_table
from diffsmooth.pipeline.data.entry import Dataset
from diffsmooth.pipeline.data.images import UNLABELLED
from diffsmooth.pipeline.data.sets import sample_indices
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import StoredRun


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """An attack on a run after a call."""

    run_uri: str
    attack: Attack
    wanted: list[int]  # samples that this call asked for
    samples: list[AttackedSample]  # all that are finished
    table: pd.DataFrame  # columns as in `diffsmooth.pipeline.attack.record.TABLE_COLUMNS`
    gap: Gap | None  # None if the run has no certificates
    robustness: list[Robustness]
    seconds: float  # of this call's search, on the cluster

    @property
    def complete(self) -> bool:
        return set(self.wanted) <= {one.sample for one in self.samples}

    def to_json(self) -> dict[str, Any]:
        gap = self.gap
        rows = self.table.replace({math.inf: None}).to_dict("records")
        return {
            "run": self.run_uri,
            "attack": self.attack.id,
            "settings": self.attack.model_dump(mode="json"),
            "complete": self.complete,
            "seconds": round(self.seconds, 2),
            "samples": rows,
            "contradictions": None if gap is None else gap.contradictions,
            "chance": None if gap is None else gap.chance,
            "robustness": [asdict(one) for one in self.robustness],
        }


def default_alpha(stored: StoredRun) -> float:
    """The alpha of the first order that has radii; 0.001 if there is none."""
    orders = [order for order in stored.orders.values() if order.kind.has_radius]
    return orders[0].total_alpha if orders else 0.001


def chosen_samples(stored: StoredRun, samples: str | None, data: Dataset) -> list[int]:
    """The samples to attack: those of --samples, or of the first order. Raises: UserError if one has no label."""
    if samples is not None:
        wanted = list(sample_indices(samples, len(data), "--samples"))
    else:
        first = next(iter(stored.orders.values()), None)
        wanted = list(first.samples) if first else []
    if not wanted:
        raise UserError(f"{stored.store.uri} has no order; choose samples with --samples START:STOP:STEP")
    if data[wanted[0]].label == UNLABELLED:
        raise UserError(f"sample {wanted[0]} has no label, and an attack needs one; use a labelled data set")
    return wanted


def finish(stored: StoredRun, attack: Attack, wanted: Sequence[int], seconds: float = 0.0) -> Attacked:
    """Read all finished samples of an attack, and write its table."""
    samples = read_samples(stored.store, stored.run, attack)
    table = table_of(samples, attack)
    write_table(stored.store, attack, table)
    return Attacked(
        run_uri=stored.store.uri,
        attack=attack,
        wanted=list(wanted),
        samples=samples,
        table=table,
        gap=_gap(stored, attack, samples),
        robustness=robustness(samples, attack),
        seconds=seconds,
    )


def _gap(stored: StoredRun, attack: Attack, samples: Sequence[AttackedSample]) -> Gap | None:
    """The certificates of the first order beside this attack."""
    orders = [name for name, order in stored.orders.items() if order.kind.has_radius]
    if not orders:
        return None
    wanted = {one.sample for one in samples}
    blocks = [block for block in stored.committed() if block.sample in wanted]
    certificates = stored.certificates(stored.votes(blocks), orders[0])
    rows = certificates[certificates["sample"].isin(wanted)]
    attacks = Attacks(settings={attack.id: attack}, samples={attack.id: samples})
    return gap_of(rows, attacks, stored.orders[orders[0]].total_alpha)
