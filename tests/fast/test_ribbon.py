"""Which kernel takes a ribbon, and the GPU's kernel played by brute force: no GPU is needed for that."""

import inspect

import pytest
import torch

from parrot.attention import Ribbon
from parrot.fast import ribbon, tiles


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


def test_the_kernel_is_called_as_its_signature_wants(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(17, heads, 8).bfloat16() for heads in (6, 2, 2))
    expected = Ribbon([5, 1, 11]).attend(0, q, k, v)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", brute_force)
    found = ribbon.varlen(q, k, v, ribbon.seams([5, 1, 11]), 11)
    assert torch.allclose(found.float(), expected.float(), atol=3e-2)
    assert not ribbon.varlen_takes(torch.zeros(1, 2, 12).bfloat16())
    assert not ribbon.varlen_takes(torch.zeros(1, 2, 320).bfloat16())
    assert not ribbon.varlen_takes(q.float())


def test_this_torch_has_the_signature_that_we_use():
    from torch.nn.attention.varlen import varlen_attn
    assert "window_size" in inspect.signature(varlen_attn).parameters


def test_no_old_gpu(monkeypatch):
    monkeypatch.setattr(ribbon, "send", lambda tensor, device: tensor)
    for capability, has in [((7, 5), False), ((8, 6), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (ribbon.FastAttention([3, 2], "cuda").seams is not None) == has


@pytest.mark.parametrize("lengths", [[50, 10], [1], [3, 1, 7]])
def test_a_document_too_long_for_tiles_goes_another_way(lengths, monkeypatch):
    q, k, v = (torch.randn(sum(lengths), heads, 16) for heads in (6, 2, 2))
    expected = Ribbon(lengths).attend(0, q, k, v)
    monkeypatch.setattr(tiles, "LONGEST", 0)
    other = Ribbon(lengths)
    assert other.fast.tiles is None
    assert torch.allclose(other.attend(0, q, k, v), expected, atol=1e-5)
