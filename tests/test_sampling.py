"""Top-p against brute force, greedy, seeds, stopping, and the end of the context."""

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot import sampling
from parrot.attention import Ribbon
from parrot.sampling import choose, generate, penalize
from parrot.system.console import UserError


def nucleus(logits, temperature, top_p):
    """The probability of every token (B, V), zero outside the nucleus."""
    probabilities, tokens = sampling.nucleus(logits, temperature, top_p)
    return torch.zeros_like(logits).scatter(-1, tokens, probabilities)


def brute_force(probabilities, top_p):
    """Take tokens, likeliest first and lower ids first among equals, until they hold top_p."""
    kept, total = [], 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: (-probabilities[t], t)):
        kept.append(token)
        total += probabilities[token]
        if total >= top_p:
            break
    return {token: probabilities[token] / total for token in kept}


@settings(max_examples=300)
@given(weights=st.lists(st.integers(1, 6), min_size=1, max_size=12), top_p=st.floats(0.01, 1.0))
def test_nucleus_against_brute_force_ties_included(weights, top_p):
    exact = [weight / sum(weights) for weight in weights]
    sums = torch.tensor(sorted(exact, reverse=True), dtype=torch.float64).cumsum(0)
    if (sums - top_p).abs().min() < 1e-5:
        return  # on the threshold itself, rounding decides
    ours = nucleus(torch.tensor([exact]).log(), 1.0, top_p)[0]
    expected = brute_force(exact, top_p)
    assert {t for t, p in enumerate(ours.tolist()) if p > 0} == set(expected)
    for token, probability in expected.items():
        assert ours[token].item() == pytest.approx(probability, rel=1e-4)


def test_the_token_that_crosses_the_threshold_stays_in():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert nucleus(logits, 1.0, 0.6)[0].gt(0).tolist() == [True, True, False, False]
    assert nucleus(logits, 1.0, 0.5)[0].gt(0).tolist() == [True, False, False, False]
    assert nucleus(logits, 1.0, 0.8)[0].gt(0).tolist() == [True, True, True, False]
    for top_p in (1e-300, 1e-7, 9e-7):
        assert nucleus(logits, 1.0, top_p)[0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("steps", [1, 7, 300])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95])
def test_nucleus_of_a_whole_vocabulary_against_a_plain_sort(steps, top_p):
    """Flat or peaked, in few distinct values with many ties, as bfloat16 logits have."""
    logits = (torch.randn(2, 49152, generator=torch.Generator().manual_seed(0)) * steps).round() / 20
    probabilities = logits.softmax(-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    inside = ordered.cumsum(-1) - ordered < top_p
    ours = nucleus(logits, 1.0, top_p)
    for row in range(2):
        assert set(ours[row].nonzero().flatten().tolist()) == set(tokens[row][inside[row]].tolist())
    assert torch.allclose(ours.sum(-1), torch.ones(2))


def test_top_p_of_one_keeps_everything():
    logits = torch.randn(3, 49152, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(nucleus(logits, 1.0, 1.0), logits.softmax(-1)) or torch.allclose(
        nucleus(logits, 1.0, 1.0), logits.softmax(-1), rtol=1e-4)
    assert (nucleus(logits, 1.0, 1.0) > 0).all()


def test_temperature_is_the_exponent():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    expected = torch.tensor([0.7, 0.2, 0.1]) ** 2
    assert torch.allclose(nucleus(logits, 0.5, 1.0)[0], expected / expected.sum())
    assert nucleus(logits, 1e-30, 0.9)[0].tolist() == [1.0, 0.0, 0.0]  # and no NaN


def test_temperature_zero_takes_the_likeliest():
    for temperature in (0, 1e-50):
        assert choose(torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]]), temperature, 0.5, torch.zeros(2)).tolist() == [1, 0]


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(20000, 1)
    numbers = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    drawn = choose(logits, 1.0, 0.75, numbers).bincount(minlength=3) / 20000
    assert torch.allclose(drawn, torch.tensor([0.625, 0.375, 0.0]), atol=0.015)


@pytest.mark.parametrize("penalty", [1.0, 1.1, 3.0])
def test_the_penalty_is_that_of_transformers(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor
    logits, written = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 7, 1], [0, 0, 0], [49, 2, 3]])
    assert torch.equal(penalize(logits, written, penalty), RepetitionPenaltyLogitsProcessor(penalty)(written, logits.clone()))


PROMPT = [5, 6, 7, 8]


def run(prompts=(PROMPT,), stop=(), seed=0, **options):
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, **options}
    replies = generate(tiny_model(), [list(p) for p in prompts], stop,
                       generator=torch.Generator().manual_seed(seed), **options)
    return [reply for reply, _ in replies]


def test_the_same_seed_gives_the_same_reply_and_another_another():
    assert run(seed=1) == run(seed=1)
    assert run(seed=1) != run(seed=2)


