"""Which kernel takes a ribbon, and the GPU's kernel played by brute force: no GPU is needed for that."""

import inspect
from unittest import mock

import pytest
import torch
from conftest import tiny_model

from parrot import fast
from parrot.attention import KVCache, Ribbon
from parrot.fast import ribbon


def brute_force(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """Attention with one big mask."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff()
    assert max_q == max_k == int(lengths.max()) and len(q) == int(lengths.sum())
    assert q.shape == k.shape and window_size == (-1, 0)
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    visible = (document[:, None] == document).tril()
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v.float()).to(q.dtype)


def stay_here(monkeypatch):
    """What is sent to a GPU stays where it is."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *how: to(self, *(x for x in how if x != "cuda")))


@pytest.fixture
def modern_gpu(monkeypatch):
    """A GPU that has the kernel, by brute force; what is sent to it stays where it is."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", mock.Mock(side_effect=brute_force))
    stay_here(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    return lambda: torch.nn.attention.varlen.varlen_attn.called


@pytest.mark.parametrize("size, dtype, is_called", [
    (8, torch.bfloat16, True), (256, torch.bfloat16, True), (12, torch.bfloat16, False),
    (320, torch.bfloat16, False), (8, torch.float32, False)])
def test_the_kernel_is_called_as_its_signature_wants_where_it_knows_type_and_size(size, dtype, is_called, modern_gpu):
    torch.manual_seed(0)
    q, k, v = (torch.randn(17, heads, size).to(dtype) for heads in (6, 2, 2))
    attention = ribbon.FastAttention([5, 1, 11], "cuda")
    assert attention.seams.tolist() == [0, 5, 6, 17]
    found = attention.attend(q, k, v)
    assert modern_gpu() == is_called
    assert torch.allclose(found.float(), Ribbon([5, 1, 11]).attend(0, q, k, v).float(), atol=3e-2)


def test_this_torch_has_the_signature_that_we_use():
    from torch.nn.attention.varlen import varlen_attn
    assert "window_size" in inspect.signature(varlen_attn).parameters


def test_no_old_gpu(monkeypatch):
    stay_here(monkeypatch)
    for capability, has in [((7, 5), False), ((8, 6), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (ribbon.FastAttention([3, 2], "cuda").seams is not None) == has


@pytest.mark.parametrize("lengths", [[3, 9], [6, 6], [1]])
def test_a_step_looks_at_the_cache_as_the_formula_does(lengths, monkeypatch):
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
