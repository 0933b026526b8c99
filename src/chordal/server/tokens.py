"""What a token looks like alone, and OpenAI's objects for the log-probabilities of tokens.

A token's bytes need not be whole characters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from chordal.sequence import TokenLogprob

# What OpenAI writes for a log-probability that JSON has no number for.
_LEAST_LOGPROB = -9999.0
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Shows single tokens of a tokenizer.

    Args:
        tokenizer: A transformers tokenizer; it is only read.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = _steps(json.loads(backend.to_str()).get("decoder")) if backend is not None else []
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
        # What a piece is written with that the text has not, e.g. "\u2581" for a space.
        self._replaced = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ] + [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
        self._has_pieces = backend is not None

    def bytes_of(self, token: int) -> bytes:
        """Give the bytes a token adds to a text; none for an id that is no token."""
        if token in self._added:
            return self._added[token].encode()
        if not self._has_pieces:
            return str(self._tokenizer.decode([token])).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._is_byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        for written, meant in self._replaced:
            piece = piece.replace(written, meant)
        return str(piece).encode()

    def text(self, token: int) -> str:
        r"""Show a token; half a character as OpenAI does, e.g. `bytes:\xf0\x9f`."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass
class Offset:
    """How many characters of a text come before its next token; half a character counts once it is whole.

    Below 0 at the start of a text that lacks the first characters of its first token.
    """

    characters: int = 0
    partial: bytes = b""

    def add(self, raw: bytes) -> int:
        """Add the bytes of a token, and give where it begins."""
        start = self.characters
        whole = (self.partial + raw).decode(errors="replace")
        kept = whole.rstrip("\ufffd")
        # Up to three bytes may still become a character; more are none.
        self.partial = (self.partial + raw)[len(kept.encode()) :] if len(whole) > len(kept) else b""
        if len(self.partial) > 3:
            kept, self.partial = whole, b""
        self.characters += len(kept)
        return max(0, start)


def completion_logprobs(
    texts: TokenTexts, tokens: Seq[int], scores: Seq[TokenLogprob | None], num_top: int, offset: Offset
) -> dict[str, Any]:
    """Write log-probabilities as text completions have them.

    Args:
        texts: Shows tokens.
        tokens: Of the text.
        scores: Of each; None has none, as the first token of a prompt.
        num_top: How many likely tokens each is told with, beside itself.
        offset: Where the first token begins; moves on.
    """
    tops: list[dict[str, float] | None] = []
    for score in scores:
        if score is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        # Of tokens that look the same the likelier one stands, which comes first.
        for token, logprob in (*score.top[:num_top], (score.token, score.logprob)):
            top.setdefault(texts.text(token), _number(logprob))
        tops.append(top)
    return {
        "tokens": [texts.text(token) for token in tokens],
        "token_logprobs": [None if score is None else _number(score.logprob) for score in scores],
        "top_logprobs": tops,
        "text_offset": [offset.add(texts.bytes_of(token)) for token in tokens],
    }


def chat_logprobs(
    texts: TokenTexts, tokens: Seq[int], scores: Seq[TokenLogprob | None], num_top: int
) -> dict[str, Any]:
    """Write log-probabilities as chats have them; arguments as for `completion_logprobs`."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        number = None if logprob is None else _number(logprob)
        return {"token": texts.text(token), "logprob": number, "bytes": list(texts.bytes_of(token))}

    content = [
        {
            **entry(token, None if score is None else score.logprob),
            "top_logprobs": [entry(*one) for one in (score.top[:num_top] if score is not None else ())],
        }
        for token, score in zip(tokens, scores, strict=True)
    ]
    return {"content": content, "refusal": None}


def _number(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB) if math.isfinite(logprob) else _LEAST_LOGPROB


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return (
        [step for one in decoder["decoders"] for step in _steps(one)] if "decoders" in decoder else [decoder]
    )


def _byte_table() -> dict[str, int]:
    """Give the bytes that the characters of byte-level BPE stand for: printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_table()
