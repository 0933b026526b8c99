from __future__ import annotations

import json

import pytest

from chordal.bench.results import Folder, results, summary
from chordal.bench.theory import bound
from chordal.errors import InputError


def sample(**more):
    return {
        "index": 0, "right": None, "score": None, "strict": None, "prompt_tokens": 5, "tokens": 8,
        "forwards": 4, "draft_forwards": 1, "rows": 4, "positions_fed": 12, "draft_tokens": 6,
        "accepted_tokens": 4, "finish_reason": "length", "error": None, "text_hash": "a", **more,
    }  # fmt: skip


def run(label, task="t", round_=0, session=0, seconds=1.0, **more):
    record = {
        "label": label, "task": task, "round": round_, "session": session, "num_prompts": 1,
        "seconds": seconds, "ttft_s": 0.5, "peak_memory_bytes": 10, **more,
    }  # fmt: skip
    return record | ({} if round_ else {"samples": more.get("samples", [sample()])})


def conditions(*tasks, labels=("plain", "x"), repeats=1, decoders=None):
    return {
        "version": 1,
        "repeats": repeats,
        "tasks": [{"name": task, "group": "g", "num_prompts": 1, "hash": task} for task in tasks],
        "decoders": decoders
        or [{"label": label, "decoder": label, "settings": {"k": 1}, "promise": "exact"} for label in labels],
    }


def graded(right):
    return [sample(right=right, score=float(right), strict=right)]


def test_tokens_of_a_failed_prompt_do_not_count_and_its_time_does():
    failed = sample(error="DecodingError: x", text_hash=None, right=False, score=0.0, strict=False)
    fine = sample(right=True, score=1.0, strict=False)
    rows = results(conditions("t"), [run("plain", samples=[fine, fine]), run("x", samples=[fine, failed])])
    row = rows[-1]
    assert (row["num_errors"], row["num_prompts"], row["tokens"], row["forwards"]) == (1, 2, 8, 4)
    assert row["tokens_per_s"] == 8.0
    assert row["same_text"] == 0.5
    assert (row["quality"]["value"], row["quality"]["strict"], row["quality"]["score"]) == (0.5, 0.0, 0.5)


def test_totals_are_divided_never_ratios_averaged():
    rows = results(
        conditions("t"),
        [run("plain"), run("x", samples=[sample(tokens=10, forwards=1), sample(tokens=2, forwards=3)])],
    )
    assert rows[-1]["tokens_per_forward"] == 3.0


def test_quartiles_of_the_rounds_are_the_spread():
    runs = [run("plain", round_=n, seconds=4.0) for n in range(4)]
    runs += [run("x", round_=n, seconds=seconds) for n, seconds in enumerate([1.0, 2.0, 4.0, 2.0])]
    row = results(conditions("t", repeats=4), runs)[-1]
    assert row["seconds"] == {"median": 2.0, "low": 1.75, "high": 2.5, "rounds": [1.0, 2.0, 4.0, 2.0]}
    assert row["ratio"]["rounds"] == [4.0, 2.0, 1.0, 2.0]


def test_what_is_not_done_has_no_row_and_no_row_over_all():
    runs = [run("plain", "one"), run("x", "one"), run("plain", "two")]
    rows = results(conditions("one", "two"), runs)
    assert [(row["label"], row["task"]) for row in rows] == [
        ("plain", "all"), ("plain", "one"), ("plain", "two"), ("x", "one"),
    ]  # fmt: skip


def test_a_run_without_its_plain_partner_has_no_ratio():
    runs = [run("plain", session=0), run("x", session=1)]
    assert results(conditions("t"), runs)[-1]["ratio"] is None


def test_aup_is_of_a_decoder_over_its_settings():
    decoders = [
        {"label": label, "decoder": label[0], "settings": {}, "promise": "exact"}
        for label in ("p", "x1", "x2")
    ]
    four = [*graded(True) * 3, *graded(False)]
    runs = [
        run("p", samples=graded(True) * 4),
        run("x1", samples=four),
        run("x2", samples=[{**one, "forwards": 2} for one in four]),
    ]
    areas = summary(results(conditions("t", decoders=decoders), runs))["aup"]
    [area] = [area for area in areas if (area["decoder"], area["task"]) == ("x", "t")]
    assert area["points"] == [(2.0, 75.0), (4.0, 75.0)]
    assert area["ymax"] == 100.0
    # 2 * 75 + 2 * 75 * exp(-3 * 0.25), the best of those compared being 100 as well.
    assert area["aup"] == pytest.approx(150 + 150 * 0.4723666)
    assert area["aup_published"] == area["aup"]


def test_published_aup_is_relative_to_the_best_that_was_compared():
    runs = [
        run("plain", samples=graded(True) + graded(False)),
        run("x", samples=graded(True) + graded(False)),
    ]
    [area, *_] = summary(results(conditions("t"), runs))["aup"]
    assert area["ymax"] == 50.0


def test_ungraded_tasks_have_no_aup():
    assert summary(results(conditions("t"), [run("plain"), run("x")]))["aup"] == []


def test_limits_from_theory_are_those_of_answers_as_long_as_the_plain_ones():
    runs = [run(label, "shuffle", samples=graded(True)) for label in ("plain", "x")]
    [limit] = summary(results(conditions("shuffle"), runs))["bounds"]
    known = bound("shuffle", 8.0)
    assert (limit["task"], limit["form"]) == ("shuffle", known.form)
    assert limit["points"] == list(known.points)


def test_files_say_what_was_computed(tmp_path):
    folder = Folder(tmp_path / "run")
    folder.open(conditions("t"))
    for label in ("plain", "x"):
        folder.add(run(label))
    folder.finish()
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(folder.results()))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"aup": [], "bounds": []}
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = Folder(tmp_path / "run")
    folder.open(conditions("t"))
    (tmp_path / "run" / "runs.jsonl").write_text('{"a": 1}\n{"a":\n{"a": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        folder.runs()


@pytest.mark.parametrize(
    ("text", "words"), [("{", "damaged"), ('{"version": 99}', "must be of version 1; it is of 99")]
)
def test_conditions_that_cannot_be_read_are_refused(tmp_path, text, words):
    (tmp_path / "conditions.json").write_text(text)
    with pytest.raises(InputError, match=words):
        Folder(tmp_path).conditions()
