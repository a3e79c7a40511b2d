"""The CUDA graph of a step of writing: replayed on a CPU (replayed.py), and on a GPU where there is one."""

import pytest
import replayed
import torch
from conftest import tiny_model

from parrot import attention, sampling
from parrot.attention import KVCache, Ribbon
from parrot.fast.captured import CapturedForward, CapturedStep

FIXED = property(lambda cache: True, lambda cache, value: None)  # the shape of a step, as on a GPU
PROMPTS = [[[3]], [[5, 6, 7]], [[5, 6, 7], [8, 9, 10, 11, 12]]]


def plain(model, cache):
    return sampling.logits_after


def greedy(model, prompts, step_type, steps=10):
    """The ids of greedy replies, each step by a CapturedStep, or as `plain` returns it."""
    cache, logits = sampling.read_prompts(model, prompts, 2 * steps, samples_each=2)
    next_logits = step_type(model, cache)
    written = []
    for step in range(steps):
        running = [row for row in range(len(logits)) if row != 1 or step < 3]  # one ends early
        tokens = logits.argmax(-1)[running]
        written.append(tokens.tolist())
        logits = next_logits(model, cache, tokens, running)
    return written


@pytest.mark.parametrize("prompts", PROMPTS)
def test_the_graph_writes_what_step_by_step_writes(prompts, monkeypatch):
    """With steps of a fixed shape, as they are on a GPU."""
    monkeypatch.setattr(KVCache, "is_cuda", FIXED, raising=False)
    for seed in range(3):
        model = tiny_model(seed=seed)
        with torch.inference_mode(), replayed.graphs():
            assert greedy(model, prompts, CapturedStep) == greedy(model, prompts, plain)


def test_a_cache_that_is_replaced_instead_of_written_is_seen(monkeypatch):
    class Replaced(KVCache):
        def step(self):
            layout = super().step()
            self.filled = self.filled.clone()
            return layout
    monkeypatch.setattr(KVCache, "is_cuda", FIXED, raising=False)
    monkeypatch.setattr(sampling, "KVCache", Replaced)
    with torch.inference_mode(), replayed.graphs():
        models = [tiny_model(seed=seed) for seed in range(5)]
        assert any(greedy(model, [[5, 6, 7]], CapturedStep) != greedy(model, [[5, 6, 7]], plain)
                   for model in models)


def test_a_wait_while_recording_is_refused():
    """The step of a CPU asks for the longest sequence, which a graph cannot."""
    with torch.inference_mode(), replayed.graphs(), pytest.raises(RuntimeError, match="capturing"):
        greedy(tiny_model(), [[5, 6, 7], [8]], CapturedStep)


class Seams:
    """fast/ribbon.py on a GPU: attention that knows the documents from a tensor."""

    def __init__(self, lengths, device):
        self.lengths, self.longest, self.seams = lengths, max(lengths), torch.tensor([0, *lengths]).cumsum(0)

    def attend(self, q, k, v):
        assert self.longest >= max(self.lengths)
        document = torch.searchsorted(self.seams, torch.arange(len(q)), right=True)
        visible = (document[:, None] == document).tril()
        return attention.attention(*(x.transpose(0, 1) for x in (q, k, v)), visible).transpose(0, 1)


def test_training_by_graphs_gives_the_gradient_of_training_without(monkeypatch):
    """Ribbons of three sizes, several to a step, steps one after the other; and a forward without gradient."""
    monkeypatch.setattr(attention, "FastAttention", Seams)
    monkeypatch.setattr("parrot.fast.captured.UNIT", 32)
    model = tiny_model(seed=1)
    plain = model.forward
    with replayed.graphs():
        captured = CapturedForward(model, longest=40)
    ribbons = [[[5, 20], [7, 30, 40, 12]], [[30], [9, 9, 9, 9], [20, 6]], [[32, 32]]]

    def gradients(forward, lengths_of_ribbons, seed):
        model.forward = forward
        torch.manual_seed(seed)
        for lengths in lengths_of_ribbons:
            hidden_states = model(torch.randint(5, 300, (sum(lengths),)), Ribbon(lengths))
            assert len(hidden_states) == sum(lengths)
            model.logits(hidden_states[::3]).logsumexp(-1).sum().backward()
        result = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad.data = parameter.grad.data.clone()  # as several processes do when they add up
        model.zero_grad()
        return result
    with replayed.graphs():
        for _ in range(2):  # the second time nothing is recorded
            for seed, step in enumerate(ribbons):
                expected, found = gradients(plain, step, seed), gradients(captured, step, seed)
                assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
        assert len(captured.graphs) == 3
    with torch.no_grad():
        model(torch.arange(100), Ribbon([100]))
    assert len(captured.graphs) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_same_replies_on_a_gpu(monkeypatch):
    model = tiny_model().cuda().bfloat16()

    def replies():
        return sampling.generate(model, PROMPTS[2], set(), max_new_tokens=30, temperature=0, top_p=1)
    captured = replies()
    monkeypatch.setattr(sampling, "CapturedStep", plain)
    assert replies() == captured
