from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import chordal
from chordal.registry import decoder_names


def python(code):
    """Run a line in a new interpreter and give what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def heavy_after(code):
    """Which of the packages that take long to import a line brings in."""
    return python(f"{code}\nimport sys\nprint(*sorted({{'torch', 'transformers'}} & set(sys.modules)))")


@pytest.mark.parametrize("name", chordal.__all__)
def test_every_public_name_is_there_and_documented(name):
    public = getattr(chordal, name)
    assert public.__name__ == name
    assert inspect.getdoc(public)
    assert public.__module__ == chordal._PUBLIC[name]


def test_public_names_are_sorted_and_the_same_for_type_checkers():
    assert list(chordal.__all__) == sorted(set(chordal.__all__))
    tree = ast.parse(inspect.getsource(chordal))
    imported = {
        name.asname: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for name in node.names
    }
    assert imported == chordal._PUBLIC


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'chordal' has no attribute 'nothing'"):
        chordal.nothing  # noqa: B018


def test_importing_chordal_or_naming_its_decoders_imports_no_torch():
    assert heavy_after("import chordal") == ""
    assert heavy_after("from chordal.registry import decoder_names; decoder_names()") == ""
    assert heavy_after("import chordal; chordal.bundled_models()") == ""


def test_the_example_of_the_package_uses_what_exists():
    calls = [
        node
        for node in ast.walk(ast.parse("\n".join(chordal.__doc__.splitlines()[2:])))
        if isinstance(node, ast.Call)
    ]
    called = {ast.unparse(call.func) for call in calls}
    assert called == {"chordal.load", "model.generate"}
    keywords = {keyword.arg: keyword.value.value for call in calls for keyword in call.keywords}
    assert keywords.pop("decoder") in decoder_names()
    assert set(keywords) <= set(chordal.Request.__dataclass_fields__)
