"""RunSpec: what is to be certified, read from TOML, checked, and named by `votes_id`.

`votes_id` hashes exactly what can change a vote, so that a run never mixes votes of two base classifiers, two noise
levels or two seeds.
"""

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.block import Stage
from pipeline.errors import UserError
from pipeline.locations import resolve

# Raised by hand whenever a change to f's code can change a vote.
F_VERSION = 3

# What cannot change a vote, as (section, key); a key of None stands for the whole section.
_OUTSIDE_VOTES_ID: tuple[tuple[str, str | None], ...] = (
    ("name", None),
    ("data", "samples"),
    ("data", "path"),
    ("denoiser", "checkpoint"),
    ("denoiser", "sha256"),
    ("classifier", "checkpoint"),
    ("classifier", "sha256"),
    ("smoothing", "n0"),
    ("smoothing", "n"),
    ("smoothing", "alpha"),
    ("sampling", None),
    ("compute", None),
)

# The keys that hold locations, as (section, key).
LOCATIONS = (("data", "path"), ("denoiser", "checkpoint"), ("classifier", "checkpoint"))

# Draws of the selection in planned mode, unless n0 is given.
PILOT = 1000


class Section(BaseModel):
    """A table of the spec: unknown keys, wrong types and later changes are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    name: str
    path: str | None = None
    split: str = "test"
    samples: str = ":"
    num_classes: int | None = Field(default=None, ge=2)  # for data that does not tell
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
            raise ValueError(f"crop = {self.crop} exceeds resize = {self.resize}, the shorter side: take at most that")
        return self


class UNetSettings(Section):
    """Hyper-parameters of an OpenAI-style UNet and its noise schedule (arXiv 2102.09672, 2105.05233)."""

    model_channels: int = Field(ge=2, le=4096)
    channel_mult: list[Annotated[int, Field(ge=1, le=64)]] = Field(min_length=1, max_length=10)
    num_res_blocks: int = Field(ge=1, le=32)
    # downsampling factors (image size // resolution) at which attention runs
    attention_factors: list[Annotated[int, Field(ge=1, le=512)]] = []
    num_heads: int = Field(default=1, ge=1)
    num_head_channels: int | None = Field(default=None, ge=1)  # channels per head; overrides num_heads
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


class Denoiser(Section):
    arch: str = "none"
    checkpoint: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    steps: int = Field(default=1, ge=1, le=1000)  # 1: one-shot; more: deterministic DDIM from the timestep of sigma
    unet: UNetSettings | None = None

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.arch == "unet" and self.unet is None:
            raise ValueError("unet is missing: arch = 'unet' needs its hyper-parameters in [denoiser.unet]")
        if self.arch != "unet" and self.unet is not None:
            raise ValueError(f"unet is given, but arch = {self.arch!r}: [denoiser.unet] belongs to arch = 'unet'")
        if self.arch == "none" and (self.checkpoint is not None or self.steps > 1):
            given = "steps" if self.checkpoint is None else "checkpoint"
            raise ValueError(f"{given} is given, but arch = 'none' denoises nothing: remove it or name an architecture")
        return self


class Normalize(Section):
    mean: list[float]
    std: list[float]

    @model_validator(mode="after")
    def _check_std(self) -> Self:
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError("normalize needs as many mean as std values, every std above 0")
        return self


class Classifier(Section):
    arch: str
    checkpoint: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    # None: as the architecture's own metadata say; the field's checkpoints, which say nothing, need it given
    normalize: Literal["cifar10", "imagenet", "half", "none", "center-imagenet"] | Normalize | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None  # to the network's own size; None: as its metadata say


def _with_whole_keys(raw: Any) -> Any:
    """TOML's and JSON's keys are strings."""
    if isinstance(raw, Mapping):
        try:
            return {int(key): value for key, value in raw.items()}
        except ValueError as error:
            raise ValueError(f"{dict(raw)}: its keys must be whole numbers") from error
    return raw


WholeKeys = BeforeValidator(_with_whole_keys)
Alpha = Annotated[float | dict[int, float], WholeKeys]  # of one bound, or split in advance over looks: n -> its share


class BlockLengths(Section):
    selection: int = Field(default=100, ge=1)
    estimation: int = Field(default=1000, ge=1)

    def of(self, stage: Stage) -> int:
        return int(getattr(self, stage))


class Smoothing(Section):
    sigma: float = Field(gt=0, le=100)  # standard deviation of the noise, pixels in [0, 1]
    m: int = Field(default=1, ge=1, le=10_000)  # local copies
    local_sigma: float = Field(default=0.0, ge=0, le=100)
    local_seed: int = Field(default=0, ge=0)
    seed: Annotated[int, Field(ge=0)] | Literal["random"] = 0  # "random": 128 secret bits, kept in run.json
    noise_grid: int | None = Field(default=None, ge=1, le=65535)  # 255: noise in whole steps of an 8-bit image
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    n0: int = Field(default=100, ge=1, lt=2**31)
    n: int = Field(default=100_000, ge=1, lt=2**31)
    alpha: Alpha = 0.001  # error probability of a certificate, or its shares by the n at which is looked
    block: BlockLengths = BlockLengths()

    @model_validator(mode="after")
    def _check_draws(self) -> Self:
        check_alpha("alpha", self.alpha, self.n)
        for look in self.alpha if isinstance(self.alpha, Mapping) else ():
            check_multiple("alpha's look at n", look, self.block.estimation, "estimation")
        check_multiple("n0", self.n0, self.block.selection, "selection")
        check_multiple("n", self.n, self.block.estimation, "estimation")
        if self.m > 1 and self.local_sigma == 0:
            raise ValueError(
                f"m = {self.m} copies with local_sigma = 0 are all equal: set m = 1, or local_sigma above 0"
            )
        return self

    def draws(self, stage: Stage) -> int:
        """Draws per sample that the order asks of a stage."""
        return self.n0 if stage == "selection" else self.n


class Sampling(Section):
    mode: Literal["fixed", "planned", "grid"] = "fixed"
    skip_wrong: bool = False  # no estimation where the selected class is not the label
    max_acr_loss: float | None = Field(default=None, gt=0, lt=1)  # planned: share of the ACR that may be given up
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
                raise ValueError(f"{key} is given, but mode = {self.mode!r}: it belongs to mode = {mode!r}")
            if not given and self.mode == mode:
                raise ValueError(f"{key} is missing: mode = {mode!r} needs it, say radii = [0.0, 0.25, 0.5]")
        if self.radii is not None and any(a >= b for a, b in pairwise(self.radii)):
            raise ValueError(f"radii = {self.radii} must increase: sort them and leave out what stands twice")
        return self


class Compute(Section):
    device: Literal["cuda", "cpu", "auto"] = "cuda"
    compile: bool = False  # f by torch.compile: minutes of warm-up for each actor; votes differ by rounding alone


class RunSpec(Section):
    """Everything that one run asks for; a table of the TOML file per field."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: Data
    denoiser: Denoiser = Denoiser()
    classifier: Classifier
    smoothing: Smoothing
    sampling: Sampling = Sampling()
    compute: Compute = Compute()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """A plan wants a longer selection, which is its pilot."""
        match raw:
            case {"sampling": {"mode": "planned"}, "smoothing": Mapping() as smoothing}:
                return {**raw, "smoothing": {"n0": PILOT, **smoothing}}
        return raw

    @model_validator(mode="after")
    def _check_alpha(self) -> Self:
        if self.sampling.mode != "fixed" and not isinstance(self.smoothing.alpha, float):
            raise ValueError(
                f"smoothing.alpha is split over several n, but sampling.mode = {self.sampling.mode!r}: that mode looks "
                "as it must; give one alpha"
            )
        return self


