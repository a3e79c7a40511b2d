"""Model folders: what transformers reads as we wrote it, and what is refused by name."""

import json
import pickle
import shutil
import sys

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from parrot import assistant
from parrot.assistant import Assistant
from parrot.chat import CHAT_TEMPLATE, default_system, encode_prompt
from parrot.config import Writing
from parrot.files import hub, model_folder
from parrot.files.model_folder import stop_tokens
from parrot.model import Llama, LlamaConfig
from parrot.sampling import generate
from parrot.system.console import UserError

NAME = "model.layers.1.self_attn.k_proj.weight"


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
    model, tokenizer = assistant.load_parts(q4_folder)
    assistant.save(tmp_path, model, tokenizer, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    reference_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert reference.dtype == torch.float32
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    inputs = reference_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = reference.generate(**inputs, max_new_tokens=40, do_sample=False,
                                 repetition_penalty=1.0)
    theirs = written[0, inputs["input_ids"].shape[1]:]
    saved, saved_tokenizer = assistant.load_parts(tmp_path)
    stop = stop_tokens(saved_tokenizer, chats=True)
    assert stop == {0, 2}
    prompt = inputs["input_ids"][0].tolist()
    [(ours, _)] = generate(saved, [prompt], stop, max_new_tokens=40, temperature=0, top_p=1)
    assert ours == [token for token in theirs.tolist() if token not in stop]
    assert "Rome" in saved_tokenizer.decode(ours)


def test_saving_in_bfloat16_rounds_and_loading_gives_it_back(tmp_path, tiny_tokenizer):
    model = tiny_model()
    assistant.save(tmp_path, model, tiny_tokenizer, torch.bfloat16)
    loaded = Llama.load(tmp_path).state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter.detach().bfloat16().float())


def test_a_config_in_the_style_of_transformers_5(folder):
    before = model_folder.read_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(raw))
    assert model_folder.read_config(folder) == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.onnx",
                                  "model-00001-of-00002.safetensors"])
def test_weights_in_other_formats_get_a_word(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match="has no model.safetensors: .* save_pretrained"):
        hub.find_weights(str(folder))


