"""The verb `report`: one HTML file of several runs, with pictures where a spec tells of their data and weights."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.certify import StoredOrder, read_order, with_seed_of, writing
from jobs.curve import is_log, parse_source, with_distinct_names
from pipeline.errors import RunError, UserError
from pipeline.report import Exhibit, RunReport, render_report
from pipeline.spec import RunSpec, votes_id
from pipeline.votes import StoredBlock, run_sha256


def report(
    sources: Sequence[str],
    *,
    order_name: str | None = None,
    specs: Sequence[RunSpec] = (),
    shipped: Callable[[str], RunSpec | None] = lambda name: None,
    each: int = 3,
    output: str,
) -> bool:
    """Write the report of [NAME=]RUN ...; returns whether all of their samples are complete.

    `specs` tell of the runs' data and weights; for a run that none of them made, the `shipped` one of its name is
    tried. `each` samples of a kind are shown, none where it is 0.

    Raises: UserError; also for a spec that made none of the runs, and for data and weights of `specs` that do not load.
    """
    parsed = [parse_source(text) for text in sources]
    for source in parsed:
        if is_log(source.place):
            raise UserError(f"{source.place}: a log holds radii alone, and a report wants a run: give the log to curve")
    read = [read_order(source.place, order_name) for source in parsed]
    curves = with_distinct_names(parsed, [one.curve for one in read])
    galleries = _galleries(read, specs, shipped, each) if each else [([], "--samples 0 asks for none")] * len(read)
    runs = [
        RunReport(
            curve=curve,
            certificates=stored.certificates,
            order=stored.order,
            noise_grid=stored.run["spec"]["smoothing"].get("noise_grid"),
            facts=_facts(stored),
            spec=json.dumps(stored.run["spec"], indent=2, sort_keys=True),
            exhibits=exhibits,
            no_exhibits=reason,
        )
        for stored, curve, (exhibits, reason) in zip(read, curves, galleries, strict=True)
    ]
    with writing("--output", output):
        Path(output).write_text(render_report(runs), encoding="utf-8")
    return all(not one.curve.incomplete for one in read)


def _galleries(
    read: Sequence[StoredOrder],
    specs: Sequence[RunSpec],
    shipped: Callable[[str], RunSpec | None],
    each: int,
) -> list[tuple[list[Exhibit], str]]:
    """Each run's gallery, or none and why."""
    galleries: list[tuple[list[Exhibit], str]] = []
    used: set[int] = set()
    for stored in read:
        made = [index for index, spec in enumerate(specs) if _made(spec, stored)]
        used.update(made)
        spec = specs[made[0]] if made else shipped(stored.run["name"])
        try:
            if spec is not None and (made or _made(spec, stored)):
                galleries.append((_gallery(spec, stored, each), "no sample is of a kind that is shown"))
                continue
            reason = "name the run's spec with --spec SPEC, which tells where data and weights are"
        except (UserError, RunError) as error:
            if made:
                raise
            reason = f"the data or weights of the shipped spec do not load here ({error}); name another with --spec"
        galleries.append(([], reason))
    for index, spec in enumerate(specs):
        if index not in used:
            raise UserError(f"--spec {spec.name}: made none of these runs; give the one that did, or leave it out")
    return galleries


def _made(spec: RunSpec, stored: StoredOrder) -> bool:
    from pipeline.smoothing import weights_ids

    return votes_id(with_seed_of(stored.run, spec), weights_ids(spec)) == stored.run["votes_id"]


def _gallery(spec: RunSpec, stored: StoredOrder, each: int) -> list[Exhibit]:
    import torch

    from jobs.gallery import gallery

    device = torch.device("cuda" if torch.cuda.is_available() and spec.compute.device != "cpu" else "cpu")
    return gallery(with_seed_of(stored.run, spec), device, stored.certificates, stored.votes, each)


def _facts(stored: StoredOrder) -> dict[str, str]:
    """What a reader needs in order to check the claim, or to make it again."""
    result, blocks = stored.result(), stored.stored
    smoothing = stored.run["spec"]["smoothing"]
    used, all_of_n = result["draws_used"], result["draws_at_n"]
    return {
        "run": stored.store.uri,
        "order": f"{stored.name}: {stored.order.certificate}, {stored.order.mode}, n0 = {stored.order.n0:,}, "
        f"n = {stored.order.n:,}, alpha = {stored.order.total_alpha:g}",
        "votes_id": stored.run["votes_id"],
        "sha256 of run.json": run_sha256(stored.store),
        "sigma, m, local_sigma": ", ".join(f"{smoothing[key]:g}" for key in ("sigma", "m", "local_sigma")),
        "seed of the noise, of the local copies": f"{smoothing['seed']}, {smoothing['local_seed']}",
        "precision": smoothing["precision"],
        "weights": ", ".join(f"{name} {sha256}" for name, sha256 in stored.run["spec"]["weights"].items()) or "none",
        "samples": f"{len(stored.certificates):,} in the order, {stored.curve.incomplete:,} of them incomplete",
        "draws behind these certificates": f"{used:,}; n0 + n of each sample would be {all_of_n:,}"
        + (f", {1 - used / all_of_n:.0%} saved" if used < all_of_n else ""),
        "blocks stored": f"{len(blocks):,}",
        "device hours": _hours(blocks),
        "versions": _versions(blocks),
    }


def _hours(blocks: Sequence[StoredBlock]) -> str:
    seconds: Counter[str] = Counter()
    for one in blocks:
        seconds[one.metadata["device"]] += one.metadata["seconds"]
    return ", ".join(f"{device}: {total / 3600:.3g}" for device, total in sorted(seconds.items()))


def _versions(blocks: Sequence[StoredBlock]) -> str:
    """Each package with every version that cast a block."""
    found: dict[str, set[str]] = {}
    for one in blocks:
        for package, version in one.metadata["versions"].items():
            found.setdefault(package, set()).add(version)
    return ", ".join(f"{package} {' and '.join(sorted(versions))}" for package, versions in sorted(found.items()))
