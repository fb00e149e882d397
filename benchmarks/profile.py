"""`python -m benchmarks speed SPEC --profile`: what the device does while votes are cast, by kind of kernel.

torch.profiler records the kernels of a GPU, or torch's operators on a CPU. The time that none of them explains is the
launch gaps of a GPU, or Python and the code of a compiled f on a CPU. The traffic is what operators read and write if
none are fused, so it is the same for an eager and a compiled f.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OTHER = "pointwise and others"
_KINDS = (  # the first that matches; fused kernels have the names of all that they do
    (_OTHER, r"^triton_poi"),
    ("attention and softmax", r"scaled_dot_product|sdpa|flash|fmha|attention|softmax"),
    ("norm", r"norm|moments|fusedparams|welford"),
    ("convolution", r"conv|fprop|implicit|winograd"),
    ("matrix product", r"gemm|gemv|mm(_out)?\b|matmul|linear|nvjet|cutlass|cublas"),
    ("copy", r"cop(y|ies)|mem(cpy|set)|\bcat|catarray|tonhwc|tonchw|transpose|clone|\bfill_?\b|zero_"),
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All kernels or operators of one kind."""

    name: str
    share: float  # of the wall time
    calls: float  # per batch
    bytes_per_draw: float  # read and written, if nothing is fused


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What the device does during some batches."""

    on_gpu: bool
    batch_size: int
    batches: int
    seconds: float
    idle: float  # share of the wall time in which nothing that was recorded runs
    kinds: list[Kind]  # the most expensive first
    slowest: dict[str, float]  # single kernels or operators -> share of the wall time


def kind_of(kernel: str) -> str:
    """The kind of a kernel or operator by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, kernel.lower())), _OTHER)


def profile(
    cast: Callable[[int, int], object],
    batch_size: int,
    *,
    batches: int,
    scores: Callable[[Tensor], Tensor],
    x_BCHW: Tensor,
    clock: Callable[[], float],
) -> Profile:
    """Record `cast(batch_size, batches)` on the device of `x_BCHW`, and the traffic of `scores(x_BCHW)`, not compiled.

    Raises: RuntimeError if the profiler cannot record this device.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's library prints its debugging output otherwise
    on_gpu = x_BCHW.device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        start = clock()
        cast(batch_size, batches)
        seconds = clock() - start
    found = [event for event in recorded.events() or () if not getattr(event, "is_user_annotation", False)]
    if on_gpu:
        kernels = [event for event in found if event.device_type == DeviceType.CUDA]
        spans = [(event.time_range.start, event.time_range.end) for event in kernels]
        timed = [(event.name, (stop - start) / 1e6) for event, (start, stop) in zip(kernels, spans, strict=True)]
        busy = covered(spans) / 1e6
    else:
        timed = [(event.name, event.self_cpu_time_total / 1e6) for event in found if "::" in event.name]
        busy = sum(duration for _, duration in timed)
    if not timed:
        raise RuntimeError("torch.profiler recorded nothing on this device")
    with _Traffic() as traffic:
        scores(x_BCHW)
    by_name = _sums(timed)
    by_kind = _sums((kind_of(name), duration) for name, duration in timed)
    calls = _sums((kind_of(name), 1.0) for name, _ in timed)
    kinds = [
        Kind(
            name=name,
            share=by_kind.get(name, 0.0) / seconds,
            calls=calls.get(name, 0.0) / batches,
            bytes_per_draw=traffic.bytes.get(name, 0) / len(x_BCHW),
        )
        for name in dict.fromkeys([*by_kind, *traffic.bytes])
    ]
    return Profile(
        on_gpu=on_gpu,
        batch_size=batch_size,
        batches=batches,
        seconds=seconds,
        idle=max(0.0, 1 - busy / seconds),
        kinds=sorted(kinds, key=lambda kind: -kind.share),
        slowest={name: by_name[name] / seconds for name in sorted(by_name, key=by_name.__getitem__, reverse=True)[:10]},
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in pairs:
        sums[name] = sums.get(name, 0.0) + value
    return sums


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, by kind; views read and write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in returned):
            kind = kind_of(func.name())
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes[kind] = self.bytes.get(kind, 0) + sum(one.numel() * one.element_size() for one in tensors)
        return out
