"""model.Llama, faster: the network arranged for writing.

Small operations and reads of memory cost most: matrices with one input are joined, the norm's scale
multiplied in; rotation is a complex product. On a CPU, one reply's weights stay in bfloat16 even
where larger products need float32; for several, oneDNN reorders them. A token takes 9.5 ms, not
12.2 (in an H200's graph 2.2, not 4.7). Held equal by tests/fast/test_packed.py.
"""

import platform

import torch
import torch.nn.functional as F

from parrot.system.device import multiplies_bfloat16


class PackedLinear:
    """Linear layers on one input, joined if there is a scale (in,) of it; else one layer."""

    def __init__(self, batched, *weights, scale=None):
        weight = weights[0].detach()
        if scale is not None:
            weight = (torch.cat(weights) * scale).to(weight.dtype).detach()
        self.weight, self.packed = weight.T, None
        if batched and weight.dtype != torch.float16:  # few CPUs can
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # suits 16 rows
            if weight.dtype == torch.float32:
                self.weight = None  # its own order is as good for one row

    def __call__(self, x, stream=None):  # x (N, in) -> (N, all outs), added to any stream
        if self.packed is not None and (len(x) > 1 or self.weight is None):
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        elif stream is not None and stream.dtype == self.weight.dtype:
            return torch.addmm(stream, x, self.weight)
        else:
            dtype = x.dtype if len(x) > 1 else self.weight.dtype
            y = x.to(dtype) @ self.weight.to(dtype)
        return y if stream is None else stream + y


class PackedBlock:  # model.Block in four products
    def __init__(self, block, batched):
        attention, mlp, D = block.self_attn, block.mlp, block.self_attn.head_dim
        norms = block.input_layernorm.weight, block.post_attention_layernorm.weight
        root = 1 if norms[0].is_cuda else len(norms[0]) ** 0.5  # of C: see PackedLlama.normed
        before, between = (weight.float() * root for weight in norms)
        # (heads D, C): each pair of rows that turns lies side by side; q k^T is the same.
        q, k = (p.weight.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2)
                for p in (attention.q_proj, attention.k_proj))
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        self.qkv_proj = PackedLinear(batched, q, k, attention.v_proj.weight, scale=before)
        self.o_proj = PackedLinear(batched, attention.o_proj.weight)
        self.gate_up_proj = PackedLinear(batched, gate, up, scale=between)
        self.down_proj = PackedLinear(batched, mlp.down_proj.weight)


class PackedLlama:  # a model.Llama that only writes
    def __init__(self, model, batched=True):
        self.config, self.device = model.config, model.device
        is_slow = model.device.type == "cpu" and not multiplies_bfloat16(model.device)
        self.dtype = torch.float32 if is_slow else model.dtype
        # On a CPU small products, as with the cache, take half as long in float32.
        self.cache_dtype = torch.float32 if model.device.type == "cpu" else model.dtype
        self.embed_tokens, self.norm = model.model.embed_tokens, model.model.norm
        self.blocks = [PackedBlock(block, batched) for block in model.model.layers]
        self.lm_head = PackedLinear(batched, model.lm_head.weight)
        self.least = torch.tensor((model.config.hidden_size * model.config.rms_norm_eps) ** 0.5)

    def normed(self, linear, x):  # `linear` of x (N, C), its rows at root mean square 1
        C, eps = self.config.hidden_size, self.config.rms_norm_eps
        if x.is_cuda:  # one kernel; on a CPU the rest is faster, and the root of C is in `linear`
            return linear(F.rms_norm(x, (C,), eps=eps))
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return linear(x) / torch.hypot(length, self.least)  # sqrt(|x|^2 + C eps)

    def __call__(self, tokens, layout):  # as model.Llama.forward
        N, H, K = len(tokens), self.config.num_attention_heads, self.config.num_key_value_heads
        D = self.config.head_dim
        # model.rope_angles as complex numbers; v does not turn.
        exponents = torch.arange(0, D, 2, device=self.device) / D
        angles = layout.positions[:, None] / self.config.rope_theta ** exponents  # (N, D / 2)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (N, 1, D / 2)
        turns = torch.cat([turns.expand(N, H + K, -1), turns.new_ones(N, K, D // 2)], dim=1)
        x = self.embed_tokens(tokens).to(self.dtype)  # (N, C)
        with one_row_by_torch(N):
            for layer, block in enumerate(self.blocks):
                qkv = self.normed(block.qkv_proj, x).float().view(N, -1, D // 2, 2)
                qkv = torch.view_as_real(torch.view_as_complex(qkv) * turns).view(N, -1, D)
                qkv = qkv.to(self.cache_dtype).split((H, K, K), dim=1)
                y = layout.attend(layer, *qkv)  # (N, H, D)
                x = block.o_proj(y.reshape(N, -1).to(x.dtype), x)
                gate, up = self.normed(block.gate_up_proj, x).chunk(2, dim=-1)
                x = block.down_proj((F.silu(gate) * up).to(x.dtype), x)
        return self.norm(x)

    def logits(self, hidden_states):  # as model.Llama.logits
        with one_row_by_torch(len(hidden_states)):
            return self.lm_head(hidden_states)


def one_row_by_torch(num_rows):
    """For one row torch's own product reads bfloat16 at 29 GB/s, that of oneDNN (mkldnn) at 10."""
    return torch.backends.mkldnn.flags(enabled=num_rows > 1, allow_tf32=None)


def keeps_bfloat16(device):
    """Whether one reply keeps its weights in bfloat16, whatever the type of the products."""
    is_x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.mkldnn.is_available()


def pack(model, batched):
    """A Llama -> a packed one where that was seen to pay (x86 with oneDNN, CUDA), else itself."""
    if model.device.type == "cuda":
        return PackedLlama(model, batched=False)
    return PackedLlama(model, batched) if keeps_bfloat16(model.device) else model
