"""The kernel's three signatures, played by brute force: no GPU is needed to call them right."""

import inspect

import pytest
import torch

from parrot import varlen
from parrot.attention import Ribbon


def brute_force(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, causal, gqa):
    """Attention with one big mask."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff()
    assert max_q == max_k == int(lengths.max()) and len(q) == int(lengths.sum())
    assert gqa or q.shape == k.shape
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    visible = document[:, None] == document
    if causal:
        visible &= torch.ones(len(q), len(q), dtype=torch.bool).tril()
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v.float()).to(q.dtype)


def torch_2_10(q, k, v, a, b, m, n, is_causal=False, return_aux=None):
    return brute_force(q, k, v, a, b, m, n, is_causal, gqa=False)


def torch_2_11(q, k, v, a, b, m, n, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return brute_force(q, k, v, a, b, m, n, window_size == (-1, 0), gqa=False)


def torch_2_12(q, k, v, a, b, m, n, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
    return brute_force(q, k, v, a, b, m, n, window_size == (-1, 0), enable_gqa)


@pytest.mark.parametrize("signature", [torch_2_10, torch_2_11, torch_2_12])
def test_each_signature_gives_what_document_by_document_gives(signature, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(17, heads, 8).bfloat16() for heads in (6, 2, 2))
    expected = Ribbon([5, 1, 11]).attend(0, q, k, v)
    monkeypatch.setattr(varlen, "kernel", lambda: signature)
    monkeypatch.setattr(varlen, "works_on", lambda device: True)
    ribbon = Ribbon([5, 1, 11])
    found = ribbon.attend(0, q, k, v)
    assert torch.allclose(found.float(), expected.float(), atol=3e-2)
    assert not varlen.takes(torch.zeros(1, 2, 12).bfloat16()) and not varlen.takes(torch.zeros(1, 2, 320).bfloat16())
    exact = ribbon.attend(0, q.float(), k.float(), v.float())  # the kernel has no float32: document by document
    assert torch.allclose(exact, expected.float(), atol=3e-2)


@pytest.mark.skipif(varlen.kernel() is None, reason="torch before 2.10")
def test_this_torch_has_a_signature_that_we_know():
    assert {"is_causal", "window_size"} & set(inspect.signature(varlen.kernel()).parameters)


def test_no_cpu_and_no_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not varlen.works_on("cpu") and not varlen.works_on("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert varlen.works_on("cuda") == (varlen.kernel() is not None)
