"""Training that begins with the weights of an earlier package.

A package's file holds no batch normalisation any more: its convolutions have taken it in. It is put back here so that
the network answers as the file does and can be trained on. Residual blocks that the file lacks begin as the identity:
a network may be deeper than the one that it takes over.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor, nn

from .network import Network, Residual

CLOSE = 0.3
"""Largest difference of a slab logit between the file and the network that it was put into; 0.04 was seen."""


def inherit(network: Network, model: Path, slabs: Tensor) -> None:
    """Give a network the weights of an exported one of the same widths, with as many residual blocks or fewer.

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
    folded = {
        _module(node.name): (values[node.input[1]], values[node.input[2]])
        for node in graph.node
        if node.op_type == "Conv" and not node.input[1].startswith("network.")
    }
    kept = {name.removeprefix("network."): value for name, value in values.items() if name.startswith("network.")}
    modules, named = dict(network.named_modules()), network.state_dict()
    # A convolution, its normalisation: NAME.0, NAME.1.
    pairs = {f"{name[:-2]}.0": module for name, module in modules.items() if isinstance(module, nn.BatchNorm2d)}
    new = {name for name, module in modules.items() if isinstance(module, Residual) and f"{name}.first.0" not in folded}
    missing = {name for name in pairs if name not in folded and name.rpartition(".")[0].rpartition(".")[0] not in new}
    if missing or not set(folded) <= set(pairs) or not set(kept) <= set(named):
        raise ValueError(f"{model} is of another network")
    for name, value in {**kept, **{f"{name}.weight": weight for name, (weight, _) in folded.items()}}.items():
        if named[name].shape != value.shape:
            raise ValueError(f"{model}: {name} has shape {tuple(value.shape)}, not {tuple(named[name].shape)}")
        named[name].copy_(value)
    for name in new:
        nn.init.zeros_(modules[name].second[1].weight)
    count = len(slabs)
    slabs = torch.cat([slabs, slabs.flip(3)])
    hooks = []
    for name, (weight, bias) in folded.items():
        # Of the size that training starts with, so that a step changes them as much as it changes new ones.
        scale = (2 / weight[0].numel()) ** 0.5 / weight.flatten(1).std(dim=1).clamp(min=1e-4)
        named[f"{name}.weight"].mul_(scale[:, None, None, None])
        hooks.append(pairs[name].register_forward_pre_hook(_taking_over(scale, bias)))
    network.train()
    with torch.no_grad():
        network(slabs)
        for hook in hooks:
            hook.remove()
        # By the statistics that were taken over: those of a batch are told less exactly where a channel hardly varies.
        network.eval()
        logits = network(slabs)[1]
        network.train()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    said = torch.from_numpy(session.run(["probabilities"], {"slabs": slabs[:count].numpy()})[0])
    clear = (said > 1e-3) & (said < 1 - 1e-3)

    def off_by(logits: Tensor) -> float:
        # The file's probabilities are calibrated: its own slope and shift come last.
        expected = logits * values["slope"] + values["shift"]
        return float((torch.logit(said) - expected)[clear].abs().max()) if clear.any() else 0.0

    # Files of versions before 0.6.0 looked at a slab as it is and not mirrored too.
    off = min(off_by((logits[:count] + logits[count:]) / 2), off_by(logits[:count]))
    if off > CLOSE:
        raise ValueError(f"{model}: the network answers otherwise than the file, by {off:.2g}")


def _module(node: str) -> str:
    """The module that a node of an exported graph comes from: ``/network/stage1/stage1.1/first/first.0/Conv`` from
    ``stage1.1.first.0``, as each part repeats what it lies in where that is a sequence.
    """
    name: list[str] = []
    for part in node.split("/")[2:-1]:
        if name and part.startswith(f"{name[-1]}."):
            name.pop()
        name.append(part)
    return ".".join(name)


def _taking_over(scale: Tensor, bias: Tensor):  # type: ignore[no-untyped-def]
    """What sets a normalisation, when it first sees its input, so that it gives what the file's convolution gave."""

    def take_over(normalisation: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        normalisation.running_mean.copy_(mean)
        normalisation.running_var.copy_(variance)
        normalisation.weight.data.copy_((variance + normalisation.eps).sqrt() / scale)
        normalisation.bias.data.copy_(mean / scale + bias)

    return take_over
