"""Records: everything that is read back (specs, run.json, orders, plans, block metadata) goes through these models.

A damaged or hostile file then fails in one place, with one line that names the key and the value.
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffsmooth.pipeline.errors import RunError, UserError, first_line

MOST_BYTES = 100_000_000  # of a record's file
LARGEST = 2**31 - 1  # of samples, labels, classes, and draws: their columns are int32


class Record(BaseModel):
    """A frozen model that refuses unknown keys, wrong types, infinities, and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120


def shortened(value: Any) -> str:
    """The repr of a value that came from outside, cut to a length that fits in a message."""
    try:
        return _short.repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return f"a number of type {type(value).__name__} with too many digits"


def parse_record(model: type[Model], data: bytes) -> Model:
    """Parse JSON into a record. Raises: ValueError with one line that names the first problem."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextmanager
def intact(place: str, remedy: str = "") -> Iterator[None]:
    """Report in one line that a stored file is damaged if reading its content raises anything.

    What already says what is wrong with the file, or that there is none, is raised as it is.
    """
    try:
        yield
    except (FileNotFoundError, RunError, UserError):
        raise
    except Exception as error:  # pyarrow and pandas do not document what they raise for damaged files
        reason = first_problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise RunError(f"{place} is damaged: {reason}{f'; {remedy}' if remedy else ''}") from error


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings as one line: key, value, and what is wrong."""
    finding = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in finding["loc"])
    message = finding["msg"].removeprefix("Value error, ").splitlines()[0]
    if finding["type"] == "missing":
        return f"{name} is missing"
    if finding["type"] == "value_error" or not name:
        return f"{name}: {message}" if name else message
    return f"{shortened(name)[1:-1]} = {shortened(finding['input'])}: {message[0].lower()}{message[1:]}"