def test_greedy_is_the_argmax_of_the_uncached_model():
    model, tokens = tiny_model(), list(PROMPT)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(model.logits(model(torch.tensor(tokens), Ribbon([len(tokens)])))[-1].argmax().item())
    assert run(temperature=0) == [tokens[4:]]


def test_a_penalty_looks_at_the_reply_and_not_at_the_prompt():
    model, prompt = tiny_model(), PROMPT + run(temperature=0)[0]  # in which stands what the reply would say

    def brute_force(start):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                logits = model.logits(model(torch.tensor(tokens), Ribbon([len(tokens)])))[-1]
                for token in set(tokens[start:]):
                    logits[token] *= 1 / 1.5 if logits[token] > 0 else 1.5
                tokens.append(logits.argmax().item())
        return tokens[len(prompt):]
    assert run([prompt], temperature=0, repetition_penalty=1.5) == [brute_force(len(prompt))]
    assert brute_force(len(prompt)) != brute_force(0) and [brute_force(len(prompt))] != run([prompt], temperature=0)


def test_a_penalty_that_is_high_ends_every_loop():
    assert len(set(run(temperature=0, max_new_tokens=100)[0])) < 100  # this model loops
    assert len(set(run(temperature=0, max_new_tokens=100, repetition_penalty=1e6)[0])) == 100


def test_several_prompts_at_once_get_the_replies_they_get_alone():
    prompts = [PROMPT, [9, 10], [11] * 20]
    assert run(prompts, temperature=0) == [run([p], temperature=0)[0] for p in prompts]


def test_one_row_by_another_product_leaves_the_setting_as_it_was():
    before = torch.backends.mkldnn.enabled
    seen = []
    generate(tiny_model(), [PROMPT], set(), max_new_tokens=3, temperature=0, top_p=1,
             show=lambda replies: seen.append(torch.backends.mkldnn.enabled))
    assert seen == [before] * 3


def test_several_samples_differ_and_are_as_many_as_asked():
    replies = run(samples_each=4)
    assert len(replies) == 4 and len({tuple(reply) for reply in replies}) > 1


def test_a_reply_ends_at_a_stop_token_which_is_not_shown():
    whole = run(temperature=0)[0]
    stop = whole[5]
    assert run(temperature=0, stop={stop, 319})[0] == whole[:whole.index(stop)]


def test_one_reply_may_end_before_another():
    prompts = [PROMPT, [9, 10]]
    whole = run(prompts, temperature=0)
    stop = next(token for token in whole[0] if token not in whole[1])
    assert run(prompts, temperature=0, stop={stop}) == [whole[0][:whole[0].index(stop)], whole[1]]


def test_those_that_go_on_when_half_have_ended_get_the_replies_they_get_alone():
    prompts = [[n, n + 1, n + 2][:1 + n % 3] for n in range(10, 45, 5)]
    how = {"temperature": 0, "max_new_tokens": 40, "repetition_penalty": 1.5}  # which remembers what each reply has said
    whole = run(prompts, **how)
    stop = {whole[i][4 * i] for i in range(6)}
    expected = [reply[:next((i for i, token in enumerate(reply) if token in stop), None)] for reply in whole]
    ends = sorted(map(len, expected))
    assert ends[0] < ends[3] < ends[-1]  # so that at least one is left when four of seven have ended
    assert run(prompts, stop=stop, **how) == expected
    assert run(prompts, stop=stop, samples_each=2, **how) == [reply for reply in expected for _ in range(2)]


def test_the_end_of_the_context_ends_the_reply():
    assert len(run([[5] * 505], max_new_tokens=100)[0]) == 512 - 505
    with pytest.raises(UserError, match="prompt has 512 tokens; the model's context holds 512"):
        run([[5] * 512])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    logits = torch.zeros(2, 50)
    logits[1, 7] = bad
    with pytest.raises(UserError, match="logits are not finite"):
        choose(logits, temperature, 0.9, torch.rand(2))


def tenths(total, parts):
    """All ways to write `total` tenths as a sum of `parts`."""
    if parts == 1:
        return [[total]]
    return [[first, *rest] for first in range(total + 1) for rest in tenths(total - first, parts - 1)]


def test_every_distribution_in_tenths_keeps_the_smallest_set():
    """Exact ties and exact thresholds, by brute force in whole numbers."""
    weights = torch.tensor(tenths(10, 4))
    for top_p in range(1, 10):
        kept = nucleus((weights / 10).log().clamp(min=-1e4), 1.0, top_p / 10) > 0
        for row, mine in zip(weights.tolist(), kept.tolist()):
            order, expected, total = sorted(range(4), key=lambda i: (-row[i], i)), set(), 0
            while total < top_p:
                expected.add(order[len(expected)])
                total = sum(row[i] for i in expected)
            assert {i for i in range(4) if mine[i]} == expected, (row, top_p)
