"""How commands print: notes on stderr, and a result as text or as JSON with the exit status that it gives."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import click
from rich.console import Console

from diffsmooth.pipeline.errors import printable


class Result(Protocol):
    """What a command came to; its `str` is what the command prints, unless it prints a table."""

    def to_json(self) -> Any: ...


R = TypeVar("R", bound=Result | Sequence[Result])


def note(text: str) -> None:
    """Print a line for the user on stderr, without markup."""
    Console(stderr=True).print(printable(text), highlight=False, markup=False, soft_wrap=True)


def print_text(result: object) -> None:
    """Print a result as its own text."""
    click.echo(printable(str(result)), nl=False)


def json_of(result: Result | Sequence[Result]) -> str:
    """A result, or a list of results, as indented JSON."""
    found = [one.to_json() for one in result] if isinstance(result, Sequence) else result.to_json()
    return json.dumps(found, indent=2)


def print_json(result: Result | Sequence[Result]) -> None:
    click.echo(json_of(result))


def conclude(
    result: R, *, as_json: bool, show: Callable[[R], None] | None = print_text, complete: bool = True, status: int = 0
) -> NoReturn:
    """End a command: print its result as JSON alone or with `show`; exit with `status`, or with 1 if it is incomplete.

    `show` is None if the text was printed while the command ran.
    """
    if as_json:
        print_json(result)
    elif show is not None:
        show(result)
    sys.exit(status if complete else 1)
