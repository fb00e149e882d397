"""Certify a model that is in memory, in this process: no Ray, and no files unless a folder for the run is given.

The same worker casts the votes as on a cluster, so they equal those of the command for the same f, images, seed and
batch size.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffsmooth.cluster.attacker import Attacker, block_of
from diffsmooth.cluster.worker import Setup, Worker
from diffsmooth.pipeline.attack.record import attacked, claim_attack
from diffsmooth.pipeline.attack.request import AttackRequest, attack_of
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.advice import warn_of_settings
from diffsmooth.pipeline.certify.orders import order_of
from diffsmooth.pipeline.data.images import UNLABELLED, Sample
from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.models.denoisers import Denoiser
from diffsmooth.pipeline.noise import local_noise
from diffsmooth.pipeline.results.attacked import Attacked, chosen_samples, default_alpha, finish
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.smoothing import BaseClassifier, check_function, check_networks
from diffsmooth.pipeline.spec import MOST_CLASSES, RunSpec, load_spec
from diffsmooth.pipeline.storage.store import MemoryStore, open_store
from diffsmooth.pipeline.votes.run import claim_run, describe_run

_BATCHES_PER_TASK = 20  # a stop loses at most so much work, and progress is reported this often
_IN_MEMORY = "python"  # stands for the data set and the architectures, which have no name

OnProgress = Callable[[int, int, float], None]  # the draws that are cast, those of all blocks, and draws per second


@dataclass(frozen=True, kw_only=True)
class Model:
    """f in memory: the classifier, and how it is smoothed."""

    classifier: Callable[[Tensor], Tensor]  # x_BCHW in [0, 1] -> logits_BK
    denoiser: Denoiser | None = None  # x_BCHW, sigma -> x0_BCHW, both in [0, 1]
    m: int = 1
    local_sigma: float = 0.0
    identity: str | None = None  # names the weights and code of both; None: their sha256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The noise and the order."""

    sigma: float
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    seed: int = 0
    batch_size: int | None = None
    device: str | torch.device | None = None  # None: that of the model
    on_progress: OnProgress | None = None


class MemoryImages:
    """Images and labels in memory as a data set of ours; see `diffsmooth.pipeline.data.sets.Dataset`."""

    def __init__(self, images: Any, labels: Any, num_classes: int) -> None:
        self.num_classes = num_classes
        self._images, self._labels = images, labels
        self._shape: tuple[int, ...] | None = None  # of the first image that was read
        size = len(images)
        if size == 0:
            raise UserError("images is empty")
        if labels is not None and len(labels) != size:
            raise UserError(f"there are {size} images but {len(labels)} labels")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        item = self._images[index]
        label = None if self._labels is None else self._labels[index]
        if label is None and isinstance(item, tuple | list) and len(item) == 2:
            item, label = item
        image_CHW = as_image(item, index)
        self._shape = self._shape or image_CHW.shape
        if image_CHW.shape != self._shape:
            raise UserError(f"image {index} has shape {image_CHW.shape}, another {self._shape}; all must be equal")
        number = UNLABELLED if label is None else _as_label(label, index, self.num_classes)
        digest = hashlib.sha256(image_CHW.tobytes() + str(image_CHW.shape).encode() + str(number).encode())
        return Sample(image_CHW, number, digest.hexdigest())


