from __future__ import annotations

import json

import pytest

from chordal.bench.tasks.parallelbench.published import read
from chordal.bench.tasks.parallelbench.waiting_line import FREE, OPERATIONS, Case, read_list, render
from chordal.bench.tasks.rows import Row
from chordal.errors import InputError

A, B, C, D = "Ann Young", "Bob Reed", "Cat Adams", "Dan Moss"
E, F, G = "Eve West", "Flo King", "Gus Bell"


def line(operation, items, *, name=None, index=None, answer=None):
    """A line of a published file, without its worked examples."""
    case = Case(operation, items, name, index)
    if answer is None:
        answer = sorted(items) if operation == "sort" else case.apply()
    given = {"context": render(items)} | ({"word": name} if name else {})
    given |= {} if index is None else {"index": index}
    free = {"input": items, "example": render(answer)}
    return {"input": given, "answer": free if operation in FREE else render(answer), "metadata": {}}


def lines(operation, **more):
    """Two lines with a worked example each; neither list is in order, by first or by last name."""
    tests = [line(operation, [A, C, B], **more), line(operation, [B, A, C, D], **more)]
    for test in tests:
        test["input"]["icl_examples"] = [line(operation, [F, E, G], **more)]
    return tests


def make(operation):
    named = {"name": "New One"} if operation.startswith(("insert", "replace")) else {}
    if operation == "shuffle":
        shuffled = [line(operation, items, answer=items[::-1]) for items in ([A, C, B], [B, A, C, D])]
        shuffled[0]["input"]["icl_examples"] = [line(operation, [F, E, G], answer=[G, E, F])]
        return shuffled
    if operation in FREE:
        case = Case(operation, [A, C, B], **named)
        return [line(operation, [A, C, B], answer=case.apply(at), **named) for at in (0, 1, 2)]
    return lines(operation, **named, **({"index": 1} if operation.endswith("_index") else {}))


