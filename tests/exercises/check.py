"""python tests/exercises/check.py mask: is the function in tests/exercises/mask.py right?

It is put in the place of the lesson's own, and the lesson is tested.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from parrot import attention, chat, data, fast, model, sampling, training  # noqa: E402
from parrot.attention import KVCache, Ribbon  # noqa: E402
from parrot.data import Batch, Examples  # noqa: E402

PLACES = {"mask": (chat, "pieces_of"), "shift": (Batch, "of"), "sum": (training, "loss_sum"),
          "rotation": (model, "rotate"), "nucleus": (sampling, "nucleus"),
          "cache": (attention.Step, "attend")}
FOUR = [([5, 6, 7, 8], [False, False, True, True]), ([9, 10, 11], [False, True, True]),
        ([3, 4, 12, 13, 14, 15], [False] * 5 + [True]), ([1, 2, 3], [False, True, True])]


def tiny_model():
    """A random model of two layers; its weights are large, so that every part of it counts."""
    torch.manual_seed(0)
    llama = model.Llama(model.LlamaConfig(32, 16, 24, 2, 4, 2, 4, 64, 1e-5, 10000.0, True))
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return llama


def equal(ours, expected, what):
    """Say what is wrong, if anything is. Numbers may differ by rounding."""
    if isinstance(expected, torch.Tensor):
        same = ours.shape == expected.shape and torch.allclose(ours, expected, atol=1e-5)
    else:
        same = ours == expected
    if isinstance(expected, torch.Tensor) and expected.numel() > 8:
        assert same, f"{what} yours is not what it should be"
    assert same, f"{what}\n  yours:     {ours}\n  should be: {expected}"


def check_mask():
    pieces = chat.pieces_of([{"role": "system", "content": "Be kind."},
                             {"role": "user", "content": "Hi"},
                             {"role": "assistant", "content": " Ho "}])
    marked = "".join(f"«{text}»" if flag else text for text, flag in pieces).replace("»«", "")
    equal(marked, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
          "<|im_start|>assistant\n«Ho<|im_end|>»\n", "the targets, in «»:")
    controls = [text for text, _ in pieces if isinstance(text, chat.Control)]
    equal(controls, [chat.IM_START, chat.IM_END] * 3, "the control tokens:")


def check_shift():
    three = Examples.of([*FOUR[:2], ([20, 21], [False, False])])
    batch = data.Batch.of(three, [0, 1, 2])
    equal(batch.targets.tolist(), [7, 8, 10, 11],
          "the targets of [5 6 (7) (8)] [9 (10) (11)] [20 21]:")
    equal(batch.rows.tolist(), [1, 2, 4, 5], "the rows that predict them:")


def check_sum():
    llama, four = tiny_model(), Examples.of(FOUR)
    whole = Batch.of(four, [0, 1, 2, 3])
    logits = llama.logits(llama(whole.tokens, whole.ribbon))[whole.rows]
    expected = F.cross_entropy(logits, whole.targets, reduction="sum")
    for split in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        losses = [training.loss_sum(llama, Batch.of(four, indices), torch.float32)
                  for indices in split]
        sum(losses).backward()
        equal(sum(losses), expected, f"the loss of seven targets in {len(split)} ribbon(s), added:")


def check_rotation():
    quarter = model.rotate(torch.tensor([[[1.0, 2, 0, 0]]]), torch.tensor(0.0), torch.tensor(1.0))
    equal(quarter.flatten(), torch.tensor([0.0, 0, 1, 2]),
          "[1, 2, 0, 0], whose pairs are (1, 0) and (2, 0), after a quarter turn (cos 0, sin 1):")
    x, positions = torch.randn(3, 2, 4), torch.tensor([0, 1, 7])
    cos, sin = model.rope_angles(positions, 4, 100.0)
    points = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    turned = model.rotate(x, cos, sin)
    equal(turned[0], x[0], "position 0, which turns by nothing:")
    equal(turned, torch.cat([points.real, points.imag], dim=-1), "three positions:")
    far = model.rotate(x, *model.rope_angles(positions + 50, 4, 100.0))
    equal((far[1] * far[2]).sum(), (turned[1] * turned[2]).sum(), "a score, 50 positions later:")


def check_nucleus():
    logits = torch.tensor([[0.3, 0.5, 0.2], [0.98, 0.01, 0.01]]).log()
    for top_p, expected in ((0.4, [[1, 0, 0], [1, 0, 0]]), (0.6, [[0.625, 0.375, 0], [1, 0, 0]]),
                            (1.0, [[0.5, 0.3, 0.2], [0.98, 0.01, 0.01]])):
        probabilities, _ = sampling.nucleus(logits, 1.0, top_p)
        equal(probabilities, torch.tensor(expected).float(), f"probabilities, top-p {top_p}:")


def check_cache():
    one_head = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    cache = KVCache(replace(tiny_model().config, **one_head), batch_size=1, capacity=4)
    zeros, values = torch.zeros(3, 1, 4), torch.eye(4)[:, None]  # all keys are equally good
    cache.prefill([2]).attend(0, zeros[:2], zeros[:2], values[:2])
    taken = cache.step().attend(0, zeros[2:], zeros[2:], values[2:3])
    equal(taken.flatten(), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]),
          "how much token 2 takes from tokens 0, 1, 2, 3 (the last is not written yet):")
    llama, cache = tiny_model(), KVCache(tiny_model().config, 2, 8)
    llama(torch.tensor([5, 6, 7, 8]), cache.prefill([3, 1]))
    for tokens in ([9, 10], [11, 12]):
        hidden_states = llama(torch.tensor(tokens), cache.step())
    expected = llama(torch.tensor([5, 6, 7, 9, 11, 8, 10, 12]), Ribbon([5, 3]))[[4, 7]]
    equal(hidden_states, expected, "two replies, two tokens on, against reading all of them anew:")


def fault_of(name, path):
    """What is wrong with the function in the file, or None."""
    fast.enabled = False  # the plain code, which calls the function
    owner, attribute = PLACES[name]
    before = owner.__dict__[attribute]
    try:
        spec = importlib.util.spec_from_file_location(f"exercise_{name}", path)
        exercise = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(exercise)
        function = getattr(exercise, attribute)
        setattr(owner, attribute, classmethod(function) if name == "shift" else function)
        with torch.set_grad_enabled(name == "sum"):
            globals()[f"check_{name}"]()
    except AssertionError as error:
        return str(error)
    except Exception as error:  # whatever the student's line does
        return f"{type(error).__name__}: {error}"
    finally:
        setattr(owner, attribute, before)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PLACES:
        sys.exit(f"usage: python tests/exercises/check.py {' | '.join(PLACES)}")
    fault = fault_of(sys.argv[1], HERE / f"{sys.argv[1]}.py")
    print(fault or "Right.")
    sys.exit(fault is not None)
