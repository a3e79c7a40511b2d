"""The nucleus: the likeliest tokens that hold top_p. A copy of parrot/sampling.py, nucleus.

`probabilities` are in descending order. Say which of them get probability 0. The token that crosses
the threshold stays, so at least one always does.
"""

from parrot.sampling import ROUNDING


def nucleus(logits, temperature, top_p):
    """logits (B, V) -> probabilities and tokens (B, V), in descending order of probability."""
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        threshold = top_p - ROUNDING
        outside = probabilities > threshold  # your line here
        probabilities = probabilities.masked_fill(outside, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), tokens
