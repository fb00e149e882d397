"""The audit of a run: its files are checked, and some of its blocks are cast again.

That the votes are those of f can only be shown by casting some of them again, in blocks that the auditor chooses at
random. A fraction q of forged blocks escapes k redrawn blocks with probability at most (1 - q)^k.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsmooth.pipeline.attack.search import proof_noise, votes_at
from diffsmooth.pipeline.audit.files import AttackedImage, Published, check_files
from diffsmooth.pipeline.block import Block, Stage
from diffsmooth.pipeline.casting import CastOptions, cast_votes
from diffsmooth.pipeline.data.entry import Dataset
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.device import DeviceFacts, device_facts, device_of, torch_settings
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.smoothing import BaseClassifier, check_spec
from diffsmooth.pipeline.spec import RunSpec
from diffsmooth.pipeline.votes.blocks import StoredBlock, block_key
from diffsmooth.pipeline.votes.run import Run

_LEAST_AGREEMENT = 0.98  # of votes cast on another kind of device, where rounding can decide near ties differently
_NOTHING = Published()


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many blocks to redraw."""

    share: float = 0.01  # the smallest fraction of forged blocks to detect
    assurance: float = 0.95  # with this probability
    blocks: int | None = None  # None: as many as share and assurance need
    seed: int | None = None  # None: choose the blocks with the operating system's randomness

    def __post_init__(self) -> None:
        for name in ("share", "assurance"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise UserError(f"--{name} {value} must be above 0 and below 1")

    @property
    def wanted(self) -> int:
        """The smallest k with 1 - (1 - share)^k >= assurance, unless the number of blocks is given."""
        if self.blocks is not None:
            return self.blocks
        return math.ceil(math.log1p(-self.assurance) / math.log1p(-self.share) - 1e-9)


@dataclass
class Redrawn:
    """What came of casting blocks again."""

    blocks: int = 0
    equal: int = 0  # vote for vote
    elsewhere: int = 0  # blocks that were first cast on another device or with other packages
    agreement_elsewhere: float | None = None  # the lowest share of equal votes among these
    attacked: int = 0  # attacked samples at whose nearest image votes were cast again
    attacked_equal: int = 0


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of an audit."""

    run: str
    votes_id: str
    blocks: int
    noise_moments_largest_z: float
    redrawn: Redrawn
    share: float
    findings: list[str]  # a line for each problem
    notes: list[str]  # a line for each assumption that files cannot show

    @property
    def escape_probability(self) -> float:
        return (1 - self.share) ** self.redrawn.blocks

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"escape_probability": self.escape_probability}

    def __str__(self) -> str:
        redrawn = self.redrawn
        lines = [
            f"{self.run}: {self.blocks:,} blocks read; the moments of the noise are at most "
            f"{self.noise_moments_largest_z:.1f} standard errors off"
        ]
        if redrawn.blocks:
            lines.append(
                f"{redrawn.blocks:,} blocks cast again, {redrawn.equal:,} equal vote for vote; a fraction of "
                f"{self.share:g} forged blocks would have escaped with probability {self.escape_probability:.2g}"
            )
            if redrawn.elsewhere:
                lines.append(
                    f"{redrawn.elsewhere:,} of them were first cast on another device or with other packages; at least "
                    f"{100 * (redrawn.agreement_elsewhere or 0.0):.3f} % of their votes agree"
                )
            if redrawn.attacked:
                lines.append(
                    f"{redrawn.attacked:,} adversarial images were voted on again, {redrawn.attacked_equal:,} of them "
                    "with the same votes"
                )
        else:
            lines.append("no block was cast again; use --spec with the spec of this run")
        lines += [f"NOTE: {note}" for note in self.notes]
        lines += [f"FOUND: {finding}" for finding in self.findings] or ["no problem found"]
        return "\n".join(lines) + "\n"


def audit(run_uri: str, *, spec: RunSpec | None, effort: Effort, published: Published = _NOTHING) -> Findings:
    """Check a run. Without `spec`, which says where data and weights are, no block is cast again.

    Raises: UserError if there is no run, or if the spec is that of another run.
    """
    found = check_files(run_uri, published)
    run, redrawn = found.stored.run, Redrawn()
    if spec is not None:
        chooser = random.SystemRandom() if effort.seed is None else random.Random(effort.seed)
        chosen = chooser.sample(found.blocks, min(effort.wanted, len(found.blocks)))
        images = chooser.sample(found.images, min(effort.wanted, len(found.images)))
        redrawn = _redraw(run, run.seeded(spec), chosen, images, found.findings)
    return Findings(
        run=found.stored.store.uri,
        votes_id=run.votes_id,
        blocks=found.committed,
        noise_moments_largest_z=found.noise_moments_largest_z,
        redrawn=redrawn,
        share=effort.share,
        findings=found.findings,
        notes=found.notes,
    )


def _vote_again(
    f: BaseClassifier, data: Dataset, one: AttackedImage, noise: Noise, here: DeviceFacts, precision: str
) -> str | None:
    """What is wrong with an adversarial image: its distance, or its votes. None if nothing is."""
    same = (one.sample.metadata.device, one.sample.metadata.versions) == (here.device, here.versions)
    least = 1 if same else _LEAST_AGREEMENT
    attack, sample, rung = one.attack, one.sample, one.sample.rungs[one.number]
    key = attack.sample_key(sample.sample)
    clean = data[sample.sample] if sample.sample < len(data) else None
    if clean is None or (clean.sha256, clean.label) != (sample.metadata.sample_sha256, sample.label):
        return f"{key}: sample {sample.sample} of the data set has another image or label than in the attack"
    distance = float(np.linalg.norm((rung.image_CHW.astype(np.float64) - clean.image_CHW).ravel()))
    if not math.isclose(distance, rung.distance, rel_tol=1e-9, abs_tol=1e-12):
        return f"{key} says distance {rung.distance:.6g}, but its image is {distance:.6g} away; delete it"
    options = CastOptions(sample.metadata.batch_size)
    parts: list[tuple[Stage, int, int, NDArray[np.int64] | None]] = [
        ("selection", one.number, attack.n0, rung.selection_K),
        ("estimation", rung.judged, attack.n, rung.judging_K),
    ]
    for stage, place, length, claimed_K in parts:
        block = Block(sample.sample, stage, place * length, (place + 1) * length)
        with torch_settings(precision, sample.metadata.threads):
            counts_K = votes_at(f, rung.image_CHW, clean, block, proof_noise(attack, noise), options)
        if claimed_K is not None and np.minimum(counts_K, claimed_K).sum() < least * length:
            return f"{key}: f casts other {stage} votes at this image; find out where the file came from"
    return None


def _redraw(
    run: Run, spec: RunSpec, chosen: Sequence[StoredBlock], images: Sequence[AttackedImage], findings: list[str]
) -> Redrawn:
    """Cast the chosen blocks again, the way their metadata say that they were cast; and vote on images again."""
    checked, redrawn = check_spec(spec), Redrawn()
    weights = checked.weights_ids
    for name, sha256 in run.spec.weights.items():
        if weights.get(name) != sha256:
            findings.append(f"{name} is {weights.get(name)} here, but {sha256} in the run; get the run's own file")
    if weights != run.spec.weights:
        return redrawn
    if checked.votes_id != run.votes_id:
        raise UserError(f"--spec {spec.name} is not the spec of this run (votes_id {run.votes_id})")
    data, device = checked.data, device_of(spec)
    f, here = checked.build(device), device_facts(device)
    agreements = []
    for one in chosen:
        key = block_key(one.block)
        agreement = _agreement(f, data, one, Noise.of(spec.smoothing), spec.smoothing.precision)
        if agreement is None:
            findings.append(
                f"{key}: sample {one.block.sample} of the data set has another image or label than in the run"
            )
            continue
        same = (one.metadata.device, one.metadata.versions) == (here.device, here.versions)
        redrawn.blocks += 1
        redrawn.equal += agreement == 1
        if not same:
            agreements.append(agreement)
        if agreement < (1 if same else _LEAST_AGREEMENT):
            findings.append(
                f"{key}: f casts other votes ({100 * agreement:.2f} % agree); find out where this file came "
                "from before you rely on the run"
            )
    for image in images:
        wrong = _vote_again(f, data, image, Noise.of(spec.smoothing), here, spec.smoothing.precision)
        redrawn.attacked += 1
        redrawn.attacked_equal += wrong is None
        findings += [wrong] if wrong else []
    redrawn.elsewhere = len(agreements)
    redrawn.agreement_elsewhere = min(agreements, default=None)
    return redrawn


def _agreement(f: BaseClassifier, data: Dataset, one: StoredBlock, noise: Noise, precision: str) -> float | None:
    """The share of a block's votes that f casts again; None if the data set has another image or label."""
    if one.block.sample >= len(data):
        return None
    sample = data[one.block.sample]
    if (sample.sha256, sample.label) != (one.metadata.sample_sha256, one.label):
        return None
    options = CastOptions(one.metadata.batch_size)
    with torch_settings(precision, one.metadata.threads):
        (cast,) = cast_votes(f, [one.block], {one.block.sample: sample}, noise, options)
    claimed = np.zeros_like(cast.counts_K)
    claimed[one.classes] = one.counts
    return float(np.minimum(claimed, cast.counts_K).sum() / one.block.draws)
