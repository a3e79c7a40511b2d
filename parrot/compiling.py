"""Compiled code for what treats every token alone (torch.compile): the same but for rounding.

Compiling fuses the many small passes over memory (norm, rotation, SiLU, sums) into few. It
takes half a minute, once a process.
"""

import torch

from parrot.attention import Ribbon
from parrot.console import UserError, say
from parrot.device import autocast

# Tokens to train on from which "auto" compiles: on two cores it gave 5%, for 30 seconds. (On a GPU: a guess.)
EARNED_BACK = {"cpu": 500_000, "cuda": 500_000, "mps": float("inf")}


def compile_blocks(model, choice, tokens, dtype):
    """Let training run compiled code; returns whether it will.

    choice: "on", "off", or "auto": where it works and where the run, of so many `tokens`, is
    long enough. UserError where it is on and does not work.
    """
    if choice == "off" or (choice == "auto" and tokens < EARNED_BACK[model.device.type]):
        return False
    for block in model.model.layers:
        block.before_attention = _compiled_in_training(block.before_attention)
        block.after_attention = _compiled_in_training(block.after_attention)
    try:  # Always on a ribbon of this size: the code is made from the first one it sees, and a
        # resumed run shall compute with the same code to the same bits.
        with autocast(model.device, dtype):
            model(torch.zeros(256, dtype=torch.long, device=model.device), Ribbon([256], model.device)).sum().backward()
    except Exception as error:  # it takes a C++ compiler, or Triton; every backend has its own errors
        why = f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
        if choice == "on":
            raise UserError(f"--compile on: {why}") from None
        say(f"{why} (training goes on without, a little slower)")
        for block in model.model.layers:
            del block.before_attention, block.after_attention  # those of the class are back
        return False
    finally:
        model.zero_grad()
    return True


def _compiled_in_training(function):
    """Evaluation and sampling stay as they are: they would need, and wait for, code of their own."""
    compiled = torch.compile(function, dynamic=True)  # dynamic: for ribbons of any length
    return lambda *tensors: (compiled if torch.is_grad_enabled() else function)(*tensors)
