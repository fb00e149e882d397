"""The verb `audit`: does a run's folder hold what it claims to, and do its votes come out again?

The files alone show a damaged, swapped, foreign or deleted block, and certificates that do not follow from the votes.
That the votes themselves are f's can be shown by casting some again: blocks that the auditor chooses at random. A share
q of false blocks escapes k redrawn ones with probability (1 - q)^k at most.
"""

import io
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jobs.certify import certificates_of, sampler_of, with_seed_of
from pipeline import noise
from pipeline.block import Block
from pipeline.errors import RunError, UserError
from pipeline.sampling import read_orders, read_plans
from pipeline.spec import RunSpec
from pipeline.storage.store import Store, open_store
from pipeline.votes import (
    BLOCK_COLUMNS,
    TABLE_KEY,
    StoredBlock,
    block_key,
    block_lengths,
    list_blocks,
    read_blocks,
    read_run,
    to_table,
)

_MOMENT_VALUES = 2_000_000
_MOMENT_LIMIT = 5.0  # standard errors
_LEAST_AGREEMENT = 0.98  # of votes cast on another kind of device, where ties in floats may fall the other way


def blocks_for(share: float, assurance: float) -> int:
    """The least k with 1 - (1 - share)^k >= assurance."""
    return math.ceil(math.log1p(-assurance) / math.log1p(-share) - 1e-9)


def audit(
    run_uri: str, *, spec: RunSpec | None, share: float, assurance: float, blocks: int | None, seed: int | None
) -> dict[str, Any]:
    """Check a run; `findings` holds a line for everything that is wrong.

    `spec` tells where data and weights are: without it nothing is cast again. `blocks` of them are redrawn, or as many
    as `share` and `assurance` ask for; they are chosen by the operating system's randomness unless a seed is given.

    Raises: UserError where there is no run, or the spec is another run's.
    """
    store = open_store(run_uri)
    run = read_run(store)
    findings: list[str] = []
    try:
        noise.check_known_answers()
    except RunError as error:
        findings.append(str(error))

    def note(error: RunError) -> None:
        findings.append(str(error))

    standing = list_blocks(store, block_lengths(run), on_damage=note)
    stored = read_blocks(store, standing, on_damage=note)
    good = {one.block for one in stored}
    votes = to_table(stored)
    _compare_table(store, votes, findings)
    _check_orders(store, run, votes, good, findings)
    largest = _moments(run, stored, findings)
    wanted = min(blocks_for(share, assurance) if blocks is None else blocks, len(stored))
    redrawn: dict[str, Any] = {"blocks": 0, "equal": 0, "elsewhere": 0, "agreement_elsewhere": None}
    if spec is not None:
        chooser = random.SystemRandom() if seed is None else random.Random(seed)
        redrawn = _redraw(spec, run, chooser.sample(stored, wanted), findings)
    return {
        "run": store.uri,
        "votes_id": run["votes_id"],
        "blocks": len(standing),
        "noise_moments_largest_z": largest,
        "redrawn": redrawn,
        "share": share,
        "escape_probability": (1 - share) ** redrawn["blocks"],
        "findings": findings,
    }


def _compare_table(store: Store, votes: pd.DataFrame, findings: list[str]) -> None:
    """Blocks of votes.parquet that are gone or other than there."""
    try:
        table = pd.read_parquet(io.BytesIO(store.read(TABLE_KEY))).astype({"stage": str})
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        findings.append(f"{store.uri}/{TABLE_KEY} is damaged ({str(error).splitlines()[0]}): certify makes it anew")
        return
    keys = [*BLOCK_COLUMNS, "class"]
    columns = [*keys, "votes", "label"]
    both = table[columns].merge(votes[columns], on=keys, how="left", suffixes=("", "_now"))
    changed = both[(both["votes"] != both["votes_now"]) | (both["label"] != both["label_now"])]
    for block in changed[BLOCK_COLUMNS].drop_duplicates().itertuples(index=False, name=None):
        key = block_key(Block(*block))
        gone = key not in store.existing([key])
        findings.append(
            f"{store.uri}/{key} {'was deleted' if gone else 'was changed'} since {TABLE_KEY} was made of it: "
            f"{'run certify again to cast its draws' if gone else 'delete it and run certify again'}"
        )


def _check_orders(
    store: Store, run: Mapping[str, Any], votes: pd.DataFrame, good: set[Block], findings: list[str]
) -> None:
    """Blocks that an order wants and lacks; certificates that do not follow from the votes."""
    orders, plans = read_orders(store), read_plans(store)
    for name, order in orders.items():
        missing = sampler_of(store, run, name, order, good).start()
        if missing:
            findings.append(
                f"{store.uri}: order {name} lacks {len(missing)} blocks, the first {block_key(missing[0])}: never "
                "cast, or deleted; run certify again"
            )
            continue
        key = f"orders/{name}/certificates.parquet"
        try:
            written = pd.read_parquet(io.BytesIO(store.read(key)))
        except FileNotFoundError:
            findings.append(f"{store.uri}/{key} is missing: certify or analyze makes it from the votes")
            continue
        derived = certificates_of(votes, run, orders, plans, name)
        columns = [column for column in derived.columns if column != "post_hoc"]
        if not written[columns].equals(derived[columns].astype(dict(written.dtypes[columns]))):
            differing = (
                "its samples" if len(written) != len(derived)
                else next(column for column in columns if not written[column].equals(derived[column]))
            )  # fmt: skip
            findings.append(f"{store.uri}/{key} does not follow from the votes ({differing}): run certify again")


