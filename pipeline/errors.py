"""The three ways in which a command ends early. The command line prints one line for each and exits with its status.

No message shows the user, the password or the query of a URI, which may be a signature or a token.
"""

import re

_URI = re.compile(
    r"""(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)      # anywhere in a text
        (?:[^\s/?\#'"]*@)?                            # user and password
        (?P<place>[^\s?'"]*)
        (?P<query>\?(?!\.\.\.)[^\s'"]+?(?=[:;,.)\]]*(?:[\s'"]|$)))?  # without the punctuation that follows the URI
    """,
    re.VERBOSE,
)


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def redacted(text: str) -> str:
    """A text in which no URI has a user, a password or a query."""
    return _URI.sub(lambda uri: uri["scheme"] + uri["place"] + ("?..." if uri["query"] else ""), text)


def printable(text: str) -> str:
    """A text in which escape sequences and other unprintable characters are escaped; lines stay lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """The user made a mistake. The message names the value and the limit, and a remedy if it helps. Exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message), limit=None))


class RunError(RuntimeError):
    """The environment failed, for example because a disk is full or a file is damaged. Exit status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message), limit=None))


class Stopped(Exception):
    """A signal stopped the work. Stored votes are kept, and the same command resumes. Exit status 128 + signal."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def one_line(text: object, limit: int | None = 300) -> str:
    """Foreign text as part of a message: on one line, with unprintable characters escaped, cut after `limit`."""
    joined = re.sub(r"\s*[\r\n]\s*", " ", str(text).strip())
    kept = joined if limit is None else joined[: limit + 1]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    return escaped if limit is None or len(escaped) <= limit else f"{escaped[:limit]}..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, escaped and cut like `one_line`; its type if the message is empty."""
    return one_line(next(iter(str(error).strip().splitlines()), type(error).__name__))


def without_colours(text: object) -> str:
    """A text of Ray, which puts the colours of a terminal into its messages."""
    return _COLOUR.sub("", str(text))


def missing_import(error: BaseException) -> str | None:
    """What another process could not import, according to the traceback in the message of its error."""
    found = re.search(r"(?:ModuleNotFoundError|ImportError): (.+)", without_colours(error))
    return None if found is None else one_line(found[1])
