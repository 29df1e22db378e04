from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("kaldialign", reason="needs the speech extra")

from quadric.speech.scoring import (
    Errors,
    align,
    count,
    operation,
    paired_bootstrap,
    read_text,
    score,
    write_per_spk,
    write_per_utt,
    write_text,
    write_trn,
)
from reference.levenshtein import edit_distance

pytestmark = pytest.mark.speech

SENTENCE = st.lists(st.sampled_from("abcd"), max_size=8)
ERRORS = st.builds(Errors, *[st.integers(0, 1000)] * 4)


def corpus(seed: int, *, error: float = 0.3) -> tuple[dict, dict, dict]:
    """References, hypotheses with the given share of changed words, and six speakers."""
    rng = np.random.default_rng(7)
    noise = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i}" for i in range(20)])
    references, hypotheses, speakers = {}, {}, {}
    for i in range(60):
        words = rng.choice(vocabulary, size=int(rng.integers(1, 9)))
        changed = np.where(noise.random(len(words)) < error, noise.choice(vocabulary, size=len(words)), words)
        key = f"utt{i:02d}"
        references[key], hypotheses[key] = words.tolist(), changed[noise.random(len(words)) > error / 4].tolist()
        speakers[key] = f"s{i % 6}"
    return references, hypotheses, speakers


class TestAlignment:
    @given(SENTENCE, SENTENCE)
    def test_has_the_least_possible_errors(self, reference: list[str], hypothesis: list[str]) -> None:
        assert count(align(reference, hypothesis)).errors == edit_distance(reference, hypothesis)

    @given(SENTENCE, SENTENCE)
    def test_holds_both_sentences_in_order(self, reference: list[str], hypothesis: list[str]) -> None:
        pairs = align(reference, hypothesis)
        assert [a for a, _ in pairs if a is not None] == reference
        assert [b for _, b in pairs if b is not None] == hypothesis
        assert (None, None) not in pairs

    @given(SENTENCE, SENTENCE)
    def test_words_plus_insertions_less_deletions_is_what_was_recognised(
        self, reference: list[str], hypothesis: list[str]
    ) -> None:
        errors = count(align(reference, hypothesis))
        assert errors.words == len(reference)
        assert errors.words + errors.insertions - errors.deletions == len(hypothesis)
        assert errors.correct + errors.substitutions + errors.insertions == len(hypothesis)

    @pytest.mark.parametrize(
        ("pair", "expected"), [(("a", "a"), "C"), (("a", "b"), "S"), ((None, "b"), "I"), (("a", None), "D")]
    )
    def test_names_operations(self, pair: tuple, expected: str) -> None:
        assert operation(pair) == expected


class TestErrors:
    @given(ERRORS, ERRORS)
    def test_add_field_by_field(self, a: Errors, b: Errors) -> None:
        both = a + b
        assert both.errors == a.errors + b.errors
        assert (both.words, both.insertions) == (a.words + b.words, a.insertions + b.insertions)
        assert (both.deletions, both.substitutions) == (a.deletions + b.deletions, a.substitutions + b.substitutions)

    @pytest.mark.parametrize(
        ("errors", "line"),
        [
            (Errors(1000, 4, 5, 114), "%WER 12.30 [ 123 / 1000, 4 ins, 5 del, 114 sub ]"),
            (Errors(7, 1, 1, 1), "%WER 42.86 [ 3 / 7, 1 ins, 1 del, 1 sub ]"),
            (Errors(2, 3, 0, 0), "%WER 150.00 [ 3 / 2, 3 ins, 0 del, 0 sub ]"),
            (Errors(0, 2, 0, 0), "%WER inf [ 2 / 0, 2 ins, 0 del, 0 sub ]"),
            (Errors(), "%WER 0.00 [ 0 / 0, 0 ins, 0 del, 0 sub ]"),
            # In single precision, as Kaldi computes; double precision would round to 1.11.
            (Errors(20000, 0, 0, 223), "%WER 1.12 [ 223 / 20000, 0 ins, 0 del, 223 sub ]"),
        ],
    )
    def test_line_is_that_of_compute_wer(self, errors: Errors, line: str) -> None:
        assert errors.line == line


class TestScore:
    def test_sums_utterances_by_set_and_by_speaker(self) -> None:
        references, hypotheses, speakers = corpus(1)
        scored = score(references, hypotheses, speakers=speakers)
        assert scored.total == sum((u.errors for u in scored.utterances), Errors())
        assert scored.total == sum(scored.per_speaker.values(), Errors())
        assert scored.total.words == sum(map(len, references.values()))
        assert scored.total.errors == sum(edit_distance(references[k], hypotheses[k]) for k in references)
        assert list(scored.per_speaker) == ["s0", "s1", "s2", "s3", "s4", "s5"]
        assert scored.per_utterance["utt03"].reference == tuple(references["utt03"])
        assert scored.per_utterance["utt03"].hypothesis == tuple(hypotheses["utt03"])

    def test_prints_the_three_lines_of_compute_wer(self) -> None:
        scored = score({"a": ["x", "y"], "b": ["z"], "c": []}, {"a": ["x", "q"], "b": ["z"], "c": []})
        assert scored.lines == (
            "%WER 33.33 [ 1 / 3, 0 ins, 0 del, 1 sub ]",
            "%SER 33.33 [ 1 / 3 ]",
            "Scored 3 sentences, 0 not present in hyp.",
        )

    def test_counts_missing_hypotheses_as_deletions_on_request_only(self) -> None:
        references = {"a": ["x", "y"], "b": ["z"]}
        with pytest.raises(ValueError, match="none for a; recognise them, or pass on_missing='count'"):
            score(references, {"b": ["z"]})
        scored = score(references, {"b": ["z"]}, on_missing="count")
        assert scored.missing == ("a",)
        assert scored.total == Errors(3, deletions=2)
        assert scored.lines[0].endswith(" [PARTIAL]")
        assert scored.lines[2] == "Scored 2 sentences, 1 not present in hyp."

    @pytest.mark.parametrize("on_missing", ["error", "count"])
    def test_refuses_hypotheses_without_reference(self, on_missing: str) -> None:
        with pytest.raises(ValueError, match="no reference for b, c"):
            score({"a": ["x"]}, {"a": ["x"], "b": ["y"], "c": []}, on_missing=on_missing)

    def test_lists_ten_ids_and_counts_the_others(self) -> None:
        with pytest.raises(ValueError, match="u09 and 5 more"):
            score({f"u{i:02d}": ["x"] for i in range(15)}, {})

    @pytest.mark.parametrize("word", ["", "two words", "<eps>", "tab\t"])
    def test_refuses_what_is_no_word(self, word: str) -> None:
        with pytest.raises(ValueError, match="hypotheses: a holds"):
            score({"a": ["x"]}, {"a": [word]})

    def test_refuses_a_sentence_that_is_not_split(self) -> None:
        with pytest.raises(ValueError, match="split it into words"):
            score({"a": "x y"}, {"a": ["x"]})

    def test_refuses_no_references_unknown_speakers_and_options(self) -> None:
        with pytest.raises(ValueError, match="references: there are none"):
            score({}, {})
        with pytest.raises(ValueError, match="speakers: none given for a"):
            score({"a": ["x"]}, {"a": ["x"]}, speakers={})
        with pytest.raises(ValueError, match="on_missing='skip'"):
            score({"a": ["x"]}, {"a": ["x"]}, on_missing="skip")

    def test_finds_the_worst_utterances(self) -> None:
        references = {"a": ["x"] * 4, "b": ["x"] * 2, "c": ["x"], "d": ["x"]}
        hypotheses = {"a": ["x", "x", "q", "q"], "b": ["q", "q"], "c": ["q"], "d": ["x"]}
        assert [u.id for u in score(references, hypotheses).worst(10)] == ["b", "a", "c"]


class TestFiles:
    def test_text_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        texts = {"b": ("größe", "日本"), "a": (), "c": ("no\u00a0break",)}
        write_text(tmp_path / "text", texts)
        assert (tmp_path / "text").read_text(encoding="utf-8").startswith("a\nb größe")
        assert read_text(tmp_path / "text") == texts

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a x\nb y\na z\n", "text:3: utterance a is already on line 1"),
            (b"a x\n\nb y\n", "text:2: the line is empty"),
            (b"a \xff\n", "text:1: not UTF-8"),
        ],
    )
    def test_text_errors_name_the_line(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / "text")

    def test_missing_text(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_text(tmp_path / "text")

    def test_trn(self, tmp_path: Path) -> None:
        write_trn(tmp_path / "ref.trn", {"u2": ["x", "y"], "u1": []}, {"u1": "bob", "u2": "eve"})
        assert (tmp_path / "ref.trn").read_text() == "(bob-u1)\nx y (eve-u2)\n"
        write_trn(tmp_path / "ref.trn", {"u2": ["x"]})
        assert (tmp_path / "ref.trn").read_text() == "x (u2)\n"

    def test_per_utt_is_laid_out_as_in_kaldi(self, tmp_path: Path) -> None:
        scored = score(
            {"UTT-A": ["word-A", "word-B", "word-C", "word-D", "word-E"], "UTT-B": []},
            {"UTT-A": ["word-A", "word-A", "word-B", "word-D", "word-X"], "UTT-B": []},
        )
        write_per_utt(tmp_path / "per_utt", scored)
        lines = (tmp_path / "per_utt").read_text().splitlines()
        assert lines[3] == "UTT-A #csid 3 1 1 1"
        assert lines[7] == "UTT-B #csid 0 0 0 0"
        reference, hypothesis, operations = (line.split()[2:] for line in lines[:3])
        assert len(lines[0]) == len(lines[1]) == len(lines[2])
        assert lines[0].startswith("UTT-A ref  word-A  ")
        assert lines[2].startswith("UTT-A op      C     ")
        columns = zip(reference, hypothesis, strict=True)
        pairs = [tuple(None if word == "<eps>" else word for word in column) for column in columns]
        assert [operation(pair) for pair in pairs] == operations
        assert [a for a in reference if a != "<eps>"] == ["word-A", "word-B", "word-C", "word-D", "word-E"]

    def test_per_spk_is_laid_out_as_in_kaldi(self, tmp_path: Path) -> None:
        scored = score({"u": list("abcde")}, {"u": list("aabdx")}, speakers={"u": "A"})
        write_per_spk(tmp_path / "per_spk", scored)
        shares = "60.00      20.00      20.00      20.00      60.00     100.00"
        counts = "3          1          1          1          3          1"
        assert (tmp_path / "per_spk").read_text().splitlines() == [
            "SPEAKER         id       #SENT      #WORD       Corr        Sub        Ins        Del        Err"
            "      S.Err",
            f"A               raw          1          5          {counts}",
            f"A               sys          1          5      {shares}",
            f"SUM             raw          1          5          {counts}",
            f"SUM             sys          1          5      {shares}",
        ]
        with pytest.raises(ValueError, match="knows no speakers"):
            write_per_spk(tmp_path / "per_spk", score({"u": ["a"]}, {"u": ["a"]}))

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        write_text(tmp_path / "text", {"a": ["x"]})
        with pytest.raises(ValueError, match="white space"):
            write_text(tmp_path / "text", {"a b": ["x"]})
        assert os.listdir(tmp_path) == ["text"]
        assert read_text(tmp_path / "text") == {"a": ("x",)}

    @pytest.mark.skipif(shutil.which("sctk") is None, reason="sclite is not installed")
    def test_sclite_reads_it_and_agrees(self, tmp_path: Path) -> None:
        references, hypotheses, speakers = corpus(3)
        write_trn(tmp_path / "ref.trn", references, speakers)
        write_trn(tmp_path / "hyp.trn", hypotheses, speakers)
        command = [
            "sctk",
            "sclite",
            "-r",
            "ref.trn",
            "trn",
            "-h",
            "hyp.trn",
            "trn",
            "-i",
            "spu_id",
            "-o",
            "rsum",
            "stdout",
        ]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        (total,) = (line for line in printed.splitlines() if "Sum" in line)
        sentences, words, *_, errors, wrong = (int(token) for token in total.split() if token.isdigit())
        scored = score(references, hypotheses)
        assert (sentences, words, wrong) == (60, scored.total.words, scored.sentence_errors)
        # sclite charges a substitution 4 and the others 3, so its alignment is not always the one of fewest errors.
        assert scored.total.errors <= errors <= 1.1 * scored.total.errors


class TestPairedBootstrap:
    def pair(self, **errors: float) -> list:
        scores = []
        for seed, error in ((11, errors["first"]), (12, errors["second"])):
            references, hypotheses, speakers = corpus(seed, error=error)
            scores.append(score(references, hypotheses, speakers=speakers))
        return scores

    def test_is_deterministic_and_depends_on_the_seed(self) -> None:
        a, b = self.pair(first=0.3, second=0.25)
        assert paired_bootstrap(a, b, samples=2000, seed=4) == paired_bootstrap(a, b, samples=2000, seed=4)
        assert paired_bootstrap(a, b, samples=2000, seed=4) != paired_bootstrap(a, b, samples=2000, seed=5)

    def test_sees_a_large_improvement(self) -> None:
        a, b = self.pair(first=0.5, second=0.1)
        found = paired_bootstrap(a, b, samples=2000)
        assert found.difference == pytest.approx(b.total.rate - a.total.rate)
        assert found.low < found.difference < found.high < 0
        assert found.probability == 1.0
        assert found.groups == 6
        assert paired_bootstrap(a, b, by="utterance", samples=2000).groups == 60

    def test_turned_round_it_says_the_opposite(self) -> None:
        a, b = self.pair(first=0.3, second=0.28)
        there, back = paired_bootstrap(a, b, samples=2000), paired_bootstrap(b, a, samples=2000)
        assert (there.difference, there.probability) == pytest.approx((-back.difference, 1 - back.probability))
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))

    def test_a_system_does_not_improve_on_itself(self) -> None:
        a, _ = self.pair(first=0.3, second=0.3)
        found = paired_bootstrap(a, a, samples=100)
        assert (found.difference, found.low, found.high, found.probability) == (0, 0, 0, 0.5)

    def test_agrees_with_drawing_speakers_one_by_one(self) -> None:
        a, b = self.pair(first=0.3, second=0.25)
        rng = np.random.default_rng(0)
        names, differences = list(a.per_speaker), []
        for _ in range(4000):
            drawn = rng.choice(names, size=len(names))
            rates = [sum((s.per_speaker[name] for name in drawn), Errors()).rate for s in (a, b)]
            differences.append(rates[1] - rates[0])
        found = paired_bootstrap(a, b, samples=20_000)
        assert found.low == pytest.approx(np.quantile(differences, 0.025), abs=0.5)
        assert found.high == pytest.approx(np.quantile(differences, 0.975), abs=0.5)
        assert found.probability == pytest.approx(np.mean(np.less(differences, 0)), abs=0.03)

    def test_refuses_what_cannot_be_compared(self) -> None:
        a = score({"u": ["x"], "v": ["y"]}, {"u": ["x"], "v": ["y"]}, speakers={"u": "s", "v": "t"})
        other = score({"u": ["q"], "v": ["y"]}, {"u": ["x"], "v": ["y"]}, speakers={"u": "s", "v": "t"})
        fewer = score({"u": ["x"]}, {"u": ["x"]}, speakers={"u": "s"})
        unknown = score({"u": ["x"], "v": ["y"]}, {"u": ["x"], "v": ["y"]})
        silent = score({"u": [], "v": []}, {"u": [], "v": []}, speakers={"u": "s", "v": "t"})
        for first, second, options, message in (
            (a, other, {}, "reference or speaker of u differs"),
            (a, fewer, {}, "v scored by one system only"),
            (fewer, fewer, {}, "1 speaker is not enough"),
            (unknown, unknown, {}, "know no speakers"),
            (silent, silent, {}, "hold no words"),
            (a, a, {"samples": 0}, "samples=0"),
            (a, a, {"confidence": 95}, "confidence=95"),
            (a, a, {"by": "day"}, "by='day'"),
        ):
            with pytest.raises(ValueError, match=message):
                paired_bootstrap(first, second, **options)
