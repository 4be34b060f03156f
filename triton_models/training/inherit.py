"""Training that begins with the weights of an earlier package.

A package's file holds no batch normalisation any more: its convolutions have taken it in. It is put back here so that
the network answers as the file does and can be trained on.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor, nn

from .network import Network

CLOSE = 0.3
"""Largest difference of a slab logit between the file and the network that it was put into; 0.15 was seen."""


def inherit(network: Network, model: Path, slabs: Tensor) -> None:
    """Give a network the weights of an exported one of the same shape.

    Args:
        network: changed in place.
        model: ``model_fp32.onnx`` of a package, or what `export.to_onnx` wrote.
        slabs: (n, 9, h, w) of the training data, whose statistics the normalisations take over; 64 or more.

    Raises:
        ValueError: the file cannot be read, or is of another network.
    """
    try:
        graph = onnx.load(str(model)).graph
    except (OSError, DecodeError) as error:
        raise ValueError(f"{model} cannot be read as an ONNX model: {error}") from error
    values = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    convolutions = [[values[name] for name in node.input[1:]] for node in graph.node if node.op_type == "Conv"]
    named = network.state_dict()
    kept = {name.removeprefix("network."): value for name, value in values.items() if name.startswith("network.")}
    folded = [pair for pair, node in zip(convolutions, _convolutions(graph), strict=True) if node not in values]
    modules = list(network.modules())
    pairs = [(a, b) for a, b in pairwise(modules) if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d)]
    if len(pairs) != len(folded) or not set(kept) <= set(named):
        raise ValueError(f"{model} is of another network")
    for name, value in kept.items():
        if named[name].shape != value.shape:
            raise ValueError(f"{model}: {name} has shape {tuple(value.shape)}, not {tuple(named[name].shape)}")
        named[name].copy_(value)
    hooks = []
    for (convolution, normalisation), (weight, bias) in zip(pairs, folded, strict=True):
        # Of the size that training starts with, so that a step changes them as much as it changes new ones.
        scale = (2 / weight[0].numel()) ** 0.5 / weight.flatten(1).std(dim=1).clamp(min=1e-4)
        convolution.weight.data.copy_(weight * scale[:, None, None, None])
        hooks.append(normalisation.register_forward_pre_hook(_taking_over(scale, bias)))
    network.train()
    with torch.no_grad():
        network(slabs)
        for hook in hooks:
            hook.remove()
        logits = network(slabs)[1]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    said = torch.from_numpy(session.run(["probabilities"], {"slabs": slabs.numpy()})[0])
    # The file's probabilities are calibrated: its own slope and shift come last.
    expected = logits * values["slope"] + values["shift"]
    clear = (said > 1e-3) & (said < 1 - 1e-3)
    off = float((torch.logit(said) - expected)[clear].abs().max()) if clear.any() else 0.0
    if off > CLOSE:
        raise ValueError(f"{model}: the network answers otherwise than the file, by {off:.2g}")


def _convolutions(graph: onnx.GraphProto) -> list[str]:
    """Of each convolution the name under which its weights would lie, had it no normalisation."""
    paths = [node.name.split("/") for node in graph.node if node.op_type == "Conv"]
    return [f"network.{path[2]}.weight" if len(path) > 2 else "" for path in paths]


def _taking_over(scale: Tensor, bias: Tensor):  # type: ignore[no-untyped-def]
    """What sets a normalisation, when it first sees its input, so that it gives what the file's convolution gave."""

    def take_over(normalisation: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        normalisation.running_mean.copy_(mean)
        normalisation.running_var.copy_(variance)
        normalisation.weight.data.copy_((variance + normalisation.eps).sqrt() / scale)
        normalisation.bias.data.copy_(mean / scale + bias)

    return take_over
