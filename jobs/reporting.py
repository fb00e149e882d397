"""The work of `report`: one HTML file about several runs, with pictures if a spec says where data and weights are."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from diffsmooth.jobs.orders import report_incomplete
from diffsmooth.jobs.places import images_of, is_log, parse_images, parse_source, with_distinct_names, writing
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.models.device import any_device
from diffsmooth.pipeline.results.stored import StoredResult, comparison_notes, read_result
from diffsmooth.pipeline.show.gallery import attack_exhibits, gallery
from diffsmooth.pipeline.show.report import Exhibit, render_report, report_of
from diffsmooth.pipeline.smoothing import CheckedSpec, check_spec
from diffsmooth.pipeline.spec import RunSpec

logger = logging.getLogger(__name__)

Shipped = Callable[[str], RunSpec | None]  # name of a run -> the shipped spec of that name


def report(
    sources: Sequence[str],
    *,
    order_name: str | None = None,
    specs: Sequence[RunSpec] = (),
    shipped: Shipped = lambda name: None,
    each: int = 3,
    pixels: str | None = None,
    output: str,
) -> bool:
    """Write the report of [NAME=]RUN ...; returns whether all of their samples are complete.

    `specs` say where the data and weights of the runs are; for a run that none of them made, the `shipped` spec of its
    name is tried. `each` samples of each kind are shown, none if it is 0. `pixels` is the shape C,H,W of the images.

    Raises: UserError, also for a spec that made none of the runs, and if the data or weights of `specs` do not load.
    """
    images = parse_images(pixels, None)
    parsed = [parse_source(text) for text in sources]
    for source in parsed:
        if is_log(source.place):
            raise UserError(f"{source.place} is a log, but a report needs a run; use `diffsmooth curve` for logs")
    read = [read_result(source.place, order_name) for source in parsed]
    curves = with_distinct_names(parsed, [one.result.curve for one in read])
    galleries = _galleries(read, specs, shipped, each) if each else [([], "--samples 0 was given")] * len(read)
    runs = [
        replace(
            report_of(one),
            curve=curve,
            exhibits=[*exhibits, *attack_exhibits(one.attacks, one.gap, each)],
            no_exhibits=reason,
            shape_CHW=images_of(one.result.run, images).shape_CHW,
        )
        for one, curve, (exhibits, reason) in zip(read, curves, galleries, strict=True)
    ]
    with writing("--output", output) as path:
        Path(path).write_text(render_report(runs), encoding="utf-8")
    for line in comparison_notes([one.result for one in read]):
        logger.warning("NOTE: %s", line)
    for one in read:
        report_incomplete(one.result)
    return all(not one.result.curve.incomplete for one in read)


def _galleries(
    read: Sequence[StoredResult], specs: Sequence[RunSpec], shipped: Shipped, each: int
) -> list[tuple[list[Exhibit], str]]:
    """Each run's gallery, or an empty one and the reason."""
    galleries: list[tuple[list[Exhibit], str]] = []
    used: set[int] = set()
    for one in read:
        found = [(index, checked) for index, spec in enumerate(specs) if (checked := _checked(spec, one)) is not None]
        made = {index for index, _ in found}
        used |= made
        spec = None if found else shipped(one.result.run.name)
        try:
            checked = found[0][1] if found else None if spec is None else _checked(spec, one)
            if checked is not None:
                device = any_device(checked.spec)
                exhibits = gallery(checked, device, one.result.certificates, one.votes, each)
                galleries.append((exhibits, "no sample is of a kind that is shown"))
                continue
            reason = "use --spec SPEC to name the run's spec, which says where data and weights are"
        except (UserError, RunError) as error:
            if made:
                raise
            reason = f"the data or weights of the shipped spec do not load here ({error}); use --spec for another"
        galleries.append(([], reason))
    for index, spec in enumerate(specs):
        if index not in used:
            raise UserError(f"--spec {spec.name} made none of these runs; use the spec that did, or omit it")
    return galleries


def _checked(spec: RunSpec, one: StoredResult) -> CheckedSpec | None:
    """The spec with the seed of a run if it made the run."""
    run = one.result.run
    checked = check_spec(run.seeded(spec))
    return checked if checked.votes_id == run.votes_id else None
