"""RunSpec: what to certify, read from TOML and validated; `votes_id` names everything that can change a vote.

Each table of a spec has a base class with the keys that can change a vote; together they make up `Identity`, whose hash
is the votes_id. A run never mixes the votes of two base classifiers, two noise levels, or two seeds.
"""

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from diffsmooth.pipeline.block import Stage
from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.locations import resolve
from diffsmooth.pipeline.records import LARGEST, Record, shortened

# Raised by hand whenever a change to f's code can change a vote.
F_VERSION = 3

# The keys that hold locations.
LOCATIONS = ("data.path", "denoiser.checkpoint", "classifier.checkpoint", "classifier.adapter.checkpoint")

# Selection draws in planned mode, unless n0 is given.
PILOT = 1000

MOST_CLASSES = 1_000_000  # a larger label is a mistake, and would allocate memory for its votes


def check_alpha(name: str, alpha: float | Mapping[int, float], n: int) -> None:
    """Refuse an impossible error probability, and a split one without a look at n."""
    shares = alpha if isinstance(alpha, Mapping) else {n: alpha}
    for look, share in shares.items():
        key = f"{name}.{look}" if isinstance(alpha, Mapping) else name
        if not 0 < share < 0.5:
            raise UserError(f"{key} = {share} must be above 0 and below 0.5")
    if sum(shares.values()) >= 0.5:
        raise UserError(
            f"{name} = {dict(shares)} adds up to {sum(shares.values()):g}; the sum of all shares must be below 0.5"
        )
    if n not in shares:
        looks = ", ".join(map(str, sorted(shares)))
        raise UserError(f"n = {n} has no share of {name}, which is split over n = {looks}; use one of these n")


def looks_at(alpha: float | Mapping[int, float], n: int) -> dict[int, float]:
    """The looks up to n and their shares of alpha; one look at n, unless alpha is split."""
    if isinstance(alpha, Mapping):
        return {look: share for look, share in sorted(alpha.items()) if look <= n}
    return {n: alpha}


def check_multiple(name: str, value: int, length: int, stage: Stage) -> None:
    """Refuse a number of draws that is not a multiple of the block length, naming the nearest that are."""
    if value % length:
        below = value // length * length
        nearest = f"{below} or {below + length}" if below else f"{length}"
        raise UserError(f"{name} = {value} is not a multiple of the {stage} block length {length}; use {nearest}")


def check_radii(radii: Sequence[float] | None) -> None:
    """Refuse the radii of grid mode unless they increase."""
    if radii is not None and any(a >= b for a, b in pairwise(radii)):
        raise UserError(f"radii = {shortened(list(radii))} must increase; sort them and remove duplicates")


class DataIdentity(Record):
    """Which images: the keys of [data] that can change a vote."""

    name: str
    split: str = "test"
    num_classes: int | None = Field(default=None, ge=2, le=MOST_CLASSES)  # if the data set does not say
    resize: int | None = Field(default=None, ge=1, le=10_000)  # length of the shorter side, pixels
    crop: int | None = Field(default=None, ge=1, le=10_000)  # side of the centre square, pixels, after resizing

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("name") == "imagenet":
            return {"resize": 256, "crop": 224, **raw}
        return raw

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop = {self.crop} exceeds resize = {self.resize}, the shorter side")
        return self


class Data(DataIdentity):
    """The table [data]."""

    path: str | None = None
    samples: str = ":"