@pytest.mark.parametrize("names", [[], ["config.json"], ["config.json", "model.safetensors"]])
def test_adapters_get_a_word(folder, names):
    """Even one beside a whole model: transformers would add it to the weights."""
    (folder / "adapter_config.json").write_text("{}")
    for name in names:
        (folder / name).unlink()
    with pytest.raises(UserError, match="is an adapter: merge it into its model first"):
        hub.find_weights(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(folder, tiny_tokenizer, value):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny_model()
    model.get_parameter(NAME).data[3, 4] = value
    with pytest.raises(UserError, match=f"tensor {NAME} contains NaN or infinity"):
        assistant.save(folder, model, tiny_tokenizer, torch.float32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_tokenizer_config_names_the_inputs_that_the_model_takes(folder):
    """Without this, generate of transformers 4 refuses the token_type_ids of its own tokenizer."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


def test_other_software_samples_as_sample_py_does(folder):
    """But for the penalty, which transformers puts on the prompt, too."""
    written = GenerationConfig.from_pretrained(folder)
    assert written.do_sample and written.top_k == 0 and 1 < written.repetition_penalty < 1.2
    assert (written.temperature, written.top_p) == (Writing.temperature, Writing.top_p)
    model, replies = AutoModelForCausalLM.from_pretrained(folder), []
    for explicit in ({}, {"do_sample": True, "temperature": Writing.temperature, "top_k": 0,
                          "top_p": Writing.top_p, "repetition_penalty": 1.1}):
        torch.manual_seed(0)
        replies.append(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, **explicit))
    assert torch.equal(*replies)


@pytest.mark.parametrize("changes, field", [
    ({"rope_parameters": {"type": "linear"}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters"),
    ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters"),
    ({"model_type": "qwen2"}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": -3}, "hidden_size"), ({"hidden_size": "48", "head_dim": None}, "hidden_size"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"),
    ({"vocab_size": "many"}, "vocab_size"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"intermediate_size": 10**15}, "intermediate_size"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"), ({"head_dim": 7}, "head_dim")])
def test_what_the_module_cannot_express_is_refused_by_name(folder, changes, field):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=f"{field} ") as caught:
        Llama.load(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
    (lambda t: t.update({NAME[:-6] + "bias": torch.zeros(16)}),
     f"tensor {NAME[:-6]}bias has no place"),
    (lambda t: t.update({NAME: torch.zeros(16, 31)}), f"tensor {NAME} is \\[16, 31\\]"),
    (lambda t: t[NAME].__setitem__((3, 4), float("nan")), f"tensor {NAME} contains NaN"),
    (lambda t: t.update({NAME: torch.zeros(16, 48).to(torch.float8_e4m3fn)}),
     f"tensor {NAME} is .* of torch.float8"),
    (lambda t: t.update({NAME: torch.zeros(16, 48, dtype=torch.int8)}),
     f"tensor {NAME} is .* of torch.int8"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(320, 48)}), "lm_head.weight differs")])
def test_tensors_that_do_not_fit_are_refused_by_name(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(UserError, match=message):
        Llama.load(folder)


def test_a_tied_model_with_only_a_head_is_refused(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    with pytest.raises(UserError, match="model.embed_tokens.weight is missing"):
        Llama.load(folder)


def test_a_copy_of_the_tied_head_is_accepted(folder):
    edit_tensors(folder, lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = Llama.load(folder)
    for ours, parameter in zip(loaded.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(ours, parameter)


@pytest.mark.parametrize("spoil", [
    lambda b: b.replace(b'"F32"', b'"F4" ', 1), lambda b: b[:-100], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * 8 + b[8:],
    lambda b: b[:8] + b"nonsense" + b[16:]])
def test_damaged_files_are_named(folder, spoil):
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="model.safetensors"):
        Llama.load(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, tokenizer):
    assistant.save(tmp_path, tiny_model(), tokenizer, torch.float32)
    with pytest.raises(UserError, match="tokenizer has 49152 tokens"):
        assistant.load_parts(tmp_path)


NUMBERS = st.integers() | st.floats() | st.just(10**400)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: (st.lists(inner, max_size=2)
                   | st.dictionaries(st.text(max_size=5), inner, max_size=2)), max_leaves=3)
FIELDS = [*LlamaConfig.__annotations__, *model_folder.SUPPORTED, "rope_parameters", "eos_token_id",
          "chat_template"]


@given(changes=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=3),
       name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
@settings(max_examples=300)
def test_whatever_the_configs_say_a_folder_loads_or_is_refused(
        changes, name, tiny_folder, tmp_path_factory):
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("fuzz") / "model")
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    try:
        model, tokenizer = assistant.load_parts(folder)
        assert all(isinstance(token, int) for token in stop_tokens(tokenizer, chats=True))
        default_system(tokenizer.chat_template or "")
    except UserError:
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"{", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_not_what_they_should_be(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        assistant.load_parts(folder)


def test_no_code_of_a_folder_is_run_and_nothing_unpickled(folder, monkeypatch):
    """Poison in every place where other software would execute it."""
    poison = f"open({str(folder / 'poisoned')!r}, 'w')"
    for name in ("modeling_llama.py", "__init__.py", "configuration.py"):
        (folder / name).write_text(poison)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.Model"})
    torch.save({NAME: torch.zeros(1)}, folder / "pytorch_model.bin")
    command = f"cycler.__init__.__globals__.os.system('touch {folder / 'poisoned'}')"
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{% if " + command + " %}{% endif %}")
    monkeypatch.setattr(pickle, "Unpickler", None), monkeypatch.setattr(torch, "load", None)
    opened = []

    def note(event, arguments):
        if event == "open" and opened is not None:
            opened.append(str(arguments[0]))
    sys.addaudithook(note)
    model, tokenizer = assistant.load_parts(folder)
    with pytest.raises(UserError, match="chat template"):
        default_system(tokenizer.chat_template)
    prompt = encode_prompt([{"role": "user", "content": "Hi"}], tokenizer)
    stop = stop_tokens(tokenizer, chats=True)
    generate(model, [prompt], stop, max_new_tokens=3, temperature=1, top_p=1)
    assert not (folder / "poisoned").exists()
    assert not any(path.endswith((".py", ".bin")) and str(folder) in path for path in opened)
    opened = None


@pytest.mark.parametrize("format, stop", [("chat", {0, 2}), ("plain", {0}), ("auto", {0})])
def test_where_a_base_model_stops(format, stop, folder):
    """Like SmolLM2-135M: its configs know <|endoftext|> alone, and it has no template."""
    (folder / "tokenizer_config.json").unlink()
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "eos_token_id": 0}))
    assert Assistant("", *assistant.load_parts(folder), format).stop == stop


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        assistant.load_parts(folder)
