"""The network arranged for writing replies on a CPU: the same replies, sooner.

For one new token each weight is used once: what counts is how fast it comes from memory, and how many small operations
stand between. Matrices that read the same row become one, the rotation is a product of complex numbers, the norm five
operations instead of eight, and nothing is an nn.Module, whose calls take longer: 10.1 ms a token instead of 11.4 on
2 cores. oneDNN, the library under torch's products, has the matrices in an order of its own: 16 replies are read at
15 GB/s instead of 8 in bfloat16, and in float32, where there are no bfloat16 units, written 1.5 times as fast, one reply
as well. In bfloat16 torch's own product is the faster one for one reply, so the matrices are kept in their own order too.
"""

import platform

import torch
import torch.nn.functional as F

from parrot.device import multiplies_bfloat16


class PackedLinear:
    """The matrices of one or several linear layers of the same input, as one product: (N, in) -> (N, all outs)."""

    def __init__(self, *weights):
        weight = torch.cat(weights).detach()
        self.weight = weight if weight.dtype == torch.bfloat16 else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # in the order that suits 16 rows

    def __call__(self, x):
        if len(x) == 1 and self.weight is not None:  # after the prompt, sampling.logits_after makes this torch's own product
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class PackedNorm:
    """model.RMSNorm by its root, in float32 throughout: x w / rms = sqrt(C) x w / sqrt(|x|^2 + C eps)."""

    def __init__(self, norm):
        C = len(norm.weight)
        self.weight, self.least = norm.weight.detach().float() * C ** 0.5, torch.tensor((C * norm.eps) ** 0.5)

    def __call__(self, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.least) * self.weight).to(x.dtype)


class PackedBlock:
    """model.Block in four products instead of seven."""

    def __init__(self, block):
        attention, mlp = block.self_attn, block.mlp
        q, k = (pairs_together(p.weight, attention.head_dim) for p in (attention.q_proj, attention.k_proj))
        self.heads = [len(w) // attention.head_dim for w in (q, k)]  # H, K
        self.norms = PackedNorm(block.input_layernorm), PackedNorm(block.post_attention_layernorm)
        self.qkv_proj, self.o_proj = PackedLinear(q, k, attention.v_proj.weight), PackedLinear(attention.o_proj.weight)
        self.gate_up_proj, self.down_proj = PackedLinear(mlp.gate_proj.weight, mlp.up_proj.weight), PackedLinear(mlp.down_proj.weight)

    def __call__(self, x, layer, place, angles):
        N, (H, K), (before_attention, before_mlp) = len(x), self.heads, self.norms
        qkv = self.qkv_proj(before_attention(x)).float().view(N, H + 2 * K, -1, 2)  # (N, H + 2 K, D / 2, 2)
        qk = torch.view_as_real(torch.view_as_complex(qkv[:, :H + K]) * torch.complex(*angles)).flatten(-2)  # (N, H + K, D)
        y = place.attend(layer, qk[:, :H], qk[:, H:], qkv[:, H + K:].flatten(-2))  # (N, H, D)
        x = x + self.o_proj(y.view(N, -1).to(x.dtype))
        gate, up = self.gate_up_proj(before_mlp(x)).view(N, 2, -1).unbind(1)
        return x + self.down_proj(F.silu(gate) * up)


def pairs_together(weight, head_dim):
    """(heads D, C) -> the same rows, each pair that is rotated side by side. In the same order, q and k have the same product."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pays(device, dtype):
    """Whether packing was seen to work and to pay: on an x86 CPU, in float32 or where it multiplies bfloat16."""
    return (device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
            and (dtype == torch.float32 or multiplies_bfloat16(device)))


def pack(model):
    """Pack, where that pays, a model that only speaks from now on; its own matrices are given up on the way."""
    if not pays(model.device, model.dtype):
        return
    layers, head = model.model.layers, model.lm_head.weight
    del model.model.layers, model.lm_head  # modules, which take 2 us a call
    model.model.layers = []
    while layers:
        model.model.layers.append(PackedBlock(layers.pop(0)))
    model.lm_head = PackedLinear(head)
