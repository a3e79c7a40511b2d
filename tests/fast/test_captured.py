"""The CUDA graph of a step, where there is a GPU."""

import pytest
import torch
from conftest import tiny_model

from parrot import sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_the_same_replies_as_step_by_step(monkeypatch):
    model = tiny_model().cuda().bfloat16()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]

    def replies():
        return list(sampling.generate(model, prompts, set(), max_new_tokens=30, temperature=0, top_p=1))
    replayed = replies()
    monkeypatch.setattr(sampling, "CapturedStep", lambda model, cache: lambda tokens: sampling.logits_after(model, cache, tokens))
    assert replies() == replayed
