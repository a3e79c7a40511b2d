"""A llama-architecture GGUF file -> a Hugging Face model folder.

GGUF is llama.cpp's format: often with 4-bit weights, and with other names. The package `gguf`
undoes the quantisation; what is left is the names, the order of rows, and the tokenizer.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from parrot.files.model_folder import read_config, read_tensors, write
from parrot.files.tokenizer import Tokenizer
from parrot.system.console import UserError
from parrot.system.disk import write_json

FIELDS = {  # of "llama." in GGUF: our name; where two have the same, their values must agree
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta", "vocab_size": "vocab_size"}
TOP = {  # tensors: our name, the shape
    "token_embd": ("model.embed_tokens", "VC"), "output_norm": ("model.norm", "C"),
    "output": ("lm_head", "VC")}
BLOCK = {
    "attn_norm": ("input_layernorm", "C"), "ffn_norm": ("post_attention_layernorm", "C"),
    "attn_q": ("self_attn.q_proj", "QC"), "attn_k": ("self_attn.k_proj", "KC"),
    "attn_v": ("self_attn.v_proj", "KC"), "attn_output": ("self_attn.o_proj", "CQ"),
    "ffn_gate": ("mlp.gate_proj", "MC"), "ffn_up": ("mlp.up_proj", "MC"),
    "ffn_down": ("mlp.down_proj", "CM")}


def import_gguf(path, folder):
    """Write the model of the GGUF file `path` into `folder`, its weights in bfloat16.

    Whatever the file holds, the outcome is a folder that loads or a UserError.
    """
    try:
        _convert(path, Path(folder))
    except (OSError, SafetensorError):  # the disk
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}".replace(f"{folder}/", "")) from None
    except Exception as error:  # whatever the libraries stumble over; KeyError: no such field
        reason = repr(error).partition("\\n")[0]
        raise UserError(f"{path} is damaged or not a GGUF file of a Llama: {reason}") from None


def _convert(path, folder):
    import gguf  # late: most runs never read one

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    write_json(folder / "config.json", _config(fields, [tensor.name for tensor in reader.tensors]))
    config = read_config(folder)
    layout = _layout(config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.removesuffix(".weight").split(".")[-1]
        if part in heads:
            array = unpermute(array, heads[part])
        name, _ = layout.get(tensor.name, (tensor.name, None))  # read_tensors refuses others
        tensors[name] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    _write_tokenizer(fields, folder)
    write(folder, config, tensors, Tokenizer(folder), fields.get("tokenizer.chat_template"),
          stop=[fields.get("tokenizer.ggml.eos_token_id")])
    # One check of all that the file may hold: the folder must load.
    read_tensors(folder, dict(layout.values()), torch.bfloat16, "cpu")
    Tokenizer(folder)


def _config(fields, names):
    """The fields of a GGUF -> those of a config.json; `names`: of all tensors."""
    if fields["general.architecture"] != "llama":
        raise UserError(f"general.architecture is {fields['general.architecture']!r}, not 'llama'")
    raw = {"model_type": "llama", "vocab_size": len(fields["tokenizer.ggml.tokens"]),
           "tie_word_embeddings": "output.weight" not in names}
    for name, value in fields.items():
        if name.startswith("llama."):
            ours = FIELDS.get(name.removeprefix("llama."))
            if ours is None or raw.setdefault(ours, value) != value:  # or two fields disagree
                raise UserError(f"{name} is {value!r:.60}, which is not supported")
    raw["rms_norm_eps"] = float(f"{raw['rms_norm_eps']:.6g}")  # a float32: 9.9999997e-06 was 1e-05
    return raw


def _layout(config):
    """{GGUF's name: (our name, shape)} of every tensor of the model."""
    sizes = {"V": config["vocab_size"], "C": config["hidden_size"],
             "M": config["intermediate_size"],
             "Q": config["num_attention_heads"] * config["head_dim"],
             "K": config["num_key_value_heads"] * config["head_dim"]}
    parts = dict(TOP)
    if config["tie_word_embeddings"]:
        del parts["output"]
    for layer in range(config["num_hidden_layers"]):
        for name, (ours, shape) in BLOCK.items():
            parts[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{ours}", shape
    return {f"{name}.weight": (f"{ours}.weight", torch.Size(map(sizes.get, shape)))
            for name, (ours, shape) in parts.items()}


def unpermute(weight, heads):
    """llama.cpp's order of a head's rows of q and k, where 2i and 2i + 1 turn as a pair, -> ours.

    >>> unpermute(np.array([[0], [2], [1], [3]]), heads=1).T
    array([[0, 1, 2, 3]])
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _write_tokenizer(fields, folder):
    """The GGUF's vocabulary and merges -> tokenizer.json."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise UserError(f"its tokenizer is {kind}; only SmolLM's ('gpt2', 'smollm') is supported")
    vocab = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    types = zip(vocab, fields["tokenizer.ggml.token_type"], strict=True)  # no token twice
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                for token, kind in types if kind == 3])  # control tokens
    backend.save(str(folder / "tokenizer.json"))
