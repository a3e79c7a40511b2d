"""Compiled code for what treats every token alone (torch.compile): the same but for rounding.

Compiling fuses the many small passes over memory (norm, rotation, SiLU, sums) into few. It
takes half a minute, once a process.
"""

import torch

from parrot.console import UserError, say

# Tokens to train on from which "auto" compiles: on two cores it gave 5%, for 30 seconds.
EARNED_BACK = {"cpu": 500_000, "cuda": 500_000, "mps": float("inf")}


def compile_blocks(model, choice, tokens):
    """Let training run compiled code; returns whether it will.

    choice: "on", "off", or "auto": where it works and where the run, of so many `tokens`, is
    long enough. UserError where it is on and does not work.
    """
    if choice == "off" or (choice == "auto" and tokens < EARNED_BACK[model.device.type]):
        return False
    try:  # on something small: it takes a C++ compiler, or Triton
        torch.compile(lambda x: x.cos() + 1)(torch.zeros(8, device=model.device))
    except Exception as error:  # every backend has its own
        why = f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
        if choice == "on":
            raise UserError(f"--compile on: {why}") from None
        say(f"{why} (training goes on without, a little slower)")
        return False
    for block in model.model.layers:
        block.before_attention = _compiled_in_training(block.before_attention)
        block.after_attention = _compiled_in_training(block.after_attention)
    return True


def _compiled_in_training(function):
    """Evaluation and sampling stay as they are: they would need, and wait for, code of their own."""
    compiled = torch.compile(function, dynamic=True)  # dynamic: for ribbons of any length
    return lambda *tensors: (compiled if torch.is_grad_enabled() else function)(*tensors)
