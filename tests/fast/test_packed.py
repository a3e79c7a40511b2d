"""Packed weights: the same hidden states, logits and replies as the plain ones."""

import copy
import functools

import pytest
import torch
from conftest import tiny_config, tiny_model

from parrot import assistant
from parrot.attention import Ribbon
from parrot.fast import packed
from parrot.sampling import generate
from parrot.system.device import multiplies_bfloat16

CPU = torch.device("cpu")


@pytest.fixture(params=[(torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)], ids=str)
def kind(request):
    """(type of the weights, whether they are arranged for several replies)"""
    if not packed.keeps_bfloat16(CPU):
        pytest.skip("this CPU's products are not packed")
    if request.param == (torch.bfloat16, True) and not multiplies_bfloat16(CPU):
        pytest.skip("this CPU has no bfloat16 units")
    return request.param


def test_packed_where_it_was_seen_to_pay(monkeypatch):
    assert not packed.keeps_bfloat16(torch.device("cuda"))
    monkeypatch.setattr(packed.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert packed.keeps_bfloat16(CPU)
    monkeypatch.setattr(packed.platform, "machine", lambda: "arm64")
    assert not packed.keeps_bfloat16(CPU)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_logits_for_any_shape(heads, kv_heads, tied, kind):
    dtype, batched = kind
    exact = tiny_model(tiny_config(heads, kv_heads, tied)).double()
    plain = copy.deepcopy(exact).to(dtype)
    ours = copy.deepcopy(plain)
    ours = packed.pack(ours, batched)
    assert isinstance(ours, packed.PackedLlama)
    tokens = torch.arange(40) * 7 % 320
    for lengths in ([25, 15], [1]):
        some, ribbon = tokens[:sum(lengths)], Ribbon(lengths)
        with torch.inference_mode():
            expected, near, found = (model.logits(model(some, ribbon)).double() for model in (exact, plain, ours))
        # no further from the truth than its type is
        assert (found - expected).norm() <= 1.2 * (near - expected).norm() + 1e-6 * expected.norm()
    assert ours.device.type == "cpu" and ours.dtype == (dtype if multiplies_bfloat16(CPU) else torch.float32)


def reply_of(model, tokenizer):
    prompt = tokenizer.encode("The capital of France is")
    return generate(model, [prompt], {0, 2}, max_new_tokens=24, temperature=0, top_p=1)[0][0]


@functools.cache
def plain_reply(folder, dtype):
    return reply_of(*assistant.load_parts(folder, dtype, CPU))


def test_the_real_model_writes_the_same_reply(q4_folder, kind):
    """And one reply keeps the weights in their type."""
    dtype, batched = kind
    expected = plain_reply(q4_folder, dtype if multiplies_bfloat16(CPU) else torch.float32)
    model, tokenizer = assistant.load_parts(q4_folder, dtype, CPU)
    model = packed.pack(model, batched)
    sure = 8 if torch.bfloat16 in kind else 24  # after that, some lead is below the rounding of bfloat16
    assert reply_of(model, tokenizer)[:sure] == expected[:sure] and len(expected) == 24
    if not batched:
        kept = [layer.weight.dtype for block in model.blocks for layer in vars(block).values()]
        assert set(kept) == {dtype} and all(layer.packed is None for layer in vars(model.blocks[0]).values())
