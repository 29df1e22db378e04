"""Recurrent networks run by torch on every window of an utterance by itself: the twin of the unfolded models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadric.model.recurrent import LSTM, RNN, LSTMLayer, RecurrentLayer, RNNLayer, Unfolded


def scores(model: RNN | LSTM, inputs: Tensor) -> Tensor:
    """Logits [B, T, C] of an RNN or LSTM without dropout, from inputs [B, frames, D]."""
    steps = model.left_context + 1 + model.right_context
    recurrent, *above = model.hidden
    assert isinstance(recurrent, Unfolded)
    layers = [torch_layer(layer) for layer in recurrent.layers]
    rows = []
    for utterance in inputs:
        for first in range(len(utterance) - steps + 1):
            h = utterance[first : first + steps]
            for layer in layers:
                h, _ = layer(h)
            h = h[-1]
            for layer in above:
                z = layer.norm(layer.linear.weight @ h + layer.linear.bias)
                h = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[layer.activation](z)
            rows.append(model.output.weight @ h + model.output.bias)
    return torch.stack(rows).unflatten(0, (len(inputs), -1))


def torch_layer(layer: RecurrentLayer) -> nn.Module:
    """torch's own layer with the same weights; a loop for the logistic one, which torch has not."""
    width, inputs = layer.recurrent.in_features, layer.input.in_features
    if isinstance(layer, RNNLayer) and layer.activation == "sigmoid":
        return Logistic(layer)
    if isinstance(layer, LSTMLayer):
        twin: nn.RNNBase = nn.LSTM(inputs, width)
    else:
        assert isinstance(layer, RNNLayer)
        twin = nn.RNN(inputs, width, nonlinearity=layer.activation)
    twin = twin.to(layer.input.weight.dtype)
    with torch.no_grad():
        twin.weight_ih_l0.copy_(layer.input.weight)
        twin.weight_hh_l0.copy_(layer.recurrent.weight)
        twin.bias_ih_l0.copy_(layer.input.bias)
        twin.bias_hh_l0.zero_()
    return twin


class Logistic(nn.Module):
    """h_k = sigmoid(W x_k + U h_{k-1} + b), one vector at a time."""

    def __init__(self, layer: RecurrentLayer) -> None:
        super().__init__()
        self.W, self.b, self.U = layer.input.weight, layer.input.bias, layer.recurrent.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, rows = x.new_zeros(len(self.U)), []
        for row in x:
            h = torch.sigmoid(self.W @ row + self.U @ h + self.b)
            rows.append(h)
        return torch.stack(rows), h
