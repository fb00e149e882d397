"""Pictures for a report that show samples at each step of f: original, one noisy draw, denoised, locally smoothed."""

import io
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.block import Stage
from pipeline.data import open_dataset
from pipeline.noise import Noise
from pipeline.report import Exhibit, Picture
from pipeline.smoothing import BaseClassifier, build_base_classifier, noisy_images
from pipeline.spec import RunSpec

_CLASSES = 5  # shown as vote bars
_SMALL = 64  # pixels; images whose sides are at most this long are stored as PNG, larger ones as JPEG


def gallery(
    spec: RunSpec, device: torch.device, certificates: pd.DataFrame, votes: pd.DataFrame, each: int
) -> list[Exhibit]:
    """Return exhibits of up to `each` samples of every kind, each with the first draw of the votes that it shows.

    The seed of `spec` must be the run's. Raises: UserError for weights or data that cannot be loaded.
    """
    chosen = list(choose(certificates, each))
    if not chosen:
        return []
    data = open_dataset(spec.data)
    f = build_base_classifier(spec, device, data)
    exhibits = []
    for kind, row in chosen:
        stage: Stage = "selection" if row["status"] == "skipped" else "estimation"
        classes, draws = _votes(votes, int(row["sample"]), stage)
        image_CHW = data[int(row["sample"])].image_CHW
        exhibits.append(
            Exhibit(
                kind=kind,
                sample=int(row["sample"]),
                label=int(row["label"]),
                verdict=_verdict(row),
                votes=classes,
                draws=draws,
                pictures=list(_pictures(f, spec, image_CHW, int(row["sample"]), stage)),
            )
        )
    return exhibits


def choose(certificates: pd.DataFrame, each: int) -> Iterator[tuple[str, pd.Series]]:
    """Yield the samples to show, each with its kind.

    They are the correct ones with the largest and smallest radii, the wrong ones with the largest radii, and abstained
    ones.
    """
    certified = certificates[certificates["status"] == "certified"]
    right = certified[certified["correct"]].sort_values("radius", ascending=False, kind="stable")
    wrong = certified[~certified["correct"]].sort_values("radius", ascending=False, kind="stable")
    best, worst = right.iloc[:each], right.iloc[each:].iloc[-each:]
    skipped, abstained = (certificates[certificates["status"] == status] for status in ("skipped", "abstained"))
    for kind, rows in (
        ("best", best),
        ("worst of the right", worst),
        ("wrong", pd.concat([wrong, skipped]).iloc[:each]),
        ("abstained", abstained.iloc[:each]),
    ):
        for _, row in rows.iterrows():
            yield kind, row


def _verdict(row: pd.Series) -> str:
    if row["status"] == "skipped":
        return f"skipped: class {row['top_class']} was selected"
    if row["status"] == "abstained":
        return f"abstained: class {row['top_class']} got {row['n_A']:,} of {row['n']:,} votes"
    return f"class {row['prediction']}, radius {np.floor(row['radius'] * 1000) / 1000:.3f}"


def _votes(votes: pd.DataFrame, sample: int, stage: Stage) -> tuple[list[tuple[int, int]], int]:
    """Return the classes with the most votes in a sample's stage, and the total number of draws."""
    of_sample = votes[(votes["sample"] == sample) & (votes["stage"] == stage)]
    counts = of_sample.groupby("class")["votes"].sum().sort_values(ascending=False, kind="stable")
    return [(int(str(k)), int(count)) for k, count in counts.iloc[:_CLASSES].items()], int(counts.sum())


def _pictures(
    f: BaseClassifier, spec: RunSpec, image_CHW: NDArray[np.float32], sample: int, stage: Stage
) -> Iterator[Picture]:
    smoothing = spec.smoothing
    noisy_1CHW = noisy_images(image_CHW, Noise.of(smoothing), stage, sample, range(1)).to(f.device)
    denoised_1CHW = f.denoise(noisy_1CHW)
    vote = int(f(noisy_1CHW).argmax())
    yield _picture("original", torch.from_numpy(image_CHW))
    yield _picture(f"draw 0 of the {stage} stage; f returns class {vote}", noisy_1CHW[0])
    if f.denoiser is not None:
        yield _picture("denoised", denoised_1CHW[0])
    if smoothing.local_sigma > 0:
        yield _picture(f"locally smoothed, copy 1 of {smoothing.m}", denoised_1CHW[0] + f.local_noise_MCHW[0])


def _picture(caption: str, image_CHW: torch.Tensor) -> Picture:
    """Return a picture of an image; values outside [0, 1] are clipped for display."""
    pixels_HWC = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    image, buffer = Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC), io.BytesIO()
    if max(image.size) <= _SMALL:
        image.save(buffer, "PNG")
        return Picture(caption, buffer.getvalue())
    image.save(buffer, "JPEG", quality=88)
    return Picture(caption, buffer.getvalue(), "image/jpeg")