def rows(values):
    return [Row("file", number, json.loads(json.dumps(value))) for number, value in enumerate(values, 1)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_operation_is_found_from_the_answers(operation):
    workload = read(rows(make(operation)), "name")
    assert (workload.name, workload.group, workload.grader) == ("name", "parallelbench", "line")
    assert workload.max_new_tokens == 32
    for index, value in enumerate(make(operation)):
        items = read_list(value["input"]["context"])
        case = Case(operation, items, value["input"].get("word"), value["input"].get("index"))
        request = workload.prompts[index]
        asked = request if isinstance(request, str) else request[-1]["content"]
        assert asked == case.prompt
        if operation in FREE:
            assert workload.grade(index, value["answer"]["example"])
        elif operation != "sort":
            assert workload.grade(index, value["answer"])
        assert not workload.grade(index, render(["X Y"]))


def test_worked_examples_become_turns_in_our_wording():
    request = read(rows(lines("reverse")), "name").prompts[0]
    assert [message["role"] for message in request] == ["user", "assistant", "user"]
    assert request[0]["content"] == Case("reverse", [F, E, G]).prompt
    assert request[1]["content"] == render([G, E, F])


def test_sort_goes_by_last_name_whatever_the_published_answer():
    workload = read(rows(lines("sort")), "name")
    assert workload.grade(0, render([C, B, A]))
    assert not workload.grade(0, render([A, B, C]))
    assert workload.prompts[0][1]["content"] == render([G, F, E])


def test_long_lines_have_their_own_group_and_canvas():
    people = [f"Ann {chr(65 + at)}x" for at in range(15)]
    workload = read(rows([line("reverse", people)]), "name")
    assert (workload.group, workload.max_new_tokens) == ("parallelbench_n15", 128)


def test_a_line_of_another_operation_is_named():
    values = [*lines("reverse"), line("copy", [A, C, B])]
    with pytest.raises(InputError, match=r"file, line 3: .*result of reverse"):
        read(rows(values), "name")
    values = [*lines("reverse"), lines("reverse")[0]]
    values[2]["input"]["icl_examples"] = [line("copy", [F, E, G])]
    with pytest.raises(InputError, match=r"file, line 3: .*worked examples"):
        read(rows(values), "name")


LATIN = {
    "input": {"size": 4, "symbols": "[A, B, C, 7]"},
    "answer": {"symbols": ["A", "B", "C", "7"], "example": "A,B,C,7\nB,A,7,C\nC,7,A,B\n7,C,B,A"},
}
SUDOKU = {"input": {"sudoku": "0234\n3412\n2143\n4320"}, "answer": "1234\n3412\n2143\n4321"}
WORDS = {"input": {"words": "dog and cat"}, "answer": {"words": ["dog", "cat"]}}
SUMMARY = {
    "input": {"text": "Ann: Hi Bob!\nBob: Hi Ann!"},
    "answer": {"text": "", "summary": "Ann greets Bob."},
}
PARAPHRASE = {"input": {"text": "Is it late for Ann?"}, "answer": {"text": "", "examples": "[]"}}


@pytest.mark.parametrize(
    ("value", "grader", "right", "wrong"),
    [
        (LATIN, "latin", "B,A,7,C\nA,B,C,7\nC,7,A,B\n7,C,B,A", "A,B,C,7"),
        (SUDOKU, "sudoku", "1234\n3412\n2143\n4321", "0234\n3412\n2143\n4320"),
        (WORDS, "words", "A dog saw a cat.", "A dog saw it."),
        (SUMMARY, "summary", "Ann and Bob say hi.", "ann and bob say hi"),
        (PARAPHRASE, "paraphrase", "Is Ann out of time?", "Is it late for Ann?"),
    ],
)
def test_other_tasks_are_found_by_their_keys(value, grader, right, wrong):
    workload = read(rows([value]), "name")
    assert (workload.group, workload.grader, workload.max_new_tokens) == ("parallelbench", grader, 64)
    assert workload.grade(0, right)
    assert not workload.grade(0, wrong)


@pytest.mark.parametrize("value", [LATIN, SUDOKU])
def test_worked_examples_of_puzzles_become_turns(value):
    value = value | {"input": value["input"] | {"icl_examples": [value]}}
    [request] = read(rows([value]), "name").prompts
    assert request[0] == {"role": "user", "content": request[2]["content"]}
    assert len(request[1]["content"].splitlines()) == 4


def broken(value, **changes):
    return value | changes


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"input": {"what": 1}, "answer": ""}, "no known task of ParallelBench; it has what"),
        ({"input": 3, "answer": ""}, '"input" must be an object; got 3'),
        (broken(LATIN, answer={"symbols": ["A"]}), "answer.example"),
        (
            broken(LATIN, answer=LATIN["answer"] | {"example": "A,B\nB,A"}),
            "must be a Latin square of A, B, C, 7",
        ),
        (broken(SUDOKU, answer="1234"), "must be the only solution; the grid has 1"),
        (broken(SUDOKU, input={"sudoku": "0" * 16}), "the grid has 288"),
        (broken(SUDOKU, input={"sudoku": "1234" * 5}), "4x4 grid"),
        (broken(WORDS, answer={"words": []}), "list of words"),
        (broken(SUMMARY, answer={"summary": 5}), '"answer.summary" must be a text; got 5'),
        (broken(line("copy", [A, B]), input={"context": 5}), "must hold texts"),
        (broken(line("copy", [A, B]), input={"context": "[]", "icl_examples": 5}), "list of objects"),
        (line("copy", [A, B], answer=[C]), "result of a known operation"),
    ],
)
def test_a_bad_line_is_named_with_what_it_must_hold(value, said):
    with pytest.raises(InputError, match="file, line 1: ") as error:
        read(rows([value]), "name")
    assert said in str(error.value)
