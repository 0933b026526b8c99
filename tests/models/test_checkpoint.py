from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import save_file

from chordal.errors import CheckpointError
from chordal.models.checkpoint import Checkpoint, Weight

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = {
    FIRST: {"embed": torch.arange(6.0).reshape(2, 3), "norm": torch.ones(4, dtype=torch.bfloat16)},
    SECOND: {"head": torch.arange(8, dtype=torch.int8), "bias": torch.tensor(0.5)},
}


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint of two shards, to be damaged."""
    return write_sharded(tmp_path / "model")


@pytest.fixture
def single(tmp_path):
    """A folder with one file of weights, which a test writes."""
    path = tmp_path / "single"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path / "model.safetensors"


@pytest.fixture
def opened():
    """Every file that Python opens from here on."""
    _opened.clear()
    yield _opened
    _opened.clear()


_opened: list[str] = []


def _note(event, args):
    if event == "open" and isinstance(args[0], str):
        _opened.append(args[0])


sys.addaudithook(_note)


def write_sharded(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    for file, weights in SHARDS.items():
        save_file(weights, path / file)
    write_index(path, {name: file for file, weights in SHARDS.items() for name in weights})
    return path


def write_index(path, places):
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def change_index(path, **places):
    index = json.loads((path / INDEX).read_text())
    write_index(path, index["weight_map"] | places)


def write_file(file, header, values=b"", *, length=None):
    """Write a safetensors file from its parts, however wrong they are."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + values)


def weight(start, end, *, dtype="U8", shape=None):
    return {
        "dtype": dtype,
        "shape": [end - start] if shape is None else shape,
        "data_offsets": [start, end],
    }


