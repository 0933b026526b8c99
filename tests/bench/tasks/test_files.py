from __future__ import annotations

import gzip
import json
from decimal import Decimal

import pytest

from chordal.bench.tasks.files import grade_number, read_workloads, written_function
from chordal.bench.tasks.task import Instance
from chordal.bench.tasks.workload import load_tasks
from chordal.errors import InputError

MATHS = [
    {"question": f"What is {n} times 1000?", "answer": f"It is <<{n}*1000={n}000>>.\n#### {n},000"}
    for n in range(1, 11)
]
CODE = 'import math\n\ndef half(x):\n    return x / 2\n\ndef root(x):\n    """Give the root."""\n'
PROGRAM = {
    "task_id": "x/0",
    "prompt": CODE,
    "entry_point": "root",
    "canonical_solution": "    return math.sqrt(x)\n",
    "test": "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(4) == 2\n",
}
CHATS = [
    {"question_id": 1, "category": "writing", "turns": ["One.", "Two."]},
    {"question_id": 2, "category": "coding", "turns": ["Three.", "Four."], "reference": []},
    {"question_id": 3, "category": "qa", "turns": ["Who?"]},
    {"question_id": 4, "category": "rag", "turns": ["What?"]},
]


@pytest.fixture
def write(tmp_path):
    def write_file(values, name="file.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = "".join(value if isinstance(value, str) else json.dumps(value) + "\n" for value in values)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write_file


def test_maths_is_graded_by_its_number(write):
    [workload] = read_workloads([write(MATHS)])
    assert (workload.name, workload.group, workload.grader) == ("file.jsonl", "maths", "number")
    assert workload.max_new_tokens == 256
    assert workload.prompts[2].startswith("What is 3 times 1000?\n")
    assert workload.grade(2, MATHS[2]["answer"]).strict
    assert not workload.grade(2, MATHS[3]["answer"])


@pytest.mark.parametrize(
    ("text", "right", "strict"),
    [
        ("12 + 6 = 18\n#### 18", True, True),
        ("#### $18.00.", True, True),
        ("#### 18 apples", True, True),
        ("So she makes 18 dollars.", True, False),
        ("The answer is 1,8.", True, False),
        ("#### 18\nNo, wait.\n#### 19", False, False),
        ("#### 19, not 18", False, False),
        ("18 of 20", False, False),
        ("-18", False, False),
        ("#### none", False, False),
        ("18 #### what", True, False),
        ("", False, False),
    ],
)
def test_a_number_is_read_behind_the_mark_or_last(text, right, strict):
    grade = grade_number(Instance("x", "", "", {"result": Decimal(18)}), text)
    assert (grade.right, grade.strict) == (right, strict)


def test_programs_are_run_only_where_that_is_asked_for(write):
    path = write([PROGRAM], "tests.jsonl.gz")
    [workload] = read_workloads([path])
    assert (workload.group, workload.grade, workload.grader) == ("programs", None, None)
    [workload] = read_workloads([path], execute=True)
    assert (workload.grader, workload.max_new_tokens) == ("program", 512)
    assert CODE.rstrip() in workload.prompts[0]
    assert workload.grade(0, PROGRAM["canonical_solution"])
    assert workload.grade(0, "Here:\n```python\ndef root(x):\n    return half(2 * x**0.5)\n```\nDone.")
    assert workload.grade(0, "def root(x): return math.sqrt(x)")
    assert not workload.grade(0, "    return x / 3")
    assert not workload.grade(0, "    exit(0)")
    assert not workload.grade(0, "I cannot do this.")
    assert not workload.grade(0, "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("    return 1", "HEAD\ndef f():\n    return 1"),
        ("```\n    return 1\n```", "HEAD\ndef f():\n    return 1\n"),
        ("def f():\n    return 1", "HEAD\n\ndef f():\n    return 1"),
        ("```py\ndef f(): 1\n```\nor\n```\ndef f(): 2\n```\nas\n```\nf()\n```", "HEAD\n\ndef f(): 2\n"),
        ("```python\ndef f(): cut", "HEAD\n\ndef f(): cut"),
    ],
)
def test_the_function_is_found_in_an_answer(text, found):
    assert written_function(text, "HEAD\ndef f():\n", "f") == found


