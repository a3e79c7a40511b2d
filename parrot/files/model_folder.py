"""A Hugging Face model folder: its config, its tensors, the tokens that end a reply.

Reading is strict, and names what it refuses: a model that is nearly right answers nonsense.
"""

from pathlib import Path

import safetensors.torch
import torch

from parrot.files.tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer
from parrot.system.console import UserError, refuse
from parrot.system.disk import open_to_read, read_json, replace_file, write_json

SUPPORTED = {  # fields that would change the computation, and the values that we compute
    "model_type": ("llama",), "hidden_act": ("silu", None), "attention_bias": (False, None),
    "mlp_bias": (False, None), "tie_word_embeddings": (False, True, None), "rope_scaling": (None,),
    "partial_rotary_factor": (None,), "sliding_window": (None,), "quantization_config": (None,)}
FIELDS = {  # name: (largest value, with the field's type; default or how to get it)
    "vocab_size": (10**6, None), "hidden_size": (10**6, None), "intermediate_size": (10**6, None),
    "num_hidden_layers": (1000, None), "num_attention_heads": (10**6, None),
    "num_key_value_heads": (10**6, lambda config: config["num_attention_heads"]),
    "head_dim": (10**6, lambda config: config["hidden_size"] // config["num_attention_heads"]),
    "max_position_embeddings": (10**9, 2048), "rms_norm_eps": (1., 1e-6), "rope_theta": (1e12, 1e4)}
# sample.py's defaults, but a lower penalty: transformers also penalises the prompt's <|im_end|>.
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0,
              "repetition_penalty": 1.1}


def read_config(folder) -> dict:
    """config.json -> the arguments of LlamaConfig; UserError names an unsupported field."""
    path = Path(folder) / "config.json"
    raw = {field: value for field, value in read_json(path).items() if value is not None}
    rope = raw.get("rope_parameters")  # where transformers 5 writes RoPE's fields
    if isinstance(rope, dict):
        raw.setdefault("rope_theta", rope.get("rope_theta"))
    plain_rope = {"rope_type": "default", "rope_theta": raw.get("rope_theta")}
    for field, values in {**SUPPORTED, "rope_parameters": (None, plain_rope)}.items():
        if raw.get(field) not in values:
            raise UserError(f"{path}: {field} is {raw.get(field)!r:.60}; supported: {values}")
    config = {}
    for field, (largest, default) in FIELDS.items():
        value, kind = raw.get(field, default), type(largest)
        value = value(config) if callable(value) else value
        if type(value) not in (int, float) or not 0 < value <= largest or value != kind(value):
            fault = f"expected a positive {kind.__name__} of at most {largest}"
            raise UserError(f"{path}: {field} is {value!r:.60}, {fault}")
        config[field] = kind(value)
    refuse(f"{path}:", {
        "num_key_value_heads does not divide num_attention_heads":
            config["num_attention_heads"] % config["num_key_value_heads"],
        f"head_dim {config['head_dim']} is odd, but RoPE turns pairs": config["head_dim"] % 2})
    return {**config, "tie_word_embeddings": bool(raw.get("tie_word_embeddings"))}


def stored_dtype(folder) -> torch.dtype:
    """The type of a folder's weights, of the first if they differ."""
    with safetensors.safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def read_tensors(folder, shapes: dict, dtype: torch.dtype, device) -> dict[str, torch.Tensor]:
    """The tensors that `shapes` names, all of them and no others, in `dtype` on `device`."""
    path = Path(folder) / "model.safetensors"
    try:
        tensors = safetensors.torch.load(open_to_read(path).read())  # no map: the file may change
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: an unknown type
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    head = None if "lm_head.weight" in shapes else tensors.pop("lm_head.weight", None)  # tied, too
    for name in sorted(shapes.keys() | tensors.keys()):
        tensor, shape = tensors.get(name, torch.empty(0)), shapes.get(name)
        refuse(f"{path}: tensor {name}", {
            "is missing": name not in tensors,
            "has no place in this architecture": name not in shapes,
            f"is {list(tensor.shape)} of {tensor.dtype}, expected {shape} of float16 or wider":
                tensor.shape != shape or not tensor.is_floating_point() or tensor.itemsize < 2})
        tensors[name] = tensor.to(device, dtype)
    embeddings = tensors["model.embed_tokens.weight"]
    if head is not None and not torch.equal(head.to(device, dtype), embeddings):
        raise UserError(f"{path}: lm_head.weight differs from the embeddings it is tied to")
    refuse_infinite(tensors, folder)
    return tensors


def refuse_infinite(tensors, folder):  # or NaN: UserError
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: tensor {name} contains NaN or infinity")


def write(folder, config: dict, tensors: dict, tokenizer: Tokenizer, chat_template: str | None):
    """Write a folder that others read, too, the weights last. UserError if one is not finite."""
    refuse_infinite(tensors, folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    start, end = tokenizer.control(IM_START), tokenizer.control(IM_END)
    # Padding is not <|im_end|>: transformers gives the embedding of the pad token no gradient.
    padding = tokenizer.backend.token_to_id(END_OF_TEXT)
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": padding}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "torch_dtype": dtype, **ids, **config})
    stop = [end] if padding is None else [end, padding]
    write_json(folder / "generation_config.json", {**ids, "eos_token_id": stop, **GENERATION})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": IM_START, "eos_token": IM_END,
        "pad_token": None if padding is None else END_OF_TEXT, "chat_template": chat_template,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"]})  # transformers 4 would add another
    replace_file(folder / "tokenizer.json", lambda path: path.write_bytes(tokenizer.content))
    replace_file(folder / "model.safetensors",
                 lambda path: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}))


def stop_tokens(tokenizer: Tokenizer, chats: bool) -> set[int]:
    """The ids that end a reply: what the configs call eos, and <|im_end|> in a chat."""
    stops = [tokenizer.control(IM_END)] if chats else []
    for path in map(tokenizer.folder.joinpath, ("generation_config.json", "config.json")):
        eos = read_json(path).get("eos_token_id") if path.is_file() else None
        stops += eos if isinstance(eos, list) else [eos]
    return {token for token in stops if type(token) is int}
