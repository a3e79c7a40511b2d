"""The sum: what one ribbon adds to the loss of a step. A copy of parrot/training.py, loss_sum.

train.py calls backward() on the result for each ribbon of a step, then divides the gradient once,
by the number of targets of all ribbons. The result must not depend on how a step was split.
"""

import torch.nn.functional as F

from parrot.training import hidden_states_of_targets


def loss_sum(model, batch, dtype):
    """The loss of a ribbon, as train.py needs it."""
    hidden_states = hidden_states_of_targets(model, batch, dtype)  # (S, C)
    logits = model.logits(hidden_states).float()  # (S, V)
    loss = F.cross_entropy(logits, batch.targets)  # your line here
    return loss
