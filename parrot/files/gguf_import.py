"""A GGUF file of a SmolLM2 -> a Hugging Face model folder."""

import re

import tokenizers
import torch
from safetensors import SafetensorError

from parrot.files.model_folder import read_config, write
from parrot.files.tokenizer import Tokenizer
from parrot.system.console import UserError, refuse
from parrot.system.disk import write_json

RENAMED = {  # key after "llama.": our name; keys that share a name must have equal values
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta", "vocab_size": "vocab_size"}
EXPECTED = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False}
TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}


def import_gguf(path, folder):
    """Write the model of the GGUF file `path` into `folder`, in bfloat16; loading checks it."""
    import gguf  # late: most runs never read one

    class Reader(gguf.GGUFReader):
        def _get(self, offset, *args, **more):  # the library's reads on past the end
            if offset >= len(self.data):
                raise ValueError("the file ends too early")
            return super()._get(offset, *args, **more)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        write_json(folder / "config.json", _config(fields))
        config = read_config(folder)
        tensors = {}
        for tensor in reader.tensors:
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
            if not match or match[2] not in TENSORS:
                raise UserError(f"tensor {tensor.name} has no place in this architecture")
            weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
            if match[2] in ("attn_q", "attn_k"):
                pairs = weight.unflatten(0, (-1, config["head_dim"] // 2, 2))  # rows 2i and 2i + 1
                weight = pairs.transpose(1, 2).flatten(0, 2)  # ours: i and i + D / 2 of each head
            block = f"model.layers.{match[1]}." if match[1] else ""
            tensors[f"{block}{TENSORS[match[2]]}.weight"] = weight
        _write_tokenizer(fields, folder)
        write(folder, config, tensors, Tokenizer(folder), fields.get("tokenizer.chat_template"))
    except (OSError, SafetensorError):  # the disk
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}".replace(f"{folder}/", "")) from None
    except Exception as error:  # whatever the libraries stumble over; KeyError: no such field
        reason = repr(error).partition("\\n")[0]
        raise UserError(f"{path} is damaged or not a GGUF file of a Llama: {reason}") from None


def _config(fields):
    for name, expected in EXPECTED.items():
        value = fields.get(name)
        refuse(name, {f"is {value!r:.60}, not {expected!r}": (value or False) != expected})
    raw = {"model_type": "llama", "tie_word_embeddings": True}
    for name, value in fields.items():
        ours = RENAMED.get(name.removeprefix("llama."))
        if name.startswith("llama.") and (not ours or raw.setdefault(ours, value) != value):
            raise UserError(f"{name} is {value!r:.60}, which is not supported")
    raw["rms_norm_eps"] = float(f"{raw['rms_norm_eps']:.6g}")  # a float32: 9.9999997e-06 was 1e-05
    return raw


def _write_tokenizer(fields, folder):
    vocab = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    types = zip(vocab, fields["tokenizer.ggml.token_type"], strict=True)  # no token twice
    backend.add_special_tokens([token for token, kind in types if kind == 3])  # control tokens
    backend.save(str(folder / "tokenizer.json"))
