"""Attention against the formula written out, and no document sees another."""

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot import fast
from parrot.attention import KVCache, Ribbon


def by_the_formula(q, k, v, lengths):
    """softmax(q k^T / sqrt(D)) v, a head and a document at a time, in float64."""
    out, group, start = torch.zeros(q.shape, dtype=torch.float64), q.shape[1] // k.shape[1], 0
    for length in lengths:
        for head in range(q.shape[1]):
            rows = slice(start, start + length)
            query, key, value = q[rows, head].double(), k[rows, head // group].double(), v[rows, head // group].double()
            scores = query @ key.T / q.shape[2] ** 0.5
            scores += torch.full((length, length), float("-inf")).triu(1)
            out[rows, head] = scores.softmax(-1) @ value
        start += length
    return out


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1)).item()  # of one token alone, q and k have none


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 7, 100, 90, 60], [20, 517, 1, 256, 2]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_and_its_gradients_are_those_of_the_formula(lengths, dtype, tolerance, both_ways):
    torch.manual_seed(0)
    exact = [torch.randn(sum(lengths), heads, 16, dtype=dtype).double().requires_grad_() for heads in (6, 2, 2)]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    grad = torch.randn(sum(lengths), 6, 16, dtype=dtype)
    expected = by_the_formula(*exact, lengths)
    expected.backward(grad.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = Ribbon(lengths).attend(0, *inputs)
    y.backward(grad)
    assert y.dtype == dtype and relative(y, expected) < tolerance
    for x, of_formula in zip(inputs, exact):
        assert x.grad.dtype == dtype and relative(x.grad, of_formula.grad) < tolerance


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=6), data=st.data())
@pytest.mark.parametrize("enabled", [False, True])
def test_no_document_sees_another(enabled, lengths, data):
    """Changing a token of one document changes no logit and no gradient of another, bit for bit."""
    fast.enabled = enabled
    model = tiny_model()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    which = data.draw(st.integers(0, len(lengths) - 1))
    place = data.draw(st.integers(ends[which] - lengths[which], ends[which] - 1))
    tokens = torch.randint(0, 320, (ends[-1],), generator=torch.Generator().manual_seed(sum(lengths)))
    changed = tokens.clone()
    changed[place] = (changed[place] + data.draw(st.integers(1, 319))) % 320
    for other in range(len(lengths)):
        if other == which:
            continue
        rows = slice(ends[other] - lengths[other], ends[other])
        results = []
        for each in (tokens, changed):
            x = model.model.embed_tokens(each).detach().requires_grad_(True)
            model.model.embed_tokens.forward = lambda _, x=x: x  # so that its gradient can be read
            logits = model.logits(model(each, Ribbon(lengths)))[rows]
            logits.square().sum().backward()
            results.append((logits.detach(), x.grad))
        assert torch.equal(results[0][0], results[1][0])
        outside = torch.ones(ends[-1], dtype=torch.bool)
        outside[rows] = False
        assert torch.equal(results[0][1][rows], results[1][1][rows])
        assert not results[1][1][outside].any()


def test_positions_restart_at_each_seam():
    assert Ribbon([1, 3, 2]).positions.tolist() == [0, 0, 1, 2, 0, 1]


def test_sequences_may_be_repeated_and_left_out(both_ways):
    model = tiny_model()
    with torch.no_grad():
        cache = KVCache(model.config, 1, 10)
        model(torch.tensor([5, 6, 7]), cache.prefill([3]))
        cache.select(torch.tensor([0, 0, 0]))
        logits = model.logits(model(torch.tensor([8, 9, 8]), cache.step()))
        assert torch.equal(logits[0], logits[2])
        assert not torch.equal(logits[0], logits[1])
        cache.select(torch.tensor([1]))
        rest = model.logits(model(torch.tensor([5]), cache.step()))
        expected = model.logits(model(torch.tensor([5, 6, 7, 9, 5]), Ribbon([5])))[-1:]
    assert torch.allclose(rest, expected, atol=1e-5)
