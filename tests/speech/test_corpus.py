"""Kaldi data directories: what is read, what is refused and with which words, and the way back."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadric.speech.corpus import Audio, Corpus, Utterance, perturb_speed, read_data_dir, write_data_dir


def data_dir(folder: Path, **tables: str) -> Path:
    """A data directory; keyword ``wav_scp`` is the file ``wav.scp``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tables.items():
        (folder / name.replace("_scp", ".scp")).write_text(content)
    return folder


def sound(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no one listens yet")
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    sound(tmp_path / "a.wav")
    return data_dir(
        tmp_path / "data",
        wav_scp="u2 /x/b.wav\nu1 ../a.wav\n",
        text="u1 ONE  TWO\nu2 THREE\n",
        utt2spk="u1 ann\nu2 bob\n",
    )


def test_tables_become_sorted_utterances(good: Path) -> None:
    corpus = read_data_dir(good)
    assert corpus.name == "data"
    assert corpus.utterances == (
        Utterance("u1", "ann", ("ONE", "TWO"), Audio(path=good / "../a.wav")),
        Utterance("u2", "bob", ("THREE",), Audio(path=Path("/x/b.wav"))),
    )
    assert corpus.speakers == ("ann", "bob")
    assert corpus.word_counts() == {"ONE": 1, "TWO": 1, "THREE": 1}
    assert corpus.by_id["u2"] is corpus.utterances[1]
    assert [u.id for u in corpus.head(1)] == ["u1"]
    assert [u.id for u in corpus.subset(["u2"])] == ["u2"]
    assert pickle.loads(pickle.dumps(corpus)) == corpus


def test_subset_names_all_unknown_ids(good: Path) -> None:
    with pytest.raises(ValueError, match=r"not in the corpus data: 2 \(x, y\)"):
        read_data_dir(good).subset(["x", "u1", "y"])


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_relative_paths_start_from_the_folder_or_two_above(tmp_path: Path, depth: int) -> None:
    folder = tmp_path / "corpus" / "data" / "train"
    root = [folder, *folder.parents][depth]
    data_dir(folder, wav_scp="u flac/u.flac\n", text="u ONE\n", utt2spk="u s\n")
    sound(root / "flac" / "u.flac")
    audio = read_data_dir(folder).by_id["u"].audio
    assert audio is not None and audio.path == root / "flac" / "u.flac"


def test_a_missing_first_file_does_not_hide_the_root(tmp_path: Path) -> None:
    wav_scp, text, utt2spk = "a flac/a.flac\nb flac/b.flac\n", "a ONE\nb TWO\n", "a s\nb s\n"
    folder = data_dir(tmp_path / "data" / "train", wav_scp=wav_scp, text=text, utt2spk=utt2spk)
    sound(tmp_path / "flac" / "b.flac")
    audio = read_data_dir(folder).by_id["a"].audio
    assert audio is not None and audio.path == tmp_path / "flac" / "a.flac"  # its absence is found when it is read


def test_a_given_root_is_the_only_one(tmp_path: Path) -> None:
    folder = data_dir(tmp_path / "data", wav_scp="u u.flac\n", text="u ONE\n", utt2spk="u s\n")
    sound(folder / "u.flac")
    sound(tmp_path / "far" / "u.flac")
    audio = read_data_dir(folder, root=tmp_path / "far").by_id["u"].audio
    assert audio is not None and audio.path == tmp_path / "far" / "u.flac"
    with pytest.raises(FileNotFoundError, match=r"u\.flac, the first relative path.*pass root="):
        read_data_dir(folder, root=tmp_path / "nowhere")


def test_no_root_fits(good: Path) -> None:
    (good / "../a.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"\.\./a\.wav.*pass root="):
        read_data_dir(good)


def test_commands_are_refused_unless_allowed(good: Path) -> None:
    data_dir(good, wav_scp="u1 /x/a.wav\nu2 sox b.sph -t wav - |\n")
    with pytest.raises(ValueError, match=r"wav\.scp: 1 \(line 2\).*allow_commands=True"):
        read_data_dir(good)
    audio = read_data_dir(good, allow_commands=True).by_id["u2"].audio
    assert audio == Audio(command="sox b.sph -t wav -")


def test_segments_cut_recordings(good: Path) -> None:
    data_dir(good, wav_scp="r /x/r.wav\n", segments="u1 r 0 1.5\nu2 r 1.5 -1\n")
    corpus = read_data_dir(good)
    assert [u.audio for u in corpus] == [
        Audio(path=Path("/x/r.wav"), start=0.0, end=1.5),
        Audio(path=Path("/x/r.wav"), start=1.5, end=None),
    ]


@pytest.mark.parametrize("times", ["2 1", "1 1", "-1 3", "0 nan", "nan 1", "0 inf", "zero one", "0", "0 1 2", "2 -2"])
def test_segments_that_cannot_be(good: Path, times: str) -> None:
    data_dir(good, wav_scp="r /x/r.wav\n", segments=f"u1 r 0 1\nu2 r {times}\n")
    with pytest.raises(ValueError, match=r"malformed lines in .*segments: 1 \(line 2: "):
        read_data_dir(good)


def test_segments_of_unknown_recordings(good: Path) -> None:
    data_dir(good, wav_scp="r /x/r.wav\n", segments="u1 r 0 1\nu2 q 0 1\n")
    with pytest.raises(ValueError, match=r"recording is not in wav\.scp: 1 \(u2\)"):
        read_data_dir(good)
    kept = read_data_dir(good, on_mismatch="drop")
    assert [u.id for u in kept] == ["u1"] and kept.left_out == {"u2": "its recording is not in wav.scp"}


def test_features_alone_make_a_corpus(good: Path) -> None:
    (good / "wav.scp").unlink()
    sound(good / "feats.ark")
    data_dir(good, feats_scp="u1 feats.ark:3\nu2 /x/other.ark:9[0:4]\n")
    corpus = read_data_dir(good)
    assert [u.features for u in corpus] == [f"{good}/feats.ark:3", "/x/other.ark:9[0:4]"]
    assert [u.audio for u in corpus] == [None, None]
    data_dir(good, feats_scp="u1 copy-feats ark:a ark:- |\nu2 feats.ark:3\n")
    with pytest.raises(ValueError, match=r"commands in .*feats\.scp: 1 \(line 1\)"):
        read_data_dir(good)


@pytest.mark.parametrize("table", ["wav.scp", "text"])
def test_missing_tables(good: Path, table: str) -> None:
    (good / table).unlink()
    with pytest.raises(FileNotFoundError, match=table):
        read_data_dir(good)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data directory .*nothing"):
        read_data_dir(tmp_path / "nothing")


@pytest.mark.parametrize("table", ["wav.scp", "text", "utt2spk"])
def test_repeated_ids_are_listed_at_once(good: Path, table: str) -> None:
    (good / table).write_text((good / table).read_text() * 2)
    with pytest.raises(ValueError, match=rf"repeated ids in .*{table}: 2 \(u\d on line 3, u\d on line 4\)"):
        read_data_dir(good)


@pytest.mark.parametrize(
    ("table", "line"), [("wav.scp", "u3"), ("utt2spk", "u3"), ("utt2spk", "u3 a b"), ("text", ""), ("wav.scp", "  ")]
)
def test_malformed_lines(good: Path, table: str, line: str) -> None:
    (good / table).write_text(f"{line}\n" + (good / table).read_text() + f"{line}\n")
    with pytest.raises(ValueError, match=rf"malformed lines in .*{table}: 2 \(line 1: .*line 4: "):
        read_data_dir(good)


def test_text_that_is_not_utf8_and_empty_tables(good: Path) -> None:
    (good / "text").write_bytes("u1 CAFÉ\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text:1: not UTF-8 .*convert"):
        read_data_dir(good)
    (good / "text").write_bytes(b"")
    with pytest.raises(ValueError, match=r"table .*text is empty"):
        read_data_dir(good)


def test_mismatch_names_every_table_and_can_be_dropped(good: Path) -> None:
    data_dir(good, text="u1 ONE\nu3 THREE\nu4 FOUR\n")
    with pytest.raises(ValueError) as error:
        read_data_dir(good)
    assert "not in wav.scp: 2 (u3, u4)" in str(error.value)
    assert "not in text: 1 (u2)" in str(error.value)
    assert 'on_mismatch="drop"' in str(error.value)
    kept = read_data_dir(good, on_mismatch="drop")
    assert [u.id for u in kept] == ["u1"]
    reasons = {"u2": "not in text", "u3": "not in wav.scp nor utt2spk", "u4": "not in wav.scp nor utt2spk"}
    assert kept.left_out == pickle.loads(pickle.dumps(kept)).left_out == kept.head(0).left_out == reasons


def test_nothing_left_is_an_error(good: Path) -> None:
    data_dir(good, text="v1 ONE\nv2 TWO\n")
    with pytest.raises(ValueError, match=r"no utterance of .* is left"):
        read_data_dir(good, on_mismatch="drop")


def test_empty_transcripts(good: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_dir(good, text="u1\nu2 TWO\n")
    with pytest.raises(ValueError, match=r'empty transcripts in .*text: 1 \(u1\).*on_empty="drop"'):
        read_data_dir(good)
    kept = read_data_dir(good, on_empty="drop")
    assert [u.id for u in kept] == ["u2"] and kept.left_out == {"u1": "empty transcript"}
    assert "left out for an empty transcript: 1 (u1)" in caplog.text
    assert read_data_dir(good, allow_missing_text=True).by_id["u1"].words == ()


def test_text_may_be_missing_on_request(good: Path) -> None:
    data_dir(good, text="u2 TWO\n")
    assert [u.words for u in read_data_dir(good, allow_missing_text=True)] == [(), ("TWO",)]
    (good / "text").unlink()
    assert [u.words for u in read_data_dir(good, allow_missing_text=True)] == [(), ()]


def test_without_utt2spk_everyone_speaks_once(good: Path, caplog: pytest.LogCaptureFixture) -> None:
    (good / "utt2spk").unlink()
    assert read_data_dir(good).speakers == ("u1", "u2")
    assert "no utt2spk" in caplog.text


def test_wrong_options(good: Path) -> None:
    with pytest.raises(ValueError, match="on_mismatch='ignore'"):
        read_data_dir(good, on_mismatch="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"path": Path("a"), "command": "b"}, {"path": Path("a"), "start": -1.0},
     {"path": Path("a"), "start": 2.0, "end": 1.0}, {"path": Path("a"), "speed": 0.0}],
)  # fmt: skip
def test_impossible_audio(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Audio: "):
        Audio(**arguments)  # type: ignore[arg-type]


def test_repeated_ids_in_a_corpus() -> None:
    with pytest.raises(ValueError, match=r"repeated utterance ids: 1 \(a\)"):
        Corpus("c", (Utterance("a", "s", ()), Utterance("a", "t", ())))


names = st.text(st.characters(codec="utf-8", exclude_characters=" \t\r\n", exclude_categories=["Cs"]), min_size=1)
parts = st.one_of(st.just((0.0, None)), st.tuples(st.floats(0, 10), st.floats(11, 1e4) | st.none()))


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    with_features = draw(st.booleans())
    utterances = []
    for id in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        start, end = draw(parts)
        audio = Audio(path=Path("/x") / draw(st.sampled_from(["a.wav", "a folder/b.flac"])), start=start, end=end)
        words = tuple(draw(st.lists(names, max_size=3)))
        utterances.append(Utterance(id, draw(names), words, audio, f"/x/f.ark:{len(id)}" if with_features else None))
    return Corpus("any", tuple(utterances))


@given(corpora())
def test_written_and_read_again(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> None:
    folder = tmp_path_factory.mktemp("written") / "data"
    write_data_dir(corpus, folder)
    assert read_data_dir(folder, name="any", allow_missing_text=True) == corpus
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data"]


def test_writing_refuses_what_the_tables_cannot_say(good: Path, tmp_path: Path) -> None:
    corpus = read_data_dir(good)
    with pytest.raises(ValueError, match=r"another speed: 2 \(sp1\.1-u1, sp1\.1-u2\)"):
        write_data_dir(perturb_speed(corpus, (1.1,)), tmp_path / "fast")
    with pytest.raises(ValueError, match=r"without features, which others have: 1 \(a\)"):
        mixed = (Utterance("a", "s", ()), Utterance("b", "s", (), features="/x:1"))
        write_data_dir(Corpus("mixed", mixed), tmp_path / "mixed")
    with pytest.raises(ValueError, match="blanks inside"):
        write_data_dir(Corpus("blank", (Utterance("a b", "s", ()),)), tmp_path / "blank")
    with pytest.raises(OSError, match=r"cannot write to .*something else is already there"):
        write_data_dir(corpus, good)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "data"]


def test_speed_makes_new_speakers(good: Path) -> None:
    corpus = perturb_speed(read_data_dir(good))
    assert [u.id for u in corpus] == ["sp0.9-u1", "sp0.9-u2", "sp1.1-u1", "sp1.1-u2", "u1", "u2"]
    assert corpus.speakers == ("ann", "bob", "sp0.9-ann", "sp0.9-bob", "sp1.1-ann", "sp1.1-bob")
    slow = corpus.by_id["sp0.9-u2"]
    assert slow.words == ("THREE",) and slow.audio == Audio(path=Path("/x/b.wav"), speed=0.9)
    for factors in ((), (1.0, 1.0), (0.0,), (-1.0,)):
        with pytest.raises(ValueError, match="factors="):
            perturb_speed(corpus, factors)


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "utterances", "speakers"),
    [("speechocean762/data/dev", 500, 25), ("speechocean762/data/train", 3292, 175), ("fsdd/data/dev", 500, 1)],
)
def test_real_corpora(shared_data: Path, folder: str, utterances: int, speakers: int) -> None:
    corpus = read_data_dir(shared_data / folder)
    assert (len(corpus), len(corpus.speakers)) == (utterances, speakers)
    assert all(u.audio is not None and u.audio.path is not None and u.audio.path.is_file() for u in corpus)
