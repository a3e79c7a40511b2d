"""What the machine can do, and how it is asked: device, and type of the matrix products."""

import ctypes
import os
import sys

import torch

from parrot.console import UserError, say


def tokens_a_forward(model, dtype):
    """The token budget of one forward: what the device's memory holds, up to where more no longer pays."""
    if model.device.type != "cuda":
        return 1536  # on two cores 2048 took a fifth more memory, 1024 was 2% slower
    # An estimate, not seen on a GPU yet: weights, gradients and two moments in float32, 1 GB for logits,
    # and for each token some 35 numbers of every layer's width.
    fixed = 16 * sum(p.numel() for p in model.parameters()) + 1e9
    each = 35 * model.config.num_hidden_layers * model.config.hidden_size * dtype.itemsize
    spare = 0.8 * torch.cuda.get_device_properties(model.device).total_memory - fixed
    return int(min(16384, max(1024, spare / each)))


def pick(config):
    """--device and --dtype of these settings -> torch.device, torch.dtype; the settings then say what they became.

    float32 where the device has no bfloat16 units: run.json and caches shall tell what was computed, and
    --resume find it again. UserError where the device is not there.
    """
    device = pick_device(config.device)
    if config.dtype == "bfloat16" and not multiplies_bfloat16(device):
        say(f"{device} has no units that multiply bfloat16: computing in float32")
        config.dtype = "float32"
    return device, getattr(torch, config.dtype)


def multiplies_bfloat16(device):
    """Whether the device has units for it. On a CPU without, a product takes 400 times as long as in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()  # the last of these is ARM's; all are used by oneDNN (mkldnn) alone
        return torch.backends.mkldnn.is_available() and any(map(has.get, ("avx512_bf16", "amx_bf16", "bf16")))
    return True


def pick_device(name):
    """auto | cpu | cuda | mps -> torch.device; UserError where this machine has none."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_here in here.items() if is_here)
    if not here[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has no {name}")
    index = int(os.environ.get("LOCAL_RANK", 0))  # torchrun: each process its own GPU
    if name == "cuda" and index >= torch.cuda.device_count():
        raise UserError(f"process {index} has no GPU of its own: this machine has {torch.cuda.device_count()}")
    return torch.device(name, index) if name == "cuda" else torch.device(name)


def send(tensor, device):
    """A tensor to its device; to a GPU from pinned memory, so that the CPU need not wait for what runs there."""
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)


def autocast(device, dtype):
    """Matrix products in `dtype`, everything else, the weights first, in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_memory():
    """Let freed memory be used again at once, where malloc is glibc's; returns how to give it back.

    By itself it returns large blocks to the kernel, and each new tensor then waits for its pages:
    our training on two cores takes a tenth longer. What is kept breaks into pieces with time, so call
    the result now and then (after each step): without, a run grew to 22 GB.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return lambda: None
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return lambda: libc.malloc_trim(0)


def peak_memory(device):
    """Bytes that this process held at most so far: of the GPU's memory, else of the machine's; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
