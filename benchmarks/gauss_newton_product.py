"""The price of a Gauss-Newton product, as a multiple of a gradient on the same data, beside public peers.

    python benchmarks/gauss_newton_product.py [--threads 2] [--device cpu] [--json FILE]

One run times, in turns: a gradient as torch alone takes it; `Objective.value_and_grad`, which adds one vector, the
noise of the gradient and the seeds of random layers; the recording of a curvature (set-up); the library's product;
``torch.func.jvp`` + ``vjp`` anew each time; and the products of curvlinops and BackPACK where they are installed (`pip
install curvlinops-for-pytorch backpack-for-pytorch`). Medians; float32; a cross-entropy over the classes of each
network's outputs. Every product is compared with the library's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from quadric.loss.loss import CrossEntropy
from quadric.objective.objective import Objective

Product = Callable[[Tensor], Tensor]


class First(nn.Module):
    """The outputs of a recurrent network, without its last state."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)[0]


class Flat(nn.Module):
    """Every frame a row, as the peers want it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.network(inputs)
        return output.reshape(-1, output.shape[-1])


class Last(nn.Module):
    """Channels behind frames."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.transpose(1, 2)


def mlp() -> nn.Sequential:
    """Hinton and Salakhutdinov's autoencoder of MNIST, half its code first: 784-1000-500-250-30-250-500-1000-784."""
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def tdnn() -> nn.Sequential:
    """Three spliced layers and an output layer."""
    return nn.Sequential(
        nn.Conv1d(80, 256, 5), nn.ReLU(), nn.Conv1d(256, 256, 2, dilation=3), nn.ReLU(),
        nn.Conv1d(256, 256, 2, dilation=6), nn.ReLU(), nn.Conv1d(256, 100, 1), Last(),
    )  # fmt: skip


def vgg() -> nn.Sequential:
    """Three convolutions and two poolings on images of 32 by 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (1000, 784)),
    "tdnn": (tdnn, (16, 80, 200)),
    "vgg": (vgg, (128, 3, 32, 32)),
    "rnn": (lambda: First(nn.RNN(80, 256, nonlinearity="relu")), (50, 64, 80)),
    "lstm": (lambda: First(nn.LSTM(80, 256, 2)), (50, 64, 80)),
}
"""A builder and the shape of the inputs."""


def jvp_vjp(objective: Objective, inputs: Tensor, target: Tensor) -> Product:
    """v -> Gv by a forward-mode and a reverse-mode pass, each from the start."""
    space, theta, model, loss = objective.space, objective.space.point(), objective.model, CrossEntropy()

    def product(v: Tensor) -> Tensor:
        parameters = dict(space.views(theta))

        def forward(p: dict[str, Tensor]) -> Tensor:
            return functional_call(model, p, (inputs,))

        with torch.backends.mkldnn.flags(enabled=not _recurrent(model)):
            output, tangent = jvp(forward, (parameters,), (dict(space.views(v)),))  # type: ignore[misc]
            curved = loss.curvature(output, target)(tangent)
            (gradient,) = vjp(forward, parameters)[1](curved)
        return space.flatten(gradient[name] for name in space.names) / objective.curvature_frames

    return product


def curvlinops(objective: Objective, inputs: Tensor, target: Tensor) -> Product:
    """The peer's operator."""
    from curvlinops import GGNLinearOperator

    flat = Flat(objective.model)
    parameters = [p for p in flat.parameters() if p.requires_grad]
    operator = GGNLinearOperator(
        flat, nn.CrossEntropyLoss(), parameters, [(inputs, target.reshape(-1))],
        check_deterministic=False, num_data=len(inputs),
    )  # fmt: skip

    def product(v: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=not _recurrent(objective.model)):
            return operator @ v

    return product


def backpack(objective: Objective, inputs: Tensor, target: Tensor) -> Product:
    """The peer's Hessian-free function, which differentiates anew each time."""
    from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist

    flat, space = Flat(objective.model), objective.space

    def product(v: Tensor) -> Tensor:
        output = flat(inputs)
        loss = nn.functional.cross_entropy(output, target.reshape(-1))
        return space.flatten(ggn_vector_product_from_plist(loss, output, list(space.parameters), space.split(v)))

    return product


def _recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def seconds(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The median of each, taken in turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(some) for name, some in times.items()}


def rows(name: str, rounds: int, device: torch.device) -> list[dict[str, object]]:
    """The table's rows of one network."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().to(device)
    inputs = torch.randn(shape, device=device)
    output = model(inputs)
    target = torch.randint(output.shape[-1], output.shape[:-1], device=device)
    objective = Objective(model, CrossEntropy(), [(inputs, target)])
    theta = objective.space.point()
    v = torch.randn_like(theta)
    operator = objective.curvature(theta)
    products: dict[str, Product] = {"quadric": lambda v: operator @ v}
    for method, make in {"jvp_vjp": jvp_vjp, "curvlinops": curvlinops, "backpack": backpack}.items():
        try:
            products[method] = make(objective, inputs, target)
            products[method](v)
        except ImportError as missing:
            print(f"{name}: {method} is left out, {missing.name} is not installed")
        except (RuntimeError, NotImplementedError) as failed:
            print(f"{name}: {method} cannot: {str(failed).splitlines()[0]}")
            products.pop(method, None)
    reference = operator @ v
    parameters = list(model.parameters())
    works: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(CrossEntropy()(model(inputs), target), parameters),
        "value_and_grad": lambda: objective.value_and_grad(theta),
        "setup": lambda: objective.curvature(theta),
    }
    works |= {method: partial(product, v) for method, product in products.items()}
    found = seconds(works, rounds, device)
    return [
        {
            "model": name,
            "method": method,
            "ratio_to_gradient": found[method] / found["gradient"],
            "milliseconds": 1e3 * found[method],
            "gradient_milliseconds": 1e3 * found["gradient"],
            "value_and_grad_milliseconds": 1e3 * found["value_and_grad"],
            "setup_milliseconds": 1e3 * found["setup"] if method == "quadric" else 0.0,
            "difference": float((product(v) - reference).norm() / reference.norm()),
        }
        for method, product in products.items()
    ]


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore")
    table = []
    print("| model | method | ratio to gradient | ms | gradient ms | value_and_grad ms | set-up ms | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name in chosen.models:
        for row in rows(name, chosen.rounds, torch.device(chosen.device)):
            table.append(row)
            print(
                f"| {row['model']} | {row['method']} | {row['ratio_to_gradient']:.2f} | {row['milliseconds']:.1f} "
                f"| {row['gradient_milliseconds']:.1f} | {row['value_and_grad_milliseconds']:.1f} "
                f"| {row['setup_milliseconds']:.0f} | {row['difference']:.0e} |",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
