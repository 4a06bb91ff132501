"""Large batches in little memory: encode in micro-batches and keep only one's activations.

A contrastive loss needs the vectors of the whole batch, but not the activations behind them. So a
batch is encoded twice: first without gradients, for the loss and its gradient with respect to the
vectors; then one micro-batch at a time with gradients, each backpropagating its vector gradients.
The random state is restored before the second pass, so that dropout drops the same units. The loss
is evaluated once, which also gives the gradients of its other inputs (the logit scale).

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

MicroBatch = TypeVar("MicroBatch")


def backward_in_parts(
    network: nn.Module,
    parts: Sequence[MicroBatch],
    encode: Callable[[MicroBatch], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
) -> Tensor:
    """Add the gradients of `loss(*vectors of all parts joined)` and return the loss, detached.

    The result equals that of one large batch, unless the network mixes the items of a batch: batch
    norms normalize each micro-batch separately, and their running averages are updated once, by
    the second pass.

    Args:
        network: Holds the weights and buffers that `encode` uses.
        parts: The batch, split into micro-batches of any sizes.
        encode: Maps a micro-batch to one or more tensors, whose first dimension is its items.
        loss: Maps those tensors, each concatenated over all micro-batches, to a scalar.
    """
    device = next(network.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    states, encoded = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(device))
            encoded.append(encode(part))
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    joined = [torch.cat(chunks).requires_grad_() for chunks in zip(*encoded, strict=True)]
    value = loss(*joined)
    value.backward()
    after = _random_state(device)
    lengths = [len(chunks[0]) for chunks in encoded]
    del encoded
    vector_grads = [
        matrix.grad.split(lengths) if matrix.grad is not None else None for matrix in joined
    ]
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        _set_random_state(device, state)
        outputs = encode(part)
        pairs = [
            (output, chunks[i])
            for output, chunks in zip(outputs, vector_grads, strict=True)
            if chunks is not None and output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    _set_random_state(device, after)
    return value.detach()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
