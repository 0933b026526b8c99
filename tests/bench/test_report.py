"""The report of a benchmark: its figures are those of the rows, and any browser shows them."""

from __future__ import annotations

import json
import math
import re

import pytest

from chordal.bench import report
from chordal.bench.results import Folder
from chordal.errors import InputError

HOSTILE = "evil: note=</script><script>window.harmed=1</script><img src=x onerror=window.harmed=2>|`"
PLAIN = "low_confidence"
NUM_PROMPTS = 20

# Of each decoder: promise, prompts of 20 that are right on copy and shuffle, forwards of each prompt's 24
# tokens, and seconds of the three rounds.
DECODERS = {
    PLAIN: ("exact", (20, 18), 24, (3.0, 3.2, 3.4)),
    "draft: length=4": ("exact", (20, 18), 10, (1.5, 1.6, 1.7)),
    "threshold: threshold=0.9": ("approximate", (20, 17), 12, (2.0, 2.0, 2.1)),
    "threshold: threshold=0.5": ("approximate", (19, 4), 6, (1.0, 1.1, 1.2)),
    HOSTILE: ("approximate", (20, 2), 16, (3.5, 3.6, 3.3)),
}
BOUND = {"task": "shuffle", "points": [[1, 1.0], [2, 0.5], [8, 0.1]], "form": "n!/n^n <b>"}


def conditions():
    return {
        "version": 1,
        "command": "chordal bench --out <b>DIR</b>",
        "created": "2026-01-02T03:04:05+00:00",
        "model": "<b>tiny</b>",
        "hardware": {"cpu": "some cpu", "device": "cpu", "memory_gib": 8.0},
        "dtype": "float32",
        "threads": 1,
        "batch_size": 1,
        "repeats": 3,
        "tasks": [
            {"name": name, "group": "lists", "num_prompts": NUM_PROMPTS, "hash": "0f", "grader": "match"}
            for name in ("copy", "shuffle")
        ],
        "decoders": [
            {
                "label": label,
                "decoder": label.partition(":")[0],
                "settings": {"threshold": 0.9},
                "promise": facts[0],
            }
            for label, facts in DECODERS.items()
        ],
    }


def sample(index, *, right, forwards, label, error=None):
    return {
        "index": index,
        "right": right,
        "score": None if right is None else float(right),
        "strict": right,
        "prompt_tokens": 9,
        "tokens": 24,
        "forwards": forwards,
        "draft_forwards": 0,
        "rows": forwards,
        "positions_fed": 30 * forwards,
        "draft_tokens": 40 if label.startswith("draft") else 0,
        "accepted_tokens": 14 if label.startswith("draft") else 0,
        "finish_reason": "stop" if error is None else "error",
        "error": error,
        "text_hash": "same" if right is None or right else f"wrong {label}",
    }


def fill(path, *, num_runs=None, graded=True, bounds=(BOUND,), errors=()):
    """Make a folder as a benchmark leaves it, of all runs or the first few.

    Args:
        errors: Label, task, index and message of samples that failed.
    """
    folder = Folder(path)
    folder.open(conditions())
    runs = [
        {
            "label": label,
            "task": task,
            "round": round_,
            "session": "one",
            "seconds": seconds[round_] / 2,
            "ttft_s": 0.0625 if label == PLAIN else None,
            "num_prompts": NUM_PROMPTS,
            "peak_memory_bytes": None,
            "samples": [
                sample(
                    index,
                    right=(error is None and index < right[number]) if graded else None,
                    forwards=forwards,
                    label=label,
                    error=error,
                )
                for index in range(NUM_PROMPTS)
                for error in [next((text for *at, text in errors if at == [label, task, index]), None)]
            ],
        }
        for round_ in range(3)
        for number, task in enumerate(("copy", "shuffle"))
        for label, (_, right, forwards, seconds) in DECODERS.items()
    ]
    for run in runs[:num_runs]:
        folder.add(run if run["round"] == 0 else run | {"samples": []})
    folder.finish()
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"bounds": list(bounds)}))
    return path


def rows_of(path, task="all"):
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    return {row["label"]: row for row in rows if row["task"] == task}


def data_of(path):
    page = (path / "report.html").read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    errors = [
        (HOSTILE, "shuffle", 3, "DecodingError: <i>logits</i> are not finite"),
        (HOSTILE, "shuffle", 5, "again"),
    ]
    path = fill(tmp_path_factory.mktemp("run") / "dir", errors=errors)
    report.write(path)
    return path


