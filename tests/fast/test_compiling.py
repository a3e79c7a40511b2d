"""Compiled blocks give the step of plain ones."""

import os
import shutil

import pytest
import torch
from test_training import close, examples, gradients  # noqa: F401  (examples is a fixture)

from parrot.attention import Ribbon
from parrot.config import TrainConfig
from parrot.fast.compiling import compile_blocks
from parrot.model import Llama
from parrot.system.distributed import Processes
from parrot.training import held_out_means, make_optimizer


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_code_gives_the_same_step(examples, tiny_folder):  # noqa: F811
    """Loss, gradient and parameters after AdamW, for every split of the 64 examples."""
    plain, compiled = Llama.load(tiny_folder), Llama.load(tiny_folder)
    assert compile_blocks(compiled, "on", torch.float32, Ribbon([256]), 0)
    expected_loss, expected = gradients(plain, examples)
    for split in ((None, None), (1, None), (4, None), (None, 300)):
        loss, grads = gradients(compiled, examples, *split)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert all(close(grads[name], expected[name], 2e-5) for name in expected)
    for model in (plain, compiled):
        make_optimizer(model, TrainConfig()).step()
    assert all(close(c, p, 1e-5) for c, p in zip(compiled.parameters(), plain.parameters()))
    assert held_out_means(compiled, examples, 300, torch.float32, Processes()) == pytest.approx(
        held_out_means(plain, examples, 300, torch.float32, Processes()), rel=1e-4)