class UNetSettings(Record):
    """Hyper-parameters of an OpenAI-style UNet and its noise schedule (arXiv 2102.09672, 2105.05233)."""

    model_channels: int = Field(ge=2, le=4096)
    channel_mult: list[Annotated[int, Field(ge=1, le=64)]] = Field(min_length=1, max_length=10)
    num_res_blocks: int = Field(ge=1, le=32)
    # downsampling factors (image size // resolution) at which attention runs
    attention_factors: list[Annotated[int, Field(ge=1, le=512)]] = Field(default=[])
    num_heads: int = Field(default=1, ge=1)
    num_head_channels: int | None = Field(default=None, ge=1)  # channels per head; overrides num_heads
    qkv_first: bool = False  # attention layers split q, k, v before the heads, as consistency models do
    num_groups: int = Field(default=32, ge=1)
    resblock_updown: bool = False
    learn_sigma: bool = False
    patch: int = Field(default=1, ge=1, le=64)  # side of the pixel patch that is folded into channels first
    schedule: Literal["linear", "cosine"] = "linear"
    steps: int = Field(default=1000, ge=1, le=100_000)
    rescale_timesteps: bool = False

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        """Groups and heads must divide the widths of the layers that use them; betas must stay below 1."""
        if self.schedule == "linear" and self.steps <= 20:
            raise ValueError(f"steps = {self.steps} is too few for a linear schedule; use at least 21")
        widths = [self.model_channels * mult for mult in self.channel_mult]
        for width in widths:
            if width > 16_384:
                raise ValueError(f"model_channels * channel_mult = {width} exceeds 16384; use smaller values")
            if width % self.num_groups:
                raise ValueError(
                    f"num_groups = {self.num_groups} does not divide the width {width} = model_channels * "
                    "channel_mult; use a divisor of every level's width"
                )
        attended = [width for level, width in enumerate(widths) if 2**level in self.attention_factors]
        key = "num_heads" if self.num_head_channels is None else "num_head_channels"
        for width in (*attended, widths[-1]):  # the middle block always has attention
            if width % (self.num_head_channels or self.num_heads):
                raise ValueError(
                    f"{key} = {getattr(self, key)} does not divide the width {width} of an attention layer; use a "
                    "divisor of it"
                )
        return self

    def heads(self, width: int) -> int:
        """Return the number of heads of an attention layer."""
        return width // self.num_head_channels if self.num_head_channels else self.num_heads

    @property
    def side_multiple(self) -> int:
        """The number that must divide both sides of an image, in pixels."""
        return int(self.patch * 2 ** (len(self.channel_mult) - 1))


class DenoiserIdentity(Record):
    """How f denoises: the keys of [denoiser] that can change a vote, besides the weights' hashes."""

    arch: str = "none"
    steps: int = Field(default=1, ge=1, le=1000)  # 1: one-shot; more: deterministic DDIM from the timestep of sigma
    unet: UNetSettings | None = None

    @model_validator(mode="after")
    def _check_unet(self) -> Self:
        if self.arch == "unet" and self.unet is None:
            raise ValueError("unet is missing; arch = 'unet' needs its hyper-parameters in [denoiser.unet]")
        if self.arch not in ("unet", "consistency") and self.unet is not None:
            raise ValueError(f"unet is given, but arch = {self.arch!r}; remove [denoiser.unet] or use arch = 'unet'")
        if self.arch == "none" and self.steps > 1:
            raise ValueError("steps is given, but arch = 'none' does not denoise")
        return self


class Denoiser(DenoiserIdentity):
    """The table [denoiser]."""

    checkpoint: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _check_checkpoint(self) -> Self:
        if self.arch == "none" and self.checkpoint is not None:
            raise ValueError("checkpoint is given, but arch = 'none' does not denoise")
        return self


class Normalize(Record):
    """Normalisation of images in [0, 1]: (x - mean) / std, per channel."""

    mean: list[float]
    std: list[float]

    @model_validator(mode="after")
    def _check_std(self) -> Self:
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError("normalize needs one std above 0 for each mean")
        return self


class AdapterIdentity(Record):
    """Which weights were added to a frozen classifier: the keys of [classifier.adapter] that can change a vote."""

    kind: Literal["lora", "bottleneck"]
    rank: int = Field(ge=1, le=100_000)  # of the added matrices, or the width of the bottleneck
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None  # LoRA's, which is scaled by alpha / rank; None: rank
    # patterns of names of layers; none: all linear ones but the last (lora), linear *.proj and *.fc2 (bottleneck)
    targets: list[Annotated[str, Field(pattern=r"^[\w.*?\[\]-]+$")]] = Field(default=[])

    @model_validator(mode="after")
    def _check_alpha(self) -> Self:
        if self.alpha is not None and self.kind != "lora":
            raise ValueError(f"alpha = {self.alpha} belongs to kind = 'lora'")
        return self


