from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from quadric.speech.corpus import read_data_dir
from quadric.speech.synthesis import DIGIT_LEXICON, SPLITS, DigitCorpus, synthesise

pytest.importorskip("espeakng_loader", reason="needs the demo extra")
pytestmark = [pytest.mark.demo, pytest.mark.speech]

SMALL = DigitCorpus(utterances=(6, 2, 2), voices=(("m1", "f1"), ("m4",), ("ed",)), words=(1, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesise(SMALL, tmp_path_factory.mktemp("synthesis"))


def ctm(path: Path) -> dict[str, list[tuple[float, float, str]]]:
    rows = defaultdict(list)
    for line in path.read_text().splitlines():
        utterance, _, start, duration, label = line.split()
        rows[utterance].append((float(start), float(start) + float(duration), label))
    return rows


def test_reads_back_as_a_corpus_of_disjoint_speakers(folder: Path) -> None:
    corpora = [read_data_dir(folder / split) for split in SPLITS]
    assert [len(corpus) for corpus in corpora] == [6, 2, 2]
    assert [corpus.speakers for corpus in corpora] == [("f1", "m1"), ("m4",), ("ed",)]
    vocabulary = {word for word, _ in DIGIT_LEXICON}
    assert all(set(utterance.words) <= vocabulary and 1 <= len(utterance.words) <= 4 for utterance in corpora[0])


def test_times_agree_with_the_text_the_lexicon_and_the_audio(folder: Path) -> None:
    for split in SPLITS:
        words, phones = ctm(folder / split / "words.ctm"), ctm(folder / split / "phones.ctm")
        for utterance in read_data_dir(folder / split):
            assert utterance.audio is not None and utterance.audio.path is not None
            seconds = soundfile.info(utterance.audio.path).duration
            assert tuple(label for *_, label in words[utterance.id]) == utterance.words
            assert all(0.1 <= start < end < seconds for start, end, _ in words[utterance.id])
            for start, end, word in words[utterance.id]:
                inside = [p for p in phones[utterance.id] if start - 1e-3 < p[0] and p[1] < end + 1e-3]
                assert (word, tuple(label for *_, label in inside)) in DIGIT_LEXICON
                assert (inside[0][0], inside[-1][1]) == pytest.approx((start, end), abs=1e-3)


def test_speech_is_where_the_times_say(folder: Path) -> None:
    """Vowels are louder than the margins, noise included."""
    for utterance in read_data_dir(folder / "train"):
        assert utterance.audio is not None and utterance.audio.path is not None
        samples, rate = soundfile.read(utterance.audio.path)
        vowels = [p for p in ctm(folder / "train" / "phones.ctm")[utterance.id] if p[2][0] in "AEIOU"]
        speech = np.concatenate([samples[int(start * rate) : int(end * rate)] for start, end, _ in vowels])
        assert np.mean(speech**2) > 1.1 * np.mean(samples[: int(0.09 * rate)] ** 2)


def test_audio_is_16_bit_at_the_rate_asked_for_and_does_not_clip(folder: Path) -> None:
    for path in (folder / "train" / "wav").iterdir():
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        samples, _ = soundfile.read(path, dtype="int16")
        assert 500 < np.abs(samples.astype(int)).max() < 32767


def test_same_options_same_bytes_for_any_number_of_jobs(folder: Path, tmp_path: Path) -> None:
    again = synthesise(SMALL, tmp_path, jobs=1)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * 5 + 10
    assert [str(file) for file in files if (folder / file).read_bytes() != (again / file).read_bytes()] == []


def test_a_complete_corpus_is_reused_and_other_options_make_another(folder: Path) -> None:
    before = (folder / "lexicon.txt").stat().st_mtime_ns
    assert synthesise(SMALL, folder.parent) == folder
    assert (folder / "lexicon.txt").stat().st_mtime_ns == before
    assert dataclasses.replace(SMALL, seed=1).digest != SMALL.digest == DigitCorpus(**vars(SMALL)).digest
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_corpus_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(items: object, *, total: int | None, what: str) -> object:
        if what.startswith("mixing"):
            raise KeyboardInterrupt
        return items

    corpus = dataclasses.replace(SMALL, utterances=(1, 0, 0))
    with pytest.raises(KeyboardInterrupt):
        synthesise(corpus, tmp_path, progress=interrupted)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_noise_follows_the_ratio_asked_for(tmp_path: Path) -> None:
    def noise_to_speech(snr: float) -> float:
        corpus = dataclasses.replace(SMALL, utterances=(2, 0, 0), voices=(("m1",), (), ()), snr=(snr, snr))
        folder = synthesise(corpus, tmp_path)
        ratios = []
        for utterance in read_data_dir(folder / "train"):
            assert utterance.audio is not None and utterance.audio.path is not None
            samples, rate = soundfile.read(utterance.audio.path)
            words = ctm(folder / "train" / "words.ctm")[utterance.id]
            speech = samples[int(words[0][0] * rate) : int(words[-1][1] * rate)]
            ratios.append(np.mean(samples[: int(0.09 * rate)] ** 2) / np.mean(speech**2))
        return float(np.mean(ratios))

    assert noise_to_speech(30.0) < 0.02
    assert 0.5 < noise_to_speech(-10.0) < 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"voices": (("m1",), ("m1",), ("ed",))}, r"given twice: \['m1'\]"),
        ({"voices": (("f2",), ("m1",), ("ed",))}, "never sound the same twice"),
        ({"voices": ((), ("m1",), ("ed",))}, "none for the 6 utterances of train"),
        ({"words": (0, 4)}, r"words=\(0, 4\)"),
        ({"snr": (10.0, 0.0)}, r"snr=\(10\.0, 0\.0\)"),
        ({"utterances": (1, 1)}, r"utterances=\(1, 1\)"),
    ],
)
def test_misuse_names_the_option(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


def test_an_unknown_voice_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"voices has \['nobody'\]"):
        synthesise(dataclasses.replace(SMALL, voices=(("nobody",), ("m1",), ("ed",))), tmp_path)
