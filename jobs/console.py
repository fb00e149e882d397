"""What commands print about orders and runs."""

import logging
import time

from rich.console import Console

from diffsmooth.pipeline.certify.kinds import KINDS
from diffsmooth.pipeline.errors import printable
from diffsmooth.pipeline.results.stored import OrderResult, OrderStatus, RunStatus
from diffsmooth.pipeline.show.tables import render

logger = logging.getLogger(__name__)


def note(text: str) -> None:
    """Print a line for the user on stderr, without markup."""
    Console(stderr=True).print(printable(text), highlight=False, markup=False, soft_wrap=True)


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


def print_status(status: RunStatus) -> None:
    """Print what is committed and what is missing."""
    last = "never" if status.last_write is None else _time(status.last_write)
    devices = ", ".join(f"{name} ({count} blocks)" for name, count in status.devices.items()) or "none yet"
    lines = [
        f"{status.name}  votes_id {status.votes_id}",
        f"blocks {status.blocks:,}  draws {status.draws:,}  bytes {status.bytes:,}  last write {last}",
        f"devices: {devices}",
    ]
    driver = status.driver
    if driver is not None and not all(order.summary.complete for order in status.orders.values()):
        eta = "" if driver.eta_seconds is None else f", ETA {driver.eta_seconds:,.0f} s"
        age = max(0.0, time.time() - driver.updated)
        lines.append(
            f"driver's last status, {age:,.0f} s ago: {driver.draws_cast:,} of {driver.draws_wanted:,} draws, "
            f"{driver.draws_per_second:,.0f}/s{eta}; {driver.note}"
        )
    for name, order in status.orders.items():
        lines += _order_lines(name, order)
    Console().out(printable("\n".join(lines)), highlight=False)


def _order_lines(name: str, status: OrderStatus) -> list[str]:
    order = status.summary
    adaptive = order.mode != "fixed"
    missing = f"{status.draws_missing:,}{' or more' if adaptive else ''} draws missing; run certify again"
    lines = [
        f"order {name}: {order.certificate}, {f'{order.mode}, ' if adaptive else ''}n0 = {order.n0}, n = {order.n}, "
        f"alpha = {order.alpha:g}{', post hoc' if order.post_hoc else ''}: {order.samples} of "
        f"{order.samples + order.incomplete} samples, {status.draws_done:,} draws done, "
        f"{'complete' if order.complete else missing}"
    ]
    if order.samples and not KINDS[order.certificate].has_radius:
        abstained = 100 * (order.abstention_rate or 0.0)
        lines.append(f"  predictions so far  {100 * order.accuracy:.1f}% correct, {abstained:.1f}% abstained")
    elif order.samples:
        accuracy = "  ".join(f"r={radius}: {100 * value:.1f}%" for radius, value in order.certified_accuracy.items())
        acr = "" if order.acr is None else f"  ACR {order.acr:.3f}"
        lines.append(f"  certified accuracy so far  {accuracy}{acr}")
    return lines


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
