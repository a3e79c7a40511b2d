"""Train LittleParrot: turn a language model that continues text into one that answers.

    python train.py --quickstart      minutes on a laptop's CPU
    python train.py                   SmolLM2-135M on Dolly 15K, 3 epochs

Read `train` from top to bottom: the loop is all there.
"""

import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from parrot import hub, portrait, report, weights
from parrot.chat import pieces_of_view
from parrot.checkpoint import Progress, RunFolder, describe
from parrot.compiling import compile_blocks
from parrot.config import TrainConfig, parse
from parrot.console import Interrupted, StopSignal, UserError, run_program, say
from parrot.data import Batch, Examples, examples_of_step, load_examples, micro_batches, steps_an_epoch
from parrot.device import keep_memory, peak_memory, pick, tokens_a_forward
from parrot.distributed import Processes
from parrot.limits import flop_of, matrix_rate
from parrot.model import Llama
from parrot.optim import learning_rate, make_optimizer
from parrot.speaker import Speaker
from parrot.tokenizer import Tokenizer
from parrot.training import accumulate_gradients, held_out_loss


@dataclass
class Run:
    """What a training run consists of."""
    config: TrainConfig
    processes: Processes  # one, unless torchrun started several
    folder: RunFolder
    model: Llama
    tokenizer: Tokenizer
    train_set: Examples
    val_set: Examples
    optimizer: torch.optim.Optimizer
    progress: Progress
    shown: list  # held-out prompts that it is asked before and after
    total_steps: int
    dtype: torch.dtype  # of the matrix products; the weights are float32
    max_tokens: int  # of one forward
    limit: float  # FLOP a second of a large matrix product here, by all processes


