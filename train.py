"""Train LittleParrot: turn a language model that continues text into one that answers.

    python train.py --quickstart      minutes on a laptop's CPU
    python train.py                   SmolLM2-135M on Dolly 15K, 3 epochs

Read `train` from top to bottom: the loop is all there.
"""

import math
import shlex
import sys
import time

import torch
from tqdm import tqdm

from parrot import hub, weights
from parrot.checkpoint import Progress, RunFolder, describe
from parrot.chat import default_system, encode_prompt
from parrot.config import QUICKSTART, TrainConfig, parse
from parrot.console import Interrupted, StopSignal, UserError, printable, run, say
from parrot.data import Batch, examples_of_step, load_examples, micro_batches, steps_an_epoch
from parrot.device import TOKENS_A_FORWARD, keep_freed_memory, pick_device
from parrot.optim import learning_rate, make_optimizer
from parrot.sampling import generate
from parrot.training import accumulate_gradients, held_out_loss

QUESTIONS = ("Who are you?", "Who was the first woman to win a Nobel Prize?",  # asked before and after
             "What planet is closest to the sun?", "What is the capital of Canada?")


def train(config):
    folder = RunFolder(config.out)
    folder.begin(config.resume)
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    max_tokens = config.micro_batch_tokens or TOKENS_A_FORWARD[device.type]

    # The parts: weights, data, model, optimizer.
    weights_from, data_from = hub.find_weights(config.weights), hub.find_data(config.data)
    model, tokenizer = weights.load(weights_from.path, torch.float32, device)
    train_set, val_set, counts = load_examples(data_from.path, tokenizer, config.max_length,
                                               config.val_fraction, config.skip_bad_records)
    total_steps = config.epochs * steps_an_epoch(train_set, config.batch_size)
    total_steps = min(total_steps, config.max_steps or total_steps)
    optimizer = make_optimizer(model, config)
    say(f"{len(train_set)} examples to train on, {len(val_set)} held out, {total_steps} steps on {device}",
        *str(counts).splitlines())
    folder.open(describe(config, weights_from, data_from, {
        "examples": len(train_set), "held_out": len(val_set), "counts": counts.as_dict(),
        "device": str(device), "micro_batch_tokens": max_tokens, "steps": total_steps}), config.resume)
    progress = folder.restore(model, optimizer) if config.resume else Progress()
    if progress.step == 0:
        say("before training:", *answers(model, tokenizer, weights_from.path))

    bar = tqdm(total=total_steps, initial=progress.step, unit="step", desc="training", smoothing=0.1)
    with StopSignal() as stop, bar:
        while True:
            started = time.perf_counter()

            # Now and then, and at the end: how well does it do on what it has not seen?
            due = progress.step % config.eval_every == 0 or progress.step == total_steps
            if len(val_set) and due and not stop.status:
                val_loss = held_out_loss(model, val_set, max_tokens, dtype, lambda: stop.status)
                if val_loss is not None:
                    progress.seconds += time.perf_counter() - started
                    if progress.step == 0:
                        progress.first_loss = val_loss
                    elif progress.best_loss is None or val_loss < progress.best_loss:
                        progress.best_loss = val_loss
                        folder.save_best(model, tokenizer, dtype)
                    folder.log(step=progress.step, epoch=epoch_of(progress.step, train_set, config),
                               val_loss=val_loss, seconds=round(progress.seconds, 2))
                    bar.write(f"step {progress.step}: held-out loss {val_loss:.4f}", file=sys.stderr)

            if stop.status:
                folder.save(model, optimizer, progress)
                raise Interrupted(f"stopped after step {progress.step} of {total_steps}; to go on: "
                                  f"{command_to_resume()}", stop.status)
            if progress.step == total_steps:
                break

            # One step: the examples, as ribbons; their gradient; one move of the weights.
            started = time.perf_counter()
            indices = examples_of_step(progress.step, train_set, config.batch_size, config.seed)
            batches = [Batch.of(train_set, some, device) for some in micro_batches(
                indices, train_set.lengths, config.micro_batch_size, max_tokens)]
            loss = accumulate_gradients(model, batches, dtype)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
            if not math.isfinite(loss + grad_norm):
                raise diverged(progress.step, loss, grad_norm, train_set, indices, folder)
            rate = learning_rate(progress.step, total_steps, config.learning_rate,
                                 config.min_learning_rate, config.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

            # What happened, for the file and for the eye.
            tokens, seconds = sum(len(batch.tokens) for batch in batches), time.perf_counter() - started
            progress.step += 1
            progress.tokens += tokens
            progress.seconds += seconds
            folder.log(step=progress.step, epoch=epoch_of(progress.step, train_set, config), train_loss=loss,
                       learning_rate=rate, grad_norm=grad_norm, tokens=progress.tokens,
                       tokens_per_second=round(tokens / seconds, 1), seconds=round(progress.seconds, 2))
            bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {tokens / seconds:.0f} tokens/s", refresh=False)
            bar.update()
            if progress.step % config.save_every == 0 and progress.step < total_steps:
                folder.save(model, optimizer, progress)

    if not len(val_set):
        folder.save_best(model, tokenizer, dtype)
    folder.finish(first_loss=progress.first_loss, best_loss=progress.best_loss, seconds=progress.seconds)
    best, tokenizer = weights.load(folder.path, torch.float32, device)
    say("after training:", *answers(best, tokenizer, folder.path))
    say(told_at_the_end(progress, folder.path))


def epoch_of(step, train_set, config):
    """Passes over the data after `step` steps."""
    return round(step / steps_an_epoch(train_set, config.batch_size), 4)


def answers(model, tokenizer, folder):
    """What the model says to QUESTIONS, greedily, in its own format."""
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    if tokenizer.chat_template:
        system = default_system(tokenizer.chat_template)
        prompts = [encode_prompt([{"role": "user", "content": q}], tokenizer, system) for q in QUESTIONS]
    replies = [[] for _ in QUESTIONS]
    for step in generate(model, prompts, weights.stop_tokens(folder, tokenizer), max_new_tokens=48,
                         temperature=0, top_p=1):
        for reply, token in zip(replies, step):
            reply += [token] if token is not None else []
    return [f"  {question}  ->  {printable(' '.join(tokenizer.decode(reply).split()))}"
            for question, reply in zip(QUESTIONS, replies)]


def diverged(step, loss, grad_norm, train_set, indices, folder):
    """The error for a step whose loss or gradient is not a finite number."""
    names = ", ".join(train_set.sources[index] for index in indices)
    return UserError(f"step {step + 1}: the loss is {loss} and the gradient's length {grad_norm}. Its "
                     f"examples: {names}. The weights were not changed; the last checkpoint in "
                     f"{folder.checkpoints} is good. A lower --learning-rate usually helps.")


def command_to_resume():
    """The command line of this run, with --resume."""
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    return shlex.join(["python", "train.py", *arguments, "--resume"])


def told_at_the_end(progress, path):
    """The last words of a run."""
    told = f"{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s. The model is in {path}"
    if progress.best_loss is not None:
        told += f"; held-out loss {progress.first_loss:.3f} -> {progress.best_loss:.3f}"
        if progress.best_loss >= progress.first_loss:
            told += " (no better than before training: try a lower --learning-rate)"
    return f'{told}.\nAsk it: python sample.py --model {path} --prompt "Who are you?"'


if __name__ == "__main__":
    keep_freed_memory()
    run(lambda: train(parse(TrainConfig, sys.argv[1:], __doc__.splitlines()[0], {"quickstart": QUICKSTART})))
