"""CUDA graphs: the kernels of a function, recorded once and then launched as one. Those of a model
of this size take a GPU less time than a host takes to launch them one by one."""
import torch

MOST_GRAPHS = 8  # of as many shapes of batches; others run kernel by kernel


class CudaGraphs:
    """Calls functions of a batch, a dict of tensors on a GPU, that give a scalar there, and of
    which the host learns nothing meanwhile.

    The first batch of a shape runs kernel by kernel, whose fastest are chosen then; the second is
    recorded. What the function leaves behind, such as gradients, must keep its place in memory."""

    def __init__(self):
        self.seen, self.graphs, self.pool = set(), {}, None

    def __call__(self, function, batch):
        shapes = tuple((name, *tensor.shape) for name, tensor in batch.items())
        if shapes not in self.graphs:
            if shapes not in self.seen or len(self.graphs) == MOST_GRAPHS:
                self.seen.add(shapes)
                return function(batch)
            self.graphs[shapes] = self.record(function, batch)
        graph, inputs, result = self.graphs[shapes]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        graph.replay()
        return result.clone()

    def record(self, function, batch):
        """-> graph, the tensors that it reads, and the one that it writes."""
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # The thread that prepares the next batch goes on meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function(inputs)
        self.pool = graph.pool()  # of all, as no two run at once
        return graph, inputs, result