def _moments(run: Mapping[str, Any], stored: Sequence[StoredBlock], findings: list[str]) -> float:
    """The largest deviation, in standard errors, of mean, variance and kurtosis of the run's own noise.

    It catches accidents, not attackers: those are caught by casting votes again.
    """
    smoothing = run["spec"]["smoothing"]
    values, sigma, grid = 1000, float(smoothing["sigma"]), smoothing.get("noise_grid")
    draws = max(1, _MOMENT_VALUES // values)
    first = stored[0].block if stored else Block(0, "estimation", 0, 1)
    out = np.empty((draws, values), np.float32)
    noise.draw_noise(
        out, seed=smoothing["seed"], stage=first.stage, sample=first.sample, draws=range(draws), sigma=sigma, grid=grid
    )
    z = out.astype(np.float64).ravel() / (grid or 1)
    z /= math.sqrt(sigma**2 + (1 / (12 * grid**2) if grid else 0.0))  # rounding adds a uniform step's variance
    deviations = {
        "mean": z.mean() * math.sqrt(z.size),
        "variance": ((z**2).mean() - 1) * math.sqrt(z.size / 2),
        "fourth moment": ((z**4).mean() - 3) * math.sqrt(z.size / 96),
    }
    for name, deviation in deviations.items():
        if abs(deviation) > _MOMENT_LIMIT:
            findings.append(f"the noise's {name} is {deviation:+.1f} standard errors off: install another NumPy")
    return max(abs(deviation) for deviation in deviations.values())


def _redraw(
    spec: RunSpec, run: Mapping[str, Any], chosen: Sequence[StoredBlock], findings: list[str]
) -> dict[str, Any]:
    """Cast the chosen blocks again as their metadata say they were cast."""
    import torch

    from cluster.worker import device_of, facts_of
    from pipeline.data import open_dataset
    from pipeline.smoothing import build_base_classifier, cast_votes, weights_ids
    from pipeline.spec import votes_id

    spec = with_seed_of(run, spec)
    weights = weights_ids(spec)
    for name, sha256 in run["spec"]["weights"].items():
        if weights.get(name) != sha256:
            findings.append(f"{name} is {weights.get(name)} here, and the run's is {sha256}: get the run's own file")
    if weights == run["spec"]["weights"] and votes_id(spec, weights) != run["votes_id"]:
        raise UserError(f"--spec {spec.name}: is not the spec of this run (votes_id {run['votes_id']}); give that one")
    redrawn: dict[str, Any] = {"blocks": 0, "equal": 0, "elsewhere": 0, "agreement_elsewhere": None}
    if findings and weights != run["spec"]["weights"]:
        return redrawn
    data, device = open_dataset(spec.data), device_of(spec)
    f, here = build_base_classifier(spec, device), facts_of(device)
    agreements = []
    for one in chosen:
        sample, key = data[one.block.sample], block_key(one.block)
        if (sample.sha256, sample.label) != (one.metadata["sample_sha256"], one.label):
            findings.append(
                f"{key}: sample {one.block.sample} of the data set is another image or label than the run's"
            )
            continue
        torch.set_num_threads(one.metadata["threads"])
        (cast,) = cast_votes(
            f,
            [one.block],
            {one.block.sample: sample},
            sigma=spec.smoothing.sigma,
            seed=int(spec.smoothing.seed),
            batch_size=one.metadata["batch_size"],
            noise_grid=spec.smoothing.noise_grid,
        )
        claimed = np.zeros_like(cast.counts_K)
        claimed[one.classes] = one.votes
        agreement = float(np.minimum(claimed, cast.counts_K).sum() / one.block.draws)
        same = all(one.metadata[fact] == here[fact] for fact in ("device", "versions"))
        redrawn["blocks"] += 1
        redrawn["equal"] += agreement == 1
        if not same:
            agreements.append(agreement)
        if agreement < (1 if same else _LEAST_AGREEMENT):
            findings.append(
                f"{key} holds other votes than f casts: {100 * agreement:.2f} % agree; delete it, run certify again, "
                "and ask where it came from"
            )
    redrawn["elsewhere"] = len(agreements)
    redrawn["agreement_elsewhere"] = min(agreements, default=None)
    return redrawn


def report(facts: Mapping[str, Any]) -> str:
    """The audit in words, a line a finding."""
    redrawn = facts["redrawn"]
    lines = [
        f"{facts['run']}: {facts['blocks']:,} blocks read; the noise's moments are at most "
        f"{facts['noise_moments_largest_z']:.1f} standard errors off"
    ]
    if redrawn["blocks"]:
        lines.append(
            f"{redrawn['blocks']:,} blocks cast again, {redrawn['equal']:,} equal vote for vote; a share of "
            f"{facts['share']:g} of false blocks would have escaped with probability {facts['escape_probability']:.2g}"
        )
        if redrawn["elsewhere"]:
            lines.append(
                f"{redrawn['elsewhere']:,} of them were cast on another device or with other packages: at least "
                f"{100 * redrawn['agreement_elsewhere']:.3f} % of the votes agree"
            )
    else:
        lines.append("no block was cast again: that needs --spec SPEC, which tells where data and weights are")
    lines += [f"FOUND: {finding}" for finding in facts["findings"]] or ["nothing wrong was found"]
    return "\n".join(lines) + "\n"
