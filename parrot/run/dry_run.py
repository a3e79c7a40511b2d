"""train.py --dry-run: all that can be told of a run before it, from the data and one ribbon."""

import shutil
import sys
import time

import numpy as np

from parrot.chat import coloured
from parrot.run.trainer import Trainer
from parrot.system.console import say
from parrot.system.device import peak_memory
from parrot.training import loss_sum


def dry_run(run: Trainer):
    """Say what the run would be; nothing is written."""
    data, config = run.train_set, run.config
    num_targets = sum(int(data[i][1].sum()) for i in range(len(data)))
    num_tokens = run.total_steps / run.steps_per_epoch * data.lengths.sum()
    median, most = np.percentile(data.lengths, [50, 99])
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    say(f"an example has {median:.0f} tokens (median), 99% have at most {most:.0f}, the longest "
        f"{data.lengths.max()}; {num_targets / data.lengths.sum():.0%} of the tokens are targets",
        f"{num_parameters:,} parameters, {run.total_steps} steps of up to {config.batch_size} "
        f"examples, {num_tokens:,.0f} tokens in all", f"the first example, {data.source(0)}:")
    print(coloured(*data[0], run.tokenizer, colour=sys.stdout.isatty()))

    batch, seconds = run.batches(0)[0], []
    for _ in range(2):  # the first time is slower
        started = time.perf_counter()
        loss = loss_sum(run.model, batch, run.dtype)
        loss.backward()
        loss.item()  # a GPU is waited for
        seconds.append(time.perf_counter() - started)
    hours = num_tokens * seconds[1] / len(batch.tokens) / run.processes.size / 3600
    memory = (peak_memory(run.model.device) or 0) + 8 * num_parameters  # AdamW's two moments
    folder = run.folder.path.absolute()
    while not folder.exists():
        folder = folder.parent
    disk = (2 * 12 + run.dtype.itemsize) * num_parameters  # two checkpoints, while one is replaced
    say(f"a ribbon of {len(batch.tokens)} tokens takes {seconds[1]:.1f} s, so the steps about "
        f"{hours:.1f} h; about {memory / 1e9:.1f} GB of memory; {disk / 1e9:.1f} GB of disk, "
        f"{shutil.disk_usage(folder).free / 1e9:.0f} GB are free. Nothing was written.")
