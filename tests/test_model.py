"""Our logits against transformers, on the real weights and on small random shapes."""

import math

import pytest
import torch
from conftest import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from parrot import fast
from parrot.attention import KVCache, Ribbon
from parrot.model import Llama, rope_angles, rotate

PROMPTS = ["The capital of France is Paris, and the capital of Italy is",
           "def fibonacci(n):\n    if n < 2:\n        return",
           "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n", "ü 漢字 🦜 " * 20, "a"]


def logits_of(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens, Ribbon([len(tokens)])))


def test_logits_on_the_real_weights(q4_folder, tokenizer, monkeypatch):
    model = Llama.load(q4_folder)
    reference = AutoModelForCausalLM.from_pretrained(q4_folder, dtype=torch.float32)
    for prompt in PROMPTS:
        tokens = torch.tensor(tokenizer.encode(prompt))
        with torch.no_grad():
            expected = reference(tokens[None]).logits[0]
        for enabled in (True, False):
            monkeypatch.setattr(fast, "enabled", enabled)
            ours = logits_of(model, tokens)
            assert torch.allclose(ours, expected, atol=1e-3, rtol=0)
            assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (8, 1)])
def test_logits_on_random_shapes(both_ways, heads, kv_heads, tied):
    model = tiny_model(tiny_config(heads, kv_heads, tied))
    c = model.config
    reference = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=c.head_dim, max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=tied))
    reference.load_state_dict(model.state_dict())
    tokens = torch.randint(0, c.vocab_size, (50,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
    assert torch.allclose(logits_of(model, tokens), expected, atol=1e-4, rtol=0)


def test_a_tied_head_is_the_embedding_and_is_counted_once(q4_folder):
    model = Llama.load(q4_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_a_ribbon_gives_each_document_its_own_logits(both_ways, q4_folder, tokenizer):
    model = Llama.load(q4_folder)
    documents = [torch.tensor(tokenizer.encode(prompt)) for prompt in PROMPTS]
    with torch.no_grad():
        together = model.logits(model(torch.cat(documents), Ribbon([len(d) for d in documents])))
    for document, ours in zip(documents, together.split([len(d) for d in documents])):
        assert torch.allclose(ours, logits_of(model, document), atol=1e-4, rtol=0)


def test_cached_logits_are_the_uncached_ones(both_ways):
    """Two prompts of different lengths, read together, then continued token by token."""
    model = tiny_model()
    tokens = [torch.randint(0, 320, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 21)]
    cache = KVCache(model.config, 2, 40)
    with torch.no_grad():
        read = model(torch.cat([tokens[0][:20], tokens[1][:11]]), cache.prefill([20, 11]))
        cached = [model.logits(read[[19, 30]])]
        for i in range(10):
            cached.append(model.logits(model(torch.stack([tokens[0][20 + i], tokens[1][11 + i]]), cache.step())))
    for row, (document, start) in enumerate(zip(tokens, (20, 11))):
        expected = logits_of(model, document)[start - 1:]
        assert torch.allclose(torch.stack([step[row] for step in cached]), expected, atol=1e-5, rtol=0)


def test_rotary_embedding_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0))

    def score(place_of_q, place_of_k):
        def at(p):
            return rope_angles(torch.tensor([p]), 64, 10000.0)
        return (rotate(q, *at(place_of_q)) * rotate(k, *at(place_of_k))).sum()
    assert torch.allclose(score(7, 3), score(1007, 1003), atol=1e-3)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)
    assert torch.allclose(score(0, 0), (q * k).sum(), atol=1e-5)


def test_gradients_reach_every_parameter():
    model = tiny_model()
    model.logits(model(torch.arange(20), Ribbon([20]))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_module_holds_no_hidden_buffers():
    """All that a checkpoint must keep are the parameters."""
    assert not list(Llama(tiny_config()).buffers())


def test_tokens_that_do_not_fit_the_layout_are_an_error_in_words():
    with pytest.raises(ValueError, match="5 tokens on a layout of 6"):
        tiny_model()(torch.arange(5), Ribbon([4, 2]))


def test_a_new_model_has_sensible_random_weights():
    model = Llama(tiny_config())
    loss = torch.nn.functional.cross_entropy(logits_of(model, torch.arange(50)), torch.arange(100, 150))
    assert loss.item() == pytest.approx(math.log(320), rel=0.02)  # as unsure as can be
