"""The schedule by hand, and which weights decay."""

import math

import pytest
import torch
from conftest import tiny_model

from parrot.config import TrainConfig
from parrot.optim import learning_rate, make_optimizer


def test_the_schedule_by_hand():
    rates = [learning_rate(step, 12, peak=2.0, floor=0.2, warmup_ratio=0.25) for step in range(12)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3] == pytest.approx(2.0) and rates[-1] == pytest.approx(0.2)
    assert rates[7] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 4 / 8)) / 2)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


def test_the_warmup_is_rounded_to_whole_steps():
    assert [learning_rate(step, 11, 3.0, 0.3, 0.25) for step in range(4)] == pytest.approx([1, 2, 3, 3])  # 2.75 steps


@pytest.mark.parametrize("total, warmup", [(1, 0.0), (1, 1.0), (2, 0.5), (3, 1.0)])
def test_short_schedules_stay_within_bounds(total, warmup):
    assert all(0.1 <= learning_rate(s, total, 1.0, 0.1, warmup) <= 1.0 for s in range(total))


def test_matrices_decay_and_scales_do_not():
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.5, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # without a gradient, only decay moves anything
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] if "norm" in name else before[name] * 0.95, atol=1e-6), name
