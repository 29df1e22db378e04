"""A trained acoustic model with all that decoding needs, in one folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import TypeAdapter

from quadric.data.batch import pad_context
from quadric.files import new_folder
from quadric.model.acoustic import AcousticModel, log_likelihoods
from quadric.progress import Progress
from quadric.speech.decoding import DecodeOptions, Decoder, Hypothesis
from quadric.speech.features import Fbank
from quadric.speech.graph import read_graph
from quadric.speech.lexicon import Lexicon, read_lexicon
from quadric.speech.normalisation import Normalisation
from quadric.speech.topology import Tying
from quadric.train import checkpoint
from quadric.train.recipe import Decoding, Network
from quadric.train.stages import plain


class Likelihoods(Mapping[str, np.ndarray]):
    """log p(x | pdf) up to a constant per frame, times a scale, for every utterance, computed when it is asked for.

    A hybrid system scores a frame with log p(pdf | x) - log p(pdf).

    Args:
        model: logits from features.
        features: utterance id -> float32 [T, D].
        log_prior: [C].
        autocast: compute matrix products in bfloat16.
        scale: the acoustic scale.
    """

    def __init__(
        self,
        model: AcousticModel,
        features: Mapping[str, np.ndarray],
        log_prior: Float[np.ndarray, " C"],
        *,
        autocast: bool = False,
        scale: float = 1.0,
    ) -> None:
        self._model = model.eval()
        self._features = features
        self._device = next(model.parameters()).device
        self._log_prior = torch.as_tensor(log_prior, dtype=torch.float32, device=self._device)
        self._autocast, self._scale = autocast, scale

    def __getitem__(self, id: str) -> Float32[np.ndarray, "T C"]:
        return (self._scale * log_likelihoods(self._logits(id), self._log_prior)).cpu().numpy()

    def posteriors(self, id: str) -> Float[torch.Tensor, "T C"]:
        """p(pdf | x) of the frames of an utterance."""
        return torch.softmax(self._logits(id), -1).cpu()

    def _logits(self, id: str) -> Float[torch.Tensor, "T C"]:
        window = pad_context(self._features[id], self._model.left_context, self._model.right_context)
        inputs = torch.from_numpy(np.ascontiguousarray(window)).unsqueeze(0).to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return self._model(inputs)[0].float()

    def __contains__(self, id: object) -> bool:
        return id in self._features

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)


@dataclass(frozen=True)
class Front:
    """How features are made: they must be the same in training and use.

    Attributes:
        fbank: of audio.
        normalisation: of the features.
        deltas: orders of differences appended.
    """

    fbank: Fbank
    normalisation: Normalisation
    deltas: int = 0


@dataclass(frozen=True)
class System:
    """A trained acoustic model, its units and its decoding settings.

    Attributes:
        front: the features it was trained on.
        inputs: D.
        network: its architecture.
        model: its parameters.
        log_prior: of its outputs, [C].
        tying: which phone state each output is.
        lexicon: the words it knows.
        graph: file of the decoding graph.
        decoding: of the search.
        lm_weight, word_penalty: chosen on development data.
    """

    front: Front
    inputs: int
    network: Network
    model: AcousticModel
    log_prior: Float[np.ndarray, " C"]
    tying: Tying
    lexicon: Lexicon
    graph: Path
    decoding: Decoding
    lm_weight: float = 10.0
    word_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.lm_weight < math.inf or not math.isfinite(self.word_penalty):
            raise ValueError(
                f"lm_weight={self.lm_weight} must be positive, and word_penalty={self.word_penalty} a number"
            )

    def likelihoods(
        self, features: Mapping[str, np.ndarray], *, autocast: bool = False, scale: float = 1.0
    ) -> Likelihoods:
        """Scores for decoding and alignment, and with the acoustic scale for lattices."""
        return Likelihoods(self.model, features, self.log_prior, autocast=autocast, scale=scale)

    def decoder(self, *, jobs: int) -> Decoder:
        """The search over this system's graph."""
        options = DecodeOptions(self.decoding.beam, self.decoding.max_active)
        return Decoder(self.graph, self.lexicon.words, self.tying.num_pdfs, options=options, jobs=jobs)

    def recognise(
        self, decoder: Decoder, scores: Mapping[str, np.ndarray], *, progress: Progress
    ) -> dict[str, Hypothesis]:
        """The best words under this system's weights."""
        return decoder.decode(scores, 1 / self.lm_weight, word_penalty=self.word_penalty, progress=progress)

    def save(self, folder: Path) -> None:
        """Writes everything to ``folder``, which must not exist."""
        options = {name: plain(getattr(self, name)) for name in _OPTIONS}
        with new_folder(folder) as temporary:
            (temporary / "options.json").write_text(json.dumps(options, indent=1))
            state = {"model": self.model.state_dict(), "log_prior": torch.as_tensor(self.log_prior)}
            checkpoint.save(state, temporary / "model.pt")
            self.tying.save(temporary / "tying.npz")
            lines = (f"{word} {' '.join(phones)}\n" for word, phones in self.lexicon.entries)
            (temporary / "lexicon.txt").write_text("".join(lines))
            shutil.copyfile(self.graph, temporary / "graph.fst")

    @classmethod
    def load(cls, folder: Path) -> System:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no trained system in ``folder``.
            ValueError: a file of it is damaged or missing.
        """
        if not (folder / "options.json").is_file():
            raise FileNotFoundError(
                f"folder={folder}: no trained system there; it is a folder named 'system' under the working folder"
            )
        with _whole(folder):
            written = json.loads((folder / "options.json").read_text())
            options: dict[str, Any] = {
                name: TypeAdapter(_OPTIONS[name]).validate_python(value) for name, value in written.items()
            }
            tying = Tying.load(folder / "tying.npz")
            read_graph(folder / "graph.fst")
            model = options["network"].build(options["inputs"], tying.num_pdfs)
            state = checkpoint.load(folder / "model.pt")
            model.load_state_dict(state["model"])
            return cls(
                model=model.eval(),
                log_prior=state["log_prior"].numpy(),
                tying=tying,
                lexicon=read_lexicon(folder / "lexicon.txt", strip_stress=False),
                graph=folder / "graph.fst",
                **options,
            )

    def tuned(self, lm_weight: float, word_penalty: float) -> System:
        """The same system with decoding weights chosen."""
        return replace(self, lm_weight=lm_weight, word_penalty=word_penalty)


_OPTIONS: dict[str, type] = {
    "front": Front,
    "inputs": int,
    "network": Network,
    "decoding": Decoding,
    "lm_weight": float,
    "word_penalty": float,
}


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, OSError, RuntimeError) as error:
        what = f"unknown option {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"folder={folder}: the system is damaged, or of another version of quadric ({what}): copy it again, or "
            "delete its folder and run the same `quadric train` again"
        ) from error
