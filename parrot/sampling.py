"""From logits to words: repetition penalty, temperature, top-p, and the loop that writes token after token."""

import functools

import torch

from parrot.attention import KVCache
from parrot.captured import CapturedStep
from parrot.console import UserError


def nucleus(logits, temperature, top_p):
    """logits (B, V) -> probabilities (B, W) of tokens (B, W), zero outside the nucleus.

    The nucleus (arXiv:1904.09751) is the smallest set of likeliest tokens that holds at least
    `top_p` of the probability, so the token that crosses the threshold is in it. Among equals,
    the lower id comes first. Returned are the W likeliest tokens in order, W large enough to hold the
    nucleus; where `top_p` is 1, all V in the order of their ids.

    >>> nucleus(torch.tensor([[0.3, 0.5, 0.2]]).log(), temperature=1.0, top_p=0.6)
    (tensor([[0.6250, 0.3750, 0.0000]]), tensor([[1, 0, 2]]))
    """
    logits = logits.float()
    # Subtracting the largest first keeps tiny temperatures from overflowing.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p >= 1:  # everything: not even rounding may drop a token
        return probabilities, torch.arange(probabilities.shape[-1], device=logits.device).expand_as(probabilities)
    ordered, tokens = likeliest(probabilities, top_p)
    before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    return ordered / ordered.sum(-1, keepdim=True), tokens


def likeliest(probabilities, mass):
    """(B, V) -> as many of the likeliest as hold `mass`, or more, and their ids: both (B, W), in order."""
    if probabilities.device.type == "cpu":
        # A few are nearly always enough, and finding them takes 6 ms (16 x 49,152), sorting all 30. The
        # bits of positive floats are in the order of the floats; below them stands what breaks a tie.
        V = probabilities.shape[-1]
        keys = (probabilities.view(torch.int32).long() << 32) + torch.arange(V - 1, -1, -1)
        tokens = keys.topk(min(V, 1024)).indices
        ordered = probabilities.gather(-1, tokens)
        if (ordered.sum(-1) >= mass).all():
            return ordered, tokens
    return probabilities.sort(dim=-1, descending=True, stable=True)


def penalize(logits, written, penalty):
    """logits (B, V), ids that the reply has already (B, t) -> logits (B, V), theirs lowered (arXiv:1909.05858).

    What was said twice seems to the model the likeliest to follow, so greedy replies end in loops. Divided
    (below zero: multiplied) by a penalty above 1, it has to be that much better than the rest.

    >>> penalize(torch.tensor([[4.0, -1.0, 3.0]]), torch.tensor([[0, 1, 0]]), 2.0)
    tensor([[ 2., -2.,  3.]])
    """
    said = logits.gather(-1, written)
    return logits.scatter(-1, written, torch.where(said > 0, said / penalty, said * penalty))


def choose(logits, temperature, top_p, generator=None):
    """logits (B, V) -> the next token of every sequence (B,). Temperature 0: the likeliest."""
    if temperature < 1e-6:  # would divide by nothing
        return logits.float().argmax(-1)  # in bfloat16 it takes 160 us instead of 45
    probabilities, tokens = nucleus(logits, temperature, top_p)
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


@torch.inference_mode()
def generate(model, prompts, stop, *, max_new_tokens, temperature, top_p, generator=None,
             repetition_penalty=1.0, samples_each=1):
    """Write replies to several prompts at once, a token each at a time.

    prompts: lists of ids; stop: the ids that end a reply. repetition_penalty looks at the reply alone: an
    answer may quote the question. Yields, step by step, a list with one id for each reply, None for those
    that have ended (the stop token itself is not shown). Ends when all have, after `max_new_tokens`, or
    at the end of the model's context.
    """
    device = model.device
    lengths = [len(prompt) for prompt in prompts]
    room = check_room(lengths, model.config, max_new_tokens)
    cache = KVCache(model.config, len(prompts), max(lengths) + room, model.dtype, device)

    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)  # (N,)
    hidden_states = model(tokens, cache.prefill(lengths))  # (N, C)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    each = torch.arange(len(prompts), device=device).repeat_interleave(samples_each)  # (B,) whose reply it is
    cache.select(each)
    next_logits = CapturedStep(model, cache) if cache.static else functools.partial(logits_after, model, cache)
    logits = model.logits(hidden_states[last][each])  # (B, V)
    written = torch.empty(len(each), room, dtype=torch.long, device=device)
    places = going_on = list(range(len(each)))
    for count in range(room):
        if repetition_penalty != 1:
            logits = penalize(logits, written[:, :count], repetition_penalty)
        written[:, count] = tokens = choose(logits, temperature, top_p, generator)  # (B,)
        said = {place: token for place, token in zip(places, tokens.tolist()) if place in going_on and token not in stop}
        if not said:
            return
        going_on = said
        yield [said.get(place) for place in range(len(each))]
        if not cache.static and len(said) * 2 <= len(places):  # half have ended: go on without them
            rows = [row for row, place in enumerate(places) if place in said]
            cache.select(rows)
            tokens, written, places = tokens[rows], written[rows], list(said)
        if count < room - 1:
            logits = next_logits(tokens)


def logits_after(model, cache, tokens):
    """The tokens (B,) that were just written -> logits (B, V) of what comes next."""
    # One row: torch's own product reads bfloat16 at 29 GB/s, that of oneDNN (mkldnn) at 10.
    with torch.backends.mkldnn.flags(enabled=len(tokens) > 1, allow_tf32=None):
        return model.logits(model(tokens, cache.step()))


def replies(model, prompts, stop, *, max_new_tokens, samples_each=1, **how):
    """`generate` to the end -> [(tokens, whether it ended by itself)], one for each reply."""
    room = check_room([len(prompt) for prompt in prompts], model.config, max_new_tokens)
    tokens = [[] for _ in range(len(prompts) * samples_each)]
    for step in generate(model, prompts, stop, max_new_tokens=max_new_tokens, samples_each=samples_each, **how):
        for reply, token in zip(tokens, step):
            if token is not None:
                reply.append(token)
    return [(reply, len(reply) < room) for reply in tokens]


def check_room(lengths, config, max_new_tokens):
    """How many tokens can follow the longest prompt: `max_new_tokens`, or the context's rest."""
    left = config.max_position_embeddings - max(lengths)
    if left < 1:
        raise UserError(f"the prompt has {max(lengths)} tokens; the model's context holds "
                        f"{config.max_position_embeddings}, reply included. Shorten the prompt.")
    return min(left, max_new_tokens)
