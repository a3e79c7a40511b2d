"""Other versions of transformers read what we write, each in an environment of its own.

    python -m venv t446 && t446/bin/pip install "transformers==4.46.3" "torch>=2.11,<2.14" numpy
    CLIENTS=t446/bin/python python -m pytest -m clients tests/test_clients.py

CLIENTS names one interpreter or several, separated by colons.
"""

import json
import os
import re
import subprocess

import pytest
import torch
from conftest import ROOT

from parrot import assistant
from parrot.config import SampleConfig

pytestmark = pytest.mark.clients
CLIENTS = [name for name in os.environ.get("CLIENTS", "").split(":") if name]
QUESTION = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def folder(q4_folder, tmp_path_factory):
    """The real model, as train.py saves it."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = assistant.load_parts(q4_folder)
    assistant.save(folder, model, tokenizer, torch.bfloat16)
    return folder


def ask(python, code, *args):
    done = subprocess.run([python, "-c", code, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


GREEDY = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, messages = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
settings = model.generation_config.to_dict()
print(json.dumps([inputs["input_ids"][0].tolist(), tokens[0].tolist(), {name: settings[name] for name in ("do_sample", "temperature", "top_p")}]))
"""


@pytest.mark.parametrize("python", CLIENTS or [pytest.param("", marks=pytest.mark.skip(reason="set CLIENTS"))])
def test_the_same_prompt_and_the_same_greedy_reply(python, folder):
    prompt, tokens, settings = ask(python, GREEDY, folder, json.dumps(QUESTION))
    ours = assistant.Assistant.load("", folder, torch.float32, torch.device("cpu"), "chat")
    assert prompt == ours.prompt(QUESTION)
    from parrot.sampling import generate
    [(reply, _)] = generate(ours.model, [prompt], ours.stop, max_new_tokens=24, temperature=0, top_p=1)
    assert tokens[len(prompt):][:len(reply)] == reply
    assert settings == {"do_sample": True, "temperature": SampleConfig().temperature, "top_p": SampleConfig().top_p}


@pytest.mark.parametrize("python", CLIENTS or [pytest.param("", marks=pytest.mark.skip(reason="set CLIENTS"))])
def test_the_model_cards_own_snippet(python, folder):
    card = (ROOT / "parrot" / "run" / "card.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("path/to/this/folder", str(folder))
    *setup, call = code.strip().splitlines()
    reply = ask(python, "\n".join([*setup, f"import json; print(json.dumps({call}))"]))
    assert len(reply[0]["generated_text"][-1]["content"].split()) > 8
