"""The speech synthesiser of the ``demo`` extra, espeak-ng, through the C interface of its ``speak_lib.h``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16

WORD = "#WORD"
"""The label of the event that begins a word."""

UNSTABLE = frozenset(
    {"Alicia", "Demonic", "Reed", "Storm", "caleb", "f2", "f3", "f5", "sandro", "victor", "whisper", "whisperf"}
)
"""Voice variants with breath: the engine computes it from memory that it has not set."""


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _EngineEvent(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EngineEvent))
_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT, _UTF8 = 2, 0x0001, 0x8000, 1
_LIST_TERMINATED, _WORD_EVENT, _PHONEME_EVENT = 0, 1, 7
_RATE_PARAMETER, _PITCH_PARAMETER = 1, 3


class Engine:
    """One voice of the synthesiser. Its state is global: use one engine in a process."""

    def __init__(self, voice: str) -> None:
        library, data = _engine_files()
        self._library = ctypes.CDLL(library)
        options = _PHONEME_EVENTS | _DONT_EXIT
        self.rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), options)
        if self.rate <= 0:
            raise RuntimeError(f"the synthesiser did not start with its data in {data}")
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"the synthesiser does not have the voice {voice!r}")
        self._samples: list[Int16[np.ndarray, " N"]] = []
        self._events: list[tuple[str, int]] = []
        self._callback = _Callback(self._receive)  # kept: the library holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, rate: int, pitch: int) -> tuple[Int16[np.ndarray, " N"], list[tuple[str, int]]]:
        """Samples, and events as (label, sample): ``WORD``, a phone without its stress, or a pause ``_...``."""
        self._samples.clear()
        self._events.clear()
        self._library.espeak_SetParameter(_RATE_PARAMETER, rate, 0)
        self._library.espeak_SetParameter(_PITCH_PARAMETER, pitch, 0)
        encoded = text.encode() + b"\0"
        if self._library.espeak_Synth(encoded, len(encoded), 0, 0, 0, _UTF8, None, None) != 0:
            raise RuntimeError(f"the synthesiser refused {text!r}")
        return np.concatenate(self._samples), list(self._events)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        self._events.extend(_read_events(events))
        return 0


def _read_events(events: Any) -> Iterator[tuple[str, int]]:
    index = 0
    while events[index].type != _LIST_TERMINATED:
        event = events[index]
        if event.type == _WORD_EVENT:
            yield WORD, event.sample
        elif event.type == _PHONEME_EVENT:
            label = event.id.string.decode(errors="replace").lstrip("',")
            if label != ";":  # a mark of palatalisation, not a phone
                yield label, event.sample
        index += 1


@functools.cache
def _engine_files() -> tuple[str, str]:
    """The engine's shared library and its data folder."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("the corpus of spoken digits needs a synthesiser: pip install quadric[demo]") from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def voice_variants() -> frozenset[str]:
    """The voices that may follow a language and ``+``. Raises ``ImportError`` without the ``demo`` extra."""
    return frozenset(path.name for path in Path(_engine_files()[1], "voices", "!v").iterdir())
