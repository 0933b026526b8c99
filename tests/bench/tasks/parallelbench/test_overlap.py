from __future__ import annotations

import math

import pytest

from chordal.bench.tasks.parallelbench.overlap import bleu, rouge_l, words


def test_words_are_lower_case_without_punctuation():
    assert words("Don't stop: it's 5 o'clock, \u201cJos\u00e9\u201d!") == [
        *("don't", "stop", "it's", "5", "o'clock", "jos\u00e9"),
    ]
    assert words(" ... ") == []


def test_rouge_l_of_worked_examples():
    assert rouge_l("The cat sat.", "the big cat sat down") == pytest.approx(0.75)
    # The longest common subsequence of these is "police the gunman" or the like: 2 of 4 and 4.
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)


def test_bleu_of_a_worked_example():
    # Of 6, 5, 4, 3 runs are shared 5, 3, 2, 1; one word shorter than the reference.
    text, reference = "the cat sat on the rug", "the cat sat on the red mat"
    mean = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu(text, reference) == pytest.approx(math.exp(1 - 7 / 6) * mean)


def test_repeating_a_word_of_the_reference_does_not_count_twice():
    assert bleu("the the the", "the cat", max_n=1) == pytest.approx(1 / 3)


@pytest.mark.parametrize("measure", [rouge_l, bleu])
def test_same_words_overlap_fully_and_other_words_not_at_all(measure):
    text = "One two three four five."
    assert measure(text, text) == 1
    assert measure(text.upper(), text) == 1
    assert measure("six seven eight nine ten", text) == 0
    assert measure("", text) == measure(text, "") == 0


def test_order_counts():
    assert rouge_l("a b c d", "d c b a") == pytest.approx(0.25)
    assert bleu("a b c d", "d c b a") == 0
