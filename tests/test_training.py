"""The loss and its gradient, against transformers with padding and against every split."""

import math

import numpy as np
import pytest
import torch
from conftest import some_records, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from parrot import assistant, fast
from parrot.config import TrainConfig
from parrot.data import Batch, load_examples, micro_batches
from parrot.files.hub import find_data
from parrot.model import Llama
from parrot.system.device import multiplies_bfloat16
from parrot.system.distributed import Processes
from parrot.training import held_out_means, learning_rate, loss_sum, make_optimizer


def accumulate(model, batches, dtype=torch.float32):
    """The gradient of a whole step, as in train.py; returns its mean loss."""
    num_targets, total = sum(len(batch.targets) for batch in batches), 0.0
    for batch in batches:
        loss = loss_sum(model, batch, dtype)
        loss.backward()
        total += loss.item()
    for parameter in model.parameters():
        parameter.grad /= num_targets
    return total / num_targets


@pytest.fixture
def examples(records_file, tiny_tokenizer):
    train, _, _ = load_examples(find_data(records_file(some_records(64))), tiny_tokenizer, 512, 0.0)
    return train


def reference_loss(reference, examples, indices):
    """The same mean loss by another road: padded rows, labels of -100, a plain token sum."""
    longest = max(examples.lengths[i] for i in indices)
    tokens, labels = np.zeros((2, len(indices), longest), np.int64)
    mask = np.zeros((len(indices), longest), np.int64)
    labels[:] = -100
    for row, index in enumerate(indices):
        example, is_target = examples[index]
        tokens[row, :len(example)], mask[row, :len(example)] = example, 1
        labels[row, :len(example)] = np.where(is_target, example.astype(np.int64), -100)
    logits = reference(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits
    labels = torch.from_numpy(labels)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                             ignore_index=-100)


def gradients(model, examples, max_examples=None, max_tokens=None):
    model.zero_grad()
    batches = [Batch.of(examples, some) for some in
               micro_batches(range(64), examples.lengths, max_examples, max_tokens)]
    loss = accumulate(model, batches)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_any_split_gives_the_gradient_of_transformers(way, examples, tiny_folder, monkeypatch):
    """And the parameters after one step of AdamW: the first one divides by |gradient|, so an eps
    under which gradients that are only rounding stay small."""
    monkeypatch.setattr(fast, "enabled", way == "fast")
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = reference_loss(reference, examples, range(64))
    expected.backward()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}
    torch.optim.AdamW(reference.parameters(), **settings).step()
    for split in ((1, None), (4, None), (64, None), (None, 100), (None, 1000), (7, 500)):
        model = Llama.load(tiny_folder)
        loss, grads = gradients(model, examples, *split)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.optim.AdamW(model.parameters(), **settings).step()
        ours = dict(model.named_parameters())
        for name, parameter in reference.named_parameters():
            assert close(grads[name], parameter.grad, 2e-5), (name, split)
            assert close(ours[name], parameter, 2e-5), (name, split)


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_steps_equal_a_plain_loop_on_padded_batches(tied, examples, tmp_path, tiny_tokenizer):
    assistant.save(tmp_path, tiny_model(tiny_config(tied=tied)), tiny_tokenizer, torch.float32)
    model = Llama.load(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(model, config)
    decayed = [p for n, p in reference.named_parameters() if "norm" not in n]
    scales = [p for n, p in reference.named_parameters() if "norm" in n]
    plain = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0}],
                              lr=1e-2, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(6):
        indices = range(step * 10, step * 10 + 10)
        optimizer.zero_grad(), plain.zero_grad()
        accumulate(model, [Batch.of(examples, indices[:3]), Batch.of(examples, indices[3:])])
        reference_loss(reference, examples, indices).backward()
        for parameters in (model.parameters(), reference.parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), plain.step()
    ours = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert close(ours[name], parameter, 1e-4), name