def check_alpha(name: str, alpha: float | Mapping[int, float], n: int) -> None:
    """Refuse an impossible error probability, and a split one that does not look at n."""
    shares = alpha if isinstance(alpha, Mapping) else {n: alpha}
    for look, share in shares.items():
        where = f"{name}.{look}" if isinstance(alpha, Mapping) else name
        if not 0 < share < 0.5:
            raise UserError(f"{where} = {share} must lie between 0 and 0.5")
    if sum(shares.values()) >= 0.5:
        raise UserError(
            f"{name} = {dict(shares)} adds up to {sum(shares.values()):g}: all shares together must stay below 0.5"
        )
    if n not in shares:
        looks = ", ".join(map(str, sorted(shares)))
        raise UserError(f"n = {n} is no look of {name}, which is split over n = {looks}: take one of these")


def check_multiple(name: str, value: int, length: int, stage: Stage) -> None:
    """Refuse a number of draws that does not end on a block's edge, naming the nearest that do."""
    if value % length:
        below = value // length * length
        nearest = f"{below} or {below + length}" if below else f"{length}"
        raise UserError(f"{name} = {value} is not a multiple of the {stage} block of {length} draws: take {nearest}")


def load_spec(path_or_dict: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunSpec:
    """Read and check a spec.

    Relative paths in a file are taken from the file's folder, those in a mapping or an override from the working
    folder. An override is `section.key=value`, its value written as in TOML (a bare word is a string).

    Raises: UserError, naming key, value, limit and remedy.
    """
    if isinstance(path_or_dict, Mapping):
        where, raw, folder = "spec", _copy(path_or_dict), Path.cwd()
    else:
        path = Path(path_or_dict)
        where, folder = str(path), path.resolve().parent
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not valid TOML: {error}; mend it") from error
        except OSError as error:
            raise UserError(f"{where}: cannot read the spec: {error.strerror}; give the path of a TOML file") from error
    _anchor(raw, folder)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return RunSpec.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error)}") from None