@pytest.fixture
def shown(page, folder):
    """The page of the folder, loaded."""
    page.goto((folder / "report.html").as_uri())
    return page


# ---- The files ----------------------------------------------------------------------------------


def test_the_page_carries_exactly_what_the_files_say(folder):
    data = data_of(folder)
    assert data["conditions"] == json.loads((folder / "conditions.json").read_text())
    assert data["rows"] == [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {name: data[name] for name in ("aup", "bounds")} == json.loads(
        (folder / "summary.json").read_text()
    )


def test_the_page_names_no_other_file_and_no_host(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    urls = set(re.findall(r"\bhttps?://[^\"'\s]+", page))
    assert urls == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<(link|img|iframe|object)\b|@import|url\(", page.replace(HOSTILE, ""))


def test_writing_again_replaces_both_files(folder, tmp_path):
    path = fill(tmp_path / "dir")
    for name in ("report.html", "report.md"):
        (path / name).write_text("old")
    assert report.write(path) == [path / "report.html", path / "report.md"]
    assert "old" not in ((path / "report.html").read_text(), (path / "report.md").read_text())


def test_markdown_has_the_figures_of_every_row(folder):
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    row = rows_of(folder)["threshold: threshold=0.9"]
    expected = [
        "`threshold: threshold=0.9`",
        "approximate",
        f"92.5% ({100 * row['quality']['low']:.1f} to {100 * row['quality']['high']:.1f})",
        f"{100 * row['same_text']:.1f}%",
        "2.00",
        "-",
        f"{row['ratio']['median']:.2f}x ({row['ratio']['low']:.2f} to {row['ratio']['high']:.2f})",
        f"{row['tokens_per_s']:.1f}",
        "-",
        "480",
        "0",
        "14,400",
        "0",
    ]
    assert f"| {' | '.join(expected)} |" in lines
    assert sum(line.startswith("| `threshold: threshold=0.9`") for line in lines) == 3 + 1  # and its settings


def test_markdown_keeps_texts_inside_their_cells(folder):
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    bare = [re.sub(r"\\.|`[^`]*`", "", line) for line in tables]
    widths = {line.count("|") for line in bare}
    assert widths == {14, 7, 6, 4}  # figures, AUP, tasks, settings
    assert not any("<" in line for line in bare)


def test_the_highlights_name_the_fastest_exact_and_the_fastest_without_a_measured_loss(folder):
    exact, approximate = data_of(folder)["highlights"]
    assert (exact["label"], exact["value"]) == ("draft: length=4", "2.00x")
    # The other is faster, and its interval lies below the plain decoder's accuracy.
    assert (approximate["label"], approximate["value"]) == ("threshold: threshold=0.9", "1.60x")
    assert "plain 95.0%" in approximate["text"]


def test_a_decoder_whose_quartiles_reach_1_is_not_called_faster(tmp_path, monkeypatch):
    monkeypatch.setitem(DECODERS, "draft: length=4", ("exact", (20, 18), 10, (3.5, 3.1, 3.4)))
    path = fill(tmp_path / "dir")
    report.write(path)
    assert data_of(path)["highlights"][0]["text"].startswith("Not reliably faster")


def test_a_decoder_that_failed_on_a_prompt_is_not_called_without_loss(tmp_path):
    path = fill(tmp_path / "dir", errors=[("threshold: threshold=0.9", "copy", 0, "broke")])
    report.write(path)
    assert data_of(path)["highlights"][1]["label"] is None


def test_ungraded_decoders_lose_nothing_if_every_text_is_the_same(tmp_path):
    path = fill(tmp_path / "same", graded=False)
    report.write(path)
    assert data_of(path)["highlights"][1]["label"] == "threshold: threshold=0.5"
    assert "100.0% of texts the same" in data_of(path)["highlights"][1]["text"]


def test_failed_samples_and_their_messages_are_listed(folder):
    (failure,) = data_of(folder)["failures"]
    assert (failure["label"], failure["task"], failure["num_errors"]) == (HOSTILE, "shuffle", 2)
    assert failure["messages"][1] == {"index": 5, "error": "again"}
    assert "2 samples failed" in (folder / "report.md").read_text(encoding="utf-8")


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    path = fill(tmp_path / "dir", num_runs=7)
    report.write(path)
    missing = [(run["label"], run["task"]) for run in data_of(path)["missing"]]
    assert missing == [(label, "shuffle") for label in list(DECODERS)[2:]]
    assert "Unfinished: 3 runs" in (path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.jsonl", None, "cannot read .*results.jsonl"),
        ("results.jsonl", "{}\n{", "results.jsonl is damaged"),
        ("summary.json", "{", "summary.json is damaged"),
        ("conditions.json", None, "not the folder of a benchmark"),
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, name, text, message):
    path = fill(tmp_path / "dir")
    (path / name).unlink()
    if text is not None:
        (path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        report.write(path)


def test_a_folder_without_a_summary_has_a_report(tmp_path):
    path = fill(tmp_path / "dir")
    (path / "summary.json").unlink()
    report.write(path)
    assert data_of(path)["aup"] == data_of(path)["bounds"] == []


# ---- The page in a browser ------------------------------------------------------------------------


def column(page, key):
    return page.locator(f"#table tbody td[data-key={key}]").all_inner_texts()


def labels(page, where="#table tbody tr"):
    return [row.get_attribute("data-label") for row in page.locator(where).all()]


@pytest.mark.browser
@pytest.mark.parametrize("task", ["all", "copy", "shuffle"])
def test_the_table_shows_the_figures_of_the_rows(shown, folder, task):
    shown.select_option("#task", task)
    rows = rows_of(folder, task)
    assert sorted(labels(shown)) == sorted(rows)
    mine = [rows[label] for label in labels(shown)]

    def interval(part, digits, scale=1):
        return f"{scale * part['low']:.{digits}f} to {scale * part['high']:.{digits}f}"

    assert column(shown, "accuracy") == [
        f"{100 * row['quality']['value']:.1f}% {interval(row['quality'], 1, 100)}" for row in mine
    ]
    assert column(shown, "ratio") == [
        f"{row['ratio']['median']:.2f}x {interval(row['ratio'], 2)}" for row in mine
    ]
    assert column(shown, "seconds") == [
        f"{row['seconds']['median']:.2f} {interval(row['seconds'], 2)}" for row in mine
    ]
    assert column(shown, "tokens_per_forward") == [f"{row['tokens_per_forward']:.2f}" for row in mine]
    assert column(shown, "tokens_per_s") == [f"{row['tokens_per_s']:.1f}" for row in mine]
    assert column(shown, "positions_fed") == [f"{row['positions_fed']:,}" for row in mine]
    assert column(shown, "ttft_s") == ["62.5 ms" if row["is_baseline"] else "\u2013" for row in mine]
    assert column(shown, "same_text") == [f"{100 * row['same_text']:.1f}%" for row in mine]


@pytest.mark.browser
def test_hostile_texts_are_shown_and_do_nothing(shown):
    assert shown.evaluate("window.harmed") is None
    assert shown.locator("script").count() == 2
    assert shown.locator("main img, main b, main i:not([class]), header b").count() == 0
    assert shown.get_by_role("heading", level=1).inner_text() == "Benchmark of <b>tiny</b>"
    assert shown.locator("#table th[scope=row]", has_text=HOSTILE).count() == 1
    assert "<i>logits</i> are not finite" in shown.locator("#failures").inner_text()


@pytest.mark.browser
def test_a_heading_sorts_and_turns_the_order_round(shown, folder):
    rows = rows_of(folder)
    assert shown.locator("#table th[aria-sort]").inner_text().startswith("ratio")
    fastest_first = sorted(rows, key=lambda label: -rows[label]["ratio"]["median"])
    assert labels(shown) == fastest_first

    heading = shown.locator("#table [data-key=tokens_per_forward]").first
    heading.click()
    fewest_last = sorted(rows, key=lambda label: -rows[label]["tokens_per_forward"])
    assert labels(shown) == fewest_last
    assert shown.locator("#table th[aria-sort=descending]").inner_text().startswith("tokens per")
    shown.keyboard.press("Enter")  # the focus stays on the heading
    assert labels(shown) == fewest_last[::-1]
    assert shown.locator("#table th[aria-sort=ascending]").count() == 1

    shown.locator("#table button[data-key=label]").click()
    assert sorted(labels(shown), key=str.lower) == labels(shown)


@pytest.mark.browser
@pytest.mark.parametrize("presses", [1, 2])
def test_rows_without_a_figure_come_last_in_either_order(shown, presses):
    for _ in range(presses):
        shown.locator("#table button[data-key=acceptance_length]").click()
    assert labels(shown)[0] == "draft: length=4"


@pytest.mark.browser
def test_tables_say_which_cells_head_rows_and_columns(shown):
    for table in shown.locator("table").all():
        assert table.locator("thead th:not([scope=col])").count() == 0
        assert table.locator("tbody tr > :first-child:not(th[scope=row])").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("task", ["all", "shuffle"])
def test_marks_lie_where_their_figures_say(shown, folder, task):
    shown.select_option("#task", task)
    rows, places = rows_of(folder, task), {}
    for point in shown.locator("#plot .point").all():
        transform = point.locator("[transform]").get_attribute("transform")
        places[point.get_attribute("data-label")] = tuple(map(float, re.findall(r"[\d.]+", transform)))
    assert places.keys() == rows.keys()

    def line(first, second):
        slope = (second[1] - first[1]) / (second[0] - first[0])
        return lambda value: first[1] + slope * (value - first[0])

    figures = {
        label: (math.log(row["tokens_per_forward"]), row["quality"]["value"]) for label, row in rows.items()
    }
    one, other = PLAIN, "threshold: threshold=0.5"
    x, y = (
        line((figures[one][axis], places[one][axis]), (figures[other][axis], places[other][axis]))
        for axis in (0, 1)
    )
    assert places[one][0] < places[other][0] and places[one][1] < places[other][1]
    for label, (parallelism, accuracy) in figures.items():
        assert places[label] == pytest.approx((x(parallelism), y(accuracy)), abs=0.2)


@pytest.mark.browser
def test_bars_are_as_long_as_their_ratios_and_accuracy_stands_beside(shown, folder):
    rows = rows_of(folder)
    for bar in shown.locator("#bars li").all():
        row = rows[bar.get_attribute("data-label")]
        track = bar.locator(".track").bounding_box()
        drawn = bar.locator(".bar").bounding_box()["width"] / track["width"]
        whisker = bar.locator(".whisker").bounding_box()
        most = max(row["ratio"]["high"] for row in rows.values())
        assert drawn == pytest.approx(row["ratio"]["median"] / most, abs=0.005)
        left = (whisker["x"] - track["x"]) / track["width"]
        assert left == pytest.approx(row["ratio"]["low"] / most, abs=0.005)
        shares = bar.locator(".figures").inner_text().split()
        assert shares == [f"{row['ratio']['median']:.2f}x", f"{100 * row['quality']['value']:.1f}%"]


@pytest.mark.browser
def test_bounds_are_drawn_beside_the_points_of_their_task_only(shown):
    bound = shown.locator("#plot .bound")
    assert bound.count() == 0
    shown.select_option("#task", "shuffle")
    assert bound.count() == 1
    assert BOUND["form"] in shown.locator("#quality-note").inner_text()
    x, y = (
        [float(number) for number in re.findall(r"[ML]([\d.]+),([\d.]+)", bound.get_attribute("d"))[index]]
        for index in (0, 1)
    )
    plain = shown.locator(f'#plot .point[data-label="{PLAIN}"] [transform]').get_attribute("transform")
    at_one = [float(number) for number in re.findall(r"[\d.]+", plain)]
    assert x[0] == pytest.approx(at_one[0], abs=0.2)  # one token per forward, all right
    assert x[1] < at_one[1] < y[1]  # 100% above its 90%, and half of it below
    assert shown.locator("#multiples .bound").count() == 1


@pytest.mark.browser
def test_pressing_a_small_plot_shows_its_task_everywhere(shown):
    card = shown.locator("#multiples button[data-task=shuffle]")
    card.focus()
    shown.keyboard.press("Enter")
    assert shown.input_value("#task") == "shuffle"
    assert card.get_attribute("aria-pressed") == "true"
    assert "90.0%" in shown.locator('#table tr.baseline [data-key="accuracy"]').inner_text()
    shown.keyboard.press("Enter")
    assert shown.input_value("#task") == "all"


@pytest.mark.browser
def test_the_filter_keeps_what_holds_its_text(shown):
    shown.fill("#filter", "THRESHOLD=0.5")
    for where in ("#table tbody tr", "#bars li", "#plot .point"):
        assert labels(shown, where) == ["threshold: threshold=0.5"]
    shown.fill("#filter", "nothing has this")
    assert shown.locator("#table tbody tr").count() == 0
    assert "Nothing to draw" in shown.locator("#plot").inner_text()


@pytest.mark.browser
def test_keys_walk_the_plot_and_show_the_figures(shown):
    shown.locator("#plot .point").first.focus()
    tip = shown.get_by_role("tooltip")
    assert PLAIN in tip.inner_text() and "1.00" in tip.inner_text()
    shown.keyboard.press("ArrowRight")
    assert HOSTILE in tip.inner_text()
    shown.keyboard.press("End")
    assert "threshold=0.5" in tip.inner_text() and "4.00" in tip.inner_text()
    assert shown.locator("#plot .point[tabindex='0']").count() == 1
    shown.keyboard.press("Escape")
    assert tip.count() == 0  # a hidden tooltip has no role


@pytest.mark.browser
def test_pointing_at_a_mark_shows_its_figures_inside_the_window(shown, folder):
    shown.locator("#plot .point .mark").last.hover()
    tip = shown.get_by_role("tooltip")
    row = rows_of(folder)["threshold: threshold=0.5"]
    assert f"{row['ratio']['median']:.2f}x" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= 1280


@pytest.mark.browser
def test_a_decoder_picked_in_the_legend_stands_out_until_cleared(shown):
    entry = shown.locator("#legend button", has_text="threshold")
    entry.click()
    assert entry.get_attribute("aria-pressed") == "true"
    assert shown.locator("#plot .point:not(.faded)").count() == 2
    shown.get_by_role("button", name="Show all alike").click()
    assert shown.locator(".faded").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("task", ["all", "shuffle"])
def test_the_page_never_scrolls_sideways(shown, width, task):
    shown.set_viewport_size({"width": width, "height": 844})
    shown.select_option("#task", task)
    for details in shown.locator("summary").all():
        details.click()
    shown.wait_for_function("document.querySelector('#plot svg').viewBox.baseVal.width <= innerWidth")
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    # What is wider stands in a region of its own that scrolls and takes the focus.
    assert shown.locator(".scroll:not([tabindex='0'])").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_are_told_from_the_paper_in_both_schemes(shown, scheme):
    shown.emulate_media(color_scheme=scheme)
    colours = shown.evaluate(
        """() => Object.fromEntries(["page", "panel", "wash", "ink", "soft", "accent", "warn",
        "c0", "c1", "c2", "c3", "c4", "c5"].map((name) =>
            [name, getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim()]))"""
    )

    def luminance(name):
        parts = [int(colours[name][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "panel", "wash"):
        assert min(contrast(name, ground) for name in ("ink", "soft", "warn")) >= 4.5
    assert min(contrast(f"c{index}", "page") for index in range(6)) >= 3
    assert (luminance("page") < 0.1) == (scheme == "dark")


@pytest.mark.browser
def test_ungraded_tasks_are_drawn_by_their_agreement_with_plain_decoding(page, tmp_path):
    path = fill(tmp_path / "dir", graded=False, bounds=())
    report.write(path)
    page.goto((path / "report.html").as_uri())
    assert "Same text as plain decoding" in page.locator("#plot").inner_text()
    assert page.locator("#aup-section").is_hidden()
    assert page.locator("#bars .figures").first.inner_text().split()[1:] == ["100.0%", "same"]


@pytest.mark.browser
@pytest.mark.parametrize("num_runs", [0, 1, 7])
def test_an_unfinished_run_is_shown_as_far_as_it_got(page, tmp_path, num_runs):
    path = fill(tmp_path / "dir", num_runs=num_runs, bounds=())
    report.write(path)
    page.goto((path / "report.html").as_uri())
    assert f"Unfinished: {10 - num_runs} of 10 runs" in page.locator("#warnings").inner_text()
    assert page.locator("#table tbody tr").count() == {0: 0, 1: 1, 7: 2}[num_runs]


@pytest.mark.browser
def test_without_scripts_the_page_points_to_the_markdown(browser, folder):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    assert "report.md" in page.locator("body").inner_text()
    context.close()