def test_conversations_are_a_workload_for_each_kind(write):
    path = write(CHATS, "questions.jsonl")
    first = read_workloads([path])
    assert {workload.name: workload.prompts for workload in first} == {
        "questions.jsonl:mt_bench": ["One.", "Three."],
        "questions.jsonl:qa": ["Who?"],
        "questions.jsonl:rag": ["What?"],
    }
    assert {(workload.group, workload.grade, workload.max_new_tokens) for workload in first} == {
        ("conversations", None, 1024)
    }
    assert read_workloads([path], turns="all")[0].prompts == ["One.\n\nTwo.", "Three.\n\nFour."]


def test_plain_prompts_have_no_grader(write):
    chat = [{"role": "user", "content": "Hi"}]
    values = [
        {"prompt": "One.", "id": 1},
        "\n",
        {"messages": chat},
        {"prompt": [5, 6]},
        json.dumps("Two.") + "\n",
    ]
    [workload] = read_workloads([write(values)])
    assert workload.prompts == ["One.", chat, [5, 6], "Two."]
    assert (workload.group, workload.grade, workload.max_new_tokens) == ("data", None, None)


def test_prompts_of_a_file_are_taken_at_even_distances_with_their_graders(write):
    [workload] = read_workloads([write(MATHS)], num_prompts=4, max_new_tokens=9)
    assert [prompt.split()[2] for prompt in workload.prompts] == ["1", "3", "6", "8"]
    assert [bool(workload.grade(index, "6000")) for index in range(4)] == [False, False, True, False]
    assert workload.max_new_tokens == 9
    assert len(read_workloads([write(MATHS)], num_prompts=99)[0].prompts) == 10


def test_files_are_told_apart_by_as_little_of_their_path_as_does(write):
    one, two, three = (write(MATHS, name) for name in ("a/x.jsonl", "b/x.jsonl", "b/y.jsonl"))
    assert [workload.name for workload in read_workloads([one, three])] == ["x.jsonl", "y.jsonl"]
    assert [workload.name for workload in read_workloads([one, two])] == ["a/x.jsonl", "b/x.jsonl"]
    assert [workload.name for workload in read_workloads([one, one])] == ["x.jsonl"]


def test_tasks_and_files_come_together(write):
    workloads = load_tasks(["copy"], 2, data=[write(MATHS)])
    assert [(workload.name, len(workload.prompts)) for workload in workloads] == [
        ("copy", 2),
        ("file.jsonl", 2),
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "holds no prompts"),
        (["\n\n"], "holds no prompts"),
        (["{\n"], "line 1: not JSON"),
        ([MATHS[0], "\n", "nonsense\n"], "line 3: not JSON"),
        ([{"a": 1, "b": 2}], "line 1: no known kind of prompts; its keys are a, b"),
        ([MATHS[0], {"question": "x"}], 'line 2: "answer" must be a text; got null'),
        ([MATHS[0], {"question": "x", "answer": "5"}], 'line 2: "answer" must end with'),
        ([MATHS[0], "5\n"], "line 2: must be an object like the first line; got 5"),
        ([PROGRAM | {"entry_point": "other"}], 'line 1: "prompt" must hold the head of the function other'),
        ([PROGRAM | {"test": None}], 'line 1: "test" must be a text'),
        ([CHATS[0] | {"turns": []}], 'line 1: "turns" must be a list of texts'),
        ([CHATS[0] | {"turns": "x"}], 'line 1: "turns" must be a list; got "x"'),
        ([{"prompt": "x"}, {"prompt": 5}], "line 2: "),
        ([{"input": {"x": 1}, "answer": "y"}], "line 1: no known task of ParallelBench"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(values, said, write):
    path = write(values)
    with pytest.raises(InputError) as error:
        read_workloads([path])
    assert said in str(error.value)
    assert path in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path, write):
    with pytest.raises(InputError, match=r"cannot read .*missing.jsonl: No such file"):
        read_workloads([str(tmp_path / "missing.jsonl")])
    damaged = tmp_path / "x.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"prompt": "x"}\n')[:-10])
    with pytest.raises(InputError, match=r"cannot read .*x.jsonl.gz"):
        read_workloads([str(damaged)])
    damaged.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"cannot read .*x.jsonl.gz"):
        read_workloads([str(damaged)])
