"""The sum: what one ribbon adds to the loss of a step. A copy of parrot/training.py, loss_sum.

train.py calls backward() on the result for each ribbon of a step, then divides the gradient once,
by the number of targets of all ribbons. The result must not depend on how a step was split.
"""

from parrot.training import token_losses


def loss_sum(model, batch, dtype):
    """The loss of a ribbon, as train.py needs it."""
    losses = token_losses(model, batch, dtype)  # (S,)
    loss = losses.mean()  # your line here
    return loss
