"""sampling.logits_after and model.Llama.forward, faster on a GPU: recorded once, then replayed.

The CPU takes longer to start a thousand small kernels than the GPU takes to run them. A CUDA graph
starts them all at once, on the memory that they had when they were recorded. On an H200 a step of
training takes 53 ms instead of 110. Held equal by tests/fast/test_captured.py.
"""

import torch

UNIT = 1024  # tokens: the size of a ribbon is padded to a multiple of it


class CapturedStep:
    """sampling.logits_after for one model and one cache. Shapes are fixed: ended replies go on."""

    def __init__(self, model, cache):
        self.tokens, self.graph = torch.zeros_like(cache.filled), torch.cuda.CUDAGraph()
        self.rows = torch.arange(len(self.tokens), device=self.tokens.device)
        filled, side = cache.filled.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first run sets up what may not be recorded
            model.logits(model(self.tokens, cache.step()))
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = model.logits(model(self.tokens, cache.step()))
        cache.filled.copy_(filled)  # nothing was written yet

    def __call__(self, model, cache, tokens, running):
        self.rows = self.rows[running]  # the places of the running replies in the graph
        self.tokens[self.rows] = tokens
        self.graph.replay()
        return self.logits[self.rows]


class CapturedForward:
    """model.Llama.forward in training, with its backward, for ribbons of a few sizes.

    longest: of all documents. `.grad` of each parameter lies where the graphs add to it.
    """

    def __init__(self, model, longest):
        self.forward, self.longest = model.forward, max(longest, UNIT)
        self.parameters = list(model.model.parameters())
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())  # work on the default stream cannot be recorded

    def __call__(self, tokens, ribbon):
        if not torch.is_grad_enabled():
            return self.forward(tokens, ribbon)
        N, documents = len(tokens), len(ribbon.lengths)
        # Empty documents make their number a multiple of 64; one more holds the padding.
        lengths = [*ribbon.lengths, -N % UNIT, *[0] * (-documents % 64)]
        padded = type(ribbon)(lengths, tokens.device)  # Ribbon; its module imports this one
        size = len(padded.positions), len(lengths)
        if self.parameters[0].grad is None:  # the first ribbon of a step
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient.detach()
        if size not in self.graphs:
            padded.fast.longest = self.longest
            self.graphs[size] = Graphs(self, tokens.new_zeros(size[0]), padded)
        graphs = self.graphs[size]
        graphs.tokens[:N] = tokens
        graphs.ribbon.positions.copy_(padded.positions)
        graphs.ribbon.fast.seams.copy_(padded.fast.seams)
        return Replay.apply(self.parameters[0], graphs)[:N]


class Graphs:
    """Forward and backward for ribbons of one size. All sizes share their memory (the pool)."""

    def __init__(self, captured: CapturedForward, tokens, ribbon):
        self.tokens, self.ribbon = tokens, ribbon
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

        def add_gradients(hidden_states):
            results = torch.autograd.grad(hidden_states, captured.parameters, self.gradient)
            torch._foreach_add_(captured.gradients, results)
        # A first run sets up what may not be recorded; with this gradient it adds nothing.
        hidden_states, stream = captured.forward(tokens, ribbon), torch.cuda.current_stream()
        self.gradient = torch.zeros_like(hidden_states)
        add_gradients(hidden_states)
        del hidden_states
        with torch.cuda.graph(self.forward, captured.pool, stream):
            hidden_states = captured.forward(tokens, ribbon)
        with torch.cuda.graph(self.backward, captured.pool, stream):
            add_gradients(hidden_states)
        self.hidden_states = hidden_states.detach()


class Replay(torch.autograd.Function):
    """Hidden states from the graphs; backward adds to `.grad`. For `parameter`, it is called."""

    @staticmethod
    def forward(ctx, parameter, graphs: Graphs):
        ctx.graphs = graphs
        graphs.forward.replay()
        return graphs.hidden_states.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.graphs.gradient.copy_(gradient)
        ctx.graphs.backward.replay()
        return None, None
