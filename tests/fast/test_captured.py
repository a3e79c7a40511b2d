"""The CUDA graph of a step of writing: replayed on a CPU (replayed.py), and on a GPU where there is one."""

import pytest
import replayed
import torch
from conftest import tiny_model

from parrot import fast, sampling
from parrot.attention import KVCache
from parrot.fast.captured import CapturedStep

PROMPTS = [[[3]], [[5, 6, 7]], [[5, 6, 7], [8, 9, 10, 11, 12]]]


def greedy(model, prompts, next_logits, steps=10):
    """The ids of greedy replies, each step by `next_logits`."""
    cache, logits = sampling.read_prompts(model, prompts, 2 * steps, samples_each=2)
    written = []
    for step in range(steps):
        running = [row for row in range(len(logits)) if row != 1 or step < 3]  # one ends early
        tokens = logits.argmax(-1)[running]
        written.append(tokens.tolist())
        logits = next_logits(model, cache, tokens, running)
    return written


@pytest.mark.parametrize("prompts", PROMPTS)
def test_the_graph_writes_what_step_by_step_writes(prompts, monkeypatch):
    """With the plain step, whose shapes are fixed, as the fast one's are on a GPU."""
    monkeypatch.setattr(fast, "enabled", False)
    for seed in range(3):
        model = tiny_model(seed=seed)
        with torch.inference_mode(), replayed.graphs():
            assert greedy(model, prompts, CapturedStep()) == greedy(model, prompts, sampling.logits_after)


def test_a_cache_that_is_replaced_instead_of_written_is_seen(monkeypatch):
    class Replaced(KVCache):
        def step(self):
            layout = super().step()
            self.filled = self.filled.clone()
            return layout
    monkeypatch.setattr(fast, "enabled", False)
    monkeypatch.setattr(sampling, "KVCache", Replaced)
    with torch.inference_mode(), replayed.graphs():
        models = [tiny_model(seed=seed) for seed in range(5)]
        assert any(greedy(model, [[5, 6, 7]], CapturedStep()) != greedy(model, [[5, 6, 7]], sampling.logits_after)
                   for model in models)


def test_a_wait_while_recording_is_refused():
    """The fast step of a CPU asks for the longest sequence, which a graph cannot."""
    with torch.inference_mode(), replayed.graphs(), pytest.raises(RuntimeError, match="capturing"):
        greedy(tiny_model(), [[5, 6, 7], [8]], CapturedStep())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_same_replies_on_a_gpu(monkeypatch):
    model = tiny_model().cuda().bfloat16()

    def replies():
        return list(sampling.generate(model, PROMPTS[2], set(), max_new_tokens=30, temperature=0, top_p=1))
    captured = replies()
    monkeypatch.setattr(sampling, "CapturedStep", lambda: sampling.logits_after)
    assert replies() == captured
