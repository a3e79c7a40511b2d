"""What the machine can do, and how it is asked: device, and type of the matrix products."""

import sys

import torch

from parrot.system.console import refuse, say
from parrot.system.distributed import torchrun_place


def pick(device_name, dtype_name):
    """--device, --dtype -> torch.device, torch.dtype; bfloat16 only where it pays."""
    device = pick_device(device_name)
    unsafe = device.type == "mps" and dtype_name != "float32"  # sees later tokens: pytorch#195910
    if unsafe or (dtype_name == "bfloat16" and not multiplies_bfloat16(device)):
        has_float16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        better = "float16" if has_float16 else "float32"
        say(f"{dtype_name} is slow or wrong on {device}: computing in {better}")
        dtype_name = better
    return device, getattr(torch, dtype_name)


def pick_device(name):
    """auto | cpu | cuda | mps -> torch.device; UserError where this machine has none that works."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    chosen = next(device for device in here if here[device]) if name == "auto" else name
    _, num_processes, index = torchrun_place()  # each process has its own GPU
    device = torch.device(chosen, index) if chosen == "cuda" else torch.device(chosen)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of the cache
    try:
        torch.ones(1, device=device).add(1).item()  # an old or a new card: torch may have no code
        return device
    except Exception as error:
        fault = f"{device} does not compute: {error!s:.200}".splitlines()[0]
    refuse(f"--device {name}:", {fault: name != "auto" or num_processes > 1})
    say(f"{fault} (computing on the CPU)")
    return torch.device("cpu")


def multiplies_bfloat16(device):
    """Whether it has bfloat16 units. On a CPU without, a matmul is 400 times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has, units = torch.cpu.get_capabilities(), ("avx512_bf16", "amx_bf16", "bf16")  # bf16: ARM's
    return torch.backends.mkldnn.is_available() and any(has.get(unit) for unit in units)


def tokens_per_forward(model, dtype, longest=0):
    """Tokens in one forward. longest: the longest document if attention is plain, else 0."""
    if model.device.type != "cuda":
        # Measured on two cores: fewer are slower (16 bits: 2%, float32: 12%), more take memory.
        return min(1536, 256 * torch.get_num_threads()) if dtype == torch.float32 else 1536
    # Bytes: weights, gradients, two moments; a token's 35 C numbers in each layer, and its logits.
    fixed, config = 16 * sum(p.numel() for p in model.parameters()), model.config
    per_layer = 35 * config.hidden_size * dtype.itemsize + 12 * config.num_attention_heads * longest
    per_token = config.num_hidden_layers * per_layer + 14 * config.vocab_size
    spare = 0.8 * torch.cuda.get_device_properties(model.device).total_memory - fixed
    return int(min(16384, max(1024, spare / per_token)))


def autocast(device, dtype):
    """Matrix products in `dtype`; everything else, above all the weights, in float32."""
    return torch.autocast(device.type, dtype, dtype != torch.float32, cache_enabled=False)


def peak_memory(device):
    """The peak in bytes, of the GPU's memory or else of the process's; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # Windows has none
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
