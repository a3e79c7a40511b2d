"""A llama-architecture GGUF file -> a Hugging Face model folder.

GGUF is llama.cpp's format: often with 4-bit weights, always with other names, and with the
rows of q and k in another order. The package `gguf` reads the file and undoes the
quantisation; what is left to us is the names, the order and the tokenizer.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from parrot.console import UserError
from parrot.files import write_json

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
CONTROL = 3  # the token type of control tokens


def import_gguf(path, folder):
    """Write the model of the GGUF file `path` into `folder`, its weights in bfloat16."""
    import gguf  # late: most runs never read one

    folder = Path(folder)
    try:
        reader = gguf.GGUFReader(path)
        value = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                   for tensor in reader.tensors}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever the reader stumbles over in a damaged file
        raise UserError(f"{path} is damaged or not a GGUF file: {error}") from None
    try:
        config = _config(value, tensors)
        _write_tokenizer(value, folder)
    except KeyError as error:
        raise UserError(f"{path}: the field or tensor {error} is missing") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for name, array in tensors.items():
        part = name.removesuffix(".weight").split(".")[-1]  # "bias" of a bias, which weights.py will refuse
        if part in heads:
            array = unpermute(array, heads[part])
        state[_hugging_face_name(name)] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _config(value, tensors):
    """The GGUF's fields -> config.json. Scaled RoPE that no field tells of shows as an extra tensor, which weights.py refuses."""
    if value["general.architecture"] != "llama":
        raise UserError(f"general.architecture is {value['general.architecture']!r}, not 'llama'")
    if value.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"llama.rope.scaling.type is {value['llama.rope.scaling.type']!r}; only plain RoPE is supported")
    heads, size = value["llama.attention.head_count"], value["llama.embedding_length"]
    if not isinstance(heads, int):
        raise UserError(f"llama.attention.head_count is {heads!r:.60}; only layers that are all alike are supported")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(value["tokenizer.ggml.tokens"]), "hidden_size": size,
        "intermediate_size": value["llama.feed_forward_length"],
        "num_hidden_layers": value["llama.block_count"], "num_attention_heads": heads,
        "num_key_value_heads": value.get("llama.attention.head_count_kv", heads),
        "head_dim": value.get("llama.attention.key_length", size // heads),
        "max_position_embeddings": value["llama.context_length"],
        # stored as float32: 9.9999997e-06 was 1e-05
        "rms_norm_eps": float(f"{value['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": value.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors, "torch_dtype": "bfloat16",
        "bos_token_id": value.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value.get("tokenizer.ggml.eos_token_id")}


def _hugging_face_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight

    A name that we do not know stays as it is, and loading the folder will refuse it by name.
    """
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in BLOCK:
        return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.{parts[3]}"
    return f"{TOP[parts[0]]}.{parts[1]}" if parts[0] in TOP and len(parts) == 2 else name


def unpermute(weight, heads):
    """Undo llama.cpp's order of the rows of q and k.

    llama.cpp turns neighbouring rows (2i, 2i + 1) of a head as a pair, we turn rows
    (i, i + D / 2): see `rotate` in model.py.

    >>> unpermute(np.array([[0], [2], [1], [3]]), heads=1).T
    array([[0, 1, 2, 3]])
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _write_tokenizer(value, folder):
    """The GGUF's vocabulary and merges -> tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    if value["tokenizer.ggml.model"] != "gpt2" or value.get("tokenizer.ggml.pre") != "smollm":
        raise UserError(f"its tokenizer is {value['tokenizer.ggml.model']!r}/"
                        f"{value.get('tokenizer.ggml.pre')!r}; only SmolLM's ('gpt2'/'smollm') is supported")
    tokens = value["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in value["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, value["tokenizer.ggml.token_type"]) if kind == CONTROL])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "padding", "unknown"):
        if (token := value.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[{"padding": "pad", "unknown": "unk"}.get(name, name) + "_token"] = tokens[token]
    if "tokenizer.chat_template" in value:
        config["chat_template"] = value["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", config)
