"""torchao: int8 weights and dynamic int8 activations, through torch.compile."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from benchmarks.harness.peers.layer import Layer, Prepared, weight


def layer(_variant: str, what: Layer) -> Prepared:
    """Without torch.compile it is several times slower than float32."""
    torch.set_num_threads(what.threads)
    torch.set_grad_enabled(False)
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = 1  # else its processes stay
    layers = [torch.compile(layer, dynamic=False) for layer in _layers(what.n, what.k, what.copies)]
    x = torch.from_numpy(what.x)

    def call() -> list[torch.Tensor]:
        return [layer(x) for layer in layers]

    return what.prepared(call, lambda: call()[0].numpy(), weight(what.n, what.k), what.n * what.k + 4 * what.n)


@cache
def _layers(n: int, k: int, copies: int) -> tuple[nn.Module, ...]:
    model = nn.ModuleList(nn.Linear(k, n, bias=False) for _ in range(copies))
    for i, linear in enumerate(model):
        linear.weight = nn.Parameter(torch.from_numpy(weight(n, k)).roll(i, 0), requires_grad=False)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return tuple(model)
