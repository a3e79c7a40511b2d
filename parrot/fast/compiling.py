"""model.Block.forward, faster: compiled (torch.compile), the same but for rounding.

Compiling fuses norm, rotation, SiLU and sums: half a minute for 0 to 5% on two cores, 14 s for
1.7 times on an H200. Held equal by tests/fast/test_compiling.py.
"""

import torch

from parrot.fast.captured import CapturedForward
from parrot.fast.ribbon import FastAttention
from parrot.system.console import UserError, say
from parrot.system.device import autocast

EARNED_BACK = {"cpu": 500_000, "cuda": 4_000_000, "mps": float("inf")}  # tokens until it pays off


def speed_up(model, choice, dtype, ribbon, longest, num_tokens):
    """All that training does to a model beforehand; returns whether blocks are compiled."""
    is_compiled = compile_blocks(model, choice, dtype, ribbon, num_tokens)
    if ribbon.fast.has_kernel(dtype, model.config.head_dim):
        model.forward = CapturedForward(model, longest)
    return is_compiled


def compile_blocks(model, choice, dtype, ribbon, num_tokens):
    """Let training run compiled blocks; returns whether it will.

    choice: on (UserError if it does not work), off, or auto: if it works and the run is long.
    ribbon: a trial; its size shapes the code, so a resumed run needs the same size.
    """
    if choice == "off" or (choice == "auto" and num_tokens < EARNED_BACK[model.device.type]):
        return False
    if not ribbon.fast.has_kernel(dtype, model.config.head_dim):  # a loop over documents
        FastAttention.attend = torch.compiler.disable(FastAttention.attend)
    for block in model.model.layers:
        block.forward = _compiled_in_training(block.forward)
    try:
        with autocast(model.device, dtype):
            model(torch.zeros_like(ribbon.positions), ribbon).sum().backward()
        return True
    except Exception as error:  # no C++ compiler, no Triton: every backend has its own errors
        reason = f"torch.compile does not work here: {error!r:.200}"
        if choice == "on":
            raise UserError(f"--compile on: {reason}") from None
        say(f"{reason} (training continues without it, a little slower)")
        for block in model.model.layers:
            del block.forward  # the method of the class is back
        return False
    finally:
        model.zero_grad()


def _compiled_in_training(forward):
    """Compiled in training only: evaluation and sampling would trigger more compilations."""
    compiled = torch.compile(forward, dynamic=True)  # dynamic: for ribbons of any length
    return lambda *args: (compiled if torch.is_grad_enabled() else forward)(*args)
