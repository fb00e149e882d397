"""`diffsmooth status`: what is committed and what is missing, from the files of a run alone."""

import time

import click
from rich.console import Console

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.options import JSON, RUN_ARGUMENT
from diffsmooth.pipeline.certify.kinds import KINDS
from diffsmooth.pipeline.errors import printable
from diffsmooth.pipeline.results.stored import OrderStatus, RunStatus, StoredRun


@click.command("status")
@RUN_ARGUMENT
@JSON
def status_command(run: str, as_json: bool) -> None:
    """Show what is committed and what is missing in RUN, from its files alone.

    \b
    diffsmooth status s3://BUCKET/runs/a
    """
    conclude(StoredRun.open(run).status(), as_json=as_json, show=print_status)


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
