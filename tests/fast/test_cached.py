"""The fast step of writing looks at the cache as the plain one does."""

import pytest
import torch
from conftest import tiny_model

from parrot import fast
from parrot.attention import KVCache


@pytest.mark.parametrize("lengths", [[3, 9], [6, 6], [1]])
def test_the_same_hidden_states_step_by_step(lengths, monkeypatch):
    model, tokens = tiny_model(), torch.arange(sum(lengths)) * 5 % 320
    caches = [KVCache(model.config, len(lengths), 40) for _ in range(2)]
    caches[1].values += 1e3  # what lies beyond the new tokens must not matter
    with torch.inference_mode():
        for cache in caches:
            model(tokens, cache.prefill(lengths))
        for step in range(5):
            new = torch.arange(len(lengths)) * 7 * step % 320
            hidden_states = []
            for cache, enabled in zip(caches, (False, True), strict=True):
                monkeypatch.setattr(fast, "enabled", enabled)
                hidden_states.append(model(new, cache.step()))
            assert torch.allclose(*hidden_states, atol=1e-5)
    assert caches[0].filled.tolist() == caches[1].filled.tolist() == [n + 5 for n in lengths]