def refusal(path, **settings):
    """The one line a checkpoint is refused with."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path, **settings)
    message = str(error.value)
    assert message.isprintable()
    return message


# Good folders.


def test_every_weight_is_known_by_file_type_and_shape(folder):
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.name, checkpoint.path) == ("model", folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.weights == {
        "embed": Weight(folder / FIRST, "F32", (2, 3)),
        "norm": Weight(folder / FIRST, "BF16", (4,)),
        "head": Weight(folder / SECOND, "I8", (8,)),
        "bias": Weight(folder / SECOND, "F32", ()),
    }


def test_weights_are_read_whole_or_by_rows(folder):
    slices = Checkpoint.open(folder).slices()
    assert slices.keys() == {"embed", "norm", "head", "bias"}
    for weights in SHARDS.values():
        for name, tensor in weights.items():
            assert torch.equal(slices[name][...], tensor)
    assert slices["embed"][1:2].tolist() == [[3, 4, 5]]


@pytest.mark.parametrize(
    "dtype",
    "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ "
    "F8_E5M2FNUZ F4 F6_E2M3 F6_E3M2".split(),
)
def test_every_type_has_the_size_that_safetensors_gives_it(single, dtype):
    accepted = []
    for num_bytes in (0, 4, 6, 8, 16, 32, 64):
        write_file(single, {"w": weight(0, num_bytes, dtype=dtype, shape=[8])}, bytes(num_bytes))
        try:
            ours = Checkpoint.open(single.parent).weights["w"].dtype == dtype
        except CheckpointError:
            ours = False
        try:
            safe_open(single, "pt")
            theirs = True
        except Exception:
            theirs = False
        assert ours == theirs, num_bytes
        accepted += [num_bytes] * ours
    assert len(accepted) == 1


def test_a_folder_may_be_named_by_any_path_to_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert Checkpoint.open(".").name == "model"
    assert Checkpoint.open(f"{folder}/").name == "model"
    assert Checkpoint.open(Path("..", "model")).name == "model"


def test_shards_may_be_links_as_in_the_cache_of_the_hub(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    slices = Checkpoint.open(snapshot).slices()
    assert torch.equal(slices["embed"][...], SHARDS[FIRST]["embed"])


def test_one_file_may_have_any_name_and_stands_before_an_index_that_was_left_behind(folder):
    write_file(folder / "model.safetensors", {"w": weight(0, 2)}, b"ab")
    assert list(Checkpoint.open(folder).weights) == ["w"]
    for file in (INDEX, FIRST, SECOND):
        (folder / file).unlink()
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert list(Checkpoint.open(folder).weights) == ["w"]


def test_pickles_beside_safetensors_are_left_alone(folder, opened):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    opened.clear()
    Checkpoint.open(folder).slices()
    assert any(path.endswith(FIRST) for path in opened)
    assert not any(path.endswith(".bin") for path in opened)


# Folders with something wrong beside the weights.


def test_a_folder_without_a_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder} has no config.json; is it a checkpoint folder?"
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(folder) == f"{folder} is a LoRA adapter; merge it into its base model and load that."


@pytest.mark.parametrize(
    "content", [b"", b"{ nope", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_cannot_be_read_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    assert refusal(folder).startswith(f"{folder}/{name} cannot be read: ")


@pytest.mark.parametrize(("content", "shown"), [("[]", "[]"), ("5", "5"), ('"text"', "'text'")])
def test_a_config_that_is_no_object_is_refused(folder, content, shown):
    (folder / "config.json").write_text(content)
    assert refusal(folder) == f"{folder}/config.json must hold an object; got {shown}."


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model-00001-of-00002.pth"])
def test_pickled_weights_are_refused_unopened(tmp_path, opened, name):
    class Intruder:
        def __reduce__(self):
            return Path.touch, (tmp_path / "mark",)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Intruder()))
    opened.clear()
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no safetensors; {name} is a pickle, which could run code. Convert it where you "
        f"trust it: load it with torch.load(weights_only=True), write it with safetensors.torch.save_file."
    )
    assert not (tmp_path / "mark").exists()
    assert not any(path.endswith(name) for path in opened)


def test_a_folder_without_weights_is_refused(single):
    assert refusal(single.parent) == f"{single.parent} holds no safetensors weights."


# The index.


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {}}, {"weight_map": ["w"]}, {"weight_map": None}])
def test_an_index_must_have_a_map(folder, content):
    (folder / INDEX).write_text(json.dumps(content))
    assert refusal(folder) == f"{folder}/{INDEX} must have a weight_map from weights to files."


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "..\\secret.safetensors",
        "/secret.safetensors",
        "nested/secret.safetensors",
        "./secret.safetensors",
        "nested\\secret.safetensors",
        "secret\x00.safetensors",
        "secret\n.safetensors",
        "..",
        "",
        "secret.bin",
        "secret.py",
        None,
        5,
        ["secret.safetensors"],
    ],
)
def test_names_of_shards_never_lead_out_of_the_folder(folder, tmp_path, opened, name):
    outside = tmp_path / "secret.safetensors"
    save_file({"embed": torch.ones(2, 3)}, outside)
    (folder / "nested").mkdir()
    shutil.copy(outside, folder / "nested")
    name = str(outside) if name == "/secret.safetensors" else name
    change_index(folder, embed=name)
    opened.clear()
    shown = repr(name if isinstance(name, str) else str(name))
    assert refusal(folder) == (f"{folder}/{INDEX}: {shown} must be the name of a safetensors file beside it.")
    assert not any("secret" in path for path in opened)


def test_a_shard_that_is_not_there_is_named_with_a_weight_it_should_hold(folder):
    (folder / SECOND).unlink()
    assert refusal(folder) == f"{folder}/{SECOND} is missing; the index says it holds 'head'."


@pytest.mark.parametrize("name", ["extra", "two\nlines"])
def test_a_weight_that_is_not_in_its_shard_is_named(folder, name):
    change_index(folder, **{name: SECOND})
    assert refusal(folder) == f"{folder}/{SECOND} does not hold {name!r}, though the index says so."


def test_a_weight_that_is_in_another_shard_than_its_own_is_named(folder):
    change_index(folder, embed=SECOND)
    assert refusal(folder) == f"{folder}/{SECOND} does not hold 'embed', though the index says so."


def test_a_weight_in_two_shards_is_refused(folder):
    save_file(SHARDS[SECOND] | {"norm": torch.ones(4)}, folder / SECOND)
    assert refusal(folder) == f"{folder}/{SECOND} holds norm, and so does {FIRST}; one must not."


def test_shards_without_an_index_are_refused(folder):
    (folder / INDEX).unlink()
    assert refusal(folder) == (
        f"{folder} holds 2 safetensors files ({FIRST}, ...) and no {INDEX} to say which of them belong "
        f"together; copy that too."
    )


# The header of a file of weights.


@pytest.mark.parametrize("length", [100_000_001, 2**60, 2**64 - 1])
def test_a_header_may_not_claim_any_size(single, length):
    write_file(single, b"{}", length=length)
    assert refusal(single.parent) == (
        f"{single} is damaged: its header must have at most 100000000 bytes; it claims {length}."
    )


def test_a_header_too_large_is_refused_though_the_file_has_it(single):
    write_file(single, b"{}", length=100_000_001)
    with single.open("r+b") as file:
        file.truncate(100_001_000)
    assert refusal(single.parent).endswith("at most 100000000 bytes; it claims 100000001.")


@pytest.mark.parametrize("content", [b"{ nope", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b""])
def test_a_header_that_is_not_json_is_refused(single, content):
    write_file(single, content)
    assert refusal(single.parent).startswith(f"{single} is not a readable safetensors file: ")


@pytest.mark.parametrize(("content", "shown"), [(b"[]", "[]"), (b"5", "5"), (b"null", "None")])
def test_a_header_that_is_no_object_is_refused(single, content, shown):
    write_file(single, content)
    assert refusal(single.parent) == f"{single} is damaged: its header must be an object; got {shown}."


@pytest.mark.parametrize(
    "facts",
    [
        5,
        None,
        ["U8", [4], [0, 4]],
        {},
        {"dtype": "U8", "shape": [4]},
        {"dtype": "U8", "data_offsets": [0, 4]},
        {"shape": [4], "data_offsets": [0, 4]},
        weight(0, 4, dtype=["U8"]),
        weight(0, 4, shape="4"),
        weight(0, 4, shape=[-2, -2]),
        weight(0, 4, shape=[4.0]),
        weight(0, 4, shape=[4, True]),
        weight(0, 4, shape=[2**63, 0]),
        weight(0, 4, shape=[4, *[1] * 64]),
        weight(0, 4) | {"data_offsets": [0]},
        weight(0, 4) | {"data_offsets": [0, 2, 4]},
        weight(0, 4) | {"data_offsets": [-4, 0]},
        weight(0, 4) | {"data_offsets": [0.0, 4.0]},
        weight(0, 4) | {"data_offsets": {"0": 4}},
    ],
)
def test_what_a_header_says_of_a_weight_must_be_sizes(single, facts):
    write_file(single, {"w": facts}, b"abcd")
    message = refusal(single.parent)
    assert message.startswith(f"{single} is damaged: w must have a dtype, a shape and two data_offsets; got ")


def test_a_type_that_is_none_is_named(single):
    write_file(single, {"w": weight(0, 4, dtype="X9")}, b"abcd")
    message = refusal(single.parent)
    assert message.startswith(f"{single}: w must be of one of the types C64, F64, ")
    assert message.endswith("; got 'X9'.")


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        (weight(0, 4, shape=[5]), "[5] and type U8 cannot take 4"),
        (weight(0, 4, shape=[2, 3], dtype="F16"), "[2, 3] and type F16 cannot take 4"),
        (weight(0, 4, shape=[2**62, 2**62]), f"[{2**62}, {2**62}] and type U8 cannot take 4"),
        (weight(4, 0, shape=[4]), "[4] and type U8 cannot take -4"),
        (weight(0, 4, shape=[0]), "[0] and type U8 cannot take 4"),
        (weight(0, 1, shape=[1], dtype="F4"), "[1] and type F4 cannot take 1"),
    ],
)
def test_shape_and_type_must_take_the_bytes_there_are(single, facts, shown):
    write_file(single, {"w": facts}, b"abcd")
    assert refusal(single.parent) == f"{single} is damaged: w of shape {shown} bytes."


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": weight(0, 4), "b": weight(2, 8)}, "b must start at byte 4 of the values; it starts at 2."),
        ({"a": weight(0, 8), "b": weight(0, 8)}, "b must start at byte 8 of the values; it starts at 0."),
        ({"a": weight(0, 4), "b": weight(5, 8)}, "b must start at byte 4 of the values; it starts at 5."),
        ({"a": weight(2, 8)}, "a must start at byte 0 of the values; it starts at 2."),
        ({"a": weight(0, 4)}, "its last 4 bytes belong to no weight."),
        ({}, "its last 8 bytes belong to no weight."),
    ],
)
def test_values_fill_the_file_one_after_the_other(single, header, reason):
    write_file(single, header, b"abcdefgh")
    assert refusal(single.parent) == f"{single} is damaged: {reason}"


def test_weights_without_values_take_no_room(single):
    write_file(
        single, {"b": weight(4, 8), "none": weight(4, 4), "a": weight(0, 4), "__metadata__": {}}, b"abcdefgh"
    )
    assert set(Checkpoint.open(single.parent).weights) == {"a", "b", "none"}


def test_values_beyond_the_end_are_refused_with_the_weight(single):
    write_file(single, {"a": weight(0, 4), "b": weight(4, 2**40)}, b"abcdefgh")
    size = single.stat().st_size
    assert refusal(single.parent) == (
        f"{single} is truncated: b ends at byte {size - 8 + 2**40}, the file at {size}."
    )


@pytest.mark.parametrize("kept", [0, 3, 8, 20])
def test_a_file_that_ends_in_its_header_is_refused(folder, kept):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert message.startswith(f"{path} is truncated: its header ends at byte ")
    assert message.endswith(f", the file at {kept}.")


@pytest.mark.parametrize(("cut", "lost"), [(1, "norm"), (8, "norm"), (9, "embed"), (32, "embed")])
def test_a_file_that_ends_in_its_values_is_refused_with_the_weight(single, cut, lost):
    save_file({"embed": torch.ones(2, 3), "norm": torch.ones(4, dtype=torch.bfloat16)}, single)
    content = single.read_bytes()
    single.write_bytes(content[:-cut])
    end = len(content) - (8 if lost == "embed" else 0)
    assert refusal(single.parent) == (
        f"{single} is truncated: {lost} ends at byte {end}, the file at {len(content) - cut}."
    )


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "\u202e"])
def test_a_name_that_would_garble_the_terminal_is_refused(single, name):
    write_file(single, {name: weight(0, 4)}, b"abcd")
    assert refusal(single.parent) == f"{single} is damaged: {name!r} is no name of a weight."


def test_a_file_that_safetensors_itself_refuses_is_named(single):
    write_file(single, {"__metadata__": 5, "a": weight(0, 4)}, b"abcd")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(single.parent).slices()
    assert str(error.value).startswith(f"{single} cannot be read: ")


def test_damage_at_random_never_ends_in_another_error(folder):
    """What is not refused must be as good as the original in every respect we can see."""
    import random

    original = (folder / FIRST).read_bytes()
    want = Checkpoint.open(folder).weights
    draw = random.Random(0)
    outcomes = set()
    for _ in range(200):
        content = bytearray(original)
        for _ in range(draw.choice([1, 1, 2, 8])):
            content[draw.randrange(min(len(content), 250))] = draw.randrange(256)
        (folder / FIRST).write_bytes(
            content[: draw.choice([len(content)] * 3 + [draw.randrange(len(content))])]
        )
        try:
            checkpoint = Checkpoint.open(folder)
            checkpoint.slices()
        except CheckpointError as error:
            assert str(folder) in str(error)
            outcomes.add("refused")
            continue
        outcomes.add("accepted")
        for name, found in checkpoint.weights.items():
            assert math.prod(found.shape) == math.prod(want[name].shape)
    assert outcomes == {"refused", "accepted"}


# The hub.

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the hub with two revisions of one repository: main, and v1 without a bias."""
    repo = tmp_path / "hub" / "models--owner--name"
    for ref, commit in {"main": COMMIT, "v1": OLDER}.items():
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        write_sharded(tmp_path / commit)
        if ref == "v1":
            save_file({"old": torch.ones(1)}, tmp_path / commit / "model.safetensors")
        (repo / "blobs").mkdir(exist_ok=True)
        for file in (tmp_path / commit).iterdir():
            blob = f"{commit[:8]}{file.name}"
            file.rename(repo / "blobs" / blob)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


