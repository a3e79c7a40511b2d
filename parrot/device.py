"""What the machine can do, and how it is asked: device, autocast, memory."""

import contextlib
import ctypes
import sys

import torch

from parrot.console import UserError

TOKENS_A_FORWARD = {"cpu": 4096, "mps": 4096, "cuda": 16384}  # more is faster until memory ends


def pick_device(name):
    """auto | cpu | cuda | mps -> torch.device; UserError where this machine has none."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_here in here.items() if is_here)
    if not here[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has no {name}")
    return torch.device(name)


def autocast(device, dtype):
    """Matrix products in `dtype`, everything else, the weights first, in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor. Call before the first big tensor.

    By default it gives every big block back to the kernel, and each new tensor then faults
    its pages in one by one: 1.6 x the training time. On other systems: does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # a Linux without glibc
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)  # no block comes straight from the kernel
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # nor goes back to it
