"""Places: how the arguments RUN, LOG and FILE of a command are opened, and the images of a run."""

import errno
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from diffsmooth.pipeline.certify.curve import Curve, curve_of
from diffsmooth.pipeline.certify.units import Images
from diffsmooth.pipeline.data.sets import DATASETS
from diffsmooth.pipeline.errors import UserError, printable
from diffsmooth.pipeline.locations import is_remote
from diffsmooth.pipeline.results.stored import OrderResult, read_result
from diffsmooth.pipeline.show.logs import read_log
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.votes.run import Run


class Source(NamedTuple):
    """A run or a log that the command line names."""

    label: str
    place: str
    sigma: float | None  # given with a log


@contextmanager
def writing(option: str, path: str) -> Iterator[str]:
    """Give the path of a temporary file that becomes the file of an option when the context ends without an error.

    A failure, such as a full disk, therefore leaves no truncated file. A device is written directly.

    Raises: UserError for a file that cannot be written.
    """
    special = os.path.exists(path) and not os.path.isfile(path)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    # the ending decides the format of a picture
    temporary = path if special else os.path.join(folder, f".{os.urandom(6).hex()}-{name}"[-200:])
    try:
        if not special and os.path.exists(target) and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield temporary
        if not special:
            os.replace(temporary, target)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {path}: cannot write it: {reason}") from error
    finally:
        if not special:
            with suppress(OSError, ValueError):
                os.unlink(temporary)


def parse_source(text: str) -> Source:
    """Parse [NAME=]PLACE[@SIGMA]. If the whole text is the path of a file or folder, it is PLACE."""
    label, equals, place = text.partition("=")
    if os.path.exists(text) or not equals or "/" in label:
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
        raise UserError(f"{text}: a run has its own sigma, so @{value} is not allowed")
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
        raise UserError(f"{source.place}: the log has no samples")
    return curve


def with_distinct_names(
    sources: Sequence[Source], curves: Sequence[Curve], *, taken: Sequence[str] = ()
) -> list[Curve]:
    """The curves under their labels, or under as much of their paths as distinguishes them.

    Raises: UserError if nothing does.
    """
    paths = [
        tuple(map(printable, _name_parts(source, curve.name))) for source, curve in zip(sources, curves, strict=True)
    ]
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
            raise UserError(f"two curves have the name {name!r}; rename one with NAME=PATH")
        kept = [count + (index in alike) for index, count in enumerate(kept)]


def parse_images(pixels: str | None, std: str | None) -> Images:
    """The images of --pixels C,H,W and --std S,S,S. Raises: UserError."""
    shape, deviations = _numbers("--pixels", pixels, "3,32,32"), _numbers("--std", std, "0.25,0.24,0.26")
    if shape is not None and not (len(shape) == 3 and all(value == int(value) for value in shape)):
        raise UserError(f"--pixels {pixels} must be three whole numbers C,H,W, for example 3,32,32")
    return Images(shape_CHW=None if shape is None else tuple(map(int, shape)), std=deviations)


def _numbers(option: str, text: str | None, example: str) -> list[float] | None:
    """Numbers above 0, separated by commas."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise UserError(f"{option} {text} must be numbers above 0, separated by commas, for example {example}")
    return values


def images_of(run: Run | None, given: Images) -> Images:
    """The given images, with the shape of a run's data set if every copy of that data set has it.

    run.json does not store the shape. Only CIFAR-10 and cropped ImageNet have one that follows from it.
    Raises: UserError if --pixels contradicts that shape.
    """
    data = None if run is None else run.spec.data
    entry = None if data is None else DATASETS.get(data.name)
    if data is None or entry is None or not entry.one_shape:
        return given
    facts = entry.facts(Data(**data.model_dump()))
    if facts is None:
        return given
    if given.shape_CHW not in (None, facts.shape_CHW):
        shown = ",".join(map(str, facts.shape_CHW))
        raise UserError(f"--pixels: the images of {data.name} are {shown} in this run; use that, or omit it")
    return replace(given, shape_CHW=facts.shape_CHW)
