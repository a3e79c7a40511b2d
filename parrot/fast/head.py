"""training.loss_sum, faster: the sum of F.cross_entropy(x @ weight.T, targets) in one operation.

The logits are a step's largest tensors: here a piece of them becomes its own gradient and is
forgotten. 1,024 rows take 40 ms, by autograd 65 to 250 (two cores, bfloat16) and the memory for
all. Held equal, forward and backward, by tests/fast/test_head.py.
"""

import torch

ROWS_AT_ONCE = 1024  # their logits take 200 MB in float32
ROWS_IN_CACHE = 8  # the logits of so many rows fit in a CPU's caches


class _HeadLoss(torch.autograd.Function):
    """x (S, C), weight (V, C), targets (S,) -> the sum of the losses."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        """Computes both gradients, too, while the logits are there."""
        matrix = weight.detach().to(x.dtype)
        loss = torch.zeros((), device=x.device)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        pieces = (tensor.split(ROWS_AT_ONCE) for tensor in (x, targets, grad_x))
        for x_piece, targets_piece, grad_piece in zip(*pieces, strict=True):
            logits = x_piece @ matrix.T  # (at most ROWS_AT_ONCE, V)
            loss += to_gradient_(logits, targets_piece)
            grad_piece.copy_(logits @ matrix)
            grad_weight += logits.T @ x_piece
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight.mul_(grad), None


head_loss = _HeadLoss.apply


def to_gradient_(logits, targets):
    """Overwrite logits (S, V) with the gradient of their loss; returns the sum of the losses.

    The loss is -log p(target) with p = softmax(logits), its gradient p less 1 at the target:

    >>> logits = torch.zeros(1, 4)
    >>> to_gradient_(logits, torch.tensor([2])), logits  # log(4), and
    (tensor(1.3863), tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]]))
    """
    loss = torch.zeros((), device=logits.device)
    at_once = ROWS_IN_CACHE if logits.device.type == "cpu" else len(logits)
    for rows, target in zip(logits.split(at_once), targets[:, None].split(at_once), strict=True):
        p = rows.float()
        p -= p.amax(-1, keepdim=True)
        at_target = p.gather(-1, target)
        sums = p.exp_().sum(-1, keepdim=True)
        loss += (sums.log() - at_target).sum()
        p /= sums
        rows.copy_(p.scatter_add_(-1, target, torch.full_like(at_target, -1.0)))
    return loss
