from __future__ import annotations

import itertools

import pytest

from chordal.bench.tasks import Instance
from chordal.bench.tasks.parallelbench.overlap import rouge_l
from chordal.bench.tasks.parallelbench.writing import (
    EASY,
    HARD,
    MEDIUM,
    TASKS,
    anchors,
    grade_paraphrase,
    grade_summary,
    grade_words,
    is_well_formed,
    sentence_prompt,
)

BY_NAME = {task.name: task for task in TASKS}


def take(name, count=100):
    return [*itertools.islice(BY_NAME[name].instances(0), count)]


def test_word_lists_are_free_of_repeats_and_of_each_other():
    for listed in (*EASY, MEDIUM, HARD):
        assert len(set(listed)) == len(listed)
    assert not {*MEDIUM} & {*HARD}


@pytest.mark.parametrize("level", ["easy", "medium", "hard"])
def test_four_different_words_are_asked_for(level):
    for instance in take(f"pb_words_{level}"):
        given = instance.facts["words"]
        assert len(set(given)) == 4
        assert all(word in instance.prompt for word in given)
        assert instance.request == instance.prompt


def test_request_for_one_two_and_more_words():
    assert sentence_prompt(["dog"]).endswith("uses the word dog.")
    assert sentence_prompt(["dog", "cat"]).endswith("uses the words dog and cat.")
    assert sentence_prompt(["dog", "cat", "cow"]).endswith("uses the words dog, cat and cow.")


@pytest.mark.parametrize(
    "text",
    [
        "The dog ran.",
        "  Is it 3.5 km, or 4?  ",
        "\u201cStop!\u201d he said (twice).",
        '"Go," she said, "now."',
        "Wait... what happened at 10:30?",
        "She had had enough.",
        "3 people came.",
        "He was late; they weren't.",
        "\u00c9mile sings!",
    ],
)
def test_good_english_is_well_formed(text):
    assert is_well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the dog ran.",
        "The dog ran",
        "The the dog ran.",
        "The dog ran ran.",
        "The dog , ran.",
        "The dog ran .",
        "The dog,, ran.",
        "The dog ran..",
        "The dog,ran.",
        "The (dog ran.",
        'The "dog ran.',
        "The dog<|mdm_mask|> ran.",
        "The [MASK] ran.",
        "The dog\ufffd ran.",
    ],
)
def test_marks_of_broken_english_are_seen(text):
    assert not is_well_formed(text)


@pytest.mark.parametrize(
    ("text", "right", "strict"),
    [
        ("The sun shone on the beach.", True, True),
        ("Sunny days and beaches: the sun on a beach.", True, True),
        ("It is sunny at the beaches.", True, False),
        ("The sun shone\non the beach.", True, False),
        ("Sun and Beach.", False, False),
        ("The sun shone.", False, False),
        ("the sun shone on the beach", False, False),
        ("", False, False),
    ],
)
def test_sentence_needs_every_word_and_form(text, right, strict):
    grade = grade_words(Instance("test", "", "", {"words": ("sun", "beach")}), text)
    assert (grade.right, grade.strict) == (right, strict)


def test_reference_summary_is_right_and_says_everything():
    for instance in take("pb_summary"):
        grade = grade_summary(instance, instance.answer)
        assert (grade.right, grade.score, grade.strict) == (True, 1.0, True)
        said = instance.prompt.lower()
        assert all(key.lower() in said for key in instance.facts["keys"])


def test_summary_is_shorter_well_formed_and_scored_by_overlap():
    facts = {"text": "Ann: Lunch on Friday?\nBob: Yes, at the harbor!", "keys": ("Ann", "Bob", "Friday")}
    instance = Instance("test", "", "Ann and Bob have lunch on Friday.", facts)
    full = grade_summary(instance, "Ann and Bob eat on Friday.")
    assert (full.right, full.strict) == (True, True)
    assert full.score == rouge_l("Ann and Bob eat on Friday.", instance.answer) < 1
    vague = grade_summary(instance, "Two people have lunch soon.")
    assert (vague.right, vague.strict) == (True, False)
    for wrong in (facts["text"], "ann and bob eat on Friday", "Sure!", "", "A" + " b c" * 20 + "."):
        assert grade_summary(instance, wrong) == grade_summary(instance, "")
        assert grade_summary(instance, wrong).score == 0


def test_sentences_to_paraphrase_are_well_formed_and_no_paraphrase_of_themselves():
    for instance in take("pb_paraphrase"):
        sentence = instance.facts["text"]
        assert is_well_formed(sentence)
        assert len(anchors(sentence)) >= 2
        assert not grade_paraphrase(instance, sentence)


def test_anchors_are_names_and_numbers_but_not_the_first_word():
    assert anchors("Because Ann was 12 minutes late, Bob left on Friday.") == {"ann", "12", "bob", "friday"}
    assert anchors("If so, I will.") == set()


SENTENCE = Instance("test", "", "", {"text": "Because the bus was late, Ann could not meet Bob on Friday."})


@pytest.mark.parametrize(
    ("text", "right", "strict"),
    [
        ("Ann missed Bob on Friday, since her bus did not come in time.", True, True),
        ("Ann missed Bob on Friday.\nHer bus did not come in time.", True, False),
        ("because the bus was late, ann could not meet bob on friday!", False, False),
        ("Because the bus was LATE, Ann could not meet Bob on Friday!", False, False),
        ("She missed him on Friday, since her bus did not come in time.", False, False),
        ("Ann, Bob, Friday.", False, False),
        ("Ann missed Bob on Friday" + ", and so it went" * 6 + ".", False, False),
        ("", False, False),
    ],
)
def test_paraphrase_keeps_the_names_and_changes_the_words(text, right, strict):
    grade = grade_paraphrase(SENTENCE, text)
    assert (grade.right, grade.strict) == (right, strict)
    assert grade.score > 0 if right else grade.score == 0


def test_closer_paraphrase_scores_less():
    far = grade_paraphrase(SENTENCE, "Ann missed Bob on Friday, since her bus did not come in time.")
    near = grade_paraphrase(SENTENCE, "Because the bus was late, Ann could not see Bob on Friday.")
    assert 0 < near.score < far.score <= 1
