"""From logits to words: repetition penalty, temperature, top-p, and the loop that writes.

Shapes: B replies, R of them not ended, V vocabulary, W <= V likeliest tokens, t tokens so far.
"""

import torch

from parrot import fast
from parrot.attention import KVCache
from parrot.fast.captured import CapturedStep
from parrot.fast.nucleus import likeliest
from parrot.system.console import UserError

ROUNDING = 1e-6  # of sums of probabilities in float32


def nucleus(logits, temperature, top_p):
    """logits (B, V) -> probabilities (B, W) of the tokens (B, W), in descending order.

    A temperature below 1 favours the likely tokens, above 1 the unlikely ones. The nucleus
    (arXiv:1904.09751) is the smallest set of likeliest tokens that holds at least `top_p`.

    >>> nucleus(torch.tensor([[0.3, 0.5, 0.2]]).log(), temperature=1.0, top_p=0.6)
    (tensor([[0.6250, 0.3750, 0.0000]]), tensor([[1, 0, 2]]))
    """
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # finite at any temperature
    probabilities = scaled.softmax(-1)
    if fast.enabled:  # fast/nucleus.py
        probabilities, tokens = likeliest(probabilities, top_p)
    else:
        probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities  # what all likelier tokens hold
    if top_p < 1:
        probabilities = probabilities.masked_fill(before > max(top_p - ROUNDING, 0), 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), tokens


def penalize(logits, written, penalty):
    """Lower the logits (B, V) of the ids that a reply already contains: `written` (B, t).

    Otherwise a repeated phrase becomes the most likely, and replies loop (arXiv:1909.05858).

    >>> penalize(torch.tensor([[4.0, -1.0, 3.0]]), torch.tensor([[0, 1, 0]]), 2.0)
    tensor([[ 2., -2.,  3.]])
    """
    old = logits.gather(-1, written)
    return logits.scatter(-1, written, torch.where(old > 0, old / penalty, old * penalty))


def choose(logits, temperature, top_p, numbers):
    """logits (B, V) -> the next token of every reply (B,). Temperature 0: the likeliest.

    numbers (B,): uniform in [0, 1). Each picks the first token whose cumulative sum exceeds it.
    """
    if not logits.amax(-1).isfinite().all():  # amax passes NaN on
        raise UserError("logits are not finite: damaged weights, or try --dtype float32")
    if temperature < 1e-6:  # would divide by zero
        return logits.float().argmax(-1)
    probabilities, tokens = nucleus(logits, temperature, top_p)
    sums = probabilities.cumsum(-1)
    index = torch.searchsorted(sums, numbers[:, None], right=True)  # (B, 1)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not go beyond
    return tokens.gather(-1, index.minimum(last)).squeeze(-1)


@torch.inference_mode()
def generate(model, prompts, stop, *, max_new_tokens, temperature, top_p, generator=None,
             repetition_penalty=1.0, samples_each=1, show=None):
    """Write replies to several prompts at once -> [(ids, whether it ended by itself)].

    prompts: lists of ids; stop: ids that end a reply; generator: on the CPU, so that a seed means
    the same on every device; show: called with the ids of all replies after each token. The
    penalty is on the reply alone: an answer may quote the question. UserError for a long prompt.
    """
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    if longest >= context:
        raise UserError(f"the prompt has {longest} tokens; the model's context holds {context}")
    room = min(context - longest, max_new_tokens)
    cache, logits = read_prompts(model, prompts, room, samples_each)  # logits (B, V)
    is_captured = fast.enabled and model.device.type == "cuda"  # fast/captured.py
    next_logits = CapturedStep(model, cache) if is_captured else logits_after
    B = len(logits)
    replies = [[] for _ in range(B)]
    written = torch.empty(B, room, dtype=torch.long, device=model.device)
    alive = torch.arange(B, device=model.device)  # (R,) the replies that have not ended
    for count in range(room):
        if repetition_penalty != 1:
            logits = penalize(logits, written[alive, :count], repetition_penalty)
        numbers = torch.rand(B, generator=generator).to(model.device)
        tokens = choose(logits, temperature, top_p, numbers[alive])  # (R,)

        running = [i for i, token in enumerate(tokens.tolist()) if token not in stop]
        if not running:
            break
        alive, tokens = alive[running], tokens[running]
        written[alive, count] = tokens
        for reply, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            replies[reply].append(token)
        if show:
            show(replies)
        if count < room - 1:  # the last is never read
            logits = next_logits(model, cache, tokens, running)
    return [(reply, len(reply) < room) for reply in replies]


def read_prompts(model, prompts, room, samples_each):
    """Prompts, each read once -> a KVCache with `room` for more, and the next logits (B, V)."""
    lengths, device = [len(prompt) for prompt in prompts], model.device
    dtype = getattr(model, "cache_dtype", model.dtype)  # fast/packed.py has one
    cache = KVCache(model.config, len(prompts), max(lengths) + room, dtype, device)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)  # (N,)
    hidden_states = model(tokens, cache.prefill(lengths))  # (N, C)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    prompt_of_reply = torch.arange(len(prompts), device=device).repeat_interleave(samples_each)
    cache.select(prompt_of_reply)
    return cache, model.logits(hidden_states[last][prompt_of_reply])


def logits_after(model, cache, tokens, running):
    """Keep only the `running` rows of the cache, read tokens (R,) -> the next logits (R, V)."""
    if len(running) < len(cache.filled):
        cache.select(running)
    return model.logits(model(tokens, cache.step()))
