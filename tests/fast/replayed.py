"""CUDA graphs played on a CPU: what torch.cuda.graph records is run again on the same memory, and nothing else is.

So a test without a GPU sees what a graph would do: numbers that Python knew while recording stay as they were; a tensor that is
replaced, and not written in place, is not seen; whatever would make the CPU wait for the GPU is refused; nothing that was recorded
has happened when the recording ends.
"""
import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique", "_unique2"}
MAKES_FROM_CPU = {"lift_fresh", "lift_fresh_copy"}  # torch.tensor([...]) while recording: a copy from pageable memory


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.recorded, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITS | MAKES_FROM_CPU:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        changed = []
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed += [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                changed += [x for x in tree_leaves(kwargs[argument.name]) if isinstance(x, torch.Tensor)]
        self.before += [(x, x.clone()) for x in changed]
        out = func(*args, **kwargs)
        memory = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        view = not changed and any(x.untyped_storage()._cdata in memory for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        if not view:  # a view is the same memory
            self.recorded.append((func, args, kwargs, out, bool(changed)))
        return out

    def end(self):
        """While recording nothing is run: take back what was written, spoil what was made."""
        for tensor, value in reversed(self.before):
            tensor.data.copy_(value)
        self.before = []
        for *_, out, in_place in self.recorded:
            if not in_place:
                for x in tree_leaves(out):
                    if isinstance(x, torch.Tensor):
                        x.data.fill_(float("nan") if x.is_floating_point() else 0)

    def replay(self):
        for func, args, kwargs, out, in_place in self.recorded:
            again = func(*args, **kwargs)
            if not in_place:
                for old, new in zip(tree_leaves(out), tree_leaves(again)):
                    if isinstance(old, torch.Tensor):
                        old.data.copy_(new)


@contextlib.contextmanager
def recording(graph, *_, **__):
    with graph:
        yield
    graph.end()


class Stream:
    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def graphs():
    """Inside: torch.cuda's graphs and streams on a CPU."""
    with contextlib.ExitStack() as stack:
        for name, value in {"CUDAGraph": Graph, "graph": recording, "Stream": Stream, "current_stream": Stream,
                            "set_stream": lambda _: None, "graph_pool_handle": lambda: None,
                            "stream": lambda _: contextlib.nullcontext(), "synchronize": lambda *_: None}.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", value))
        yield
