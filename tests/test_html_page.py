"""Pages of one file: what is filled in stays what it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from chordal.html_page import make_page

TEMPLATE = """<title>{{title}}</title><meta content="{{policy}}"><style>{{style}}</style>
<script type="application/json">{{data}}</script><script>{{script}}</script>"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "some_pages"
    folder.mkdir()
    for name, text in (
        ("__init__.py", ""),
        ("a.html", TEMPLATE),
        ("a.css", "p{}"),
        ("a.js", "let x = `${1}`;"),
    ):
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return "some_pages"


def data_of(page):
    return re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)</script>", "<!-- <script>", "&lt;", "{{script}}", "\u2028", '"\\']
)
def test_any_text_comes_back_from_the_data_and_ends_no_element(package, text):
    page = make_page(package, "a", title="t", data={text: [text]})
    assert json.loads(data_of(page)) == {text: [text]}
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page


def test_a_title_is_text_and_no_mark(package):
    page = make_page(package, "a", title="</title>{{data}}", data=1)
    assert "<title>&lt;/title&gt;{{data}}</title>" in page


def test_numbers_that_are_not_finite_become_text(package):
    assert json.loads(data_of(make_page(package, "a", title="t", data=[float("nan")]))) == ["nan"]


def test_the_policy_allows_the_script_of_the_page_and_nothing_else(package):
    page = make_page(package, "a", title="t", data=1)
    policy = re.search(r'content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none';")
    # As a browser takes it: of everything between the tags.
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_a_page_may_ask_its_own_server_and_no_other(package):
    [asking, not_asking] = [
        re.search(r'content="(.*?)"', make_page(package, "a", title="t", data=1, asks_server=asks))[1]
        for asks in (True, False)
    ]
    assert "connect-src 'self';" in asking
    assert "connect-src" not in not_asking


def test_all_pages_begin_with_the_same_style_and_script(package):
    page = make_page(package, "a", title="t", data=1)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "--accent:" in style
    assert style.endswith("p{}")
    assert "const el = " in re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
