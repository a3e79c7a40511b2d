"""The MLP that computes its inside again: the same loss and gradient, and less is kept."""

import torch
from conftest import tiny_model
from torch.autograd.graph import saved_tensors_hooks

from parrot.attention import Ribbon
from parrot.fast.recomputed import recompute


def kept(model):
    """(gradients, bytes that the forward kept) of one ribbon."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states = model(torch.arange(20) * 7 % 320, Ribbon([12, 8]))
    hidden_states.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sum(sizes.values())


def test_the_same_gradient_from_less():
    plain, smaller = tiny_model(), tiny_model()
    recompute(smaller)
    (expected, before), (found, after) = kept(plain), kept(smaller)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = plain.config
    # SiLU's result and the product: two numbers for each token, layer and inner dimension
    assert before - after >= 2 * 20 * config.num_hidden_layers * config.intermediate_size * 4
    with torch.no_grad():
        tokens, ribbon = torch.arange(9), Ribbon([9])
        assert torch.equal(smaller(tokens, ribbon), plain(tokens, ribbon))
