"""The last matrix and the cross-entropy as one operation, against F.cross_entropy and autograd."""

import pytest
import torch

from parrot.fast import head


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 19])
def test_the_head_by_hand_is_that_of_autograd(rows, dtype, monkeypatch):
    monkeypatch.setattr(head, "ROWS_AT_ONCE", 7)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24).to(dtype).requires_grad_(), (torch.randn(1000, 24) * 2).requires_grad_()
    targets = torch.arange(rows) * 7 % 1000
    expected = torch.nn.functional.cross_entropy((x @ weight.to(dtype).T).float(), targets, reduction="sum")
    wanted = torch.autograd.grad(expected / 50, (x, weight))
    loss = head.head_loss(x, weight, targets)
    assert torch.allclose(loss, expected, rtol=1e-5)
    for found, gradient in zip(torch.autograd.grad(loss / 50, (x, weight)), wanted):
        assert found.dtype == gradient.dtype and close(found, gradient, 2e-2 if dtype == torch.bfloat16 else 1e-5)