@contextmanager
def hub(status, code):
    """A hub on this machine that answers every question with the same error."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_id_is_found_in_the_cache(cache):
    checkpoint = Checkpoint.open("owner/name", local_files_only=True)
    assert (checkpoint.name, checkpoint.path.name) == ("owner/name", COMMIT)
    assert torch.equal(checkpoint.slices()["embed"][...], SHARDS[FIRST]["embed"])


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_a_revision_is_a_branch_a_tag_or_a_commit(cache, revision):
    checkpoint = Checkpoint.open("owner/name", revision=revision, local_files_only=True)
    assert list(checkpoint.weights) == ["old"]


def test_a_folder_stands_before_the_hub(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write_sharded(tmp_path / "owner" / "name")
    checkpoint = Checkpoint.open("owner/name", local_files_only=True)
    assert (checkpoint.name, checkpoint.path) == ("name", Path("owner/name"))


@pytest.mark.parametrize(("name", "settings"), [("owner/other", {}), ("owner/name", {"revision": "v2"})])
def test_what_the_cache_lacks_is_refused_in_one_line(cache, monkeypatch, name, settings):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    assert refusal(name, local_files_only=True, **settings) == (
        f"{name!r} is no folder here and cannot be had from the hub https://hub.example: local_files_only "
        f"forbids to ask it, and it is not, or not whole, in {constants.HF_HUB_CACHE}."
    )


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(cache, monkeypatch):
    with hub(404, "") as address:
        pass  # the port is closed again
    monkeypatch.setattr(constants, "ENDPOINT", address)
    message = refusal("owner/other")
    assert message.startswith(
        f"'owner/other' is no folder here and cannot be had from the hub {address}: it does not answer ("
    )
    assert message.endswith(f"), and it is not, or not whole, in {constants.HF_HUB_CACHE}.")
    # What is in the cache is taken from there.
    assert Checkpoint.open("owner/name").path.name == COMMIT


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, "RepoNotFound", "there is no such repository, or it is private and the token does not open it"),
        (404, "RevisionNotFound", "the repository has no revision 'v2'"),
        (403, "GatedRepo", "its owner asks for consent; give it on the repository's page, and a token here"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(cache, monkeypatch, status, code, reason):
    with hub(status, code) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        message = refusal("owner/other", revision="v2")
    assert message == (f"'owner/other' is no folder here and cannot be had from the hub {address}: {reason}.")


def test_a_name_the_hub_cannot_have_is_said_in_one_line(cache):
    assert refusal("own er/name").startswith("'own er/name' is no folder here and cannot be had from the hub")


def test_neither_code_nor_pickles_nor_copies_are_fetched(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **settings):
        asked.update(settings, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    Checkpoint.open("owner/name", revision="v1", token="secret")
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("owner/name", "v1", "secret")
    wanted = [
        "config.json", "generation_config.json", "model.safetensors", FIRST, INDEX, "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "tokenizer.model", "qwen.tiktoken", "chat_template.jinja",
    ]  # fmt: skip
    unwanted = [
        "modeling_llada.py", "configuration_dream.py", "custom_generate/generate.py", "run.sh", "lib.so",
        "pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "model.ckpt", "model.npz", "model.h5",
        "original/consolidated.00.pth", "consolidated.safetensors", "onnx/model.safetensors", "README.md",
        ".git/config.json",
    ]  # fmt: skip
    names = filter_repo_objects(
        [*wanted, *unwanted],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(names) == wanted


def test_a_token_is_never_shown(cache, monkeypatch):
    with hub(401, "RepoNotFound") as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert "hf_secret" not in refusal("owner/other", token="hf_secret")
