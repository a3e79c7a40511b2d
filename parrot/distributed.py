"""Several processes, one result: `torchrun --nproc_per_node=2 train.py ...`

Each process computes a share of every step's ribbons. Because the loss is a sum that is
divided by one count, adding up the gradients of all processes gives exactly the gradient of
one. A process that is alone does nothing here.
"""

import contextlib
import os

import torch
import torch.distributed as dist


class Processes:
    """This process among all: `rank` of `size`."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def share(self, items):
        """Every size-th item; maybe none. All processes together have each item once."""
        return items[self.rank::self.size]

    def sum(self, *numbers):
        """Each number, added up over all processes."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, number):
        """The largest of all processes' numbers, None counting as 0."""
        if self.size == 1:
            return number
        largest = torch.tensor(number or 0)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum_gradients(self, model):
        """Give every process the sum of all gradients."""
        if self.size == 1:
            return
        for parameter in model.parameters():
            if parameter.grad is None:  # this process had no ribbon
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    @contextlib.contextmanager
    def one_after_the_other(self):
        """The first process enters alone, the others when it is through: it writes, they read."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()
