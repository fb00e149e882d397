"""The device that runs the networks: how it is chosen, and which facts about it can change a vote."""

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from pydantic import BaseModel, ConfigDict

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import RunSpec

_PACKAGES = ("numpy", "torch", "pillow", "pyarrow", "torchvision")
_OPTIONAL_PACKAGES = ("timm", "diffusers")  # only some models need them


@contextlib.contextmanager
def torch_settings(precision: str, threads: int | None = None, *, deterministic: bool = False) -> Iterator[None]:
    """Set torch's global flags, and the threads of a CPU, as a computation needs them, and restore them afterwards.

    TF32 is used if and only if the precision is tf32. With `deterministic`, torch prefers deterministic algorithms.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    _set_tf32(precision == "tf32", precision == "tf32")
    _set_threads(threads or before[2])
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        _set_tf32(*before[:2])
        _set_threads(before[2])
        if deterministic:
            torch.use_deterministic_algorithms(was_deterministic)


def _set_tf32(of_products: bool, of_convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = of_products, of_convolutions


def _set_threads(threads: int) -> None:
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


class DeviceFacts(BaseModel):
    """The facts about a device and its software that can change a vote; they are recorded with every block."""

    model_config = ConfigDict(frozen=True)

    device: str
    tf32: bool
    cudnn_benchmark: bool
    versions: dict[str, str]


def device_of(spec: RunSpec) -> torch.device:
    """Return the device that a spec selects.

    Raises: UserError if the spec requires a GPU and there is none; the CPU is never used silently.
    """
    return available_device(spec.compute.device)


def available_device(selected: str) -> torch.device:
    """Return the device for compute.device = `selected`: cuda, cpu or auto. Raises: UserError, as `device_of` does."""
    if selected != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if selected == "cuda":
        raise UserError(
            f"compute.device = 'cuda', but torch {torch.__version__} sees no GPU on {platform.node()}; run on a GPU "
            "node, or choose the CPU with --set compute.device=cpu"
        )
    return torch.device("cpu")


def any_device(spec: RunSpec) -> torch.device:
    """Return a GPU if there is one and the spec allows it, else the CPU: for work that makes no votes."""
    on_gpu = spec.compute.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def computes(device: torch.device) -> bool:
    """Return whether a device still computes. After some errors, a process can never use its GPU again."""
    try:
        return torch.ones(1, device=device).add(1).item() == 2
    except RuntimeError:  # of CUDA, which raises its first error again at every call
        return False


def device_facts(device: torch.device) -> DeviceFacts:
    """Return the facts about a device, torch's settings and the installed packages."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return DeviceFacts(
        device=f"{device.type} {name}",
        tf32=torch.backends.cuda.matmul.allow_tf32,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        versions={"python": platform.python_version(), **package_versions()},
    )


def package_versions() -> dict[str, str]:
    versions = {name: version(name) for name in _PACKAGES}
    for name in _OPTIONAL_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_torch() -> str:
    """The versions of torch and CUDA, and the number of GPUs of this machine."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    gpus = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__} with {cuda}, {gpus} here"
