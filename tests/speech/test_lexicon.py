from __future__ import annotations

from pathlib import Path

import pytest

from quadric.speech.lexicon import Lexicon, read_lexicon


def written(folder: Path, text: str) -> Path:
    path = folder / "lexicon.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_variants_homophones_and_duplicates(tmp_path: Path) -> None:
    path = written(tmp_path, "TO T UW1\nTO T UW0\n\nTWO T UW1\nTO T AH0\nÇA S AH\n")
    lexicon = read_lexicon(path)
    assert lexicon.entries == (
        ("TO", ("T", "UW")),
        ("TWO", ("T", "UW")),
        ("TO", ("T", "AH")),
        ("ÇA", ("S", "AH")),
    )
    assert lexicon.words == ("TO", "TWO", "ÇA")
    assert lexicon.phones == ("AH", "S", "T", "UW")
    assert lexicon.pronunciations("TO") == (("T", "UW"), ("T", "AH"))


def test_stress_may_stay(tmp_path: Path) -> None:
    lexicon = read_lexicon(written(tmp_path, "TO T UW1\nTO T UW0\n"), strip_stress=False)
    assert lexicon.phones == ("T", "UW0", "UW1")
    assert len(lexicon.entries) == 2


def test_only_stress_digits_are_stripped(tmp_path: Path) -> None:
    lexicon = read_lexicon(written(tmp_path, "A AH1 x1 T3 2\n"))
    assert lexicon.pronunciations("A") == (("AH", "x1", "T3", "2"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("B", "empty pronunciation"),
        ("B(2) B IY", r"variants.*B\(2\).*with the word B$"),
        ("B 0.75 B IY", "probabilities"),
        ("!SIL SIL", "SIL .*reserved"),
        ("<s> B", "<s> is reserved"),
        ("#0 B", "#0 is reserved"),
        ("B B #1", "'#1', which cannot name a phone"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, f"A AH\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"lexicon\.txt:3: .*{message}"):
        read_lexicon(path)


def test_no_file_and_no_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such lexicon"):
        read_lexicon(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="empty"):
        read_lexicon(written(tmp_path, "\n \n"))


def test_all_unknown_words_are_named_with_counts() -> None:
    lexicon = Lexicon((("A", ("AH",)),))
    counts = {"A": 9, "CAT": 1, "BAT": 1, "DOG": 5}
    assert lexicon.unknown_words(counts) == {"DOG": 5, "BAT": 1, "CAT": 1}
    with pytest.raises(ValueError, match=r"3 words .*DOG \(5\), BAT \(1\), CAT \(1\).*drop"):
        lexicon.check(counts)
    lexicon.check({"A": 1})
    with pytest.raises(ValueError, match="'CAT' is not in the lexicon"):
        lexicon.pronunciations("CAT")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "empty"),
        ((("A", ()),), "empty pronunciation"),
        ((("A", ("AH",)), ("A", ("AH",))), "twice"),
        ((("A B", ("AH",)),), "not a word"),
    ],
)
def test_entries_are_checked(entries: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lexicon(entries)


@pytest.mark.data
def test_a_real_lexicon(shared_data: Path) -> None:
    lexicon = read_lexicon(shared_data / "speechocean762" / "lexicon.txt")
    assert len(lexicon.words) == 2604
    assert len(lexicon.phones) == 39
