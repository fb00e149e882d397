"""Places: how the arguments RUN, LOG and FILE of a command are opened."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipeline.curve import Curve, curve_of
from pipeline.errors import UserError
from pipeline.locations import is_remote
from pipeline.logs import read_log
from pipeline.results import OrderResult, read_result


class Source(NamedTuple):
    """A run or a log that the command line names."""

    label: str
    place: str
    sigma: float | None  # given with a log


@contextmanager
def writing(option: str, path: str) -> Iterator[None]:
    """Report a failure to write the file of an option as the user's mistake."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {path}: cannot write it: {reason}; choose another path") from error


def parse_source(text: str) -> Source:
    """Parse [NAME=]PLACE[@SIGMA]; a file or folder that has the whole text as its name is taken as such."""
    label, equals, place = text.partition("=")
    if _exists(text) or not equals or "/" in label:
        label, place = "", text
    elif not label:
        raise UserError(f"{text}: there is no name before the '='; write NAME={place}")
    sigma = None
    log, _, value = place.rpartition("@")
    if _exists(log) and not _exists(place):
        place, sigma = log, _sigma(text, value)
    if not _exists(place):
        raise UserError(f"{place}: no such file or folder; give a run's folder, s3://BUCKET/PREFIX or a log")
    if sigma is not None and not is_log(place):
        raise UserError(f"{text}: a run has its own sigma; remove @{value}")
    return Source(label, place, sigma)


def _sigma(text: str, value: str) -> float:
    try:
        sigma = float(value)
    except ValueError:
        sigma = 0.0
    if not 0 < sigma < math.inf:
        raise UserError(f"{text}: sigma = {value!r} must be a number above 0")
    return sigma


def _exists(place: str) -> bool:
    return is_remote(place) or os.path.exists(place)


def is_log(place: str) -> bool:
    return not is_remote(place) and not os.path.isdir(place)


def read_source(source: Source, order_name: str | None) -> OrderResult | Curve:
    """A run's order, or the curve of a log. Raises: UserError, also for a log without samples."""
    if not is_log(source.place):
        return read_result(source.place, order_name).result
    certificates = read_log(source.place)
    # a number is part of a name (sigma_0.50), not a file extension
    name = re.sub(r"\.[A-Za-z]\w*$", "", Path(source.place).name)
    curve = curve_of(name, certificates, source.sigma, certificates["radius"].max())
    if not curve.num_samples:
        raise UserError(f"{source.place}: the log has no samples; remove it from the command")
    return curve


def with_distinct_names(
    sources: Sequence[Source], curves: Sequence[Curve], *, taken: Sequence[str] = ()
) -> list[Curve]:
    """The curves under their labels, or under as much of their paths as distinguishes them.

    Raises: UserError if nothing does.
    """
    paths = [_name_parts(source, curve.name) for source, curve in zip(sources, curves, strict=True)]
    names = _distinct([*paths, *((name,) for name in taken)])
    return [replace(curve, name=name) for curve, name in zip(curves, names, strict=False)]


def _name_parts(source: Source, name: str) -> tuple[str, ...]:
    """The folders above a curve and its name; its label alone, if it has one."""
    if source.label:
        return (source.label,)
    above = source.place.rstrip("/") if is_remote(source.place) else os.path.abspath(source.place)
    parts = [part for part in above.split("/") if part]
    if is_log(source.place) or parts[-1:] == [name]:
        parts.pop()
    return (*parts, name)


def _distinct(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part of each path, with as many of the parts before it as distinguish it from the others."""
    kept = [1] * len(paths)
    while True:
        names = ["/".join(path[-count:]) for path, count in zip(paths, kept, strict=True)]
        alike = [index for index, name in enumerate(names) if names.count(name) > 1]
        if not alike:
            return names
        if all(kept[index] >= len(paths[index]) for index in alike):
            name = paths[alike[0]][-1]
            raise UserError(f"two curves have the name {name!r}; rename one with NAME=PATH, or remove it")
        kept = [count + (index in alike) for index, count in enumerate(kept)]
