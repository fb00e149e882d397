"""Block: the votes of one sample and stage over a range of draws, the unit in which everything else counts."""

from typing import Literal, NamedTuple, get_args

Stage = Literal["selection", "estimation"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Block(NamedTuple):
    """The votes of one sample and stage for draws [draw_start, draw_stop): the unit that is computed and stored."""

    sample: int
    stage: Stage
    draw_start: int
    draw_stop: int

    @property
    def draws(self) -> int:
        return self.draw_stop - self.draw_start

    def __str__(self) -> str:
        return f"{self.stage} draws {self.draw_start} to {self.draw_stop - 1} of sample {self.sample}"
