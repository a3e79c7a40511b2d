"""Tiles cover each document's triangle once; what they give, forward and back, is the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import by_the_formula

from parrot.fast import tiles

SHORT = [3, 1, 7, 100, 90, 60]  # together, then some in the next tile
LONG = [20, 2 * tiles.TILE + 5, 1, tiles.TILE, tiles.TILE + 1, 2]


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 3 * tiles.TILE), min_size=1, max_size=6))
def test_every_query_is_in_one_tile_with_all_that_it_may_see(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    start_of = torch.cat([start.repeat(length) for start, length in zip(starts, lengths)])  # (N,) of each token's document
    queries, ribbon = 0, tiles.Tiles(lengths)
    for (key, query, end), mask in zip(ribbon.spans, ribbon.masks):
        assert query == queries and query < end <= query + tiles.TILE
        mask, keys = mask[:, 0], torch.arange(key, end)
        assert key <= start_of[query:end].min()
        visible = (keys >= start_of[query:end, None]) & (keys <= torch.arange(query, end)[:, None])
        assert torch.equal(mask == 0, visible) and torch.equal(mask == float("-inf"), ~visible)
        queries = end
    assert queries == sum(lengths)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1)).item()  # of one token alone, q and k have none


@pytest.mark.parametrize("lengths", [[1], [2 * tiles.TILE], SHORT, LONG])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_result_and_its_gradients_are_those_of_the_formula(lengths, dtype, tolerance):
    torch.manual_seed(0)
    exact = [torch.randn(sum(lengths), heads, 16, dtype=dtype).double().requires_grad_() for heads in (6, 2, 2)]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    grad = torch.randn(sum(lengths), 6, 16, dtype=dtype)
    expected = by_the_formula(*exact, lengths)
    expected.backward(grad.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = tiles.Tiles(lengths).attend(*inputs)
    y.backward(grad)
    assert y.dtype == dtype and relative(y, expected) < tolerance
    for x, of_formula in zip(inputs, exact):
        assert x.grad.dtype == dtype and relative(x.grad, of_formula.grad) < tolerance
