from __future__ import annotations

import json
import re

import pytest

from chordal.replay import replay_page
from chordal.trace import Trace, read_trace

NASTY = "</script><script>alert(1)</script><!-- & \u2028\ud800"


def commit(forward, positions, texts, **more):
    tokens = [10 + position for position in positions]
    return {
        "type": "commit",
        "forward": forward,
        "positions": positions,
        "tokens": tokens,
        "texts": texts,
        **more,
    }


def header(**more):
    return {"type": "header", "format": 2, "model": "m", "decoder": "d", "prompt_tokens": [1, 2], **more}


def end(text, pieces, forwards, **more):
    stats = {"forwards": forwards, "committed_tokens": len(pieces), "draft_tokens": 0, "accepted_tokens": 0}
    return {"type": "end", "finish_reason": "length", "text": text, "pieces": pieces, "stats": stats, **more}


# A causal model with a tree whose second branch was kept, and a chain that was rejected.
TREE = [
    header(prompt="a prompt", models={"target": "m", "draft": "small"}),
    commit(1, [2], [" Ana"], confidence=[0.5], forwards={"draft": 0}),
    {
        "type": "draft",
        "forward": 2,
        "forwards": {"draft": 2},
        "positions": [3, 3, 4, 4],
        "tokens": [90, 13, 14, 91],
        "texts": [" no", " Ben", " Cleo", " never"],
        "parents": [-1, -1, 1, 1],
        "kept": [1, 2],
        "confidence": [0.6, 0.3, 0.25, 0.1],
        "num_accepted": 2,
    },
    commit(2, [3, 4, 5], [" Ben", " Cleo", "\n"], confidence=[0.9, None, 0.8], forwards={"draft": 2}),
    {
        "type": "draft",
        "forward": 3,
        "forwards": {"draft": 4},
        "positions": [6],
        "tokens": [92],
        "texts": [" wrong"],
        "kept": [],
        "num_accepted": 0,
    },
    commit(3, [6], [" Dan"], confidence=[0.7], forwards={"draft": 4}),
    end("Ana Ben Cleo\n Dan", ["Ana", " Ben", " Cleo", "\n", " Dan"], 3),
]
# A canvas of five positions: out of order, with guesses, a special token that ends the text and one behind.
CANVAS = [
    header(prompt=[1, 2], special_tokens=[15]),
    commit(1, [4], [" Cleo"], canvas_end=7, confidence=[0.9]),
    {
        "type": "guess",
        "forward": 1,
        "canvas_end": 7,
        "positions": [2, 3],
        "tokens": [70, 71],
        "texts": [" Eve", " Mia"],
    },
    {
        "type": "guess",
        "forward": 2,
        "canvas_end": 7,
        "positions": [3],
        "tokens": [72],
        "texts": [" Lea"],
        "revised": [0],
    },
    commit(3, [6, 3, 2, 5], [" Kim", " Ben", " Ana", "<end>"], canvas_end=7, revised=[1]),
    end("Ana Ben Cleo", ["Ana", " Ben", " Cleo", ""], 3, finish_reason="stop"),
]


@pytest.fixture
def write_page(tmp_path):
    """Write records as a trace and give the file of its page."""

    def write_page(records):
        source, page = tmp_path / "trace.jsonl", tmp_path / "trace.html"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        page.write_text(replay_page(read_trace(source)), encoding="utf-8")
        return page

    return write_page