def votes_id(spec: RunSpec, weights_ids: Mapping[str, str]) -> str:
    """Name what can change a vote: 32 hex digits over `identity`.

    Values that are defaults are left out, so that a key which a later version adds renames no earlier run; a default is
    changed only together with F_VERSION.
    """
    named = identity(spec, weights_ids, exclude_defaults=True)
    canonical = json.dumps(named, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def identity(spec: RunSpec, weights_ids: Mapping[str, str], *, exclude_defaults: bool = False) -> dict[str, Any]:
    """Everything that can change a vote, as plain JSON: the spec without `_OUTSIDE_VOTES_ID`, f's version, weights."""
    kept = spec.model_dump(mode="json", exclude_defaults=exclude_defaults)
    for section, key in _OUTSIDE_VOTES_ID:
        if key is None:
            kept.pop(section, None)
        else:
            kept.get(section, {}).pop(key, None)
    return {**kept, "f_version": F_VERSION, "weights": dict(weights_ids)}


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def _anchor(raw: dict[str, Any], folder: Path) -> None:
    """Resolve the locations in `raw`; relative paths count from `folder`."""
    for section, key in LOCATIONS:
        table = raw.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = resolve(table[key], folder)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r} has no 'section.key=value': write, say, --set smoothing.sigma=0.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    changed: dict[str, Any] = {last: value}
    for section in reversed(sections):
        changed = {section: changed}
    _anchor(changed, Path.cwd())
    _merge(raw, changed)


def _merge(into: dict[str, Any], changed: Mapping[str, Any]) -> None:
    for key, value in changed.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _one_line(error: ValidationError) -> str:
    """One of pydantic's findings, as one line for a user."""
    findings = error.errors()
    # of a value that may be a name or a table, a table's own findings say more than "not one of the names"
    of_table = (one for one in findings if "Normalize" in str(one["loc"]) and not one["type"].startswith("model_"))
    finding = next(of_table, findings[0])
    path = [str(part) for part in finding["loc"] if part not in ("Normalize", "float", "int") and "[" not in str(part)]
    name, value = ".".join(path), finding["input"]
    if finding["type"] == "extra_forbidden":
        known = _known_keys()
        siblings = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        remedy = f"the nearest valid key is {near[0]}" if near else f"valid keys: {', '.join(siblings)}"
        return f"{name} = {value!r}: unknown key; {remedy}"
    if finding["type"] == "missing":
        return f"{name} is missing: add it to the spec"
    if finding["type"] == "model_type":
        return f"{name} = {value!r}: must be a table, [{name}]"
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "value_error":  # ours: names its keys already
        return f"[{name}] {message}" if name else message
    return f"{name} = {value!r}: {message[0].lower()}{message[1:]}"


def _known_keys(model: type[BaseModel] = RunSpec, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        options = get_args(field.annotation) or (field.annotation,)
        sections = [one for one in options if isinstance(one, type) and issubclass(one, Section)]
        keys.append(prefix + name)
        for section in sections:
            keys.extend(_known_keys(section, f"{prefix}{name}."))
    return keys
