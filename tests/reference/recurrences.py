"""Recurrent layers and attention of torch as loops over `torch.nn.Linear`, of which every call can be seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Steps(nn.Module):
    """What an `nn.RNN`, `nn.LSTM` or `nn.GRU` computes of a batch ``[B, T, I]`` from zero states: its outputs."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.hidden, self.layers = layer.mode, layer.hidden_size, layer.num_layers
        self.projected = layer.proj_size
        self.ends = ["", "_reverse"] if layer.bidirectional else [""]
        self.products = nn.ModuleDict()
        for name in [name for name, _ in layer.named_parameters() if name.startswith("weight")]:
            weight, bias = getattr(layer, name), getattr(layer, name.replace("weight", "bias"), None)
            product = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
            product.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
            self.products[name] = product

    def forward(self, x: Tensor) -> Tensor:
        for k in range(self.layers):
            x = torch.cat([self.direction(f"l{k}{end}", x, end != "") for end in self.ends], 2)
        return x

    def direction(self, name: str, x: Tensor, reverse: bool) -> Tensor:
        made: dict[int, Tensor] = {}
        c = x.new_zeros(len(x), self.hidden)
        h = x.new_zeros(len(x), self.projected or self.hidden)
        order = list(range(x.shape[1]))
        for t in order[::-1] if reverse else order:
            a, b = self.products[f"weight_ih_{name}"](x[:, t]), self.products[f"weight_hh_{name}"](h)
            if self.mode == "LSTM":
                i, f, g, o = (a + b).split(self.hidden, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif self.mode == "GRU":
                (r, z, n), (r_h, z_h, n_h) = a.split(self.hidden, 1), b.split(self.hidden, 1)
                z = torch.sigmoid(z + z_h)
                h = (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * h
            else:
                h = (a + b).tanh() if self.mode == "RNN_TANH" else (a + b).relu()
            made[t] = h = self.products[f"weight_hr_{name}"](h) if self.projected else h
        return torch.stack([made[t] for t in order], 1)


class SelfAttention(nn.Module):
    """What an `nn.MultiheadAttention` computes of one batch ``[B, T, E]``, one head after the other."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, E = layer.num_heads, layer.embed_dim
        self.products = nn.ModuleDict(
            {"in_proj_weight": nn.Linear(E, 3 * E).double(), "out_proj_weight": nn.Linear(E, E).double()}
        )
        self.products["in_proj_weight"].load_state_dict({"weight": layer.in_proj_weight, "bias": layer.in_proj_bias})
        self.products["out_proj_weight"].load_state_dict(layer.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.products["in_proj_weight"](x).chunk(3, 2)
        made = []
        for one, other, values in zip(*(part.chunk(self.heads, 2) for part in (q, k, v)), strict=True):
            made.append((one @ other.mT / one.shape[2] ** 0.5).softmax(2) @ values)
        return self.products["out_proj_weight"](torch.cat(made, 2))
