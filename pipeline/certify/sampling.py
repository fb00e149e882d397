"""Sampling: which blocks an order needs next, as a function of committed votes alone.

So a resumed run decides the same. This module opens no storage: committed votes come in, wanted blocks go out.
- fixed: n0 selection and n estimation draws of each sample; with skip_wrong, no estimation if the selected class is not
  the label, since such a sample counts as not certified at every radius, whatever its votes;
- planned: the selection of all samples first, then the draws of the plan (certify/planning.py);
- grid: as many draws as the looks of certify/sequential.py need.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from diffsmooth.pipeline.block import STAGES, Block
from diffsmooth.pipeline.certify.certificates import prefix_counts, top_class
from diffsmooth.pipeline.certify.orders import Order, blocks_up_to
from diffsmooth.pipeline.certify.planning import Pilot, Plan
from diffsmooth.pipeline.spec import BlockLengths
from diffsmooth.pipeline.votes.blocks import Votes

ReadVotes = Callable[[list[Block]], Iterable[Votes]]  # reads committed blocks
SettlePlan = Callable[[Mapping[int, Pilot]], Plan]  # stores the plan that follows from all pilots, returns the stored


@dataclass
class _Tally:
    """The committed votes of a sample, as far as they are known."""

    label: int = -1
    selection: Counter[int] = field(default_factory=Counter)
    estimation: dict[int, tuple[int, Mapping[int, int]]] = field(default_factory=dict)  # draw_stop -> draw_start, votes

    def add(self, votes: Votes) -> None:
        self.label = votes.label
        if votes.block.stage == "selection":
            self.selection.update(votes.counts)
        else:
            self.estimation[votes.block.draw_stop] = (votes.block.draw_start, votes.counts)


class Sampler:
    """Hands out each block that an order needs once, as soon as committed votes make it needed."""

    def __init__(
        self,
        order: Order,
        lengths: BlockLengths,
        sigma: float,
        *,
        committed: Iterable[Block],
        read: ReadVotes,
        plan: Plan | None = None,
        settle_plan: SettlePlan | None = None,
    ) -> None:
        """`committed` are the blocks in storage, some of which `read` reads; `plan` is the order's, if it has one.

        In planned mode, `settle_plan` is called once all pilots are committed; without it no plan is made. In fixed
        mode nothing is read unless samples are skipped, so a resumed run starts after one listing.
        """
        self._order, self._lengths, self._plan, self._settle_plan = order, lengths, plan, settle_plan
        self._grid = order.grid(sigma, lengths)
        self._tallies = {sample: _Tally() for sample in order.samples}
        self._given = set(committed)
        self._waiting: set[int] = set()  # samples whose votes may make more blocks needed
        if (order.skip_wrong or order.mode != "fixed") and plan is None:
            self._recall(read)

    def _recall(self, read: ReadVotes) -> None:
        """Read the committed votes that decisions depend on."""
        order = self._order
        # a plan depends on all pilots, the other modes on the samples that are not finished
        self._waiting = {
            sample
            for sample in order.samples
            if order.mode == "planned"
            or any(block not in self._given for block in blocks_up_to(sample, "estimation", order.n, self._lengths))
        }
        # an earlier order may have drawn more than this one looks at
        limits = {"selection": order.n0, "estimation": order.n if order.mode == "grid" else 0}
        for votes in read(
            [
                block
                for block in sorted(self._given)
                if block.sample in self._waiting and block.draw_stop <= limits[block.stage]
            ]
        ):
            self._tallies[votes.block.sample].add(votes)

    @property
    def open(self) -> bool:
        """Whether more blocks may become needed than were handed out."""
        return bool(self._waiting)

    def start(self) -> list[Block]:
        """The blocks that are needed now and not committed."""
        return self._next(self._order.samples)

    def take(self, new: Iterable[Votes]) -> list[Block]:
        """Take in blocks that were committed since; returns those that are needed now."""
        samples: dict[int, None] = {}
        for votes in new:
            if votes.block.sample in self._waiting:
                self._tallies[votes.block.sample].add(votes)
                samples[votes.block.sample] = None
        return self._next(samples)

    def _next(self, samples: Iterable[int]) -> list[Block]:
        found: list[Block] = []
        for sample in samples:
            draws, final = self._needed(sample)
            for stage, count in zip(STAGES, draws, strict=True):
                blocks = blocks_up_to(sample, stage, count, self._lengths)
                found += [block for block in blocks if block not in self._given]
            if final:
                self._waiting.discard(sample)
                self._tallies[sample] = _Tally()
        self._given.update(found)
        if self._settle_plan and self._order.mode == "planned" and self._plan is None and self._pilots_complete():
            self._plan = self._settle_plan({one: Pilot(t.label, t.selection) for one, t in self._tallies.items()})
            self._waiting.clear()
            return found + self._next(self._order.samples)
        return found

    def _needed(self, sample: int) -> tuple[tuple[int, int], bool]:
        """The selection and estimation draws of a sample that are needed now, and whether that is all."""
        order, tally = self._order, self._tallies[sample]
        if self._plan is not None:
            return (order.n0, self._plan.get(sample, 0)), True
        if order.mode == "fixed" and (not order.skip_wrong or sample not in self._waiting):
            return (order.n0, order.n), True
        if tally.selection.total() < order.n0 or order.mode == "planned":
            return (order.n0, 0), False
        if order.skip_wrong and top_class(tally.selection) != tally.label:
            return (order.n0, 0), True
        if self._grid is None:
            return (order.n0, order.n), True
        top = top_class(tally.selection)
        blocks = ((stop, start, votes.get(top, 0)) for stop, (start, votes) in sorted(tally.estimation.items()))
        decision = self._grid.decide(prefix_counts(self._grid, blocks))
        return (order.n0, decision.n), decision.final

    def _pilots_complete(self) -> bool:
        return all(self._tallies[sample].selection.total() == self._order.n0 for sample in self._order.samples)
