"""Structured output: what a text must keep to while it is decoded, compiled by llguidance."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from chordal.errors import DecodingError, InputError
from chordal.forward import Bools, Ints
from chordal.ops.sampling import Constraint

if TYPE_CHECKING:
    from chordal.generation import Model

MAX_SCHEMA_BYTES = 64 * 1024
_COMPILE_TIMEOUT_S = 10.0
_MAX_HELD = 16  # texts whose matchers are kept, of one grammar
_NEAR = 32  # tokens a matcher goes back before another is made: more than drafts do, less than texts differ

# One line break and an indentation, or two blanks: without an end to them, small models write nothing else.
_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"\r?\n( {0,32}|\t{0,16})| {1,2}|\t",
    "lenient": False,
}
_LIMITS = {"verbose_errors": False, "max_grammar_size": 200_000, "max_lexer_states": 50_000}

# Runs in a process of its own. Overlapping patterns take time and memory without bound, which no limit of
# the compiler ends; the parent ends the time, the system the memory where it can.
_CHECK = """
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
except (ImportError, ValueError, OSError):
    pass
from llguidance import LLMatcher, LLParserLimits
grammar, limits = json.load(sys.stdin)
print(json.dumps(LLMatcher.validate_grammar(grammar, limits=LLParserLimits(**limits))))
"""


def json_object(model: Model) -> Constraint:
    """Allow any JSON object and nothing around it.

    Args:
        model: Whose tokens it is for.

    Raises:
        InputError: llguidance is not installed, or cannot read the model's tokenizer.
    """
    return _compile(_json_grammar({"type": "object"}), model)


def json_schema(schema: Mapping[str, Any], model: Model) -> Constraint:
    """Allow JSON that satisfies a schema and nothing around it, properties in the order of the schema.

    It takes some tens of milliseconds, seconds at most. References to other documents are never followed.

    Args:
        schema: JSON schema, at most 64 KiB as JSON, of keywords that llguidance can enforce.
        model: Whose tokens it is for.

    Raises:
        InputError: The schema is not one, uses a keyword that cannot be enforced, refers to another
            document, is satisfied by nothing, or is too large or too complex; or as for `json_object`.
    """
    if not isinstance(schema, Mapping):
        raise InputError(f"a JSON schema must be an object; got {type(schema).__name__}.")
    grammar = _json_grammar(schema)
    _check(grammar)
    return _compile(grammar, model)


@dataclass(eq=False)
class _Matcher:
    """What llguidance knows of one text.

    Attributes:
        state: Its matcher, which has consumed the tokens.
        tokens: The tokens, int `[n]`.
    """

    state: Any
    tokens: Ints


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens as llguidance reads them.

    Attributes:
        tokenizer: Its tokenizer.
        special: Ids that have no text of their own, int `[s]`.
    """

    tokenizer: Any
    special: Ints


class _Grammar:
    """A grammar for the tokens of one model, as the constraint of any number of texts at once.

    Matchers go from text to text by what two texts begin with alike: drafts branch, and several sequences
    take turns. Threads may share it.

    Args:
        start: A matcher that has consumed nothing.
        vocabulary: What it speaks.
        eos_ids: Tokens that end a text.
        vocab_size: V, more or fewer than the tokenizer has.
    """

    def __init__(
        self, start: Any, vocabulary: _Vocabulary, eos_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        self._vocabulary, self._vocab_size = vocabulary, vocab_size
        self._eos = np.array(eos_ids, np.int64)
        self._special = vocabulary.special[vocabulary.special < vocab_size]
        self._start, self._held = start, list[_Matcher]()  # the latest used last
        self._lock = threading.Lock()

    def allowed(self, generated: Ints) -> Bools:
        """See `Constraint`; some microseconds a token that is new, and as much for the answer."""
        everything = np.ones(self._vocab_size, np.bool_)
        is_known = generated < self._vocabulary.tokenizer.vocab_size
        if not is_known.all() or np.isin(generated, self._eos).any():
            return everything
        with self._lock:
            matcher = self._follow(generated)
            if len(matcher.tokens) < len(generated):
                return everything
            packed, is_over = matcher.state.compute_bitmask(), matcher.state.is_accepting()
            self._check(matcher)
        num = min(self._vocab_size, self._vocabulary.tokenizer.vocab_size)
        allowed: Bools = np.zeros(self._vocab_size, np.bool_)
        allowed[:num] = np.unpackbits(np.frombuffer(packed, np.uint8), count=num, bitorder="little")
        allowed[self._special] = False
        allowed[self._eos] = is_over
        return allowed

    def _follow(self, text: Ints) -> _Matcher:
        """Give a matcher that has consumed a text as far as the grammar goes."""
        same = [(matcher, _common_prefix(matcher.tokens, text)) for matcher in self._held]
        near = [(matcher, num) for matcher, num in same if len(matcher.tokens) - num <= _NEAR]
        fresh = _Matcher(self._start, text[:0]), 0
        matcher, num_same = max(near, key=lambda pair: pair[1], default=fresh)
        if matcher is fresh[0]:
            matcher.state = self._start.deep_copy()
        self._held = [*(held for held in self._held if held is not matcher), matcher][-_MAX_HELD:]

        matcher.state.rollback(len(matcher.tokens) - num_same)
        num = num_same + matcher.state.try_consume_tokens(text[num_same:].tolist())
        matcher.tokens = text[:num].copy()
        self._check(matcher)
        return matcher

    def _check(self, matcher: _Matcher) -> None:
        """Give up a matcher that has given up."""
        if matcher.state.is_error():
            self._held.remove(matcher)
            raise DecodingError(f"the constraint is too complex: {_line(matcher.state.get_error())}.")


def _json_grammar(schema: Mapping[str, Any]) -> str:
    matcher = _llguidance().LLMatcher
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MAX_SCHEMA_BYTES:
            raise InputError(
                f"a JSON schema must be at most {MAX_SCHEMA_BYTES} bytes as JSON; this one has {len(text)}."
            )
        grammar: str = matcher.grammar_from_json_schema(text, overrides=_OPTIONS)
    except RecursionError:
        raise InputError("the JSON schema is nested too deeply.") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"this is no JSON schema: {_line(error)}.") from None
    return grammar


@functools.lru_cache(maxsize=128)
def _check(grammar: str) -> None:
    """Compile a stranger's grammar in a process of its own, which can be ended.

    Raises:
        InputError: It cannot be compiled, or not in the time and memory there is.
    """
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _CHECK],
            input=json.dumps([grammar, _LIMITS]).encode(),
            capture_output=True,
            timeout=_COMPILE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"the JSON schema is too complex: it could not be compiled in {_COMPILE_TIMEOUT_S:g} s. "
            f"Use fewer patterns that apply to one value."
        ) from None
    if ran.returncode:
        raise InputError("the JSON schema is too complex: its compiler failed.")
    if error := json.loads(ran.stdout):
        raise InputError(f"the JSON schema cannot be enforced: {_line(error)}.")


def _compile(grammar: str, model: Model) -> Constraint:
    llguidance = _llguidance()
    eos_ids = model.family.eos_ids
    if not eos_ids:
        raise InputError(f"{model.name} has no stop token, so no text under a constraint could end.")
    vocabulary = _vocabulary(model.tokenizer, eos_ids)
    limits = llguidance.LLParserLimits(**_LIMITS)
    start = llguidance.LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits)
    if not start.is_error():
        start.compute_bitmask()  # tells what nothing satisfies
    if start.is_error():
        reason = _line(start.get_error())
        if reason.startswith("NoExtension"):
            reason = "no text satisfies it"
        raise InputError(f"the JSON schema cannot be enforced: {reason}.")
    return _Grammar(start, vocabulary, eos_ids, model.engine.target.vocab_size)


_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], _Vocabulary]] = WeakKeyDictionary()
_vocabularies_lock = threading.Lock()


def _vocabulary(tokenizer: Any, eos_ids: tuple[int, ...]) -> _Vocabulary:
    """Read a tokenizer once; it can take a second.

    Raises:
        InputError: It is of a kind that llguidance does not read.
    """
    with _vocabularies_lock:
        if known := _vocabularies.get(tokenizer, {}).get(eos_ids):
            return known
        try:
            from llguidance.hf import from_tokenizer

            read = from_tokenizer(tokenizer, eos_token=list(eos_ids))
        except Exception as error:  # its own errors are of many kinds
            raise InputError(
                f"structured output needs a fast tokenizer that llguidance can read: {_line(error)}."
            ) from error
        vocabulary = _Vocabulary(read, np.array(sorted(tokenizer.all_special_ids), np.int64))
        _vocabularies.setdefault(tokenizer, {})[eos_ids] = vocabulary
        return vocabulary


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InputError("structured output needs llguidance: pip install chordal[serve]") from error
    return llguidance


def _line(error: object) -> str:
    """Give the first line of what llguidance says, short enough to show."""
    text = " ".join(str(error).split("\n<", 1)[0].split())
    return (text if len(text) <= 200 else text[:200] + "...").rstrip(".")


def _common_prefix(one: Ints, other: Ints) -> int:
    num = min(len(one), len(other))
    differs = one[:num] != other[:num]
    return int(np.argmax(differs)) if differs.any() else num
