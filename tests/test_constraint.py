from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import socket
import sys
import threading
import weakref
from types import SimpleNamespace

import jsonschema_rs
import numpy as np
import pytest

import chordal
from chordal import constraint as constraints
from chordal.constraint import json_object, json_schema
from chordal.errors import InputError
from chordal.models.family import Family
from chordal.ops.sampling import Law
from chordal.registry import make_decoder
from chordal.testing import TableModel, chi_square, sample_joint

POINT = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Zoe", "Émile", 'a"b']},
        "x": {"type": "integer", "minimum": -5, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "x"],
    "additionalProperties": False,
}
SCHEMAS = {
    "point": POINT,
    "any object": {"type": "object"},
    "anything": {},
    "strings": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 8}, "maxItems": 4},
    "pattern": {"type": "object", "properties": {"id": {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"}}},
    "choice": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 99}, {"const": {"a": [1]}}]},
    "tree": {
        "$defs": {"t": {"type": "object", "properties": {"v": {"type": "null"}, "t": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    },
    "date": {"type": "string", "format": "date"},
}  # fmt: skip
END, ANSWER = 2, 4


@pytest.fixture(scope="module")
def model():
    return chordal.load("tiny-ar", draft="tiny-draft", dtype="float64")


@pytest.fixture(scope="module")
def stub(model):
    """The tokenizer of tiny-ar with any stop tokens and size of vocabulary."""

    def make(eos_ids=(END,), vocab_size=890, tokenizer=model.tokenizer):
        engine = SimpleNamespace(target=SimpleNamespace(vocab_size=vocab_size))
        return SimpleNamespace(
            tokenizer=tokenizer, family=Family(eos_ids=eos_ids), engine=engine, name="stub"
        )

    return make


@pytest.fixture
def ids(model):
    """Token ids of a text as it is, without the blank the tokenizer puts first."""
    read = constraints._vocabulary(model.tokenizer, (END,)).tokenizer

    return lambda text: np.array(read.tokenize_str(text), np.int64)


def walk(constraint, rng, tokenizer, num=400):
    """Choose among allowed tokens at random until a stop token, with a bias to what closes; None: no end."""
    closing = np.array([any(c in '"}]' for c in tokenizer.decode([i])) for i in range(len(tokenizer))])
    closing[END] = True
    tokens = []
    while len(tokens) < num:
        allowed = constraint.allowed(np.array(tokens, np.int64))
        assert allowed.any()
        closers = np.flatnonzero(allowed & closing)
        choices = closers if len(closers) and rng.random() < 0.3 else np.flatnonzero(allowed)
        token = int(rng.choice(choices))
        if token == END:
            return tokens
        tokens.append(token)
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_under_the_constraint_is_json_that_satisfies_the_schema(model, name):
    constraint = json_schema(SCHEMAS[name], model)
    rng = np.random.default_rng(0)
    texts = [walk(constraint, rng, model.tokenizer) for _ in range(25)]
    texts = [model.decode(tokens) for tokens in texts if tokens is not None]
    assert len(texts) >= 20
    for text in texts:
        assert jsonschema_rs.is_valid(SCHEMAS[name], json.loads(text)), text
    assert len(set(texts)) > 4, "it is no constraint but a text"


def test_an_object_is_all_that_json_object_lets_through(model):
    constraint, rng = json_object(model), np.random.default_rng(0)
    texts = [walk(constraint, rng, model.tokenizer) for _ in range(25)]
    values = [json.loads(model.decode(tokens)) for tokens in texts if tokens is not None]
    assert len(values) >= 20
    assert all(isinstance(value, dict) for value in values)


@pytest.mark.parametrize(
    "text",
    [
        " {",
        "[",
        '{"x": 7',
        '{"name": "Bob"',
        '{"name": "Zoe"}',
        '{"name": "Zoe", "x": 121',
        '{"name": "Zoe", "x": 7} ',
        '{"name":' + " " * 3,
        '{\n\n"name"',
    ],
)
def test_what_does_not_satisfy_it_cannot(model, ids, text):
    constraint, tokens = json_schema(POINT, model), ids(text)
    assert not all(constraint.allowed(tokens[:at])[token] for at, token in enumerate(tokens))


def test_texts_may_be_asked_in_any_order(model, ids):
    """Random trees over several texts, broken branches among them, against a new constraint each time."""
    rng = np.random.default_rng(1)
    shared = json_schema(SCHEMAS["any object"], model)
    long = ids('{"a": [1, 2, {"b": "some text here"}, ' + ", ".join('"text"' for _ in range(40)))
    other = ids('{"b": {"c": ' * 12)
    for _ in range(120):
        text = (long, other)[rng.integers(2)]
        text = text[: rng.integers(len(text) + 1)].tolist()
        for _ in range(rng.integers(6)):
            text.append(int(rng.integers(890)))
        text = np.array(text, np.int64)
        fresh = constraints._Grammar(shared._start.deep_copy(), shared._vocabulary, (END,), 890)
        assert np.array_equal(shared.allowed(text), fresh.allowed(text))
    assert shared.allowed(long[:-1]).any()


def test_what_is_kept_of_texts_is_bounded(model, ids):
    constraint = json_object(model)
    for number in range(100):
        text = ids(f'{{"{number:03}": [' + ", ".join("0" for _ in range(30)))
        assert constraint.allowed(text)[ids("]")[0]]
    assert 1 < len(constraint._held) <= constraints._MAX_HELD


def test_threads_may_share_a_constraint(model, ids):
    constraint, text = json_object(model), ids('{"a": [1, 2, {"b": "some text here"}, 3, "x"]}')
    want = [constraint.allowed(text[:at]) for at in range(len(text) + 1)]
    wrong = []

    def ask(seed):
        for at in np.random.default_rng(seed).integers(len(text) + 1, size=200):
            if not np.array_equal(constraint.allowed(text[:at]), want[at]):
                wrong.append(at)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_anything_may_follow_a_text_that_is_broken_or_over(model, ids):
    constraint, whole = json_object(model), ids('{"a": 1}')
    for text in ([5], [*whole, 5], [*whole[:3], END], [*whole, END], [*whole, END, 7], [*whole[:2], 889, 6]):
        assert constraint.allowed(np.array(text, np.int64)).all(), text
    assert constraint.allowed(whole).sum() == 1


def test_every_stop_token_is_allowed_at_the_end_and_only_there(stub, ids):
    constraint, text = json_object(stub(eos_ids=(END, ANSWER))), ids('{"a": [1]}')
    for at in range(len(text)):
        assert not constraint.allowed(text[:at])[[END, ANSWER]].any()
    assert np.flatnonzero(constraint.allowed(text)).tolist() == [END, ANSWER]

    number, end = json_schema({"type": "integer"}, stub(eos_ids=(END, ANSWER))), ids("7")
    allowed = number.allowed(end)
    assert allowed[[END, ANSWER]].all(), "it may end here"
    assert allowed.sum() > 2, "or go on"


def test_a_stop_token_that_has_a_text_does_not_end_the_middle_of_a_string(stub, ids):
    x = int(ids("x")[0])
    constraint = json_object(stub(eos_ids=(END, x)))
    assert not constraint.allowed(ids('{"a": "'))[x]
    assert constraint.allowed(ids('{"a": ""}'))[x]


def test_special_tokens_are_no_text(model, ids):
    allowed = json_object(model).allowed(ids('{"a": "'))
    assert not allowed[model.tokenizer.all_special_ids].any()
    assert allowed.sum() > 500


def test_a_special_token_is_no_text_even_if_it_looks_like_some(model, ids):
    constraint, x = json_object(model), ids("x")
    vocabulary = dataclasses.replace(constraint._vocabulary, special=x)
    other = constraints._Grammar(constraint._start, vocabulary, (END,), 890)
    assert constraint.allowed(ids('{"a": "'))[x]
    assert not other.allowed(ids('{"a": "'))[x]


@pytest.mark.parametrize("vocab_size", [1024, 890, 700])
def test_the_model_may_have_more_or_fewer_tokens_than_its_tokenizer(stub, model, ids, vocab_size):
    constraint, whole = json_object(stub(vocab_size=vocab_size)), json_object(model)
    for text in (ids(""), ids('{"a": "b'), ids('{"a": 1}')):
        allowed, num = constraint.allowed(text), min(vocab_size, 890)
        assert allowed.shape == (vocab_size,)
        assert np.array_equal(allowed[:num], whole.allowed(text)[:num])
        assert not allowed[num:].any()
    assert constraint.allowed(np.array([95, 1000])).all(), "ids that no tokenizer knows break any text"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (True, "must be an object; got bool"),
        ([], "must be an object; got list"),
        ('{"type": "object"}', "must be an object; got str"),
        ({"a": {1}}, "this is no JSON schema: Object of type set is not JSON serializable"),
        ({"const": float("nan")}, "this is no JSON schema: "),
        ({"const": "\ud800"}, "this is no JSON schema: "),
        ({"type": "zebra"}, r"cannot be enforced: Invalid type: zebra\."),
        ({"type": "array", "uniqueItems": True}, "cannot be enforced: Unimplemented keys"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/nowhere"}, "'/nowhere' does not exist"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"enum": ["x" * 70_000]}, "must be at most 65536 bytes as JSON; this one has"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_and_the_reason_told(model, schema, message):
    with pytest.raises(InputError, match=message) as raised:
        json_schema(schema, model)
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_references_are_never_fetched(model):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for schema in ({"$ref": url}, {"$schema": url, "type": "object"}, {"$id": url, "$ref": "other.json"}):
            with pytest.raises(InputError):
                json_schema(schema, model)
        with pytest.raises(TimeoutError):
            server.accept()


def nested(num):
    schema = {"type": "string"}
    for _ in range(num):
        schema = {"type": "array", "items": schema}
    return schema


def chained(num):
    links = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(num)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{num}": {"type": "string"}}}


BOMBS = {
    "nesting": nested(5000),
    "nesting a reader takes": nested(300),
    "chain": chained(1500),
    "products": {
        "allOf": [
            {"anyOf": [{"type": "object", "required": [f"p{i}{j}"]} for j in range(2)]} for i in range(30)
        ]
    },
    "many items": {"type": "array", "minItems": 10**9, "items": {"type": "array", "maxItems": 10**9}},
    "long strings": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "many choices": {"enum": [f"value {at}" for at in range(3500)]},
    "repetition": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    "multiples": {"type": "integer", "multipleOf": 999999937},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_no_schema_takes_long(model, name):
    try:
        constraint = json_schema(BOMBS[name], model)
    except InputError:
        return
    walk(constraint, np.random.default_rng(0), model.tokenizer, num=50)


@pytest.mark.timeout(60)
def test_a_compiler_that_finds_no_end_is_ended(model, monkeypatch):
    """Patterns that all apply to one string take it time exponential in their number, with no limit."""
    monkeypatch.setattr(constraints, "_COMPILE_TIMEOUT_S", 2.0)
    patterns = [{"type": "string", "pattern": f".*a.{{{at}}}b.*"} for at in range(40)]
    with pytest.raises(InputError, match="too complex: it could not be compiled in 2 s"):
        json_schema({"allOf": patterns}, model)
    json_schema({"allOf": patterns[:1]}, model)


def test_a_compiler_that_dies_takes_nothing_along(model, monkeypatch):
    monkeypatch.setattr(constraints, "_CHECK", "import os; os.abort()")
    with pytest.raises(InputError, match="too complex: its compiler failed"):
        json_schema({"type": "object", "properties": {"only": {"type": "null"}}}, model)


def test_without_llguidance_it_is_said_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"needs llguidance: pip install chordal\[serve\]"):
        json_object(model)


def test_a_model_needs_a_stop_token_and_a_tokenizer_that_can_be_read(stub):
    with pytest.raises(InputError, match="stub has no stop token"):
        json_object(stub(eos_ids=()))

    class Letters:
        all_special_ids = ()

    with pytest.raises(InputError, match="needs a fast tokenizer that llguidance can read"):
        json_object(stub(tokenizer=Letters()))


def test_a_tokenizer_is_read_once_and_not_kept(tokenizer_dir, stub):
    tokenizer = chordal.load("tiny-ar").tokenizer
    first, second = json_object(stub(tokenizer=tokenizer)), json_object(stub(tokenizer=tokenizer))
    assert first._vocabulary is second._vocabulary
    gone = weakref.ref(tokenizer)
    del tokenizer, first, second
    gc.collect()
    assert gone() is None


EXACT = {
    "prompt_lookup": {},
    "token_recycling": {},
    "jacobi": {},
    "draft_model": {"acceptance": "follow", "min_confidence": 0.0},
    "rsd": {},
}
PAIR = {
    "type": "object",
    "properties": {"name": {"enum": ["Zoe", "Émile"]}, "names": {"enum": ["Zoe Zoe Zoe", "Carl Zoe"]}},
    "required": ["name", "names"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("decoder", EXACT)
@pytest.mark.parametrize("law", [{}, {"temperature": 1.0, "top_k": 30}], ids=str)
def test_while_drafting_the_text_is_valid_and_that_of_plain_decoding(model, decoder, law):
    given = {"constraint": json_schema(PAIR, model), "max_new_tokens": 80, **law}
    prompts = ["Zoe likes Emil.", "4 + 5 ="]
    want = model.generate(prompts, decoder="autoregressive", **given)
    got = model.generate(prompts, decoder=decoder, config=EXACT[decoder], **given)
    for one, other in zip(got, want, strict=True):
        assert (one.error, one.finish_reason) == (None, "stop")
        assert jsonschema_rs.is_valid(PAIR, json.loads(one.text)), one.text
        if decoder != "rsd" or not law:  # which draws other numbers
            assert one.tokens == other.tokens
    assert any(one.stats["accepted_tokens"] for one in got), "nothing drafted was kept"


class Alternating:
    """After an even token an odd one; token 0 only first."""

    def allowed(self, generated):
        return np.arange(4) % 2 != generated[-1] % 2 if len(generated) else np.arange(4) != 3


@pytest.mark.parametrize(
    ("decoder", "settings"),
    [
        ("autoregressive", {}),
        ("draft_model", {"min_confidence": 0.0, "num_draft": 2}),
        ("prompt_lookup", {}),
        ("token_recycling", {}),
        ("rsd", {}),
    ],
)
def test_two_sampled_tokens_have_the_constrained_law_of_the_target(decoder, settings):
    """By enumeration: each token's law is the target's, cut to what may stand there and made whole again."""
    target, prompt = TableModel(4, seed=0), np.array([0, 1, 0, 1, 0])
    law = Law(temperature=1.0, constraint=Alternating())
    joint = np.zeros((4, 4))
    for one, other in itertools.product(range(4), repeat=2):
        first = target.joint(prompt, 1) * law.constraint.allowed(np.array([], np.int64))
        second = target.joint(np.append(prompt, one), 1) * law.constraint.allowed(np.array([one]))
        joint[one, other] = first[one] / first.sum() * second[other] / second.sum()
    models = {"target": target, "draft": TableModel(4, seed=1)}
    counts = sample_joint(make_decoder(decoder, settings), models, prompt, length=2, runs=1200, law=law)
    assert counts.sum() == 1200
    assert chi_square(counts, joint) > 1e-6
    assert chi_square(counts, target.joint(prompt, 2)) < 1e-6
    assert dataclasses.replace(law, constraint=None) != law
