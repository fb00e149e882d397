"""Packs the embedded default for Fashion-MNIST: pipeline/embedded/{fashion.parquet, fashion.safetensors}.

The images are the first 1,000 of the official test split, in their order. The weights are those of the trainings
`fashion-denoiser` and `fashion-classifier-SIGMA`, each in its folder below --trainings. They used training images only.

    for name in denoiser classifier-0.00 classifier-0.25 classifier-0.50 classifier-1.00
    do diffsmooth train fashion-$name
    done
    python -m jobs.pack_fashion [--trainings trainings] [--output pipeline/embedded]
"""

import argparse
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from jobs.train_embedded import write_held_out
from pipeline.data import open_dataset
from pipeline.spec import Data

IMAGES = 1000
NETWORKS = ("denoiser", "classifier-0.00", "classifier-0.25", "classifier-0.50", "classifier-1.00")
DEBIAN = "/usr/share/datasets/fashion-mnist"


def pack_images(folder: str, output: Path) -> None:
    """Write the first images of the test split."""
    data = open_dataset(Data(name="fashion", path=folder, split="test"))
    samples = [data[index] for index in range(IMAGES)]
    pixels_NHW = np.stack([np.rint(one.image_CHW[0] * 255).astype(np.uint8) for one in samples])
    write_held_out(output / "fashion.parquet", pixels_NHW, np.array([one.label for one in samples]))


def pack_weights(trainings: Path, output: Path) -> None:
    """Write the weights of all networks, with the name of each before its keys."""
    files = {name: load_file(trainings / f"fashion-{name}" / "weights.safetensors") for name in NETWORKS}
    state = {f"{name}.{key}": value for name, one in files.items() for key, value in one.items()}
    save_file(state, output / "fashion.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainings", type=Path, default=Path("trainings"), help="folder of the trainings")
    parser.add_argument("--images", default=DEBIAN, help=f"folder of the IDX files, default {DEBIAN}")
    parser.add_argument("--output", type=Path, default=Path("pipeline/embedded"), help="folder to write to")
    arguments = parser.parse_args()
    pack_images(arguments.images, arguments.output)
    pack_weights(arguments.trainings, arguments.output)


if __name__ == "__main__":
    main()
