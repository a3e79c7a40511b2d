"""sampling.logits_after, faster on a GPU: one step of writing, recorded once and replayed.

A new token is so little work that the GPU waits for the CPU to launch a thousand kernels; a CUDA
graph launches them at once. Not measured: no GPU was at hand. Held equal by test_captured.py.
"""

import torch


class CapturedStep:
    """sampling.logits_after for one model and one cache; the logits stand in the same memory."""

    def __init__(self):
        self.graph = None

    def __call__(self, model, cache, tokens):
        """tokens (B,) -> logits (B, V) of the next ones."""
        if self.graph is None:
            self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
            filled, side = cache.filled.clone(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a first run sets up what may not be recorded
                model.logits(model(self.tokens, cache.step()))
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = model.logits(model(self.tokens, cache.step()))
            cache.filled.copy_(filled)  # nothing was written yet
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits
