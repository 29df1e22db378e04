"""Filter banks, and their cache under every kind of interruption."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

kaldiio = pytest.importorskip("kaldiio")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("kaldi_native_fbank")
pytest.importorskip("soxr")

from quadric.speech.audio import UnreadableAudio, check_audio, read_audio  # noqa: E402
from quadric.speech.corpus import Audio, Corpus, Utterance, perturb_speed, read_data_dir, write_data_dir  # noqa: E402
from quadric.speech.features import (  # noqa: E402
    BadAudio,
    Fbank,
    FeatureStore,
    Normalisation,
    extract,
    normalise,
)
from reference.fbank import log_mel  # noqa: E402

pytestmark = pytest.mark.speech

FBANK = Fbank(rate=8000, bins=20)
COUNT, SHARD = 60, 10


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of short noises, two speakers."""
    folder = tmp_path_factory.mktemp("noises") / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    ids = [f"u{i:02d}" for i in range(COUNT)]
    for id in ids:
        noise = rng.normal(size=rng.integers(1500, 4000)) * 0.1
        soundfile.write(folder / f"{id}.wav", noise, 8000, subtype="PCM_16")
    (folder / "wav.scp").write_text("".join(f"{id} {id}.wav\n" for id in ids))
    (folder / "text").write_text("".join(f"{id} NOISE\n" for id in ids))
    (folder / "utt2spk").write_text("".join(f"{id} s{int(id[1:]) % 2}\n" for id in ids))
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return read_data_dir(folder)


@pytest.fixture(scope="module")
def truth(corpus: Corpus) -> dict[str, np.ndarray]:
    """The features, computed without any cache."""
    return {u.id: FBANK(read_audio(u.audio, 8000).samples) for u in corpus if u.audio is not None}


def assert_same(features: object, truth: dict[str, np.ndarray]) -> None:
    assert isinstance(features, FeatureStore)
    assert list(features) == list(truth)
    for id, expected in truth.items():
        np.testing.assert_array_equal(features[id], expected)


def one(path: Path, **audio: float) -> Corpus:
    return Corpus("one", (Utterance("u", "s", ("X",), Audio(path=path, **audio)),))


# --- the numbers


@pytest.mark.parametrize(("rate", "high"), [(8000, -400.0), (16000, 7600.0)])
def test_filter_banks_are_their_definition(rate: int, high: float) -> None:
    samples = np.random.default_rng(1).normal(size=rate // 8).astype(np.float32) * 0.1
    expected = log_mel(samples, rate, 23, 20.0, high if high > 0 else rate / 2 + high)
    np.testing.assert_allclose(Fbank(rate=rate, bins=23, high=high)(samples), expected, atol=2e-3)


def test_silence_is_finite_and_less_than_half_a_shift_is_nothing() -> None:
    quiet = Fbank()(np.zeros(1600, np.float32))
    assert quiet.shape == (10, 40) and np.isfinite(quiet).all()
    assert [len(Fbank()(np.ones(n, np.float32))) for n in (0, 1, 79, 80, 239, 240)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    "wrong", [{"high": 9000.0}, {"low": 8000.0}, {"bins": 1}, {"frame_shift_ms": 0.0}, {"frame_length_ms": 5.0}]
)
def test_impossible_banks(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"Fbank: .*{next(iter(wrong))}"):
        Fbank(**wrong)  # type: ignore[arg-type]


# --- reading audio


def test_segments_are_slices_and_may_end_a_little_late(tmp_path: Path) -> None:
    x = np.random.default_rng(2).integers(-9999, 9999, 8000).astype(np.int16)
    soundfile.write(tmp_path / "x.flac", x, 8000, subtype="PCM_16")
    cut = read_audio(Audio(path=tmp_path / "x.flac", start=0.25, end=0.5), 8000).samples
    np.testing.assert_array_equal(cut, x[2000:4000].astype(np.float32) / 32768)
    assert len(read_audio(Audio(path=tmp_path / "x.flac", start=0.5, end=1.4), 8000).samples) == 4000
    for start, end in ((0.5, 1.6), (1.0, 1.1)):
        with pytest.raises(UnreadableAudio, match=r"it lasts 1\.00 s"):
            read_audio(Audio(path=tmp_path / "x.flac", start=start, end=end), 8000)


@pytest.mark.parametrize("rate", [8000, 11025, 16000])
@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
def test_resampling_keeps_pitch_and_speed_moves_it(tmp_path: Path, rate: int, speed: float) -> None:
    soundfile.write(tmp_path / "x.wav", tone(1.0, rate), rate)
    samples = read_audio(Audio(path=tmp_path / "x.wav", speed=speed), 8000).samples
    assert abs(len(samples) - 8000 / speed) <= 1
    peak = np.argmax(np.abs(np.fft.rfft(samples, 80000))) / 10
    assert abs(peak - 440 * speed) < 0.5


def test_commands_are_read_like_files(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a b.wav", tone(0.5, 8000), 8000, subtype="PCM_16")
    command = f"cat {shlex.quote(str(tmp_path / 'a b.wav'))}"
    expected = read_audio(Audio(path=tmp_path / "a b.wav"), 8000).samples
    np.testing.assert_array_equal(read_audio(Audio(command=command), 8000).samples, expected)
    with pytest.raises(UnreadableAudio, match="failed with status 3: oh no"):
        read_audio(Audio(command="echo oh no >&2; exit 3"), 8000)


def test_samples_that_are_not_finite(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.array([0.0, np.nan] * 500), 8000, subtype="FLOAT")
    with pytest.raises(UnreadableAudio, match="not finite"):
        read_audio(Audio(path=tmp_path / "x.wav"), 8000)


# --- extraction and its cache


@pytest.mark.parametrize("jobs", [1, 2])
def test_extraction_is_the_same_in_any_number_of_processes(
    corpus: Corpus, truth: dict[str, np.ndarray], tmp_path: Path, jobs: int
) -> None:
    assert_same(extract(corpus, FBANK, tmp_path, jobs=jobs, shard=SHARD), truth)


def test_the_cache_is_used_until_something_changes(tmp_path: Path) -> None:
    looked: list[int | None] = []

    def watching(items: Iterator[object], *, total: int | None, what: str) -> Iterator[object]:
        looked.append(total)
        return items

    soundfile.write(tmp_path / "x.wav", tone(0.5, 8000), 8000)
    corpus = one(tmp_path / "x.wav")
    before = extract(corpus, FBANK, tmp_path / "c", jobs=1, progress=watching)["u"]  # type: ignore[arg-type]
    extract(corpus, FBANK, tmp_path / "c", jobs=1, progress=watching)  # type: ignore[arg-type]
    assert looked == [1]
    soundfile.write(tmp_path / "x.wav", tone(0.5, 8000, 880.0), 8000)
    after = extract(corpus, FBANK, tmp_path / "c", jobs=1, progress=watching)["u"]  # type: ignore[arg-type]
    assert looked == [1, 1] and not np.array_equal(before, after)
    extract(corpus, Fbank(rate=8000, bins=21), tmp_path / "c", jobs=1, progress=watching)  # type: ignore[arg-type]
    extract(one(tmp_path / "x.wav", end=0.2), FBANK, tmp_path / "c", jobs=1, progress=watching)  # type: ignore[arg-type]
    extract(one(tmp_path / "x.wav", speed=0.9), FBANK, tmp_path / "c", jobs=1, progress=watching)  # type: ignore[arg-type]
    assert looked == [1] * 5


def test_bad_audio_is_listed_at_once_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "good.wav", tone(0.5, 8000), 8000)
    soundfile.write(tmp_path / "short.wav", tone(0.004, 8000), 8000)
    (tmp_path / "text.wav").write_text("these are words")
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).normal(size=80000) * 0.1, 8000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:40000])
    names = ["good.wav", "short.wav", "text.wav", "cut.flac", "gone.wav"]
    corpus = Corpus("mixed", tuple(Utterance(n, "s", (), Audio(path=tmp_path / n)) for n in names))
    with pytest.raises(BadAudio, match='on_bad_audio="drop"') as headers:
        extract(corpus, FBANK, tmp_path / "c", jobs=1)
    assert list(headers.value.reasons) == ["gone.wav", "text.wav"]
    with pytest.raises(BadAudio, match="the audio of 2 utterances") as contents:
        extract(corpus.subset(["good.wav", "short.wav", "cut.flac"]), FBANK, tmp_path / "c", jobs=1)
    assert set(contents.value.reasons) == {"short.wav", "cut.flac"}
    assert "shorter than a frame" in str(contents.value)
    reasons = {**headers.value.reasons, **contents.value.reasons}
    assert reasons["gone.wav"] == f"missing: there is no file {tmp_path / 'gone.wav'}"
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        kept = extract(corpus, FBANK, tmp_path / "c", jobs=1, on_bad_audio="drop")
        assert list(kept) == ["good.wav"]
        assert kept.left_out == {id: reasons[id] for id in sorted(names[1:])}
        assert f"left out for audio that cannot be used: 4 (cut.flac: audio {reasons['cut.flac']}, gone" in caplog.text
    with pytest.raises(BadAudio):
        extract(corpus, FBANK, tmp_path / "c", jobs=1)
    # Reasons that are lost or damaged are found again.
    (cached,) = (tmp_path / "c").glob("*/feats.00000.left_out")
    for damage in (lambda: cached.unlink(), lambda: cached.write_text("{"), lambda: cached.write_text("{}")):
        damage()
        assert extract(corpus, FBANK, tmp_path / "c", jobs=1, on_bad_audio="drop").left_out == reasons
    with pytest.raises(ValueError, match=r"no audio of mixed can be used, none of 4 is left: 4 \(cut"):
        extract(corpus.subset(names[1:]), FBANK, tmp_path / "c", jobs=1, on_bad_audio="drop")


def test_a_wav_file_that_was_cut_is_not_taken_as_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(0.5, 8000), 8000, subtype="PCM_16")
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        for read in (check_audio, lambda audio: read_audio(audio, 8000)):
            with pytest.raises(UnreadableAudio, match=f"cut short: {length - 44} of 8000 bytes of sound"):
                read(Audio(path=path))
    # As written to a pipe: its length was not known; and with more behind the sound.
    at = whole.index(b"data") + 4
    for told in (b"\xff\xff\xff\xff", (0x7FFFF000).to_bytes(4, "little")):
        path.write_bytes(whole[:at] + told + whole[at + 4 :])
        assert len(read_audio(Audio(path=path), 8000).samples) == 4000
    path.write_bytes(whole + b"LIST\x04\0\0\0INFO")
    assert len(read_audio(Audio(path=path), 8000).samples) == 4000


def test_a_reason_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    """Of a command, whose output is not in the name of the cache."""
    soundfile.write(tmp_path / "x.wav", tone(0.5, 8000), 8000)
    places = {"u": Audio(path=tmp_path / "x.wav"), "v": Audio(command=f"cat {tmp_path / 'y.wav'}")}
    corpus = Corpus("c", tuple(Utterance(id, "s", (), audio) for id, audio in places.items()))
    assert list(extract(corpus, FBANK, tmp_path / "c", jobs=1, on_bad_audio="drop").left_out) == ["v"]
    shutil.copyfile(tmp_path / "x.wav", tmp_path / "y.wav")
    for on_bad_audio in ("error", "drop"):
        found = extract(corpus, FBANK, tmp_path / "c", jobs=1, on_bad_audio=on_bad_audio)  # type: ignore[arg-type]
        assert list(found) == ["u", "v"] and found.left_out == {}


def test_one_warning_for_rates_channels_and_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = tone(0.5, 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0.5 * left], 1), 8000)
    soundfile.write(tmp_path / "b.wav", left, 8000)
    soundfile.write(tmp_path / "c.wav", tone(0.5, 11025), 11025)
    soundfile.write(tmp_path / "d.wav", tone(0.5, 16000), 16000)
    soundfile.write(tmp_path / "e.wav", np.zeros(16000), 16000)
    paths = sorted(tmp_path.glob("*.wav"))
    corpus = Corpus("mixed", tuple(Utterance(p.stem, "s", (), Audio(path=p)) for p in paths))
    features = extract(corpus, Fbank(), tmp_path / "cache", jobs=1)
    assert [record.getMessage() for record in caplog.records] == [
        "mixed: of 5 utterances, resampled from 8000 to 16000 Hz: 2 (a, b)",
        "mixed: of 5 utterances, resampled from 11025 to 16000 Hz: 1 (c)",
        "mixed: only the first channel is used of 1 (a)",
        "mixed: all samples are zero in 1 (e)",
    ]
    np.testing.assert_array_equal(features["a"], features["b"])
    assert np.isfinite(features["e"]).all()


