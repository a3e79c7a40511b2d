"""A Hugging Face model folder <-> a Llama module.

Loading is strict. What config.json asks for and our module cannot do is refused with the
name of the field, and a tensor that is missing, left over or of another shape with its
name: a model that is only nearly right answers nonsense and tells nobody why.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parrot.chat import CHAT_TEMPLATE, IM_END, IM_START
from parrot.console import UserError
from parrot.files import read_json, replace_file, write_json
from parrot.model import Llama, LlamaConfig
from parrot.tokenizer import Tokenizer

# Fields of config.json that would change the computation, and the values that we compute.
SUPPORTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}
# The largest values that are believed, so that a damaged file makes us allocate nothing; other numbers: a million.
LARGEST = {"num_hidden_layers": 1000, "max_position_embeddings": 10**9, "rope_theta": 10**12}


def read_config(folder):
    """config.json -> LlamaConfig; UserError names the field that we cannot express."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    rope = raw.get("rope_parameters") or {}  # where transformers 5 writes what follows
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r:.60}, expected an object")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_parameters.rope_type is {rope['rope_type']!r}; only plain RoPE is supported")
    for field, values in SUPPORTED.items():
        value = raw.get(field, rope.get(field))
        if value not in values:
            raise UserError(f"{path}: {field} is {value!r:.60}; LittleParrot supports only {values[0]!r}")
    heads, size = raw.get("num_attention_heads"), raw.get("hidden_size")
    defaults = {  # those of the Llama architecture, for fields that a config.json may leave out
        "num_key_value_heads": heads,
        "head_dim": size // heads if isinstance(size, int) and isinstance(heads, int) and heads else None,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    values = {}
    for field, kind in LlamaConfig.__annotations__.items():
        value = raw.get(field)
        value = defaults.get(field) if value is None else value
        largest = LARGEST.get(field, 10**6)
        right = isinstance(value, (int, float)) and isinstance(value, bool) == (kind is bool)
        if not right or (kind is not bool and not 0 < value <= largest) or (kind is int and value != int(value)):
            expected = "true or false" if kind is bool else f"a positive {kind.__name__} of at most {largest}"
            raise UserError(f"{path}: {field} is {value!r:.60}, expected {expected}")
        values[field] = kind(value)
    config = LlamaConfig(**values)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(f"{path}: num_attention_heads {config.num_attention_heads} is not a "
                        f"multiple of num_key_value_heads {config.num_key_value_heads}")
    if config.head_dim % 2:
        raise UserError(f"{path}: head_dim {config.head_dim} is odd; RoPE turns pairs")
    return config


def _tensor_files(folder):
    """The safetensors files of a folder: one, or the shards that an index lists."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{index}: weight_map does not map tensors to files of this folder")
    return [folder / name for name in sorted(set(names.values()))]


def load(folder, dtype=torch.float32, device="cpu"):
    """A model folder -> (Llama, Tokenizer), checked to fit each other."""
    tokenizer, model = Tokenizer(folder), load_model(folder, dtype, device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {model.config.vocab_size}")
    return model, tokenizer


def load_model(folder, dtype=torch.float32, device="cpu"):
    """A model folder -> Llama with its weights in `dtype` on `device`."""
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: nothing is computed that is then overwritten
        model = Llama(config)
    expected = dict(model.named_parameters())  # a tied lm_head.weight is not listed twice
    tensors = {}
    for path in _tensor_files(folder):
        try:
            open(path, "rb").close()  # safe_open would call any trouble "no such file"
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq"):  # older folders: computed, not learned
                        continue
                    _check_shape(path, name, file.get_slice(name).get_shape(), expected, config)
                    tensor = file.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise UserError(f"{path}: tensor {name} holds {tensor.dtype}, not floating-point numbers")
                    tensors[name] = tensor.to(device, dtype)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    if config.tie_word_embeddings and "lm_head.weight" in tensors:  # allowed where it is a copy
        if not torch.equal(tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight", torch.empty(0, device=device))):
            raise UserError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight, "
                            "but config.json has tie_word_embeddings true")
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: tensor {name} contains NaN or infinity")
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # assigning untied them
    return model.requires_grad_(True)


def _check_shape(path, name, shape, expected, config):
    if config.tie_word_embeddings and name == "lm_head.weight":
        name = "model.embed_tokens.weight"
    if name not in expected:
        raise UserError(f"{path}: tensor {name} has no place in this architecture")
    if list(shape) != list(expected[name].shape):
        raise UserError(f"{path}: tensor {name} is {list(shape)}, config.json makes it {list(expected[name].shape)}")


def save_model(folder, model, tokenizer, dtype):
    """Write a trained model as a folder that transformers and llama.cpp's converter read too.

    The weights go last: a folder that has model.safetensors is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    im_start, im_end = tokenizer.control(IM_START), tokenizer.control(IM_END)
    end_of_text = tokenizer.backend.token_to_id("<|endoftext|>")
    stop = [im_end] if end_of_text is None else [im_end, end_of_text]
    # Padding is not <|im_end|>: transformers gives the embedding of the pad token no gradient.
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "torch_dtype": str(dtype).split(".")[1],
        "bos_token_id": im_start, "eos_token_id": im_end, "pad_token_id": end_of_text,
        **asdict(model.config)})
    write_json(folder / "generation_config.json", {
        "bos_token_id": im_start, "eos_token_id": stop, "pad_token_id": end_of_text})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": IM_START, "eos_token": IM_END,
        "pad_token": "<|endoftext|>" if end_of_text is not None else None, "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings, "chat_template": CHAT_TEMPLATE})
    replace_file(folder / "tokenizer.json",
                 lambda temporary: shutil.copyfile(tokenizer.folder / "tokenizer.json", temporary))
    tensors = {name: parameter.detach().to("cpu", dtype) for name, parameter in model.named_parameters()}
    replace_file(folder / "model.safetensors", lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def stop_tokens(tokenizer, chats):
    """The ids that end a reply: what the configs in the tokenizer's folder call eos, and <|im_end|> in a chat."""
    stops = set()
    for name in ("generation_config.json", "config.json"):
        if (tokenizer.folder / name).is_file():
            eos = read_json(tokenizer.folder / name).get("eos_token_id")
            stops.update(stop for stop in (eos if isinstance(eos, list) else [eos]) if isinstance(stop, int))
    return stops | ({tokenizer.control(IM_END)} if chats else set())