def test_what_a_trace_holds_is_never_markup():
    trace = Trace(header(model=NASTY, decoder=NASTY, prompt=NASTY), [], None)
    page = replay_page(trace)
    page.encode("utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)<" not in page
    data = re.search(r'id="trace">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["header"]["prompt"] == NASTY


def test_the_page_asks_for_nothing():
    page = replay_page(Trace(header(), [], None)).replace("http://www.w3.org/2000/svg", "")  # only a name
    assert not re.search(r"""(src|href)=|url\(|@import|https?:""", page)


def test_a_template_mark_inside_a_trace_stays_text():
    page = replay_page(Trace(header(prompt="{{trace}} {{title}}"), [], None))
    assert '"{{trace}} {{title}}"' in page


def shown(page):
    """Give the text of the canvas with what stands for tokens that are no text of the result."""
    return page.evaluate(
        "[...document.querySelectorAll('#canvas .tok:not([hidden])')].map(cell => cell.dataset.name ?? "
        "(cell.classList.contains('mask') ? '_' : cell.textContent))"
    )


def counters(page):
    names, values = page.locator("#counters dt"), page.locator("#counters dd")
    return dict(zip(names.all_inner_texts(), values.all_inner_texts(), strict=True))


@pytest.mark.browser
@pytest.mark.parametrize("records", [TREE, CANVAS], ids=["tree", "canvas"])
def test_playing_to_the_end_shows_the_text_of_the_result(page, write_page, records):
    page.goto(write_page(records).as_uri())
    assert page.text_content("#canvas") == ""
    page.select_option("#speed", "30")
    page.click("#play")
    page.wait_for_selector("#last:disabled")
    assert page.text_content("#canvas") == records[-1]["text"]
    assert page.get_attribute("#play", "aria-label") == "Play"
    assert counters(page)["Tokens"] == str(records[-1]["stats"]["committed_tokens"])
    assert f"Ended: {records[-1]['finish_reason']}" in page.text_content("#ending")
    page.click("#play")
    assert page.get_attribute("#play", "aria-label") == "Pause"
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#play", "aria-label") == "Play"


@pytest.mark.browser
def test_each_pass_shows_its_tree_and_stepping_back_undoes_it(page, write_page):
    page.goto(write_page(TREE).as_uri())
    page.keyboard.press("ArrowRight")
    before = page.inner_html("#canvas"), page.inner_html("#counters"), page.inner_html("#draft")
    page.keyboard.press("ArrowRight")
    assert shown(page) == ["Ana", " Ben", " Cleo", "\n"]
    assert page.locator("#draft .kept").all_inner_texts() == ["Ben", "Cleo"]
    assert page.locator("#draft .rejected").all_inner_texts() == ["no", "never"]
    assert page.locator("#draft .root").inner_text() == "Ana"
    struck = page.eval_on_selector("#draft .rejected", "node => getComputedStyle(node).textDecorationLine")
    assert struck == "line-through"
    assert counters(page)["Drafts kept"] == "2 of 4"
    assert counters(page)["draft passes"] == "2"
    page.click("#back")
    assert (page.inner_html("#canvas"), page.inner_html("#counters"), page.inner_html("#draft")) == before


@pytest.mark.browser
def test_the_kept_path_of_a_tree_is_its_first_line(page, write_page):
    page.goto(write_page(TREE).as_uri())
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    boxes = {
        text: page.locator("#draft .node", has_text=text).first.bounding_box()
        for text in ("Ana", "Ben", "Cleo", "never", "no")
    }
    assert (
        boxes["Ana"]["y"] == boxes["Ben"]["y"] == boxes["Cleo"]["y"] < boxes["never"]["y"] < boxes["no"]["y"]
    )
    assert (
        boxes["Ana"]["x"] < boxes["Ben"]["x"] == boxes["no"]["x"] < boxes["Cleo"]["x"] == boxes["never"]["x"]
    )


@pytest.mark.browser
def test_a_canvas_fills_out_of_order_over_guesses_that_change(page, write_page):
    page.goto(write_page(CANVAS).as_uri())
    page.keyboard.press("ArrowRight")
    assert shown(page) == [" Eve", " Mia", " Cleo", "_", "_"]
    page.keyboard.press("ArrowRight")
    assert shown(page) == ["_", " Lea", " Cleo", "_", "_"]
    assert page.locator("#canvas .revised").count() == 1
    page.keyboard.press("End")
    assert shown(page) == ["Ana", " Ben", " Cleo", "<end>", " Kim"]
    page.keyboard.press("Home")
    assert shown(page) == []


@pytest.mark.browser
def test_pointing_at_a_token_tells_its_id_pass_and_confidence(page, write_page):
    page.goto(write_page(TREE).as_uri())
    page.keyboard.press("End")
    page.hover("#canvas .tok:nth-child(2)")
    tip = page.text_content("#tip")
    for part in ('" Ben"', "token 13", "position 3", "forward pass 2", "draft pass 2", "0.900"):
        assert part in tip
    page.keyboard.press("ArrowLeft")
    page.locator("#draft .rejected").first.hover()
    assert "rejected" in page.text_content("#tip")
    assert "drafter's confidence 0.600" in page.text_content("#tip")


@pytest.mark.browser
def test_tokens_of_neighbouring_passes_differ_in_colour_and_confidence_has_its_own(page, write_page):
    page.goto(write_page(TREE).as_uri())
    page.keyboard.press("End")

    def colours():
        return page.eval_on_selector_all(
            "#canvas .tok", "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)"
        )

    first, second, third, _, last = colours()
    assert second == third
    assert len({first, second, last}) == 3
    page.select_option("#colour", "confidence")
    first, second, unknown, *_ = colours()
    assert len({first, second, unknown}) == 3
    assert unknown == "rgba(0, 0, 0, 0)"


@pytest.mark.browser
def test_scrubbing_and_the_timeline_jump(page, write_page):
    page.goto(write_page(TREE).as_uri())
    page.fill("#scrub", "2")
    assert shown(page) == ["Ana", " Ben", " Cleo", "\n"]
    box = page.locator("#timeline").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.05, box["y"] + 5)
    assert shown(page) == ["Ana"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("records", [TREE, CANVAS], ids=["tree", "canvas"])
def test_a_phone_shows_it_without_scrolling_sideways(page, write_page, records, scheme):
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    page.goto(write_page(records).as_uri())
    page.keyboard.press("End")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sides = page.locator("#controls button").all()
    assert all(side.bounding_box()["height"] >= 40 for side in sides)


@pytest.mark.browser
def test_a_hostile_trace_is_shown_as_it_is(page, write_page):
    text = NASTY[:-1]
    page.goto(write_page([header(decoder=text, prompt=text), commit(1, [2], [text])]).as_uri())
    page.keyboard.press("End")
    assert text in page.text_content("#canvas")
    assert text in page.text_content("#title")
    assert "cut short" in page.text_content("#ending")


@pytest.mark.browser
def test_a_trace_without_any_event_has_a_page(page, write_page):
    page.goto(write_page([header()]).as_uri())
    page.click("#play")
    assert page.is_disabled("#next")
