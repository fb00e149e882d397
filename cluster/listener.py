"""Listeners: what follows the cast loop without taking part in it, such as a progress bar and metrics."""

from typing import NamedTuple

from diffsmooth.cluster.worker import CleanAccuracy, Receipt
from diffsmooth.pipeline.votes.blocks import Votes


class Update(NamedTuple):
    """What the driver reports while it casts."""

    draws: int  # of the committed blocks, also of those that other drivers cast
    in_flight: int  # those of `draws` whose task has not finished yet
    draws_wanted: int  # of all blocks handed out so far
    cast: int  # draws cast and stored by this call
    seconds: float  # since the first task started
    actors: int  # that are ready or busy
    actors_wanted: int
    new: list[Votes]  # of the tasks that finished since the last update
    clean: CleanAccuracy | None  # of the first actor that loaded the models, once it is measured


class Listener:
    """Is told what happens while votes are cast; each method may be overridden."""

    def updated(self, update: Update) -> None:
        """Called at every turn of the loop, about once per second."""

    def finished(self, receipt: Receipt) -> None:
        """A task is finished."""

    def lost(self, error: Exception) -> None:
        """An attempt at a task ended in an error."""
