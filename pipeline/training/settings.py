"""TrainingSpec: what to train, on what and how, read from TOML and validated like a RunSpec."""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.records import Record
from diffsmooth.pipeline.spec import LOCATIONS, Classifier, Data, Denoiser, RunSpec, Smoothing, read_model

Sigma = Annotated[float, Field(gt=0, le=100)]  # standard deviation, pixels in [0, 1]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class Consistency(Record):
    """lambda and eta of consistency regularisation."""

    weight: Weight = 10.0
    entropy: Weight = 0.5


class Macer(Record):
    """lambda, gamma and beta of MACER."""

    weight: Weight = 12.0
    gamma: Weight = 8.0
    beta: Weight = 16.0


class Confidence(Record):
    """FT-CADIS's loss: replaces the cross entropy."""

    weight: Weight = 4.0
    radius: Annotated[float, Field(gt=0, le=1000)] = 0.25  # of the attack, l2, pixels in [0, 1]
    steps: int = Field(default=4, ge=1, le=100)
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the steps that keep the copy of the least loss


class Similarity(Record):
    """The similarity of expected features."""

    weight: Weight = 1.0
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0  # cosine that two classes may have


class ClassifierLoss(Record):
    """The table [classifier_loss]."""

    images: Literal["clean", "noisy", "denoised"] = "noisy"
    sigmas: list[Sigma] = Field(default=[], max_length=100)  # noise: each image draws one of them
    local_sigma: Annotated[float, Field(ge=0, le=100)] = 0.0  # noise added after denoising
    copies: int = Field(default=1, ge=1, le=100)  # noisy copies of each image
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    consistency: Consistency | None = None
    macer: Macer | None = None
    confidence: Confidence | None = None
    similarity: Similarity | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.images == "clean") != (not self.sigmas):
            raise ValueError(
                f"images = {self.images!r} with sigmas = {self.sigmas}; give noise levels for noisy and denoised "
                "images, and none for clean ones"
            )
        needing = [name for name in ("consistency", "macer", "confidence") if getattr(self, name) is not None]
        if needing and self.copies < 2:
            raise ValueError(f"copies = {self.copies}, but {needing[0]} compares noisy copies; use at least 2")
        if self.images == "clean" and self.copies > 1:
            raise ValueError(f"copies = {self.copies} of clean images are all equal; use copies = 1, or noisy images")
        if self.local_sigma and self.images != "denoised":
            raise ValueError(f"local_sigma = {self.local_sigma} is added after denoising; use images = 'denoised'")
        return self


class EDMNetwork(Record):
    """Hyper-parameters of an EDM network that is trained from scratch; denoiser.arch must be "edm"."""

    family: Literal["song", "dhariwal"] = "song"
    model_channels: int = Field(ge=2, le=4096)
    channel_mult: list[Annotated[int, Field(ge=1, le=64)]] = Field(min_length=1, max_length=10)
    num_blocks: int = Field(default=1, ge=1, le=32)
    attention_levels: list[Annotated[int, Field(ge=0, le=9)]] = Field(default=[])


class DenoiserLoss(Record):
    """The table [denoiser_loss]."""

    # this share of the images gets noise that is log-uniform between the two sigmas, the others any of the schedule
    focus: Annotated[float, Field(ge=0, le=1)] = 0.8
    low: Sigma = 0.15
    high: Sigma = 1.5
    log_mean: float = -1.2  # EDM: mean and standard deviation of ln(noise on [-1, 1])
    log_std: Annotated[float, Field(gt=0, le=10)] = 1.2
    edm: EDMNetwork | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be less than high = {self.high}")
        return self


Augmentation = Literal["flip", "shift", "affine"]


