"""What the machine can do, and how it is asked: device, autocast, memory."""

import contextlib

import torch

from parrot.console import UserError

# Tokens in one forward. On a CPU, 4096 were a tenth faster but took 9.4 GB instead of 5.8.
TOKENS_A_FORWARD = {"cpu": 2048, "mps": 2048, "cuda": 16384}


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
