"""Allocation: what the machine, SLURM and `ray symmetric-run` say about where a driver runs, and the option --part."""

import os
import re
import secrets
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from diffsmooth.cluster.scheduler import Part
from diffsmooth.pipeline.errors import UserError

_NAMES = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")


def part_of(option: str | None, environment: Mapping[str, str]) -> Part:
    """The part that --part I/K names; else that of a task of a SLURM array; else a random place.

    SLURM numbers the tasks of an array from any minimum, in steps of any size. Raises: UserError.
    """
    if option is not None:
        match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", option)
        if match is None or int(match[1]) > int(match[2]):
            raise UserError(
                f"--part {option}: must be I/K with I from 1 to K; write 2/4 for the second of four drivers"
            )
        return Part((int(match[1]) - 1) / int(match[2]), int(match[2]))
    task, first, last, count = (int(text) if (text := environment.get(name, "")).isdecimal() else -1 for name in _NAMES)
    if 0 <= first <= task <= last and count > 0:
        return Part((task - first) / (last - first + 1), count)
    return Part(secrets.SystemRandom().random())


def address_of_symmetric_run() -> str | None:
    """HOST:PORT of the `ray symmetric-run` that started this process, if one did: it sets no RAY_ADDRESS."""
    pid = os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
            status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:  # not Linux, where no Ray spans several nodes, or not our process
            return None
        if "symmetric-run" in command:
            options = command[command.index("symmetric-run") + 1 :]
            joined = [option.partition("=")[2] for option in options if option.startswith("--address=")]
            return next(iter(joined + [value for option, value in pairwise(options) if option == "--address"]), None)
        pid = int(status.rpartition(")")[2].split()[1])
    return None
