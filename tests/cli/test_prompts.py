from __future__ import annotations

import io

import pytest

from chordal.cli.prompts import count_prompts, open_prompts, read_prompts
from chordal.errors import InputError, PromptError


def read(*lines):
    return list(read_prompts(io.BytesIO(b"\n".join(lines))))


def test_prompt_may_be_text_ids_or_messages():
    chat = b'{"messages": [{"role": "user", "content": "c"}]}'
    prompts = [line.prompt for line in read(b'"a"', b'{"prompt": "b"}', b'{"prompt": [3, 4]}', chat)]
    assert prompts == ["a", "b", [3, 4], [{"role": "user", "content": "c"}]]


def test_other_keys_are_kept():
    [line] = read(b'{"id": 7, "prompt": "a", "tags": ["x"]}')
    assert line.extra == {"id": 7, "tags": ["x"]}


def test_blank_lines_are_skipped_and_counted_as_lines():
    assert [line.number for line in read(b'"a"', b"", b"  ", b'"b"')] == [1, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "a", "id": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "UTF-8"),
        (b"5", "must be an object"),
        (b'{"text": "a"}', 'needs "prompt" or "messages"'),
        (b'{"prompt": "a", "messages": []}', "not both"),
        (b'{"prompt": 5}', "must be text or a list of token ids"),
        (b'{"prompt": [true]}', "must be text or a list of token ids"),
        (b'{"messages": []}', '"role" and "content"'),
        (b'{"messages": [{"role": "user"}]}', '"role" and "content"'),
        (b'{"messages": "a"}', '"role" and "content"'),
    ],
)
def test_bad_line_carries_its_error_and_the_others_are_read(line, message):
    before, bad, after = read(b'"a"', line, b'"b"')
    assert (before.prompt, after.prompt) == ("a", "b")
    assert isinstance(bad.error, PromptError)
    assert message in str(bad.error)
    assert (bad.number, bad.prompt) == (2, None)


def test_counting_goes_back_to_the_start():
    file = io.BytesIO(b'"a"\n\n"b"')
    assert count_prompts(file) == 2
    assert len(list(read_prompts(file))) == 2


def test_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="cannot read"), open_prompts(str(path)) as file:
            file.read()
