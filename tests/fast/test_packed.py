"""Packed weights: the same hidden states, logits and replies as the plain ones."""

import copy

import pytest
import torch
from conftest import tiny_config, tiny_model

from parrot import assistant
from parrot.attention import Ribbon
from parrot.fast import packed, tiles
from parrot.sampling import generate

CPU = torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    if not packed.pays(CPU, request.param):
        pytest.skip("this CPU's products are not packed")
    return request.param


def test_packed_where_it_was_seen_to_pay(monkeypatch):
    assert not packed.pays(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(packed.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for units in (True, False):
        monkeypatch.setattr(packed, "multiplies_bfloat16", lambda _, units=units: units)
        assert packed.pays(CPU, torch.float32) and packed.pays(CPU, torch.bfloat16) == units
    monkeypatch.setattr(packed.platform, "machine", lambda: "arm64")
    assert not packed.pays(CPU, torch.float32)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_logits_for_any_shape(heads, kv_heads, tied, dtype, monkeypatch):
    exact = tiny_model(tiny_config(heads, kv_heads, tied)).double()
    plain = copy.deepcopy(exact).to(dtype)
    ours = copy.deepcopy(plain)
    ours = packed.pack(ours)
    assert isinstance(ours, packed.PackedLlama)
    tokens = torch.arange(40) * 7 % 320
    for lengths, longest in (([25, 15], 2048), ([1], 2048), ([25, 15], 20)):  # the last is attended to in another way
        monkeypatch.setattr(tiles, "LONGEST", longest)
        some, ribbon = tokens[:sum(lengths)], Ribbon(lengths)
        with torch.inference_mode():
            expected, near, found = (model.logits(model(some, ribbon)).double() for model in (exact, plain, ours))
        # no further from the truth than its type is
        assert (found - expected).norm() <= 1.2 * (near - expected).norm() + 1e-6 * expected.norm()
    assert ours.device.type == "cpu" and ours.dtype == dtype


def test_the_real_model_writes_the_same_reply(q4_folder, dtype):
    model, tokenizer = assistant.load(q4_folder, dtype, CPU)
    prompt = tokenizer.encode("The capital of France is")

    def reply():
        return list(generate(model, [prompt], {0, 2}, max_new_tokens=24, temperature=0, top_p=1))
    expected = reply()
    model = packed.pack(model)
    assert reply() == expected and len(expected) == 24
