"""sampling.logits_after, faster on a GPU: one step of writing, recorded once and replayed.

A new token is so little work that the GPU waits for the CPU to launch a thousand kernels; a CUDA
graph launches them at once. Not measured: no GPU. Held equal by tests/fast/test_captured.py.
"""

import torch


class CapturedStep:
    """sampling.logits_after for one model and one cache. Shapes are fixed: ended replies go on."""

    def __init__(self):
        self.graph = None

    def __call__(self, model, cache, tokens, running):
        if self.graph is None:
            self._capture(model, cache)
            self.rows = torch.arange(len(self.tokens), device=tokens.device)
        self.rows = self.rows[running]  # the places of the running replies in the graph
        self.tokens[self.rows] = tokens
        self.graph.replay()
        return self.logits[self.rows]

    def _capture(self, model, cache):
        self.tokens, self.graph = torch.zeros_like(cache.filled), torch.cuda.CUDAGraph()
        filled, side = cache.filled.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first run sets up what may not be recorded
            model.logits(model(self.tokens, cache.step()))
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = model.logits(model(self.tokens, cache.step()))
        cache.filled.copy_(filled)  # nothing was written yet