def as_image(item: Any, index: int) -> NDArray[np.float32]:
    """An image as C x H x W float32 in [0, 1]: from a tensor or array of floats, or of bytes, or from a PIL image.

    Raises: UserError for another shape, type or range of values.
    """
    values = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
    if not isinstance(item, Tensor | np.ndarray) and values.ndim in (2, 3):  # a PIL image: H x W, or H x W x C
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if values.ndim != 3:
        raise UserError(f"image {index} has shape {values.shape}; it must be C x H x W")
    if values.dtype == np.uint8:
        values = values.astype(np.float32) / np.float32(255)
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"image {index} has values of type {values.dtype}; they must be floats in [0, 1], or uint8")
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not (values.size and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise UserError(
            f"image {index} has values between {values.min():g} and {values.max():g}; they must be in [0, 1]: divide "
            "them by 255, or move the normalisation into the model"
        )
    return values


def _as_label(label: Any, index: int, num_classes: int) -> int:
    try:
        number = int(label)
        if number != float(label):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UserError(f"label {index} is {label!r}; it must be a whole number") from error
    if not UNLABELLED <= number < num_classes:
        raise UserError(f"label {index} is {number}; it must be a class between 0 and {num_classes - 1}")
    return number


class Cast(NamedTuple):
    """A run with all votes of one of its orders."""

    stored: StoredRun
    order: str  # its name


def certify_in_process(model: Model, images: Any, labels: Any, settings: Settings, out: str | None) -> Cast:
    """Cast and store all votes of an order on the images.

    `images` are N x C x H x W, or a data set with __len__ and __getitem__ that gives an image, or an image and its
    label. Raises: UserError for input that cannot be certified.
    """
    with _evaluating(model):
        device = _device_of(model, settings)
        f = _base_classifier(model, settings, MemoryImages(images, None, MOST_CLASSES)[0].image_CHW, device)
        data = MemoryImages(images, labels, f.num_classes)
        spec = _spec(model, settings, data)
        store = MemoryStore() if out is None else open_store(out)
        run = describe_run(spec, _weights(model, stored=out is not None), f.num_classes)
        claim_run(store, run)
        stored = StoredRun(store)
        committed = stored.committed()
        _check_images(stored, committed, data)
        order = order_of(spec, range(len(data)))
        warn_of_settings(spec, order)
        name = stored.place(order)
        missing = stored.sampler(order, committed, name=name).start()
        setup = Setup(spec, store.uri, run.votes_id, settings.batch_size, torch.get_num_threads())
        _cast(Worker(setup, f, data, store), missing, settings.on_progress)
    return Cast(stored, name)


def _check_images(stored: StoredRun, committed: Iterable[Block], data: MemoryImages) -> None:
    """Refuse other images than those that the run has votes of. Raises: UserError."""
    first = {block.sample: block for block in committed if block.sample < len(data)}
    for one in stored.read_blocks(first.values()):
        if one.metadata.sample_sha256 != data[one.block.sample].sha256:
            raise UserError(
                f"{stored.store.uri}: image {one.block.sample} or its label is not that of the run; give the same "
                "images and labels, or another folder with out="
            )


def attack_in_process(
    model: Model, images: Any, labels: Any, settings: Settings, request: AttackRequest, certified: StoredRun | None
) -> Attacked:
    """Attack the images in this process, in the run `certified` of the same model and images, or in a new one.

    Raises: UserError for input that cannot be attacked, and for another model than that of `certified`.
    """
    with _evaluating(model):
        device = _device_of(model, settings)
        f = _base_classifier(model, settings, MemoryImages(images, None, MOST_CLASSES)[0].image_CHW, device)
        data = MemoryImages(images, labels, f.num_classes)
        spec = _spec(model, settings, data)
        store = MemoryStore() if certified is None else certified.store
        if certified is not None:
            smoothing = spec.smoothing.model_copy(update={"block": certified.run.block})
            spec = spec.model_copy(update={"smoothing": smoothing})
        run = describe_run(spec, _weights(model, stored=not isinstance(store, MemoryStore)), f.num_classes)
        claim_run(store, run)
        stored = StoredRun(store)
        _check_images(stored, stored.committed(), data)
        wanted = chosen_samples(stored, request.samples or ":", data)
        attack = attack_of(request, run, alpha=default_alpha(stored), pixels=data[wanted[0]].image_CHW.size)
        claim_attack(store, attack)
        done = set(attacked(store, attack))
        setup = Setup(spec, store.uri, run.votes_id, settings.batch_size, torch.get_num_threads(), attack)
        missing = [block_of(sample, attack) for sample in wanted if sample not in done]
        _cast(Attacker(setup, f, data, store), missing, settings.on_progress, each=True)
    return finish(stored, attack, wanted)


def _weights(model: Model, *, stored: bool) -> dict[str, str]:
    """What identifies f; in memory it needs no identity."""
    return {"f": _identity(model) if stored and model.identity is None else model.identity or "memory"}


def _cast(worker: Worker, blocks: Sequence[Block], on_progress: OnProgress | None, *, each: bool = False) -> None:
    """Cast and commit blocks, a few batches at a time; with `each`, one at a time."""
    done, total = 0, sum(block.draws for block in blocks)
    chunk: list[Block] = []
    for index, block in enumerate(blocks):
        chunk.append(block)
        draws = sum(one.draws for one in chunk)
        if each or draws >= _BATCHES_PER_TASK * worker.batch_size or index == len(blocks) - 1:
            receipt = worker.run(chunk, "in-process")
            done += draws
            if on_progress is not None:
                on_progress(done, total, receipt.draws / max(receipt.seconds, 1e-9))
            chunk = []


def _device_of(model: Model, settings: Settings) -> torch.device:
    """The chosen device, or where the model's parameters are; the CPU for a callable without any. Raises: UserError."""
    if settings.device is not None:
        try:
            return torch.empty(0, device=settings.device).device
        except (RuntimeError, AssertionError) as error:  # no such device; a torch without CUDA
            raise UserError(
                f"device = {str(settings.device)!r} cannot be used here ({first_line(error)}); use 'cpu', or a machine "
                "with this device"
            ) from error
    for part in (model.classifier, model.denoiser):
        if isinstance(part, nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                return tensor.device
    return torch.device("cpu")


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Put the modules into evaluation mode, in which a vote does not depend on its batch, and restore them after."""
    parts = [part for part in (model.classifier, model.denoiser) if isinstance(part, nn.Module)]
    before = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def _base_classifier(
    model: Model, settings: Settings, image_CHW: NDArray[np.float32], device: torch.device
) -> BaseClassifier:
    """f on a device, checked with one image. Raises: UserError for a model that does not give logits."""
    copies_MCHW = local_noise(local_seed=0, m=model.m, shape=image_CHW.shape, local_sigma=model.local_sigma)
    for part in (model.classifier, model.denoiser):
        if isinstance(part, nn.Module) and settings.device is not None:
            part.to(device)
    x_BCHW = torch.from_numpy(image_CHW)[None].to(device)
    try:
        with torch.inference_mode():
            logits = model.classifier(x_BCHW)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"the model cannot classify an image of shape {image_CHW.shape}: {first_line(error)}; give images "
            "of the shape that it was trained on"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model returns {found} for one image; it must return logits of shape (1, classes)")
    f = BaseClassifier(
        denoiser=model.denoiser,
        classifier=model.classifier,
        local_noise_MCHW=torch.from_numpy(copies_MCHW).to(device),
        sigma=settings.sigma,
        num_classes=logits.shape[1],
    )
    check_networks(f, torch.full_like(x_BCHW, 0.5))
    check_function(f, image_CHW.shape, "bf16")  # the model's own precision is not known
    return f


def _spec(model: Model, settings: Settings, data: MemoryImages) -> RunSpec:
    """The spec of this run; data set and architectures have no name here."""
    n0, n = settings.n0, settings.n
    return load_spec(
        {
            "name": "in-process",
            "data": {"name": _IN_MEMORY, "samples": f"0:{len(data)}", "num_classes": data.num_classes},
            "denoiser": {"arch": "none" if model.denoiser is None else _IN_MEMORY},
            "classifier": {"arch": _IN_MEMORY},
            "smoothing": {
                "sigma": settings.sigma,
                "m": model.m,
                "local_sigma": model.local_sigma,
                "seed": settings.seed,
                "n0": n0,
                "n": n,
                "alpha": settings.alpha,
                "block": {"selection": _block_length(n0, 100), "estimation": _block_length(n, 1000)},
            },
            "compute": {"device": "auto"},
        }
    )


def _block_length(draws: int, usual: int) -> int:
    """The usual block length if it divides the draws, else one block for all of them."""
    return usual if draws % usual == 0 else max(draws, 1)


def _identity(model: Model) -> str:
    """The sha256 of the weights and of the code of a model. Raises: UserError if it has none that can be hashed."""
    digest = hashlib.sha256()
    for name, part in (("classifier", model.classifier), ("denoiser", model.denoiser)):
        if part is None:
            continue
        if not isinstance(part, nn.Module):
            raise UserError(
                f"the {name} is a {type(part).__name__}, whose votes cannot be identified; with out=, give "
                'identity="NAME", a new one for each change of the model'
            )
        digest.update(f"{name}:{part!r}".encode())
        for kind in sorted({type(module) for module in part.modules()}, key=lambda one: (one.__module__, one.__name__)):
            digest.update(_source(kind, name).encode())
        for key, tensor in part.state_dict().items():
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{key}:{values.dtype}:{tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _source(kind: type, name: str) -> str:
    if kind.__module__.startswith("torch."):
        return f"{kind.__module__}.{kind.__qualname__}"  # the version of torch is recorded in each block
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError) as error:
        raise UserError(
            f"the source of {kind.__name__}, a part of the {name}, cannot be read; with out=, give identity='NAME', "
            "a new one for each change of the model"
        ) from error
