"""Packed weights: the same hidden states, logits and replies as the plain ones."""

import copy

import pytest
import torch
from conftest import tiny_config, tiny_model

from parrot import packed, weights
from parrot.attention import Ribbon
from parrot.sampling import generate

needs_packing = pytest.mark.skipif(not packed.pays(torch.device("cpu"), torch.bfloat16),
                                   reason="this CPU has no bfloat16 products")


def test_only_bfloat16_on_a_cpu_is_packed():
    assert not packed.pays(torch.device("cpu"), torch.float32)
    assert not packed.pays(torch.device("cuda"), torch.bfloat16)


@needs_packing
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_logits_for_any_shape(heads, kv_heads, tied):
    exact = tiny_model(tiny_config(heads, kv_heads, tied))
    plain = copy.deepcopy(exact).bfloat16()
    ours = copy.deepcopy(plain)
    packed.pack(ours)
    tokens, ribbon = torch.arange(40) * 7 % 320, Ribbon([25, 15])
    with torch.inference_mode():
        expected, near, found = (model.logits(model(tokens, ribbon)).float() for model in (exact, plain, ours))
    assert (found - expected).norm() <= 1.2 * (near - expected).norm()  # no further from the truth than bfloat16 is
    assert ours.device.type == "cpu" and ours.dtype == torch.bfloat16


@needs_packing
def test_the_real_model_writes_the_same_reply(q4_folder):
    model, tokenizer = weights.load(q4_folder, torch.bfloat16, torch.device("cpu"))
    prompt = tokenizer.encode("The capital of France is")

    def reply():
        return list(generate(model, [prompt], {0, 2}, max_new_tokens=24, temperature=0, top_p=1))
    expected = reply()
    packed.pack(model)
    assert reply() == expected and len(expected) == 24
