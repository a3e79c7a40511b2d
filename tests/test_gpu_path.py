"""The GPU's path on a machine without one: devices, types, shapes, and what would wait.

Tensors that say cuda:0 and hold nothing (FakeTensorMode). An operation on tensors of two devices
fails, and so does whatever needs a number: that is where a real GPU would be waited for. Torch has
two gaps where there is no driver: autograd asks it for streams, so C++ is told "meta", and
autocast sees no CUDA tensor, so what it does to our products is done here in Python.
"""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parrot import attention, sampling
from parrot.attention import KVCache
from parrot.data import Batch, Examples
from parrot.fast.packed import PackedLlama, pack
from parrot.model import Llama
from parrot.training import loss_sum, token_losses

CUDA = torch.device("cuda", 0)


class FakeGpu(FakeTensorMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        leaves = tree_leaves((args, kwargs))
        places = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if "meta" in places:
            kwargs = {**(kwargs or {}), "device": CUDA}
        elif "cuda" not in places and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **(kwargs or {}))  # on the CPU, with numbers
        return super().__torch_dispatch__(func, types, args, kwargs)


class Autocast(TorchFunctionMode):
    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=False):
        super().__init__()
        self.dtype, self.enabled = dtype, enabled

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.enabled and func in (F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, F.scaled_dot_product_attention):
            args = [arg.to(self.dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
        return func(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    """The operations that run, by name."""

    def __init__(self):
        super().__init__()
        self.names, self.attended = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.append(name)
        if "attention" in name or "varlen" in name:
            self.attended.append([(tuple(arg.shape), arg.dtype) for arg in args[:3] if isinstance(arg, torch.Tensor)])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def gpu(capability=(9, 0)):
    with contextlib.ExitStack() as stack:
        for name, value in {"torch.cuda.get_device_capability": lambda *_: capability,
                            "torch.autocast": Autocast}.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeGpu(allow_non_fake_inputs=True))
        yield stack.enter_context(Calls())


def model_on_gpu(dtype=torch.float32):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(CUDA):
            return Llama(tiny_config())
    finally:
        torch.set_default_dtype(torch.float32)


def batch_on_gpu():
    lengths = (5, 2, 17)
    examples = Examples.of([(np.arange(n) + 20, np.arange(n) >= n // 2) for n in lengths])
    return Batch.of(examples, range(3), CUDA)


def step(dtype):
    """Forward and backward of one ribbon; returns the model."""
    model = model_on_gpu()
    loss = loss_sum(model, batch_on_gpu(), dtype)
    loss.backward()
    assert loss.device == CUDA and loss.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.grad.device == CUDA and parameter.grad.dtype == torch.float32
    return model


@pytest.mark.parametrize("capability, dtype, varlen", [
    ((9, 0), torch.bfloat16, True), ((8, 0), torch.float16, True), ((9, 0), torch.float32, False), ((7, 5), torch.float16, False),
    ((6, 1), torch.float32, False)])
def test_a_step_of_training_waits_for_nothing(capability, dtype, varlen):
    with gpu(capability) as calls:
        step(dtype)
    layers = tiny_config().num_hidden_layers
    assert calls.names.count("_varlen_attn") == (layers if varlen else 0)
    assert calls.names.count("_varlen_attn_backward") == (layers if varlen else 0)
    for (query, *_), (key, *_), (value, *_) in calls.attended:  # as many heads: no kernel for older cards takes fewer
        assert varlen or query[1] == key[1] == value[1] == tiny_config().num_attention_heads


def test_rocm_does_not_take_the_varlen_kernel(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with gpu() as calls:
        step(torch.bfloat16)
    assert "_varlen_attn" not in calls.names


def test_the_plain_form_and_the_held_out_loss(both_ways):
    with gpu():
        step(torch.bfloat16)
        with torch.no_grad():
            losses = token_losses(model_on_gpu(), batch_on_gpu(), torch.bfloat16)
    assert losses.device == CUDA and losses.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_prompt_and_a_step_of_writing(dtype, is_packed, both_ways):
    with gpu(), torch.no_grad():
        model = model_on_gpu(dtype)
        model = pack(model, batched=True) if is_packed else model
        assert isinstance(model, PackedLlama if is_packed else Llama)
        cache = KVCache(model.config, 2, 30, dtype, CUDA)
        hidden_states = model(torch.zeros(7, dtype=torch.long, device=CUDA), cache.prefill([3, 4]))
        logits = sampling.logits_after(model, cache, torch.zeros(2, dtype=torch.long, device=CUDA), [0, 1])
        logits = sampling.penalize(logits, torch.zeros(2, 3, dtype=torch.long, device=CUDA), 1.2)
    assert hidden_states.device == logits.device == CUDA and hidden_states.dtype == logits.dtype == dtype


# ---- that these tests see what they are for

def test_a_tensor_that_stays_on_the_cpu_is_seen(monkeypatch):
    monkeypatch.setattr("parrot.data.Ribbon", lambda lengths, device: attention.Ribbon(lengths))
    with gpu(), pytest.raises(Exception, match="device"):
        step(torch.bfloat16)


def test_a_wait_is_seen():
    with gpu(), pytest.raises(Exception) as error:
        torch.ones(1, device=CUDA).item()
    assert type(error.value).__name__ == "DataDependentOutputException"