class Adapter(AdapterIdentity):
    """The table [classifier.adapter]: the file holds the adapter's weights and the classifier's last layer."""

    checkpoint: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class ClassifierIdentity(Record):
    """How f classifies: the keys of [classifier] that can change a vote, besides the weights' hashes."""

    arch: str
    # None: as the architecture's own metadata say; the field's checkpoints have none, so the spec must say it
    normalize: Literal["cifar10", "imagenet", "half", "none", "center-imagenet"] | Normalize | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None  # to the network's input size; None: see normalize
    options: dict[str, str | bool | int | float] = Field(default={})  # of the architecture
    # patterns of keys that the checkpoint has too many, such as decoder.*
    ignore: list[Annotated[str, Field(pattern=r"^[\w.*?\[\]-]+$")]] = Field(default=[])
    adapter: AdapterIdentity | None = None


class Classifier(ClassifierIdentity):
    """The table [classifier]."""

    adapter: Adapter | None = None
    checkpoint: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


def _with_integer_keys(raw: Any) -> Any:
    """The keys of TOML and JSON tables are strings."""
    if isinstance(raw, Mapping):
        try:
            return {int(key): value for key, value in raw.items()}
        except ValueError as error:
            raise ValueError(f"{shortened(dict(raw))}: the keys must be whole numbers") from error
    return raw


IntegerKeys = BeforeValidator(_with_integer_keys)
# The error probability of one bound; or its shares, split in advance over looks: n -> share.
Alpha = Annotated[float | dict[int, float], IntegerKeys]


class BlockLengths(Record):
    """Draws per block of each stage; fixed for the life of a run."""

    selection: int = Field(default=100, ge=1, le=LARGEST)
    estimation: int = Field(default=1000, ge=1, le=LARGEST)

    def of(self, stage: Stage) -> int:
        return int(getattr(self, stage))


Sigma = Annotated[float, Field(ge=0, le=100)]  # standard deviation, pixels in [0, 1]


class SmoothingIdentity(Record):
    """The noise and the local copies: the keys of [smoothing] that can change a vote."""

    sigma: Annotated[float, Field(gt=0, le=100)]
    m: int = Field(default=1, ge=1, le=10_000)  # local copies
    local_sigma: Sigma = 0.0
    local_seed: int = Field(default=0, ge=0)
    seed: Annotated[int, Field(ge=0)] | Literal["random"] = 0  # "random": 128 secret bits, drawn once for run.json
    noise_grid: int | None = Field(default=None, ge=1, le=65535)  # 255: noise in whole steps of an 8-bit image
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    block: BlockLengths = BlockLengths()

    @model_validator(mode="after")
    def _check_copies(self) -> Self:
        if self.m > 1 and self.local_sigma == 0:
            raise ValueError(
                f"m = {self.m} copies with local_sigma = 0 are all equal; use m = 1, or local_sigma above 0"
            )
        # image and noise must add without rounding in float32; no draw exceeds 9 standard deviations
        if self.noise_grid is not None and self.noise_grid * (9 * self.sigma + 1) > 2**24:
            raise ValueError(
                f"noise_grid = {self.noise_grid} with sigma = {self.sigma:g} exceeds 2^24 steps, which float32 rounds; "
                "use a smaller noise_grid"
            )
        return self


class Smoothing(SmoothingIdentity):
    """The table [smoothing]."""

    n0: int = Field(default=100, ge=1, le=LARGEST)
    n: int = Field(default=100_000, ge=1, le=LARGEST)
    alpha: Alpha = 0.001

    @model_validator(mode="after")
    def _check_draws(self) -> Self:
        check_alpha("alpha", self.alpha, self.n)
        for look in self.alpha if isinstance(self.alpha, Mapping) else ():
            check_multiple("alpha's look at n", look, self.block.estimation, "estimation")
        check_multiple("n0", self.n0, self.block.selection, "selection")
        check_multiple("n", self.n, self.block.estimation, "estimation")
        return self

    def draws(self, stage: Stage) -> int:
        """Draws per sample that the spec asks for in a stage."""
        return self.n0 if stage == "selection" else self.n