def train(config):
    """Train as `config` says and leave the best model in its folder. UserError, Interrupted."""
    give_memory_back = keep_memory()
    run = set_up(config)
    model, optimizer, progress, processes = run.model, run.optimizer, run.progress, run.processes
    if progress.step == 0 and processes.rank == 0:
        before = portrait.ask(Speaker.of("", model, run.tokenizer), run.shown)
        say("before training:", *portrait.lines(before))
        run.folder.show(before=before, example=pieces_of_view(*run.train_set[0], run.tokenizer))

    bar = tqdm(total=run.total_steps, initial=progress.step, unit="step", desc="training", disable=processes.rank > 0)
    upcoming = ribbons(run, progress.step)
    with StopSignal() as stop, bar:
        while True:
            # Now and then, and at the end: how well does it do on what it has not seen?
            if progress.step % config.eval_every == 0 or progress.step == run.total_steps:
                evaluate(run, stop, bar)
            if status := processes.largest(stop.status):
                run.folder.save(model, optimizer, progress)
                raise Interrupted(f"stopped after step {progress.step} of {run.total_steps}; to go on: "
                                  f"{command_to_resume(processes)}", status)
            if progress.step == run.total_steps:
                break

            # One step: some examples, as ribbons; their gradient; one move of the weights.
            started = time.perf_counter()
            indices, batches = upcoming
            supervised = sum(len(batch.targets) for batch in batches)  # of the whole step
            loss = accumulate_gradients(model, processes.share(batches), supervised, run.dtype)
            upcoming = ribbons(run, progress.step + 1)  # while a GPU is still at this step's
            loss, = processes.sum(float(loss))
            processes.sum_gradients(model)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
            if not math.isfinite(loss + grad_norm):
                names = ", ".join(run.train_set.source(index) for index in indices)
                raise diverged(run, f"the loss is {loss} and the gradient's length {grad_norm}. Its examples: {names}")
            if progress.step % config.save_every == 0:  # here, where a finite loss shows that the weights are good
                run.folder.save(model, optimizer, progress)
            rate = learning_rate(progress.step, run.total_steps, config.learning_rate,
                                 config.min_learning_rate, config.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            give_memory_back()

            # What happened, for the file and for the eye.
            tokens, seconds = sum(len(batch.tokens) for batch in batches), time.perf_counter() - started
            progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens
            progress.seconds += seconds
            share = flop_of(model, run.train_set.lengths[indices].tolist(), supervised) / seconds / run.limit
            run.folder.log(step=progress.step, epoch=epoch_of(run), train_loss=loss, learning_rate=rate,
                           grad_norm=grad_norm, tokens=progress.tokens, tokens_per_second=round(tokens / seconds, 1),
                           share_of_limit=round(share, 4), seconds=round(progress.seconds, 2))
            bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {tokens / seconds:.0f} tokens/s", refresh=False)
            bar.update()
    finish(run)


def set_up(config):
    """Settings -> the parts of a run, with what is worth knowing told on the way."""
    processes = Processes()
    folder = RunFolder(config.out, writes=processes.rank == 0)
    folder.begin(config.resume)
    device, dtype = pick(config)

    with processes.one_after_the_other():  # the first may have to download and to tokenise, the others find it done
        data_from, weights_from = hub.find_data(config.data), hub.find_weights(config.weights)
        model, tokenizer = weights.load(weights_from.path, torch.float32, device)
        train_set, val_set, counts = load_examples(data_from.path, tokenizer, config.max_length,
                                                   config.val_fraction, config.skip_bad_records)
    longest, context = train_set.lengths.max(), model.config.max_position_embeddings
    if longest > context:
        raise UserError(f"{data_from.path} has an example of {longest} tokens, but the context of {config.weights} "
                        f"holds {context}: set --max-length {context}")
    max_tokens = config.micro_batch_tokens or tokens_a_forward(model, dtype)
    total_steps = config.epochs * steps_an_epoch(train_set, config.batch_size)
    total_steps = min(total_steps, config.max_steps or total_steps)
    tokens = total_steps * config.batch_size * train_set.lengths.mean()
    compiled = compile_blocks(model, config.compile, tokens, dtype)
    optimizer = make_optimizer(model, config)
    say(f"{len(train_set)} examples to train on, {len(val_set)} held out, {total_steps} steps on {device}, "
        f"up to {max_tokens} tokens in a forward{', compiled' if compiled else ''}", *str(counts).splitlines())

    about = describe(config, weights_from, data_from, {
        "examples": len(train_set), "held_out": len(val_set), "counts": asdict(counts),
        "lengths": report.length_histogram(train_set.lengths.tolist()), "device": str(device),
        "compiled": compiled, "processes": processes.size, "micro_batch_tokens": max_tokens, "steps": total_steps})
    with processes.one_after_the_other():
        folder.open(about, config.resume)
        progress = folder.restore(model, optimizer) if config.resume else Progress()
    return Run(config, processes, folder, model, tokenizer, train_set, val_set, optimizer,
               progress, counts.shown, total_steps, dtype, max_tokens, matrix_rate(device, dtype) * processes.size)


def ribbons(run, step):
    """The indices of a step's examples, and the ribbons of its forwards, enough for all processes where that can be."""
    indices = examples_of_step(step, run.train_set, run.config.batch_size, run.config.seed)
    most = min(run.config.micro_batch_size or len(indices), -(-len(indices) // run.processes.size))
    return indices, [Batch.of(run.train_set, some, run.model.device)
                     for some in micro_batches(indices, run.train_set.lengths, most, run.max_tokens)]


def evaluate(run, stop, bar):
    """Log the held-out loss; keep the model if it is the best yet. A signal to stop cuts it short."""
    started, progress = time.perf_counter(), run.progress
    if not len(run.val_set):
        return
    loss = held_out_loss(run.model, run.val_set, run.max_tokens, run.dtype, run.processes, lambda: stop.status)
    if loss is None:
        return
    if not math.isfinite(loss):
        raise diverged(run, f"the held-out loss is {loss}")
    progress.seconds += time.perf_counter() - started
    if progress.step == 0:
        progress.first_loss = loss
    elif progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss = loss
        run.folder.save_best(run.model, run.tokenizer, run.dtype)
    run.folder.log(step=progress.step, epoch=epoch_of(run), val_loss=loss, seconds=round(progress.seconds, 2))
    run.folder.show()
    if run.processes.rank == 0:
        bar.write(f"step {progress.step}: held-out loss {loss:.4f}", file=sys.stderr)


def finish(run):
    """Leave the folder as a finished run, and show what was learned."""
    progress, folder = run.progress, run.folder
    if not len(run.val_set):
        folder.save_best(run.model, run.tokenizer, run.dtype)  # the last is the best we know
    if run.processes.rank == 0:
        best = Speaker.load("", folder.path, torch.float32, run.model.device)
        after = portrait.ask(best, run.shown)
        question, _, tokens = after[0]
        folder.show(after=after, answer=portrait.certainty(best, question, tokens))
        say("after training:", *portrait.lines(after))
    peak = peak_memory(run.model.device)
    folder.finish(first_loss=progress.first_loss, best_loss=progress.best_loss, seconds=progress.seconds, peak_memory=peak)
    memory = f", {peak / 1e9:.1f} GB at most" if peak else ""
    told = f"{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s{memory}. The model is in {folder.path}"
    if progress.best_loss is not None:
        told += f"; held-out loss {progress.first_loss:.3f} -> {progress.best_loss:.3f}"
        if progress.best_loss >= progress.first_loss:
            told += " (no better than before training: try a lower --learning-rate)"
    say(f'{told}.\nAsk it: python sample.py --model {shlex.quote(str(folder.path))} --prompt "Who are you?"')


def epoch_of(run):
    """Passes over the data so far."""
    return round(run.progress.step / steps_an_epoch(run.train_set, run.config.batch_size), 4)


def diverged(run, what):
    """The error for a loss that is not a finite number."""
    return UserError(f"step {run.progress.step + 1}: {what}. {run.folder.what_is_safe()} If it happens again, start "
                     "anew with a lower --learning-rate and another --out.")


def command_to_resume(processes):
    """The command line of this run, with --resume."""
    start = ["python"] if processes.size == 1 else ["torchrun", f"--nproc_per_node={processes.size}"]
    return shlex.join([*start, *(each for each in sys.argv if each != "--resume"), "--resume"])


if __name__ == "__main__":
    run_program(lambda: train(parse(TrainConfig, sys.argv[1:], __doc__.splitlines()[0])))
