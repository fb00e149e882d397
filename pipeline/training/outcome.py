"""What a training leaves behind: metrics, a picture of the loss, the weights, their provenance, a spec for certify."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence

import tomli_w
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor

from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.classifiers import resolve_classifier
from diffsmooth.pipeline.models.denoisers import resolve_denoiser
from diffsmooth.pipeline.models.device import package_versions
from diffsmooth.pipeline.storage.store import FolderStore, Store
from diffsmooth.pipeline.training.batches import Split
from diffsmooth.pipeline.training.checkpoint import Identity, Row
from diffsmooth.pipeline.training.settings import TrainingSpec
from diffsmooth.pipeline.training.tasks import start_of

WEIGHTS = "weights.safetensors"


def identity_of(spec: TrainingSpec, split: Split) -> Identity:
    """Return what a resumed training must agree with."""
    start: dict[str, str] = {}
    denoised = spec.classifier_loss is not None and spec.classifier_loss.images == "denoised"
    if spec.denoiser.checkpoint is not None and (spec.task == "denoiser" or denoised):
        start |= resolve_denoiser(spec.run_spec(spec.smoothing.sigma)).ids()
    used = spec.classifier if spec.task == "classifier" else None
    if used is not None and (spec.has_start or is_own(used.arch)):
        start |= resolve_classifier(spec.run_spec(spec.smoothing.sigma), start_of(spec)).ids()
    return Identity(
        spec=spec.identity(), data_id=split.train.data_id, validation_id=split.validation.data_id, start=start
    )


def write_metrics(store: Store, rows: Sequence[Row]) -> None:
    """Write metrics.csv, in place of an older one."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows({**row, "step": int(row["step"])} for row in rows)
    store.replace("metrics.csv", text.getvalue().encode())


def _picture(name: str, rows: Sequence[Row]) -> bytes:
    """Draw the losses above, and the accuracies below if there are any."""
    steps = [row["step"] for row in rows]
    accuracies = [column for column in rows[-1] if "accuracy" in column]
    figure = Figure(figsize=(6, 6 if accuracies else 3.5), layout="constrained")
    axes = figure.subplots(2 if accuracies else 1, 1, sharex=True, squeeze=False)[:, 0]
    for column in ("loss", "validation_loss"):
        if column in rows[-1]:
            axes[0].plot(steps, [row[column] for row in rows], marker=".", label=column.replace("_", " "))
    axes[0].set_ylabel("loss")
    axes[0].set_title(name)
    for column in accuracies:
        axes[1].plot(steps, [row[column] for row in rows], marker=".", label=column.replace("_", " "))
    if accuracies:
        axes[1].set_ylabel("validation accuracy")
    axes[-1].set_xlabel("step")
    for one in axes:
        one.grid(alpha=0.3)
        one.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def write_outcome(
    store: Store,
    spec: TrainingSpec,
    split: Split,
    identity: Identity,
    average: Mapping[str, Tensor],
    rows: Sequence[Row],
) -> None:
    """Write the averaged weights, a picture of the loss, the provenance, and certify.toml if there is a classifier."""
    write_metrics(store, rows)
    if rows:
        store.replace("loss.png", _picture(spec.name, rows))
    weights = save({name: one.detach().cpu().contiguous() for name, one in average.items()})
    store.replace(WEIGHTS, weights)
    provenance = {
        "name": spec.name,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "identity": identity.model_dump(mode="json"),
        "metrics": rows[-1] if rows else {},
        "versions": package_versions(),
    }
    store.replace("provenance.json", json.dumps(provenance, indent=2).encode())
    if (text := certify_toml(store, spec, split)) is not None:
        store.replace("certify.toml", text.encode())


def certify_toml(store: Store, spec: TrainingSpec, split: Split) -> str | None:
    """Return the spec that certifies the trained network on the validation images; None without a classifier."""
    here = WEIGHTS if isinstance(store, FolderStore) else f"{store.uri}/{WEIGHTS}"
    denoiser, classifier = spec.denoiser, spec.classifier
    if classifier is None:
        return None
    trained = {"checkpoint": here, "sha256": None}
    if spec.task == "denoiser":
        denoiser = denoiser.model_copy(update=trained)
    elif classifier.adapter is not None:
        classifier = classifier.model_copy(update={"adapter": classifier.adapter.model_copy(update=trained)})
    else:
        classifier = classifier.model_copy(update=trained)
    tables = {
        "data": split.held_out,
        "denoiser": denoiser,
        "classifier": classifier,
        "smoothing": spec.smoothing,
        "compute": spec.compute,
    }
    given = {
        name: table.model_dump(mode="json", exclude_none=True, exclude_unset=name != "compute")
        for name, table in tables.items()
    }
    head = f"# Written by diffsmooth train. Certifies {spec.name} on its validation images.\n\n"
    return head + tomli_w.dumps({"name": spec.name, **{name: table for name, table in given.items() if table}})
