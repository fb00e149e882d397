"""The README.md of a published run, which the Hub shows as its page, and a results file for the page of its model."""

from typing import Any

import yaml

from diffsmooth.pipeline.data.sets import DATASETS
from diffsmooth.pipeline.results.stored import StoredResult
from diffsmooth.pipeline.show.tables import render

RESULTS_FOLDER = ".eval_results"

_CARD = """\
---
{header}---

# {name}

Votes and certificates of a smoothed image classifier, cast by diffsmooth. For each image, the certificate says: with
probability at least 1 - {alpha:g} over the noise draws, no perturbation with an l2 norm below the radius (pixels in
[0, 1]) changes the prediction.

{table}
sigma = {sigma:g}, n0 = {n0:,}, n = {n:,}, alpha = {alpha:g}, {samples:,} images of {data}. report.html has the
curves, the exact claims and how the votes were cast.

## Audit

```bash
diffsmooth audit {place} --root {root}
```

checks every file against the published root, and every certificate against the votes. With `--spec SPEC`, which says
where the images and the weights are, it also casts randomly chosen blocks again. Compare the root with the one in the
paper: anyone who can change this repository can change this page.

`diffsmooth status`, `curve`, `compare` and `report` read the same location.

## Files

| file | content |
|---|---|
| run.json | identity of the votes: networks, hashes of weights, sigma, seeds |
| orders/ | what was asked, and the certificates that follow |
| votes.parquet, blocks.parquet | all votes in one table, and a row per block |
| seals/ | sha256 of run.json, orders, plans and blocks, for `sha256sum --check` once objects.zip is unpacked here |
| objects.zip | the blocks as they were written{attacks} |
| index.json | size and sha256 of the files |
"""


def card(one: StoredResult, place: str, root: str) -> str:
    """The README.md: a header for the Hub, the results, and how to check them. `place` is where the run is read."""
    result, order = one.result, one.result.order
    header = {
        "pretty_name": f"diffsmooth run {result.run.name}",
        "task_categories": ["image-classification"],
        "tags": ["certified-robustness", "randomized-smoothing", "diffsmooth"],
        "configs": [
            {"config_name": "certificates", "data_files": f"orders/{result.name}/certificates.parquet"},
            {"config_name": "votes", "data_files": "votes.parquet"},
        ],
    }
    return _CARD.format(
        header=_yaml(header),
        name=result.run.name,
        table=render([result.curve], "markdown"),
        sigma=result.run.sigma,
        n0=order.n0,
        n=order.n,
        alpha=order.total_alpha,
        samples=len(result.certificates),
        data=result.run.spec.data.name,
        place=place,
        root=root,
        attacks="" if one.attacks is None else ", and the attacked images",
    )


def results_name(one: StoredResult) -> str:
    """The name of the results file in a repository."""
    return f"{RESULTS_FOLDER}/certified-l2-{one.result.run.name}.yaml"


def results_file(one: StoredResult, page: str) -> str | None:
    """The certified accuracies in percent, in the layout of the Hub; None for a data set that has no id there.

    The layout is that of the specification eval_results.yaml of huggingface/hub-docs: a list of entries with
    dataset.id, dataset.task_id, value, source and notes.
    """
    result, order = one.result, one.result.order
    entry = DATASETS.get(result.run.spec.data.name)
    if entry is None or entry.benchmark is None or not (order.kind.claims_label and order.kind.has_radius):
        return None
    notes = (
        f"certified l2 accuracy in %, {len(result.certificates):,} images, sigma = {result.run.sigma:g}, n0 = "
        f"{order.n0:,}, n = {order.n:,}, alpha = {order.total_alpha:g}"
    )
    return _yaml(
        [
            {
                "dataset": {"id": entry.benchmark, "task_id": f"certified_l2_{radius}"},
                "value": round(100 * accuracy, 2),
                "source": {"url": page, "name": "votes and certificates, to audit with diffsmooth"},
                "notes": notes,
            }
            for radius, accuracy in result.summary().certified_accuracy.items()
        ]
    )


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=1000)
