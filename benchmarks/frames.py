"""What benchmarks on speech share: a recipe's frames, with the output of the network that each belongs to.

No benchmark by itself.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from quadric.cli import make_speech_job
from quadric.data.stream import FrameStream
from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import AcousticModel
from quadric.objective.objective import Objective
from quadric.optim.sampling import Sizes
from quadric.recipes import RECIPES
from quadric.train.console import bar
from quadric.train.flat_start import flat_start
from quadric.train.prepare import prepare
from quadric.train.recipe import Network
from quadric.train.stages import Stages, alone_in
from quadric.train.trainer import evaluate
from quadric.train.units import choose_units


class Speech:
    """Frame classification by a network: the frames of a recipe and the output that its alignment gives each.

    Args:
        model: where every training starts.
        stream: training frames.
        held_out: those of the development set.
    """

    def __init__(self, model: AcousticModel, stream: FrameStream, held_out: FrameStream) -> None:
        self.model, self.stream, self.held_out = model, stream, held_out
        self._place = stream.state_dict()

    def again(self) -> AcousticModel:
        """A copy of the model, with the stream where it was: whoever starts from here sees the same."""
        self.stream.load_state_dict(self._place)
        return deepcopy(self.model)

    def objective(
        self,
        model: AcousticModel,
        sizes: Sizes,
        update: int,
        *,
        parts: int = 1,
        autocast: torch.dtype | None = None,
        kind: type = Objective,
    ) -> Objective:
        """The frame cross-entropy on new frames of these sizes; without curvature's where that size is 0.

        The gradient's are in so many micro-batches at least, as a sampler asks by its ``parts``.
        """
        curvature = self.stream.sample(sizes.curvature, key=update) if sizes.curvature else None
        drawn = self.stream.draw(sizes.gradient, parts)
        return kind(model, CrossEntropy(), drawn, curvature, autocast=autocast, seed=update)

    def look(self, model: AcousticModel) -> dict[str, float]:
        """Held-out ``loss`` a frame and ``accuracy``, the share of frames right, in the parameters' precision."""
        return evaluate(model, CrossEntropy(), self.held_out)

    def share(self, share: float) -> int:
        """So much of the training set, in frames."""
        return max(1, round(share * self.stream.total_frames))


def add_speech_options(parser: argparse.ArgumentParser) -> None:
    """The recipe and the network."""
    names = [recipe.__name__ for recipe in RECIPES]
    parser.add_argument("recipe", metavar="RECIPE", choices=names, help=", ".join(names))
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="of the recipe, as for quadric train")
    parser.add_argument(
        "--work", type=Path, default=Path("exp/benchmark"),
        help="features and alignments are made here once, and found again (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", default=[256] * 3, help="hidden units (default: three of 256)")
    parser.add_argument("--window", type=int, default=5, help="frames on either side of a frame (default: 5)")
    parser.add_argument("--activation", choices=("sigmoid", "relu"), default="sigmoid", help="(default: %(default)s)")
    parser.add_argument("--recipe-network", action="store_true", help="the recipe's network instead of these")
    parser.add_argument("--micro-frames", type=int, default=5000, help="frames of a micro-batch (default: 5000)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(default: cpu)")
    parser.add_argument("--json", type=Path, help="file for the rows")


def load_speech(chosen: argparse.Namespace) -> Speech:
    """What `add_speech_options` have asked for; the first time in a working folder takes minutes.

    Inputs are not augmented, copies at other speeds apart, and alignments are those before any realignment.
    """
    torch.set_num_threads(chosen.threads)
    job = make_speech_job(chosen.recipe, chosen.options)
    with alone_in(chosen.work):
        stages = Stages(chosen.work)
        prepared = prepare(job, stages, bar)
        units = choose_units(job, prepared, flat_start(job, prepared, stages, bar), stages, bar)
    network = Network("dnn", tuple(chosen.sizes), chosen.window, activation=chosen.activation, norm="none")
    torch.manual_seed(job.seed)
    model = (job.network if chosen.recipe_network else network).build(prepared.dimension, units.tying.num_pdfs)
    model.initialise_output_bias(torch.from_numpy(units.log_prior))
    model.to(chosen.device)

    def stream(split: Any, targets: Any, chunk: int | None) -> FrameStream:
        features = {id: prepared.features[split][id] for id in targets}
        context = (model.left_context, model.right_context)
        return FrameStream(
            features, targets, context=context, chunk=chunk, micro_frames=chosen.micro_frames, seed=job.seed
        )

    speech = Speech(model, stream("train", units.train, job.chunk), stream("dev", units.dev, None))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{speech.stream.total_frames:,} training frames, {speech.held_out.total_frames:,} held out, "
        f"{units.tying.num_pdfs} outputs, {parameters:,} parameters\n",
        flush=True,
    )
    return speech
