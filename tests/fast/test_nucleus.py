"""The likeliest tokens without a sort, against the sort."""

import pytest
import torch

from parrot.fast.nucleus import FEW, likeliest


@pytest.mark.parametrize("steps", [1, 7, 300])
@pytest.mark.parametrize("mass", [0.01, 0.5, 0.95])
def test_the_likeliest_of_a_whole_vocabulary(steps, mass):
    """Flat or peaked, in few distinct values with many ties, as bfloat16 logits have."""
    logits = torch.randn(2, 49152, generator=torch.Generator().manual_seed(0)) * steps
    probabilities = (logits.round() / 20).softmax(-1)
    some, ids = likeliest(probabilities, mass)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    W = FEW if (ordered[:, :FEW].sum(-1) >= mass).all() else 49152
    assert torch.equal(some, ordered[:, :W]) and torch.equal(ids, tokens[:, :W])


def test_a_small_vocabulary_is_taken_whole():
    probabilities = torch.tensor([[0.25, 0.5, 0.25]])
    assert likeliest(probabilities, 1.0)[1].tolist() == [[1, 0, 2]]