def test_real_weights_have_the_loss_and_gradient_of_transformers(q4_folder, tokenizer, records_file, monkeypatch):
    examples, _, _ = load_examples(find_data(records_file(some_records(3))), tokenizer, 512, 0.0)
    reference = AutoModelForCausalLM.from_pretrained(q4_folder, dtype=torch.float32)
    expected = reference_loss(reference, examples, range(3))
    expected.backward()
    model = Llama.load(q4_folder)
    for enabled in (True, False):
        monkeypatch.setattr(fast, "enabled", enabled)
        model.zero_grad()
        loss = accumulate(model, [Batch.of(examples, [0]), Batch.of(examples, [1, 2])])
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        ours = dict(model.named_parameters())
        for name, parameter in reference.named_parameters():
            assert close(ours[name].grad, parameter.grad, 1e-3), (name, enabled)


@pytest.mark.skipif(not multiplies_bfloat16(torch.device("cpu")), reason="takes a quarter of an hour on a CPU without bfloat16 units")
def test_bfloat16_stays_near_float32(q4_folder, tokenizer, records_file):
    examples, _, _ = load_examples(find_data(records_file(some_records(6))), tokenizer, 512, 0.0)
    model = Llama.load(q4_folder)
    batch = Batch.of(examples, range(6))
    exact = accumulate(model, [batch])
    watched = [model.model.layers[15].mlp.up_proj.weight, model.model.embed_tokens.weight]  # the latter is lm_head's, too
    expected = [weight.grad.clone() for weight in watched]
    model.zero_grad()
    assert accumulate(model, [batch], torch.bfloat16) == pytest.approx(exact, rel=1e-2)
    assert all(close(weight.grad, before, 0.1) and weight.grad.dtype == torch.float32 for weight, before in zip(watched, expected))


def test_held_out_loss_is_the_mean_over_tokens_however_it_is_split(both_ways, examples, tiny_folder):
    model = Llama.load(tiny_folder)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        mean = reference_loss(reference, examples, range(64)).item()
    for max_tokens in (1, 300, 10**6):
        assert held_out_means(model, examples, max_tokens, torch.float32, Processes()) == pytest.approx({"val_loss": mean}, rel=1e-5)


def test_held_out_loss_stops_when_asked(examples, tiny_folder):
    assert held_out_means(Llama.load(tiny_folder), examples, 100, torch.float32, Processes(), lambda: True) is None


def test_the_stop_token_is_learned(tiny_tokenizer, records_file):
    """Trained on one short reply until it knows it, the model ends the reply by itself."""
    from parrot.chat import encode_prompt
    from parrot.sampling import generate
    examples, _, _ = load_examples(find_data(records_file([{"prompt": "Hi", "completion": "Ho ho"}])), tiny_tokenizer, 64, 0.0)
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=2e-2))
    for _ in range(60):
        accumulate(model, [Batch.of(examples, [0])])
        optimizer.step(), optimizer.zero_grad()
    prompt = encode_prompt([{"role": "user", "content": "Hi"}], tiny_tokenizer)
    [(reply, _)] = generate(model, [prompt], {tiny_tokenizer.control("<|im_end|>")}, max_new_tokens=20,
                            temperature=0, top_p=1)
    assert tiny_tokenizer.decode(reply) == "Ho ho"


# ---- how the weights move

def test_the_schedule_by_hand():
    rates = [learning_rate(step, 12, peak=2.0, floor=0.2, warmup_ratio=0.25) for step in range(12)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3] == pytest.approx(2.0) and rates[-1] == pytest.approx(0.2)
    assert rates[7] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 4 / 8)) / 2)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


def test_the_warmup_is_rounded_to_whole_steps():
    assert [learning_rate(step, 11, 3.0, 0.3, 0.25) for step in range(4)] == pytest.approx([1, 2, 3, 3])  # 2.75 steps


@pytest.mark.parametrize("total, warmup", [(1, 0.0), (1, 1.0), (2, 0.5), (3, 1.0)])
def test_short_schedules_stay_within_bounds(total, warmup):
    assert all(0.1 <= learning_rate(s, total, 1.0, 0.1, warmup) <= 1.0 for s in range(total))


def test_matrices_decay_and_scales_do_not():
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.5, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # without a gradient, only decay moves anything
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] if "norm" in name else before[name] * 0.95, atol=1e-6), name
