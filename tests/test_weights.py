"""Model folders: what transformers reads as we wrote it, and what is refused by name."""

import json
import pickle
import shutil
import sys

import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from parrot import weights
from parrot.chat import CHAT_TEMPLATE, default_system, encode_prompt
from parrot.console import UserError
from parrot.model import LlamaConfig
from parrot.sampling import generate
from parrot.speaker import Speaker


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model folder that a test may spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_saved_folder_generates_the_same_in_transformers(q4_folder, tmp_path):
    model, tokenizer = weights.load(q4_folder)
    weights.save_model(tmp_path, model, tokenizer, torch.float32)
    reference, reference_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert reference.dtype == torch.float32
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    inputs = reference_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                                     return_dict=True)
    theirs = reference.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    saved, saved_tokenizer = weights.load(tmp_path)
    stop = weights.stop_tokens(saved_tokenizer, chats=True)
    assert stop == {0, 2}
    ours = [token for token, in generate(saved, [inputs["input_ids"][0].tolist()], stop, max_new_tokens=40,
                                         temperature=0, top_p=1)]
    assert ours == [token for token in theirs.tolist() if token not in stop]
    assert "Rome" in saved_tokenizer.decode(ours)


def test_saving_in_bfloat16_rounds_and_loading_gives_it_back(tmp_path, tiny_tokenizer):
    model = tiny_model()
    weights.save_model(tmp_path, model, tiny_tokenizer, torch.bfloat16)
    loaded = weights.load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], p.detach().bfloat16().float()) for name, p in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_folders(tmp_path, tiny_tokenizer, tied):
    model = tiny_model(tiny_config(tied=tied))
    weights.save_model(tmp_path, model, tiny_tokenizer, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = weights.load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in names)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors"):
        weights.load_model(tmp_path)


def test_a_config_in_the_style_of_transformers_5(folder):
    before = weights.read_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(raw))
    assert weights.read_config(folder) == before


@pytest.mark.parametrize("changes, field", [
    ({"model_type": "qwen2"}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.rope_type"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": -3}, "hidden_size"), ({"hidden_size": "48", "head_dim": None}, "hidden_size"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"), ({"vocab_size": "many"}, "vocab_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"intermediate_size": 10**15}, "intermediate_size"), ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"), ({"head_dim": 7}, "head_dim")])
def test_what_the_module_cannot_express_is_refused_by_name(folder, changes, field):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=f"{field} ") as caught:
        weights.load_model(folder)
    assert "config.json" in str(caught.value)


NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
    (lambda t: t.update({NAME[:-6] + "bias": torch.zeros(16)}), f"tensor {NAME[:-6]}bias has no place"),
    (lambda t: t.update({NAME: torch.zeros(16, 31)}), f"tensor {NAME} is \\[16, 31\\]"),
    (lambda t: t[NAME].__setitem__((3, 4), float("nan")), f"tensor {NAME} contains NaN"),
    (lambda t: t.update({NAME: torch.zeros(16, 48, dtype=torch.int8)}), f"tensor {NAME} holds torch.int8"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(320, 48)}), "lm_head.weight differs")])
def test_tensors_that_do_not_fit_are_refused_by_name(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(UserError, match=message):
        weights.load_model(folder)


def test_a_tied_model_with_only_a_head_is_refused(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    with pytest.raises(UserError, match="lm_head.weight differs"):
        weights.load_model(folder)


def test_what_is_harmless_is_accepted(folder):
    """A copy of the tied head, and the buffers that old versions of transformers saved."""
    edit_tensors(folder, lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    loaded = weights.load_model(folder)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), tiny_model().parameters()))


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * 8 + b[8:],
                                   lambda b: b[:8] + b"nonsense" + b[16:]])
def test_damaged_files_are_named(folder, spoil):
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="model.safetensors"):
        weights.load_model(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, tokenizer):
    weights.save_model(tmp_path, tiny_model(), tokenizer, torch.float32)
    with pytest.raises(UserError, match="tokenizer has 49152 tokens"):
        weights.load(tmp_path)


ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
                        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                        max_leaves=3)
FIELDS = [*LlamaConfig.__annotations__, *weights.SUPPORTED, "rope_parameters", "eos_token_id", "chat_template"]


@given(changes=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=3),
       name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
@settings(max_examples=300)
def test_whatever_the_configs_say_a_folder_loads_or_is_refused(changes, name, tiny_folder, tmp_path_factory):
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("fuzz") / "model")
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    try:
        model, tokenizer = weights.load(folder)
        assert all(isinstance(token, int) for token in weights.stop_tokens(tokenizer, chats=True))
        default_system(tokenizer.chat_template or "")
    except UserError:
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"{", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_not_what_they_should_be(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        weights.load(folder)


def test_no_code_of_a_folder_is_run_and_nothing_unpickled(folder, monkeypatch):
    """Poison in every place where other software would execute it."""
    poison = f"open({str(folder / 'poisoned')!r}, 'w')"
    for name in ("modeling_llama.py", "__init__.py", "configuration.py"):
        (folder / name).write_text(poison)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.Model"})
    torch.save({NAME: torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{{ cycler.__init__.__globals__.os.system('touch " + str(folder / "poisoned") + "') }}")
    monkeypatch.setattr(pickle, "Unpickler", None), monkeypatch.setattr(torch, "load", None)
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and opened is not None else None)
    model, tokenizer = weights.load(folder)
    prompt = encode_prompt([{"role": "user", "content": "Hi"}], tokenizer, default_system(tokenizer.chat_template))
    list(generate(model, [prompt], weights.stop_tokens(tokenizer, chats=True), max_new_tokens=3, temperature=1, top_p=1))
    assert not (folder / "poisoned").exists()
    assert not any(path.endswith((".py", ".bin")) and str(folder) in path for path in opened)
    opened = None


@pytest.mark.parametrize("format, stop", [("chat", {0, 2}), ("plain", {0}), ("auto", {0})])
def test_where_a_base_model_stops(format, stop, folder):
    """Like SmolLM2-135M: its configs know <|endoftext|> alone, and it has no template."""
    (folder / "tokenizer_config.json").unlink()
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "eos_token_id": 0}))
    assert Speaker.of("", *weights.load(folder), format).stop == stop


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        weights.load(folder)
