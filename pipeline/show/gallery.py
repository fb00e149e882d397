"""Pictures for a report that show samples at each step of f: original, one noisy draw, denoised, locally smoothed."""

import io
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from diffsmooth.pipeline.attack.gap import Attacks, Gap
from diffsmooth.pipeline.attack.record import AttackedSample, Rung
from diffsmooth.pipeline.block import Stage
from diffsmooth.pipeline.casting import noisy_images
from diffsmooth.pipeline.models.device import torch_settings
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.show.report import Exhibit, Picture
from diffsmooth.pipeline.smoothing import BaseClassifier, CheckedSpec
from diffsmooth.pipeline.spec import RunSpec

_CLASSES = 5  # shown as vote bars
_SMALL = 64  # pixels; images whose sides are at most this long are stored as PNG, larger ones as JPEG


def gallery(
    checked: CheckedSpec, device: torch.device, certificates: pd.DataFrame, votes: pd.DataFrame, each: int
) -> list[Exhibit]:
    """Return exhibits of up to `each` samples of every kind, each with the first draw of the votes that it shows.

    The seed of `checked` must be the run's. Raises: UserError for weights or data that cannot be loaded.
    """
    chosen = list(choose(certificates, each))
    if not chosen:
        return []
    f, data = checked.build(device), checked.data
    exhibits = []
    for kind, row in chosen:
        stage: Stage = "selection" if row["status"] == "skipped" else "estimation"
        classes, draws = _votes(votes, int(row["sample"]), stage)
        image_CHW = data[int(row["sample"])].image_CHW
        with torch_settings(checked.spec.smoothing.precision):
            pictures = list(_pictures(f, checked.spec, image_CHW, int(row["sample"]), stage))
        exhibits.append(
            Exhibit(
                kind=kind,
                sample=int(row["sample"]),
                label=int(row["label"]),
                verdict=_verdict(row),
                votes=classes,
                draws=draws,
                pictures=pictures,
            )
        )
    return exhibits


def attack_exhibits(attacks: Attacks | None, gap: Gap | None, each: int) -> list[Exhibit]:
    """Return exhibits of adversarial images, with the original, the difference and the votes.

    They are up to `each` contradictions, the samples with the nearest and with the farthest adversarial image, and
    those with the largest gap to their certificate.
    """
    if attacks is None or gap is None:
        return []
    best = attacks.best()
    rows = gap.table[np.isfinite(gap.table["upper"]) & (gap.table["upper"] > 0)]
    certified = rows[rows["lower"] >= 0]
    width = (certified["upper"] - certified["lower"]).sort_values(ascending=False, kind="stable")
    by_upper = rows.sort_values("upper", kind="stable")
    kinds = (
        ("attack: contradicts its certificate", gap.table[gap.table["contradiction"]].iloc[:each]),
        ("attack: nearest", by_upper.iloc[:each]),
        ("attack: farthest", by_upper.iloc[each:].iloc[-each:]),
        ("attack: widest gap", certified.loc[width.index[:each]]),
    )
    return [
        _attack_exhibit(kind, row, *best[int(row["sample"])][1:])
        for kind, chosen in kinds
        for _, row in chosen.iterrows()
    ]


def _attack_exhibit(kind: str, row: pd.Series, one: AttackedSample, rung: Rung) -> Exhibit:
    counts_K = rung.selection_K if rung.judging_K is None else rung.judging_K
    order = np.argsort(-counts_K, kind="stable")[:_CLASSES]
    clean, found = (torch.from_numpy(image) for image in (one.rungs[0].image_CHW, rung.image_CHW))
    delta = found - clean
    scale = float(delta.abs().max()) or 1.0
    lower = f"{np.floor(row['lower'] * 1000) / 1000:.3f}" if row["lower"] >= 0 else "none"
    return Exhibit(
        kind=kind,
        sample=one.sample,
        label=one.label,
        verdict=f"lower radius {lower}, upper radius {np.ceil(rung.distance * 1000) / 1000:.3f}; votes at x', p-value "
        f"{row['p_value']:.1g}",
        votes=[(int(k), int(counts_K[k])) for k in order if counts_K[k]],
        draws=int(counts_K.sum()),
        pictures=[
            _picture("original x", clean),
            _picture(f"x', class {row['class']} for g", found),
            _picture(f"difference, grey is 0, times {0.5 / scale:.2g}", 0.5 + delta * 0.5 / scale),
        ],
    )


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