SamplingMode = Literal["fixed", "planned", "grid"]


class Sampling(Record):
    """The table [sampling]: which of the n draws of a sample are cast."""

    mode: SamplingMode = "fixed"
    skip_wrong: bool = False  # no estimation if the selected class is not the label
    max_acr_loss: float | None = Field(default=None, gt=0, lt=1)  # planned: share of the ACR that may be lost
    radii: list[Annotated[float, Field(ge=0)]] | None = Field(default=None, min_length=1)  # grid, pixels in [0, 1]

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("mode") == "planned":
            return {"max_acr_loss": 0.01, **raw}
        return raw

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        for key, mode in (("max_acr_loss", "planned"), ("radii", "grid")):
            given = getattr(self, key) is not None
            if given and self.mode != mode:
                raise ValueError(f"{key} is given, but mode = {self.mode!r}; remove it or use mode = {mode!r}")
            if not given and self.mode == mode:
                raise ValueError(f"{key} is missing; mode = {mode!r} needs it, for example radii = [0.0, 0.25, 0.5]")
        check_radii(self.radii)
        return self


class Compute(Record):
    """The table [compute]: what cannot change a vote beyond rounding."""

    device: Literal["cuda", "cpu", "auto"] = "cuda"
    compile: bool = False  # compile f with torch.compile: takes minutes per actor; votes differ by rounding only


class RunSpec(Record):
    """What one run is asked for; each field is a table of the TOML file."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: Data
    denoiser: Denoiser = Denoiser()
    classifier: Classifier
    smoothing: Smoothing
    sampling: Sampling = Sampling()
    compute: Compute = Compute()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Planned mode uses the selection as its pilot, so it needs more selection draws."""
        match raw:
            case {"sampling": {"mode": "planned"}, "smoothing": Mapping() as smoothing}:
                return {**raw, "smoothing": {"n0": PILOT, **smoothing}}
        return raw

    @model_validator(mode="after")
    def _check_alpha(self) -> Self:
        if self.sampling.mode != "fixed" and not isinstance(self.smoothing.alpha, float):
            raise ValueError(
                f"smoothing.alpha is split over several n, but sampling.mode = {self.sampling.mode!r}; use one alpha, "
                "or mode = 'fixed'"
            )
        return self

    def with_seed(self, seed: int) -> "RunSpec":
        """The spec with a number in place of the seed "random"."""
        return self.model_copy(update={"smoothing": self.smoothing.model_copy(update={"seed": seed})})


