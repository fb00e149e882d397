"""What certify, predict and analyze print about an order."""

import logging

from rich.console import Console

from diffsmooth.pipeline.errors import printable
from diffsmooth.pipeline.results.stored import OrderResult
from diffsmooth.pipeline.show.tables import render

logger = logging.getLogger(__name__)


def report_incomplete(result: OrderResult) -> None:
    """Report the samples of an order that lack draws, if there are any."""
    if missing := result.incomplete:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        logger.error("%d of %d samples are incomplete: %s", len(missing), len(result.certificates), shown)


def print_order(result: OrderResult, *, quiet: bool = False) -> None:
    """Print the table of an order and where its files are; with `quiet`, only report incomplete samples."""
    if not quiet:
        console = Console()
        curve = result.curve
        if result.predicts:
            accuracy, abstained = 100 * curve.at([0.0])[0], 100 * curve.abstention_rate
            console.out(f"predictions: {accuracy:.1f} % correct, {abstained:.1f} % abstained", highlight=False)
        else:
            console.out(printable(render([curve])), end="", highlight=False)
        skipped = f", {curve.skipped} of them skipped" if curve.skipped else ""
        post_hoc = "; POST HOC: an earlier order covers these samples" if curve.post_hoc else ""
        files = "certificates.parquet" + ("" if result.predicts else ", curve.csv, curve.png")
        text = (
            f"order {result.name}: {result.order}, {curve.num_samples} samples{skipped}{post_hoc}\n"
            f"{result.run_uri}/orders/{result.name}: {files}"
        )
        console.out(printable(text) + (f"\nsealed: root {result.root}" if result.root else ""), highlight=False)
    report_incomplete(result)
