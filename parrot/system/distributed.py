"""Several processes, one result: `torchrun --nproc_per_node=2 train.py ...`

Each computes a share of a step's ribbons. Losses are sums, so the gradients add up to that of one.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from parrot.system.console import UserError


def torchrun_place():
    """torchrun's variables -> rank, number of processes, rank on this machine."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    values = {name: os.environ.get(name, alone[name]) for name in alone}
    if all(value.isdecimal() for value in values.values()):
        rank, size, local_rank = map(int, values.values())
        if rank < size and local_rank < size and (size == 1 or "MASTER_ADDR" in os.environ):
            return rank, size, local_rank
    raise UserError(f"{values} is not what torchrun sets: unset these variables, or use torchrun")


class Processes:
    """This process among all: `rank` of `size`. Raises UserError where another has ended."""

    def __init__(self):
        self.rank, self.size, local_rank = torchrun_place()
        if self.size > 1:
            if gpus := torch.cuda.device_count():
                torch.cuda.set_device(local_rank % gpus)
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=7))  # rank 0 may take hours

    def share(self, items):  # maybe none
        return items[self.rank::self.size]

    def sum(self, *numbers):
        return self._together(dist.all_reduce, torch.tensor(numbers, dtype=torch.float64)).tolist()

    def largest(self, number):  # of whole numbers; None counts as 0
        return int(self._together(dist.all_reduce, torch.tensor(number or 0), dist.ReduceOp.MAX))

    def sum_step(self, model, *numbers):
        """Sum every `.grad` and each number over all processes; -> the numbers."""
        if self.size == 1:
            return numbers
        for parameter in model.parameters():
            if parameter.grad is None:  # this process had no ribbon
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in model.parameters()]
        message = parameters_to_vector(gradients)  # all in one: each message takes a while
        vector_to_parameters(self._together(dist.all_reduce, message), gradients)
        return self.sum(*numbers)

    def copy_first(self, value, tensors=()):
        """The first process's value to all, and its tensors into theirs."""
        [value] = self._together(dist.broadcast_object_list, [value], device=torch.device("cpu"))
        for tensor in tensors:
            self._together(dist.broadcast, tensor, 0)
        return value

    def check_same(self, what, value):
        """Raise UserError in every process if `value` is not the same in all of them."""
        if self.largest(int(value != self.copy_first(value))):
            raise UserError(f"the processes do not have the same {what}")

    def close(self):
        self._together(dist.destroy_process_group, None)  # None: all of them

    def _together(self, function, message, *args, **kwargs):  # changes and returns the message
        try:
            if self.size > 1:
                function(message, *args, **kwargs)
        except RuntimeError as error:
            raise UserError(f"another process of this run has ended ({error!s:.200})") from None
        return message