class Identity(Record):
    """Everything that can change a vote: the spec's identities, the version of f's code, the hashes of its weights."""

    data: DataIdentity
    denoiser: DenoiserIdentity = DenoiserIdentity()
    classifier: ClassifierIdentity
    smoothing: SmoothingIdentity
    f_version: int = Field(ge=1)
    weights: dict[str, str]

    @property
    def votes_id(self) -> str:
        """32 hex digits. Defaults are left out, so a key added later renames no earlier run; a default may therefore
        only be changed together with F_VERSION."""
        named = self.model_dump(mode="json", exclude_defaults=True)
        canonical = json.dumps(named, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


_Part = TypeVar("_Part", bound=Record)


def identity(spec: RunSpec, weights_ids: Mapping[str, str]) -> Identity:
    """The part of a spec that can change a vote, with the hashes that `smoothing.weights_ids` returns."""

    def part(model: type[_Part], section: Record, **changed: Record | None) -> _Part:
        return model.model_validate({key: getattr(section, key) for key in model.model_fields} | changed)

    adapter = spec.classifier.adapter
    return Identity(
        data=part(DataIdentity, spec.data),
        denoiser=part(DenoiserIdentity, spec.denoiser),
        classifier=part(
            ClassifierIdentity, spec.classifier, adapter=None if adapter is None else part(AdapterIdentity, adapter)
        ),
        smoothing=part(SmoothingIdentity, spec.smoothing),
        f_version=F_VERSION,
        weights=dict(weights_ids),
    )


def votes_id(spec: RunSpec, weights_ids: Mapping[str, str]) -> str:
    """The name of everything that can change a vote: 32 hex digits."""
    return identity(spec, weights_ids).votes_id


def load_spec(
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "spec"
) -> RunSpec:
    """Read and validate a spec.

    Relative paths in a file count from the file's folder; those in a mapping or in an override from the working folder.
    `where` is what messages call a mapping.
    An override is `section.key=value`, its value written as in TOML (a bare word is a string).

    Raises: UserError, naming key, value, limit and remedy.
    """
    return read_model(RunSpec, path_or_dict, overrides, where=where)


def read_model(
    model: type[_Part],
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    locations: Sequence[str] = LOCATIONS,
    where: str = "spec",
) -> _Part:
    """Read and validate a TOML file of any model, as `load_spec` does. `locations` are its keys that hold locations."""
    if isinstance(path_or_dict, Mapping):
        raw, folder = _copy(path_or_dict), Path.cwd()
    else:
        where, folder = os.fspath(path_or_dict), Path(path_or_dict).absolute().parent
        raw = _read_toml(path_or_dict)
    _resolve_locations(raw, folder, locations)
    try:
        for override in overrides:
            _apply_override(raw, override, locations)
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, model)}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the spec: {error.strerror}; give the path of a TOML file") from error
    except ValueError as error:  # not TOML, not UTF-8, a number with thousands of digits, or a path with a NUL byte
        raise UserError(f"{path}: not valid TOML: {first_line(error)}") from error


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def locations_in(raw: dict[str, Any], names: Sequence[str] = LOCATIONS) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield each location in a spec that is not validated: its name, the table that holds it, and its key there."""
    for name in names:
        *sections, key = name.split(".")
        table: Any = raw
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(table.get(key), str):
            yield name, table, key


def _resolve_locations(raw: dict[str, Any], folder: Path, locations: Sequence[str]) -> None:
    for _, table, key in locations_in(raw, locations):
        table[key] = resolve(table[key], folder)


def _apply_override(raw: dict[str, Any], override: str, locations: Sequence[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r} is not of the form section.key=value; write --set smoothing.sigma=0.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    *sections, last = key.strip().split(".")
    changed: dict[str, Any] = {last: value}
    for section in reversed(sections):
        changed = {section: changed}
    _resolve_locations(changed, Path.cwd(), locations)
    _merge(raw, changed)


def _merge(into: dict[str, Any], changed: Mapping[str, Any]) -> None:
    for key, value in changed.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """One of pydantic's findings as one line for a user."""
    findings = error.errors(include_url=False)
    # a value may be a name or a table; then the findings about the table say more than "not one of the names"
    of_table = (one for one in findings if "Normalize" in str(one["loc"]) and not one["type"].startswith("model_"))
    finding = next(of_table, findings[0])
    path = [str(part) for part in finding["loc"] if part not in ("Normalize", "float", "int") and "[" not in str(part)]
    name, value = ".".join(path)[:300], shortened(finding["input"])
    if finding["type"] == "extra_forbidden":
        known = known_keys(model)
        siblings = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        remedy = f"the nearest valid key is {near[0]}" if near else f"valid keys: {', '.join(siblings)}"
        return f"{name} = {value}: unknown key; {remedy}"
    if finding["type"] == "missing":
        return f"{name} is missing; add it to the spec"
    if finding["type"] == "model_type":
        return f"{name} = {value}: must be a table, [{name}]" if name else "the spec must be a table of tables"
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "value_error":  # ours: names its keys already
        return f"[{name}] {message}" if name else message
    return f"{name} = {value}: {message[0].lower()}{message[1:]}"


def known_keys(model: type[BaseModel] = RunSpec, prefix: str = "") -> list[str]:
    """All keys that a spec may have, dotted."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        options = get_args(field.annotation) or (field.annotation,)
        tables = [one for one in options if isinstance(one, type) and issubclass(one, Record)]
        keys.append(prefix + name)
        for table in tables:
            keys.extend(known_keys(table, f"{prefix}{name}."))
    return keys