class Training(Record):
    """The table [training]."""

    steps: int = Field(ge=1, le=100_000_000)
    batch: int = Field(default=128, ge=1, le=1_000_000)  # images of a step, over all workers
    shards: int = Field(default=4, ge=1, le=65_536)  # parts of a batch; batch norms see one part at a time
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1e-3
    weight_decay: Weight = 0.01
    warmup: int = Field(default=100, ge=0)  # steps
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest norm of the gradient
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    augment: list[Augmentation] = Field(default=[])
    pretrained: bool = False  # start from the weights that timm or torchvision publishes
    new_last_layer: bool = False  # of a classifier, whose checkpoint may have another number of classes
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    seed: int = Field(default=0, ge=0)
    checkpoints: int = Field(default=10, ge=1, le=100_000)  # evenly spaced; metrics are measured at each

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shards > self.batch:
            raise ValueError(f"shards = {self.shards} exceeds batch = {self.batch}; use at most one shard per image")
        if self.checkpoints > self.steps:
            raise ValueError(f"checkpoints = {self.checkpoints} exceeds steps = {self.steps}; use at most one per step")
        return self

    def is_checkpoint(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps."""
        return step * self.checkpoints // self.steps > (step - 1) * self.checkpoints // self.steps


class Device(Record):
    """The table [compute]."""

    device: Literal["cuda", "cpu", "auto"] = "auto"


TASKS = ("classifier", "denoiser")


class TrainingSpec(Record):
    """What one training is asked for; each field but two is a table of the TOML file."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: Literal["classifier", "denoiser"]
    data: Data
    validation: Data | None = None  # None: a twentieth of the images is held out of training
    denoiser: Denoiser = Denoiser()
    classifier: Classifier | None = None
    classifier_loss: ClassifierLoss | None = None
    denoiser_loss: DenoiserLoss | None = None
    training: Training
    smoothing: Smoothing = Smoothing(sigma=0.5)  # of the certify.toml that is written at the end
    compute: Device = Device()

    @model_validator(mode="after")
    def _check(self) -> Self:
        other = TASKS[1 - TASKS.index(self.task)]
        if getattr(self, f"{other}_loss") is not None:
            raise ValueError(f"{other}_loss is given, but task = {self.task!r}; remove the table [{other}_loss]")
        if self.task == "denoiser" and self.denoiser.arch not in ("unet", "edm"):
            raise ValueError(f"denoiser.arch = {self.denoiser.arch!r} cannot be trained; use 'unet' or 'edm'")
        if self.task == "classifier":
            self._check_classifier()
        for key in ("pretrained", "new_last_layer"):
            if getattr(self.training, key) and self.task != "classifier":
                raise ValueError(f"training.{key} = true, but task = {self.task!r}")
        if self.denoiser.unet is not None and self.denoiser.unet.learn_sigma and self.task == "denoiser":
            raise ValueError("denoiser.unet.learn_sigma = true is not trained; use learn_sigma = false")
        return self

    def _check_classifier(self) -> None:
        if self.classifier is None:
            raise ValueError("classifier is missing, but task = 'classifier'; add the table [classifier]")
        if self.classifier_loss is None:
            raise ValueError("classifier_loss is missing, but task = 'classifier'; add the table [classifier_loss]")
        denoised, none = self.classifier_loss.images == "denoised", self.denoiser.arch == "none"
        if denoised and none:
            raise ValueError("classifier_loss.images = 'denoised', but there is no denoiser; add the table [denoiser]")
        arch = self.classifier.arch
        if arch == "diffusion":
            raise ValueError("classifier.arch = 'diffusion' cannot be trained; use another architecture")
        if arch in ("rrcm", "transformers") and self.classifier.checkpoint is None:
            raise ValueError(
                f"classifier.arch = {arch!r} takes its sizes from the checkpoint, which is missing; set "
                "classifier.checkpoint, or use another architecture"
            )
        if self.training.pretrained and self.classifier.checkpoint is not None:
            raise ValueError("training.pretrained = true, but classifier.checkpoint is given; remove one of them")
        if self.training.new_last_layer and not self.has_start:
            raise ValueError(
                "training.new_last_layer = true, but all weights are new; remove it, or set classifier.checkpoint or "
                "training.pretrained"
            )

    @property
    def has_start(self) -> bool:
        """Whether the classifier starts from weights that exist; an adapter always needs those of its classifier."""
        used = self.classifier
        return used is not None and (
            used.checkpoint is not None or used.adapter is not None or self.training.pretrained
        )

    def identity(self) -> "TrainingSpec":
        """The spec without what a resumed training may change: locations, device, and the spec of certify."""

        def placeless(data: Data) -> Data:
            return data.model_copy(update={"path": None})

        validation = None if self.validation is None else placeless(self.validation)
        arch = "" if self.classifier is None else self.classifier.arch
        reads_sigma = self.task == "classifier" and (arch.startswith("rrcm") or is_own(arch))
        changes = {"data": placeless(self.data), "validation": validation, "compute": Device(),
                   "smoothing": Smoothing(sigma=self.smoothing.sigma if reads_sigma else 0.5)}  # fmt: skip
        return self.model_copy(update=changes)

    def run_spec(self, sigma: float) -> RunSpec:
        """The networks and images as a spec of a run, for the functions that load them."""
        classifier = self.classifier or Classifier(arch="mnist_cnn")
        smoothing = Smoothing(sigma=sigma)
        return RunSpec(
            name=self.name, data=self.data, denoiser=self.denoiser, classifier=classifier, smoothing=smoothing
        )


def load_training(
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "spec"
) -> TrainingSpec:
    """Read and validate a training, as `load_spec` does a spec. Raises: UserError."""
    locations = (*LOCATIONS, "validation.path")
    return read_model(TrainingSpec, path_or_dict, overrides, locations=locations, where=where)
