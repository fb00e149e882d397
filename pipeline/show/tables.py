"""Curves -> a table of certified accuracies: text, Markdown, LaTeX, HTML or CSV.

Percent with one decimal, one row per curve; CSV has unrounded fractions, one row per curve and radius.
"""

import html
import io
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffsmooth.pipeline.certify.curve import GROWN, NO_ACR, Curve, Envelope, acr_figures, envelope_of, table_radii

logger = logging.getLogger(__name__)

ENVELOPE = "envelope (not a classifier)"  # the name of its row or block

_RESISTED = "not proven wrong by an attack"  # the second row of a run that was attacked
_Radii = NDArray[np.float64]
_Cells = list[list[str]]  # run, ACR, its interval, abstained, then one accuracy per radius
_HEADINGS = ("run", "ACR", "95 % interval", "abstain, %")


def render(curves: Sequence[Curve], form: str = "text", *, radii: _Radii | None = None, envelope: bool = False) -> str:
    """The table of curves in one of FORMATS, by default at round radii; it ends with a newline."""
    chosen = table_radii(curves) if radii is None else radii
    runs = [curve for curve in curves if not curve.scales]
    return FORMATS[form](curves, chosen, envelope_of(runs, chosen) if envelope else None)


def _notes(curves: Sequence[Curve], radii: _Radii, envelope: Envelope | None) -> list[str]:
    """The notes that a table needs: post hoc looks, grid mode, and which run each value of the envelope is from."""
    said = []
    if any(curve.post_hoc for curve in curves):
        said.append("* post hoc: an earlier order covers these samples")
    kinds = {curve.kind.name: curve.kind for curve in curves}.values()
    said += [f"{kind.mark.strip()} {kind.caveat}" for kind in kinds if kind.caveat]
    if any(curve.grown for curve in curves):
        said.append(f"grown: {GROWN}")
    if any(curve.uppers is not None for curve in curves):
        said.append(
            f"{_RESISTED}: the share of all samples without a proven adversarial image within the radius; the true "
            "accuracy lies between the certified share and this one, and samples that were not attacked count as not "
            "proven wrong"
        )
    if any(curve.tested is not None for curve in curves):
        said.append(
            f"{NO_ACR} grid mode: certified at chosen radii only; between two of them the value is that of the larger "
            "one, and the mean radius is not comparable with an ACR"
        )
    for curve in curves:
        if curve.scales:
            scales = ", ".join(f"{sigma:g}" for sigma in curve.scales)
            said.append(
                f"{curve.name}: one classifier over sigma {scales}, with one alpha in all; it is a second look at the "
                "votes of the runs"
            )
    if envelope:
        spans = []
        for _, group in groupby(zip(radii, envelope.best, strict=True), key=lambda pair: pair[1].name):
            span = list(group)
            (first, best), (last, _) = span[0], span[-1]
            reach = f"{_radius(first)} to {_radius(last)}" if last > first else _radius(first)
            spans.append(f"{reach} from {best.name}{'' if best.sigma is None else f' (sigma {best.sigma:g})'}")
        said += [
            "envelope: papers report several sigmas by choosing the best run at each radius after looking; this is not "
            "the certificate of one classifier: each value belongs to the run named here",
            f"envelope by radius: {'; '.join(spans)}",
        ]
    return said


def _text(curves: Sequence[Curve], radii: _Radii, envelope: Envelope | None) -> str:
    table = Table(title=_caption(curves), box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in (*_HEADINGS, *map(_radius, radii)):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for cells in _cells(curves, radii):
        table.add_row(*map(Text, cells))
    if resisted := _resisted_cells(curves, radii):
        table.add_section()
        for cells in resisted:
            table.add_row(*map(Text, cells))
    if envelope:
        table.add_section()
        table.add_row(*_envelope_cells(envelope))
    # as wide as the table, so that no figure is truncated; a narrow terminal wraps
    console = Console(file=io.StringIO(), width=100_000, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().rstrip("\n").split("\n")]
    return _joined([*lines, *_notes(curves, radii, envelope)])


def _markdown(curves: Sequence[Curve], radii: _Radii, envelope: Envelope | None) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = _with_best(_cells(curves, radii), _escaped_markdown, "**{}**".format)
    rows += [[_escaped_markdown(name), *cells] for name, *cells in _resisted_cells(curves, radii)]
    if envelope:
        rows.append(_envelope_cells(envelope))
    return _joined(
        [
            _caption(curves).capitalize(),
            "",
            line([*_HEADINGS, *map(_radius, radii)]),
            line(["---"] + ["---:"] * (len(radii) + len(_HEADINGS) - 1)),
            *map(line, rows),
            *(f"\n{_escaped_markdown(note)}" for note in _notes(curves, radii, envelope)),
        ]
    )


def _latex(curves: Sequence[Curve], radii: _Radii, envelope: Envelope | None) -> str:
    def line(cells: Iterable[str]) -> str:
        return rf"{' & '.join(cells)} \\"

    return _joined(
        [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * (len(radii) + len(_HEADINGS) - 1)}}}",
            r"\toprule",
            rf"{' & ' * len(_HEADINGS)}\multicolumn{{{len(radii)}}}{{c}}{{{_latex_caption(curves)}}} \\",
            rf"\cmidrule(l){{{len(_HEADINGS) + 1}-{len(_HEADINGS) + len(radii)}}}",
            line([*map(_escaped_latex, _HEADINGS), *map(_radius, radii)]),
            r"\midrule",
            *map(line, _with_best(_cells(curves, radii), _escaped_latex, r"\textbf{{{}}}".format)),
            *(line([_escaped_latex(name), *cells]) for name, *cells in _resisted_cells(curves, radii)),
            *([r"\midrule", line(_envelope_cells(envelope))] if envelope else []),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par{{\footnotesize {_escaped_latex(note)}}}" for note in _notes(curves, radii, envelope)),
        ]
    )


