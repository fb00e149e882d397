"""What torch.compile makes of f, kept so that a fleet compiles it once: torch's cache artefacts, as bytes.

The artefacts are executable code. They are therefore never read from a run or from a store, where others may write, but
only from the private cache folder (DIFFSMOOTH_CACHE) of the driver's machine, and travel to the actors through Ray. An
actor loads those of its own run, torch version and device; torch itself compares the rest, and compiles what differs.
"""

import logging
import os
import re
from collections.abc import Mapping

import torch

from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.storage.fetch import private_folder
from diffsmooth.pipeline.storage.folder import read_regular

logger = logging.getLogger(__name__)

_MOST_BYTES = 1_000_000_000


def key_of(votes_id: str, device: str) -> str:
    """The key of artefacts: run, torch version and device, as a part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", f"{votes_id}-{torch.__version__}-{device}")


def save() -> bytes | None:
    """The artefacts of all that this process has compiled; None if there are none, or torch is older than 2.7."""
    saved = getattr(torch.compiler, "save_cache_artifacts", lambda: None)()
    return None if saved is None else bytes(saved[0])


def load(known: Mapping[str, bytes], key: str) -> None:
    """Load the artefacts of a key, if they are known. Damaged ones are reported; f is then compiled as without them."""
    if not known.get(key) or not hasattr(torch.compiler, "load_cache_artifacts"):
        return
    try:
        torch.compiler.load_cache_artifacts(known[key])
    except Exception as error:  # torch does not document what it raises
        logger.warning("the compiled artefacts %s cannot be loaded (%s); f is compiled again", key, first_line(error))


def read_known(votes_id: str) -> dict[str, bytes]:
    """The artefacts of a run that are in this machine's cache folder, for this version of torch, by their keys."""
    try:
        names = {path.name.removeprefix("compiled-"): path for path in private_folder().glob(f"compiled-{votes_id}-*")}
        return {
            key: read_regular(path, _MOST_BYTES) for key, path in names.items() if key.startswith(key_of(votes_id, ""))
        }
    except (UserError, RunError) as error:
        logger.warning("compiled artefacts are not read: %s", error)
        return {}


def store(key: str, data: bytes) -> None:
    """Keep artefacts in this machine's cache folder. A folder that cannot be used is reported."""
    try:
        path = private_folder() / f"compiled-{key}"
        temporary = path.with_name(f".{os.urandom(8).hex()}")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except (UserError, RunError, OSError) as error:
        logger.warning("compiled artefacts are not kept: %s", first_line(error))
