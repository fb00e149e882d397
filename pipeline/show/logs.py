"""Logs in Cohen's layout, read and written: the files of certify.py and predict.py of arXiv 1902.02918.

Tab-separated `idx label predict radius correct time`, one line per sample; predict is -1 for an abstention; logs of
PREDICT have no radius. Later papers keep the names but not the meaning of `correct` and `time`, so both are ignored.
"""

import logging
import math
import os
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from diffsmooth.pipeline.certify.certificates import ABSTAINED, NO_PREDICTION
from diffsmooth.pipeline.certify.kinds import KINDS
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.records import LARGEST

logger = logging.getLogger(__name__)

CERTIFY = ("idx", "label", "predict", "radius", "correct", "time")
PREDICT = ("idx", "label", "predict", "correct", "time")
POST_HOC = "post_hoc"  # a further column of ours, 1 for a second look; other readers ignore it

_RADIUS_STEP = Decimal("0.000001")  # radii are written to 6 decimals
_LARGEST_RADIUS = 1e6  # in [0, 1] pixel units; larger than any image
_MOST_BYTES = 1_000_000_000


class _Row(NamedTuple):
    sample: int
    label: int
    prediction: int
    radius: float
    post_hoc: bool


def read_log(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The certificates of a log: sample, label, status, prediction, radius, correct, post_hoc.

    `correct` is label == predict, whatever the log says (some logs hold a running total). Samples that were not sampled
    (predict -2) are incomplete, and a truncated last line is skipped, both with a warning. Predictions of PREDICT get
    radius 0: they say what g returns, but nothing about nearby images.

    Raises: UserError, naming the line, what was found, and what is expected.
    """
    lines = _lines(path)
    columns = _columns(path, lines)
    rows: dict[int, _Row] = {}
    line_of: dict[int, int] = {}
    for number, line in lines[1:]:
        fields = line.split("\t")
        if len(fields) < len(columns) and number == lines[-1][0]:
            logger.warning("%s, line %d: the last line is truncated (%s) and skipped", path, number, _shown(line))
            break
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(fields)} fields in {_shown(line)}; a line must have {len(columns)}, "
                f"separated by tabs: {' '.join(columns)}"
            )
        row = _parsed(f"{path}, line {number}", dict(zip(columns, fields, strict=True)))
        if row.sample in rows:
            raise UserError(
                f"{path}: lines {line_of[row.sample]} and {number} both have idx {row.sample}; remove one of them"
            )
        rows[row.sample], line_of[row.sample] = row, number
    if "radius" not in columns:
        logger.warning("%s: a log of PREDICT has no radii; it counts at radius 0 only, and its ACR is 0", path)
    table = pd.DataFrame(list(rows.values()), columns=list(_Row._fields))
    unsampled = table["prediction"] == NO_PREDICTION
    if unsampled.any():
        logger.warning(
            "%s: %d of %d samples were not sampled (predict -2) and are excluded", path, unsampled.sum(), len(table)
        )
    certified = table["prediction"] >= 0
    return table.assign(
        status=certified.map({True: "certified", False: "abstained"}).mask(unsampled, "incomplete"),
        radius=table["radius"].where(certified, 0.0),
        correct=certified & (table["prediction"] == table["label"]),
    )


def write_log(certificates: pd.DataFrame) -> str:
    """Certificates in Cohen's layout with radii rounded down, or predictions in the layout of PREDICT.

    Incomplete samples are excluded with a warning. The layout has no status for a skipped sample, so it is written as
    an abstention. A further column marks second looks, if there are any.
    """
    complete = certificates[certificates["status"] != "incomplete"]
    if len(complete) < len(certificates):
        left_out = certificates.loc[certificates["status"] == "incomplete", "sample"].tolist()
        logger.warning(
            "%d of %d samples are incomplete and excluded from the log: %s",
            len(left_out), len(certificates), ", ".join(map(str, left_out[:10])) + (", ..." if left_out[10:] else ""),
        )  # fmt: skip
    columns = (complete[name].tolist() for name in ("sample", "label", "prediction", "radius", "correct", POST_HOC))
    predictions = not all(KINDS[name].has_radius for name in set(certificates.get("certificate", ())))
    marked = bool(certificates[POST_HOC].any())
    lines = ["\t".join((*(PREDICT if predictions else CERTIFY), *([POST_HOC] if marked else [])))]
    for sample, label, prediction, radius, correct, mark in zip(*columns, strict=True):
        floor = "" if predictions else f"{Decimal(radius).quantize(_RADIUS_STEP, rounding=ROUND_FLOOR)}\t"
        line = f"{sample}\t{label}\t{max(prediction, ABSTAINED)}\t{floor}{correct:d}\t0:00:00"
        lines.append(f"{line}\t{mark:d}" if marked else line)
    return "\n".join(lines) + "\n"


def _lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The lines that are not blank, with their line numbers."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > _MOST_BYTES:
            raise UserError(f"{path}: not a regular file of at most {_MOST_BYTES / 1e9:g} GB; give the path of a log")
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the log: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a log: it is not UTF-8 text; to read a run, give its folder") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _columns(path: str | os.PathLike[str], lines: list[tuple[int, str]]) -> list[str]:
    """The columns of the header: one of the two layouts; further columns are ignored."""
    number, header = lines[0] if lines else (1, "")
    columns = [name.strip() for name in header.split("\t")]
    if not any(tuple(columns[: len(layout)]) == layout for layout in (CERTIFY, PREDICT)):
        raise UserError(
            f"{path}, line {number}: {_shown(header)} is not the header of a log; it must be, separated by tabs, "
            f"{' '.join(CERTIFY)} (without radius for PREDICT)"
        )
    return columns


def _parsed(where: str, fields: dict[str, str]) -> _Row:
    sample, label, prediction = (_whole(where, name, fields[name]) for name in ("idx", "label", "predict"))
    if prediction < NO_PREDICTION:
        raise UserError(f"{where}: predict = {prediction} must be a class, -1 (abstained), or -2 (not sampled)")
    post_hoc = fields.get(POST_HOC, "0").strip() != "0"
    if prediction == NO_PREDICTION or "radius" not in fields:
        return _Row(sample, label, prediction, 0.0, post_hoc)
    try:
        radius = float(fields["radius"])
    except ValueError:
        radius = math.nan
    if not 0 <= radius <= _LARGEST_RADIUS:  # also refuses nan
        raise UserError(
            f"{where}: radius = {_shown(fields['radius'])} must be a number between 0 and {_LARGEST_RADIUS:g}"
        )
    return _Row(sample, label, prediction, radius, post_hoc)


def _whole(where: str, name: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = LARGEST + 1
    if abs(value) > LARGEST:
        raise UserError(f"{where}: {name} = {_shown(text)} must be a whole number up to {LARGEST}")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
