"""The network arranged for writing replies on a CPU: the same replies, sooner.

For one new token each weight is used once: what counts is how fast it comes from memory, and how many small operations
stand between. Matrices that read the same row become one, RMSNorm's weights go into the matrix that follows it, the rotation
is a product of complex numbers, and all blocks are one function: 9.5 ms a token instead of 12.2 on 2 cores. oneDNN, the
library under torch's products, has the matrices in an order of its own: 16 replies are read at 15 GB/s instead of 8 in
bfloat16, and in float32, where there are no bfloat16 units, written 1.5 times as fast, one reply as well. In bfloat16
torch's own product is the faster one for one reply, so the matrices are kept in their own order too.
"""

import platform

import torch
import torch.nn.functional as F

from parrot.device import multiplies_bfloat16


class PackedLinear:
    """The matrices of one or several linear layers of the same input, as one product: (N, in) -> (N, all outs)."""

    def __init__(self, *weights, scale=1.0):
        # scale (in,): what else its input would be multiplied by.
        weight = (torch.cat(weights) * scale).to(weights[0].dtype).detach()
        self.weight = weight.T if weight.dtype == torch.bfloat16 else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # in the order that suits 16 rows

    def __call__(self, x, stream=None):
        """x (N, in) -> the product (N, all outs), added to the stream if that is given."""
        if len(x) > 1 or self.weight is None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
            return y if stream is None else stream + y
        # After the prompt, sampling.logits_after makes this torch's own product.
        return x @ self.weight if stream is None else torch.addmm(stream, x, self.weight)


class PackedBlocks:
    """All of model.Block's, each in four products instead of seven. RMSNorm divides each row by one number: here, its product."""

    def __init__(self, layers):
        attention, norm = layers[0].self_attn, layers[0].input_layernorm
        C, D = len(norm.weight), attention.head_dim
        self.heads, self.kv_heads, self.head_dim = len(attention.q_proj.weight) // D, len(attention.k_proj.weight) // D, D  # H, K
        self.blocks, root, self.least = [], C ** 0.5, torch.tensor((C * norm.eps) ** 0.5)
        while layers:  # one by one, so that memory holds one of them twice and not all
            block = layers.pop(0)
            attention, mlp = block.self_attn, block.mlp
            q, k = (pairs_together(p.weight, D) for p in (attention.q_proj, attention.k_proj))
            before, between = (norm.weight.float() * root for norm in (block.input_layernorm, block.post_attention_layernorm))
            self.blocks.append((
                PackedLinear(q, k, attention.v_proj.weight, scale=before), PackedLinear(attention.o_proj.weight),
                PackedLinear(mlp.gate_proj.weight, mlp.up_proj.weight, scale=between), PackedLinear(mlp.down_proj.weight)))

    def length(self, x):
        """x (N, C) -> (N, 1): its root mean square times the root of C, sqrt(|x|^2 + C eps), in float32."""
        return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32), self.least)

    def __call__(self, x, _, place, angles):
        N, H, K, D = len(x), self.heads, self.kv_heads, self.head_dim
        turns = torch.complex(*angles).expand(N, H + K, -1)  # q and k are turned, v is not
        turns = torch.cat([turns, turns.new_ones(N, K, D // 2)], dim=1)  # (N, H + 2 K, D / 2)
        for layer, (qkv_proj, o_proj, gate_up_proj, down_proj) in enumerate(self.blocks):
            qkv = (qkv_proj(x) / self.length(x)).view(N, -1, D // 2, 2)
            qkv = torch.view_as_real(torch.view_as_complex(qkv) * turns).view(N, -1, D)
            y = place.attend(layer, *qkv.split((H, K, K), dim=1))  # (N, H, D)
            x = o_proj(y.reshape(N, -1).to(x.dtype), x)
            gate, up = (gate_up_proj(x) / self.length(x)).chunk(2, dim=-1)
            x = down_proj((F.silu(gate) * up).to(x.dtype), x)
        return x


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
    blocks, head = PackedBlocks(model.model.layers), PackedLinear(model.lm_head.weight)
    del model.model.layers, model.lm_head  # modules, which only modules may replace
    model.model.layers, model.lm_head = [blocks], head