def test_what_cannot_be_extracted(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without audio: 1 \(u\): FeatureStore"):
        extract(Corpus("c", (Utterance("u", "s", ()),)), FBANK, tmp_path)
    with pytest.raises(ValueError, match="no utterance"):
        extract(corpus.head(0), FBANK, tmp_path)
    with pytest.raises(ValueError, match="jobs=0"):
        extract(corpus, FBANK, tmp_path, jobs=0)


SCRIPT = """
import multiprocessing, os, sys, time
from quadric.speech.corpus import read_data_dir
from quadric.speech.features import Fbank, extract

stop_item, stop_sync = int(sys.argv[3]), int(sys.argv[4])

def hang():
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)

def watching(items, *, total, what):
    for number, item in enumerate(items):
        if number == stop_item:
            hang()
        yield item

real, syncs = os.fsync, 0
def fsync(file):
    global syncs
    syncs += 1
    if syncs == stop_sync:
        hang()
    real(file)

if __name__ == "__main__":
    os.fsync = fsync
    fbank = Fbank(rate=8000, bins=20)
    extract(read_data_dir(sys.argv[1]), fbank, sys.argv[2], jobs=2, shard=10, progress=watching)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    ("item", "sync"),
    [(25, -1), (-1, 9), (-1, 11)],
    ids=["computing the third shard", "writing its archive", "writing its table"],
)
def test_an_extraction_that_is_killed_goes_on(
    folder: Path,
    corpus: Corpus,
    truth: dict[str, np.ndarray],
    tmp_path: Path,
    alive: Callable[..., set[int]],
    number: int,
    item: int,
    sync: int,
) -> None:
    (tmp_path / "extract.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "extract.py"), str(folder), str(tmp_path / "cache"), str(item), str(sync)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        children = [int(child) for child in process.stdout.readline().split()]
        process.send_signal(number)
        process.wait()
    assert len(children) == 2
    assert not alive(children, patience=10.0), "the extraction's processes outlive it"
    (cache,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in cache.glob("*.scp")) == ["feats.00000.scp", "feats.00001.scp"]
    assert (number == signal.SIGKILL and sync > 0) == any(path.suffix == ".tmp" for path in cache.iterdir())
    kept = (cache / "feats.00001.ark").stat().st_mtime_ns
    assert_same(extract(corpus, FBANK, tmp_path / "cache", jobs=1, shard=SHARD), truth)
    assert (cache / "feats.00001.ark").stat().st_mtime_ns == kept
    assert not [path for path in cache.iterdir() if path.suffix == ".tmp"]


def test_half_written_files_are_never_read(corpus: Corpus, truth: dict[str, np.ndarray], tmp_path: Path) -> None:
    extract(corpus, FBANK, tmp_path, jobs=1, shard=SHARD)
    (cache,) = tmp_path.iterdir()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = f"{platform.node()}-{int(ended.stdout)}"
    whole = (cache / "feats.00003.ark").read_bytes()
    (cache / "feats.00003.scp").unlink()
    (cache / "feats.00003.ark").write_bytes(whole[:1000])
    (cache / f".feats.00003.scp.{dead}.tmp").write_text("u30 feats.00003.ark:4\nu31 fea")
    (cache / f".feats.00003.ark.{platform.node()}-{os.getpid()}.tmp").write_bytes(whole[:500])
    (cache / "feats.00004.ark").unlink()
    assert_same(extract(corpus, FBANK, tmp_path, jobs=1, shard=SHARD), truth)
    assert not [path for path in cache.iterdir() if path.suffix == ".tmp"]


# --- a cache that cannot be written


def test_a_full_disk_keeps_what_is_whole(
    corpus: Corpus, truth: dict[str, np.ndarray], small_disk: Callable[[str], Path]
) -> None:
    tiny_disk = small_disk("64k")
    with pytest.raises(OSError, match=rf"cannot write to {tiny_disk}.*the disk is full: free some space") as error:
        extract(corpus, FBANK, tiny_disk, jobs=1, shard=SHARD)
    assert error.value.errno == errno.ENOSPC
    (cache,) = tiny_disk.iterdir()
    whole = {path.stem for path in cache.glob("*.scp")}
    assert whole and not [path for path in cache.iterdir() if path.suffix == ".tmp"]
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    assert_same(extract(corpus, FBANK, tiny_disk, jobs=1, shard=SHARD), truth)


REFUSED = """
import os, resource, sys
from quadric.speech.corpus import read_data_dir
from quadric.speech.features import Fbank, extract

corpus = read_data_dir(sys.argv[1])
if sys.argv[3] == "limited":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
elif os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
try:
    extract(corpus, Fbank(), sys.argv[2], jobs=1)
except OSError as error:
    print(error)
"""


def refused(folder: Path, cache: Path, how: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REFUSED, str(folder), str(cache), how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_file_size_limit_names_the_remedy(folder: Path, tmp_path: Path) -> None:
    message = refused(folder, tmp_path / "cache", "limited")
    assert f"cannot write to {tmp_path / 'cache'}" in message and "raise the limit" in message
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_folder_without_permission_names_the_remedy(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o555)
        try:
            message = refused(folder, place / "cache", "locked")
        finally:
            place.chmod(0o755)
    assert f"cannot write to {place / 'cache'}" in message and "no permission to write: choose another" in message


def test_a_cache_below_a_file_names_the_remedy(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="a part of the path is a file, not a folder: choose another folder"):
        extract(corpus, FBANK, tmp_path / "file" / "cache", jobs=1)


def test_no_torch_in_the_processes() -> None:
    code = "import sys, quadric.speech.features; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# --- reading features


def test_kaldi_archives_are_read_and_written_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    matrices = {f"u{i}": rng.normal(size=(5 + i, 3)).astype(np.float32) for i in range(3)}
    kaldiio.save_ark(str(tmp_path / "f.ark"), matrices, scp=str(tmp_path / "feats.scp"))
    (tmp_path / "text").write_text("u0 A\nu1 B\nu2 C\n")
    corpus = read_data_dir(tmp_path)
    assert_same(FeatureStore.from_corpus(corpus), matrices)
    write_data_dir(corpus, tmp_path / "again")
    assert_same(FeatureStore.from_corpus(read_data_dir(tmp_path / "again")), matrices)
    kaldiio.save_ark(str(tmp_path / "c.ark"), matrices, scp=str(tmp_path / "feats.scp"), compression_method=2)
    assert np.abs(FeatureStore.from_corpus(read_data_dir(tmp_path))["u2"] - matrices["u2"]).max() < 0.05


def test_features_that_cannot_be_read(tmp_path: Path) -> None:
    kaldiio.save_ark(str(tmp_path / "f.ark"), {"u": np.ones((9, 3), np.float32)}, scp=str(tmp_path / "feats.scp"))
    (tmp_path / "text").write_text("u A\n")
    store = FeatureStore.from_corpus(read_data_dir(tmp_path))
    (tmp_path / "f.ark").write_bytes((tmp_path / "f.ark").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"features of u cannot be read from .*extract them again"):
        store["u"]
    (tmp_path / "f.ark").unlink()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        store["u"]
    with pytest.raises(KeyError):
        store["v"]
    with pytest.raises(ValueError, match=r"commands, not archives: 1 \(u\)"):
        FeatureStore({"u": "touch /tmp/x |"})
    with pytest.raises(ValueError, match="without features"):
        FeatureStore.from_corpus(Corpus("c", (Utterance("u", "s", ()),)))


# --- from audio to features


def test_speeds_are_speakers_of_their_own_from_audio_to_features(corpus: Corpus, tmp_path: Path) -> None:
    perturbed = perturb_speed(corpus.head(4))
    features = extract(perturbed, FBANK, tmp_path, jobs=1)
    for utterance in corpus.head(4):
        lengths = [len(features[prefix + utterance.id]) for prefix in ("sp0.9-", "", "sp1.1-")]
        assert lengths == sorted(lengths, reverse=True)
        assert abs(lengths[0] * 0.9 - lengths[1]) <= 1 and abs(lengths[2] * 1.1 - lengths[1]) <= 1.2


@pytest.mark.data
def test_real_speech(shared_data: Path, tmp_path: Path) -> None:
    corpus = read_data_dir(shared_data / "speechocean762" / "data" / "dev").head(20)
    features = extract(corpus, Fbank(), tmp_path, jobs=1)
    normal = normalise(features, corpus, Normalisation())
    assert all(features[u.id].shape[1] == 40 and np.isfinite(normal[u.id]).all() for u in corpus)
    everything = np.concatenate([normal[id] for id in normal])
    assert abs(everything.mean()) < 1e-4 and abs(everything.std() - 1) < 1e-3
