"""What every launcher asks of the device, and the one place from which kernels are launched."""

import functools
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# Under TRITON_INTERPRET=1 the kernels run in numpy on CPU tensors, which is how their numbers are tested without a GPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)

MIN_CAPABILITY = 80


def check_device(**tensors: Tensor | None) -> torch.device:
    """The CUDA device on which all the tensors are; None is skipped.

    Raises ValueError where they are on different devices or not on a CUDA device, RuntimeError where the device's
    compute capability is below 8.0, and under ROCm, whose devices are called "cuda" too.
    """
    (first, head), *rest = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in rest:
        if tensor.device != head.device:
            raise ValueError(
                f"all tensors must be on one device, got {first} on {head.device} and {name} on {tensor.device}; "
                "move them with .to()"
            )
    if head.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{first} must be on a CUDA device, got {head.device}; move it with .to('cuda')")
    if torch.version.hip is not None:
        raise RuntimeError(f"these kernels are for CUDA, got a build of torch for ROCm {torch.version.hip}")
    found = capability(head.device)
    if found < MIN_CAPABILITY:
        raise RuntimeError(
            f"these kernels need compute capability {MIN_CAPABILITY / 10} or newer, got {found / 10} "
            f"({torch.cuda.get_device_name(head.device)}); keep the model on the CPU"
        )
    return head.device


@functools.cache
def capability(device: torch.device) -> int:
    """The compute capability as one number: 90 for an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """The number of streaming multiprocessors."""
    if device.type != "cuda":
        return 4  # the interpreter runs programs one after another
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


@functools.cache
def name(device: torch.device) -> str:
    """The device's name, under which its tuned configurations are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Runs `programs` programs of a kernel on the device's current stream.

    Products and sums are never fused behind a kernel's back: where one rounding is meant, the kernel says tl.fma.
    maxnreg is all that a thread can have, unless given: left alone, ptxas spills registers for more occupancy.
    The number of rows is no reason to compile again: the kernels name M in do_not_specialize.
    """
    options = {"maxnreg": min(255, 2048 // options.get("num_warps", 4))} | options
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **options, enable_fp_fusion=False)