def _html(curves: Sequence[Curve], radii: _Radii, envelope: Envelope | None) -> str:
    def line(cells: Iterable[str], tag: str = "td") -> str:
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    return _joined(
        [
            "<table>",
            f"<caption>{html.escape(_caption(curves).capitalize())}</caption>",
            line([*_HEADINGS, *map(_radius, radii)], "th"),
            *map(line, _with_best(_cells(curves, radii), html.escape, "<b>{}</b>".format)),
            *(line([html.escape(name), *cells]) for name, *cells in _resisted_cells(curves, radii)),
            *([line(_envelope_cells(envelope))] if envelope else []),
            "</table>",
            *(f"<p>{html.escape(note)}</p>" for note in _notes(curves, radii, envelope)),
        ]
    )


def _csv(curves: Sequence[Curve], radii: _Radii, envelope: Envelope | None) -> str:
    """Columns run, radius, certified_accuracy, post_hoc, incomplete (samples); an envelope adds its rows and best_run.

    Runs that were attacked add the column resisted. Radii in another unit than the l2 norm of [0, 1] pixels add the
    column unit. CSV has no place for the notes, so they are logged.
    """
    for note in _notes(curves, radii, envelope):
        logger.warning("%s", note)
    attacked = any(curve.uppers is not None for curve in curves)
    columns = {"radius": radii} | ({} if curves[0].unit == Curve.unit else {"unit": curves[0].unit})
    blocks = [
        pd.DataFrame(
            {"run": one.name, **columns, "certified_accuracy": one.at(radii), "post_hoc": one.post_hoc,
             "incomplete": one.incomplete}
            | ({"resisted": one.resisted(radii)} if attacked else {})
        )
        for one in curves
    ]  # fmt: skip
    if envelope:
        best = [one.name for one in envelope.best]
        values = {"certified_accuracy": envelope.certified_accuracy, "best_run": best}
        blocks.append(pd.DataFrame({"run": ENVELOPE, **columns, **values}))
    return pd.concat(blocks).to_csv(index=False, lineterminator="\n")


FORMATS: dict[str, Callable[[Sequence[Curve], _Radii, Envelope | None], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
    "html": _html,
    "csv": _csv,
}


def _cells(curves: Sequence[Curve], radii: _Radii) -> _Cells:
    cells = []
    for curve in curves:
        marks = "*" if curve.post_hoc else ""
        marks += " (grown)" if curve.grown else ""
        marks += f" ({curve.incomplete} incomplete)" if curve.incomplete else ""
        shares = [f"{100 * curve.abstention_rate:.1f}", *_percent(curve.at(radii))]
        cells.append([curve.name + marks, *acr_figures(curve), *shares])
    return cells


def _resisted_cells(curves: Sequence[Curve], radii: _Radii) -> _Cells:
    """A row for each curve of a run that was attacked."""
    return [
        [f"{curve.name}: {_RESISTED}", "", "", "", *_percent(curve.resisted(radii))]
        for curve in curves
        if curve.uppers is not None
    ]


def _envelope_cells(envelope: Envelope) -> list[str]:
    return [ENVELOPE, "", "", "", *_percent(envelope.certified_accuracy)]


def _with_best(rows: _Cells, escape: Callable[[str], str], mark: Callable[[str], str]) -> _Cells:
    """The rows with escaped names, and the highest value of each column marked, including ties as printed."""
    _, acr, _, _, *accuracies = zip(*rows, strict=True)
    highest = [max(column, key=_figure) if len(rows) > 1 else "" for column in (acr, *accuracies)]
    highest[1:1] = ["", ""]  # neither an interval nor abstaining less is better in itself
    return [
        [
            escape(name),
            *(mark(cell) if cell == top and _figure(cell) else cell for cell, top in zip(cells, highest, strict=True)),
        ]
        for name, *cells in rows
    ]


def _caption(curves: Sequence[Curve]) -> str:
    return f"certified accuracy, %, at {curves[0].unit}"


def _latex_caption(curves: Sequence[Curve]) -> str:
    unit = _escaped_latex(curves[0].unit).replace("l2", r"$\ell_2$").replace("l-infinity", r"$\ell_\infty$")
    return rf"certified accuracy, \%, at {unit}"


def _figure(cell: str) -> float:
    return 0.0 if cell == NO_ACR else float(cell)


def _percent(shares: NDArray[np.float64]) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def _radius(radius: float) -> str:
    return f"{radius:.10g}"  # 0.35 also for 0.35000000000000003, a radius of the float grid


def _escaped_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", text)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: f"\\{character}" for character in "{}$&#_%"
}


def _escaped_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
