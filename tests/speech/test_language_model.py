from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadric.speech.language_model import BEGIN, END, NGram
from quadric.speech.lexicon import read_lexicon
from reference import kneser_ney

VOCABULARY = ("A", "B", "C", "D")
SENTENCE = st.lists(st.sampled_from(VOCABULARY[:3]), max_size=5).map(tuple)
TEXT = st.lists(SENTENCE, min_size=1, max_size=12)
ORDER = st.integers(1, 4)


def histories(order: int) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [(), (BEGIN,)]
    for _ in range(order - 1):
        found += [(*history, word) for history in found for word in VOCABULARY if len(history) < order]
    return sorted(set(found))


@given(text=TEXT, order=ORDER)
def test_probabilities_sum_to_one_after_every_history(text: list[tuple[str, ...]], order: int) -> None:
    model = NGram.estimate(text, VOCABULARY, order)
    for history in histories(min(order, 3)):
        total = sum(math.exp(model.log_prob(word, history)) for word in (*VOCABULARY, END))
        assert total == pytest.approx(1.0, abs=1e-12)


@given(text=TEXT, held_out=st.lists(SENTENCE, min_size=1, max_size=3), order=ORDER)
def test_perplexity_is_that_of_the_formulas(
    text: list[tuple[str, ...]], held_out: list[tuple[str, ...]], order: int
) -> None:
    model = NGram.estimate(text, VOCABULARY, order)
    slow = kneser_ney.perplexity(text, VOCABULARY, order, held_out)
    assert model.perplexity(held_out) == pytest.approx(slow, rel=1e-10)


def test_perplexity_with_estimated_discounts() -> None:
    """A text with enough counts of counts, so that the discounts are not the safe ones."""
    words = [f"W{i}" for i in range(40)]
    text = [tuple(words[(i * i + j * i) % (3 + i % 37)] for j in range(1 + i % 5)) for i in range(120)]
    for order in (1, 2, 3):
        used = kneser_ney.discounts(kneser_ney.kept(text, order, True))
        assert used[1] != 0.5, f"the text of this test is too plain for order {order}"
        slow = kneser_ney.perplexity(text, words, order, text[::20])
        assert NGram.estimate(text, words, order).perplexity(text[::20]) == pytest.approx(slow, rel=1e-10)


@given(text=TEXT, order=ORDER)
def test_the_written_model_is_the_same_model(
    tmp_path_factory: pytest.TempPathFactory, text: list[tuple[str, ...]], order: int
) -> None:
    path = tmp_path_factory.mktemp("arpa") / "model.arpa"
    model = NGram.estimate(text, VOCABULARY, order)
    model.write_arpa(path)
    read = NGram.read_arpa(path)
    assert (read.order, read.vocabulary) == (model.order, VOCABULARY)
    for history in histories(min(order, 3)):
        for word in (*VOCABULARY, END):
            assert read.log_prob(word, history) == pytest.approx(model.log_prob(word, history), abs=1e-9)


MODEL = """preamble

\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-1.0\t<s>\t-0.5
-0.5\t</s>
-0.4\tA\t-0.2
-0.9\t<unk>

\\2-grams:
-0.1\t<s>\tA

\\end\\
"""


def test_a_model_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(MODEL)
    model = NGram.read_arpa(path)
    ten = math.log(10.0)
    assert model.log_prob("A", (BEGIN,)) == pytest.approx(-0.1 * ten)
    assert model.log_prob("A", ("A",)) == pytest.approx((-0.2 - 0.4) * ten)
    assert model.log_prob("ELSEWHERE", ("A",)) == pytest.approx((-0.2 - 0.9) * ten)
    assert model.sentence_log_prob(("A", "A")) == pytest.approx((-0.1 - 0.2 - 0.4 - 0.2 - 0.5) * ten)


def test_a_model_within_fewer_words(tmp_path: Path) -> None:
    model = NGram.estimate([("A", "B", "C"), ("A", "C", "A")], VOCABULARY, 3)
    smaller = model.within({"A", "C"})
    assert smaller.vocabulary == ("A", "C")
    assert smaller.log_prob("C", ("A",)) == model.log_prob("C", ("A",))
    assert not any("B" in ngram or "D" in ngram for ngram in smaller.entries)
    assert NGram.estimate([("B", "B")], VOCABULARY, 4).within({"A"}).order == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\end\\", "", "not a whole model"),
        ("\\data\\", "data", "not a whole model"),
        ("-0.1\t<s>\tA", "-0.1\tA", r"arpa:14: expected a log probability, 2 words"),
        ("-0.9\t<unk>", "-inf\t<unk>", r"arpa:11: .* write -99 for never"),
        ("-0.1\t<s>", "much\t<s>", r"arpa:14: expected a log probability, 2 words"),
        ("\\2-grams:", "\\3-grams:", r"arpa:13: expected the section \\2-grams:"),
        ("-0.5\t</s>\n", "", "no unigram </s>"),
    ],
)
def test_a_broken_model_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(MODEL.replace(old, new))
    with pytest.raises(ValueError, match=message):
        NGram.read_arpa(path)


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"outside the vocabulary: X \(2\), Y \(1\)"):
        NGram.estimate([("A", "X"), ("Y", "X")], ("A",), 2)
    with pytest.raises(ValueError, match="sentences is empty"):
        NGram.estimate([], ("A",), 2)
    with pytest.raises(ValueError, match="order=0"):
        NGram.estimate([("A",)], ("A",), 0)
    with pytest.raises(ValueError, match="reserved <s>"):
        NGram.estimate([("A",)], ("A", "<s>"), 2)
    model = NGram.estimate([("A",)], ("A",), 2)
    with pytest.raises(ValueError, match="'B' is not in the vocabulary"):
        model.log_prob("B")
    with pytest.raises(ValueError, match="needs text"):
        model.perplexity([])


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such language model"):
        NGram.read_arpa(tmp_path / "absent.arpa")


@pytest.mark.data
def test_perplexity_of_held_out_sentences(shared_data: Path) -> None:
    corpus = shared_data / "speechocean762"
    lexicon = read_lexicon(corpus / "lexicon.txt")
    text = {
        split: [tuple(line.split()[1:]) for line in (corpus / "data" / split / "text").open()]
        for split in ("train", "dev")
    }
    bigram, trigram = (NGram.estimate(text["train"], lexicon.words, order) for order in (2, 3))
    assert bigram.perplexity(text["dev"]) < 116.0
    assert trigram.perplexity(text["dev"]) < bigram.perplexity(text["dev"])
