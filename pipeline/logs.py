"""Published logs: Cohen's layout, in and out (the files that certify.py and predict.py of arXiv 1902.02918 write).

Tab-separated `idx label predict radius correct time`, a line a sample; predict is -1 where it abstained; PREDICT's logs
lack the radius. Later papers keep the names and not the meaning of `correct` and `time`, so neither is believed.
"""

import logging
import math
import os
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pipeline.certify import ABSTAINED, NO_PREDICTION
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

CERTIFY = ("idx", "label", "predict", "radius", "correct", "time")
PREDICT = ("idx", "label", "predict", "correct", "time")

_RADIUS_STEP = Decimal("0.000001")  # radii are written to 6 decimals


class _Row(NamedTuple):
    sample: int
    label: int
    prediction: int
    radius: float


def read_log(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A log's certificates: sample, label, status, prediction, radius, correct, post_hoc.

    `correct` is label == predict, whatever the log says (some hold a running total). Samples that were not sampled
    (predict -2) are incomplete; a last line that was cut is left out; both are warned of. PREDICT's answers have radius
    0: they say what g returns, and nothing about its surroundings.

    Raises: UserError, naming the line, what was found and what is expected.
    """
    lines = _lines(path)
    columns = _columns(path, lines)
    rows: dict[int, _Row] = {}
    line_of: dict[int, int] = {}
    for number, line in lines[1:]:
        fields = line.split("\t")
        if len(fields) < len(columns) and number == lines[-1][0]:
            logger.warning("%s, line %d: the last line is cut short (%r) and left out", path, number, line)
            break
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(fields)} fields, {_shown(line)}; there must be {len(columns)}, separated "
                f"by tabs: {' '.join(columns)}"
            )
        row = _parsed(f"{path}, line {number}", dict(zip(columns, fields, strict=True)))
        if row.sample in rows:
            raise UserError(
                f"{path}: lines {line_of[row.sample]} and {number} both hold idx {row.sample}; a sample counts once: "
                "remove one of them"
            )
        rows[row.sample], line_of[row.sample] = row, number
    if "radius" not in columns:
        logger.warning("%s: a log of PREDICT, without radii: it counts at radius 0 alone, and its ACR is 0", path)
    table = pd.DataFrame(list(rows.values()), columns=list(_Row._fields))
    unsampled = table["prediction"] == NO_PREDICTION
    if unsampled.any():
        logger.warning(
            "%s: %d of %d samples were not sampled (predict -2) and are left out", path, unsampled.sum(), len(table)
        )
    certified = table["prediction"] >= 0
    return table.assign(
        status=certified.map({True: "certified", False: "abstained"}).mask(unsampled, "incomplete"),
        radius=table["radius"].where(certified, 0.0),
        correct=certified & (table["prediction"] == table["label"]),
        post_hoc=False,
    )


def write_log(certificates: pd.DataFrame) -> str:
    """Certificates in Cohen's layout, radii rounded down, or predictions in that of PREDICT.

    Incomplete samples are left out and warned of.

    The layout has no word for a skipped sample: it is written as one that abstained.
    """
    complete = certificates[certificates["status"] != "incomplete"]
    if len(complete) < len(certificates):
        left_out = certificates.loc[certificates["status"] == "incomplete", "sample"].tolist()
        logger.warning(
            "%d of %d samples are incomplete and not in the log: %s",
            len(left_out), len(certificates), ", ".join(map(str, left_out[:10])) + (", ..." if left_out[10:] else ""),
        )  # fmt: skip
    columns = (complete[name].tolist() for name in ("sample", "label", "prediction", "radius", "correct"))
    predictions = "predict" in set(certificates.get("certificate", ()))
    lines = ["\t".join(PREDICT if predictions else CERTIFY)]
    for sample, label, prediction, radius, correct in zip(*columns, strict=True):
        floor = "" if predictions else f"{Decimal(radius).quantize(_RADIUS_STEP, rounding=ROUND_FLOOR)}\t"
        lines.append(f"{sample}\t{label}\t{max(prediction, ABSTAINED)}\t{floor}{correct:d}\t0:00:00")
    return "\n".join(lines) + "\n"


def _lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the log: {error.strerror}; give a file that can be read") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a log: its bytes are no text; name a run by its folder") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _columns(path: str | os.PathLike[str], lines: list[tuple[int, str]]) -> list[str]:
    """The header's columns: one of the two layouts; what a paper adds behind it is not looked at."""
    number, header = lines[0] if lines else (1, "")
    columns = [name.strip() for name in header.split("\t")]
    if not any(tuple(columns[: len(layout)]) == layout for layout in (CERTIFY, PREDICT)):
        raise UserError(
            f"{path}, line {number}: not a log's header: {_shown(header)}; it must be, separated by tabs: "
            f"{' '.join(CERTIFY)} (PREDICT's logs without radius)"
        )
    return columns


def _parsed(where: str, fields: dict[str, str]) -> _Row:
    sample, label, prediction = (_whole(where, name, fields[name]) for name in ("idx", "label", "predict"))
    if prediction < NO_PREDICTION:
        raise UserError(f"{where}: predict = {prediction} must be a class, -1 (abstained) or -2 (not sampled)")
    if prediction == NO_PREDICTION or "radius" not in fields:
        return _Row(sample, label, prediction, 0.0)
    try:
        radius = float(fields["radius"])
    except ValueError:
        radius = math.nan
    if not 0 <= radius < math.inf:  # nan too
        raise UserError(f"{where}: radius = {_shown(fields['radius'])} must be a finite number, 0 or more")
    return _Row(sample, label, prediction, radius)


def _whole(where: str, name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{where}: {name} = {_shown(text)} must be a whole number") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
