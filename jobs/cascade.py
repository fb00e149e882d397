"""What `diffsmooth analyze --certificate cascade` prints."""

import logging

from rich.console import Console

from diffsmooth.pipeline.results.cascades import CASCADE_KEY, Cascade
from diffsmooth.pipeline.show.tables import render

logger = logging.getLogger(__name__)


def print_cascade(found: Cascade, home: str) -> None:
    """Print the table of a cascade and where its files are, and report incomplete samples."""
    record, curve = found.record, found.curve
    draws = "; ".join(f"sigma {one.sigma:g}: n0 = {one.n0}, n = {one.n}" for one in record.scales)
    Console().out(
        f"{render([curve])}cascade of {len(record.scales)} runs, alpha = {record.alpha:g} in all ({draws}), "
        f"{curve.num_samples} samples; POST HOC: each run has a claim of its own on these votes\n"
        f"{home}: {CASCADE_KEY}, certificates.parquet, curve.csv, curve.png",
        highlight=False,
    )
    if curve.incomplete:
        missing = found.certificates.query("status == 'incomplete'")["sample"].tolist()
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        logger.error("%d of %d samples are incomplete: %s", len(missing), len(found.certificates), shown)
