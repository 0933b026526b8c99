from __future__ import annotations

import pytest
import torch

import chordal.models.cache
from chordal.models.cache import SlotCache
from chordal.models.tiles import Tile

HEADS, SIZE, LAYERS = 2, 4, 2


def make_cache(max_rows=8, max_slots=1000):
    return SlotCache(LAYERS, max_rows, max_slots)


def aim(cache, slots, *, first_row=0, span=None):
    """Aim at one tile: slots `[B, T]` from a row on."""
    span = int(slots.max()) + 1 if span is None else span
    cache.aim([Tile(first_row, *slots.shape, span=span)], slots.flatten())


def write(cache, slots, *, first_row=0, span=None, seed=0):
    """Feed random keys and values to every layer; give what was fed and what attention gets."""
    slots = torch.tensor(slots)
    cache.reserve(first_row + len(slots), int(slots.max()) + 1)
    aim(cache, slots, first_row=first_row, span=span)
    generator = torch.Generator().manual_seed(seed)
    fed, seen = [], []
    for layer in range(LAYERS):
        keys, values = torch.randn(2, len(slots), HEADS, slots.shape[1], SIZE, generator=generator)
        fed.append((keys, values))
        seen.append(cache.update(keys, values, layer))
    return fed, seen


def snapshot(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.slot_layers]


def test_rows_are_written_at_their_slots_and_come_back_up_to_the_span():
    fed, seen = write(make_cache(), [[2, 0], [1, 4]], span=5)
    for (keys, values), (got_keys, got_values) in zip(fed, seen, strict=True):
        assert got_keys.shape == got_values.shape == (2, HEADS, 5, SIZE)
        for row, slots in enumerate([[2, 0], [1, 4]]):
            assert torch.equal(got_keys[row, :, slots], keys[row])
            assert torch.equal(got_values[row, :, slots], values[row])
        assert got_keys[0, :, [1, 3, 4]].abs().sum() == 0


def test_what_attention_gets_is_the_cache_itself_not_a_copy():
    cache = make_cache()
    write(cache, [[0, 1, 2]] * 4)
    for layer, seen in zip(cache.slot_layers, write(cache, [[3]] * 2, first_row=1)[1], strict=True):
        for held, got in zip((layer.keys, layer.values), seen, strict=True):
            assert got.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
            assert got.data_ptr() == held[1].data_ptr()


def test_writing_changes_its_rows_and_slots_alone():
    cache = make_cache()
    write(cache, [[0, 1, 2, 3]] * 3)
    before = snapshot(cache)
    fed, _ = write(cache, [[2]], first_row=1, span=4, seed=1)
    for layer, (keys, values), (fed_keys, fed_values) in zip(cache.slot_layers, before, fed, strict=True):
        keys[1, :, 2:3], values[1, :, 2:3] = fed_keys[0], fed_values[0]
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_filling_rows_write_behind_everything_attention_can_reach():
    cache = make_cache(max_slots=6)
    assert cache.trash == cache.num_slots == 6
    _, seen = write(cache, [[0, 1], [cache.trash, cache.trash]], span=6)
    for keys, values in seen:
        assert keys.shape[2] == 6
        assert keys[1].abs().sum() == values[1].abs().sum() == 0


def test_growing_keeps_what_is_held_and_moves_the_trash_behind_it():
    cache = make_cache()
    write(cache, [[0, 1, 127]])
    before = snapshot(cache)
    cache.reserve(5, 129)
    assert cache.num_slots == cache.trash == 256
    assert cache.rows_held >= 5
    for layer, (keys, values) in zip(cache.slot_layers, before, strict=True):
        assert layer.keys.shape == layer.values.shape == (cache.rows_held, HEADS, 257, SIZE)
        assert torch.equal(layer.keys[:1, :, :128], keys[:, :, :128])
        assert torch.equal(layer.values[:1, :, :128], values[:, :, :128])
        assert layer.keys[1:].abs().sum() == layer.keys[:, :, 129:].abs().sum() == 0
    _, seen = write(cache, [[200], [cache.trash]], first_row=3, span=201, seed=1)
    assert seen[0][0].shape[2] == 201


def test_growing_stops_at_the_limits_and_does_nothing_where_there_is_room():
    cache = make_cache(max_rows=3, max_slots=300)
    write(cache, [[0]])
    cache.reserve(3, 290)
    assert (cache.rows_held, cache.num_slots) == (3, 290)
    cache.reserve(2, 291)
    assert (cache.rows_held, cache.num_slots) == (3, 300)
    held = cache.slot_layers[0].keys.data_ptr()
    cache.reserve(1, 10)
    cache.reserve(3, 300)
    assert cache.slot_layers[0].keys.data_ptr() == held


def test_room_reserved_before_the_first_write_is_there():
    cache = make_cache()
    cache.reserve(4, 200)
    write(cache, [[199]] * 4)
    assert cache.slot_layers[0].keys.shape[0] >= 4
    assert cache.slot_layers[0].keys.shape[2] >= 201


def test_a_moved_row_is_a_copy_in_every_layer_and_the_others_stay():
    cache = make_cache()
    write(cache, [[0, 1]] * 3)
    before = snapshot(cache)
    cache.move_row(2, 0)
    for layer, (keys, values) in zip(cache.slot_layers, before, strict=True):
        assert torch.equal(layer.keys, keys[[2, 1, 2]])
        assert torch.equal(layer.values, values[[2, 1, 2]])


def test_a_cleared_row_forgets_even_what_is_not_finite():
    cache = make_cache()
    write(cache, [[0, 1]] * 2)
    before = snapshot(cache)
    for layer in cache.slot_layers:
        layer.keys[0, :, 1] = layer.values[0, :, 1] = float("nan")
    cache.clear_row(0)
    for layer, (keys, values) in zip(cache.slot_layers, before, strict=True):
        assert layer.keys[0].abs().sum() == layer.values[0].abs().sum() == 0
        assert torch.equal(layer.keys[1], keys[1])
        assert torch.equal(layer.values[1], values[1])


def test_rows_that_were_never_written_are_moved_and_cleared_like_empty_ones():
    """A sequence that ended before its first forward pass used to stop the whole engine."""
    cache = make_cache()
    cache.move_row(1, 0)
    cache.clear_row(7)
    write(cache, [[0, 1]])
    cache.clear_row(7)
    cache.move_row(7, 0)
    assert all(layer.keys.abs().sum() == layer.values.abs().sum() == 0 for layer in cache.slot_layers)


def test_transformers_is_told_the_span():
    cache = make_cache(max_slots=50)
    aim(cache, torch.tensor([[3]]), span=7)
    assert cache.get_seq_length() == 7
    assert cache.get_mask_sizes(1, 0) == (7, 0)
    assert cache.slot_layers[0].get_max_length() == 50


def test_a_forward_pass_that_was_not_aimed_is_a_bug():
    with pytest.raises(AssertionError, match="not aimed"):
        make_cache().update(torch.zeros(1, HEADS, 1, SIZE), torch.zeros(1, HEADS, 1, SIZE), 0)


# Positions, which only models with layers of limited reach place.


def place(cache, slots, positions, *, first_row=0, span=None):
    """Feed a pass with positions; give those of all slots in its span."""
    slots = torch.tensor(slots)
    cache.reserve(first_row + len(slots), int(slots.max()) + 1 if span is None else span)
    aim(cache, slots, first_row=first_row, span=span)
    [seen] = cache.place(torch.tensor(positions).flatten())
    return seen


def test_positions_are_noted_at_the_slots_of_their_tokens_and_given_for_the_span():
    cache = make_cache()
    assert place(cache, [[2, 0, 1], [0, 1, 2]], [[7, 5, 9], [1, 2, 3]]).tolist() == [[5, 9, 7], [1, 2, 3]]
    seen = place(cache, [[3, 1]], [[4, 6]], first_row=1, span=4)
    assert seen.tolist() == [[1, 6, 3, 4]]
    assert place(cache, [[3]], [[8]]).tolist() == [[5, 9, 7, 8]]


def test_filling_rows_note_their_positions_behind_everything_attention_can_reach():
    cache = make_cache(max_slots=6)
    place(cache, [[0, 1], [0, 1]], [[3, 4], [5, 6]])
    seen = place(cache, [[2, 3], [cache.trash, cache.trash]], [[5, 6], [9, 9]], span=4)
    assert seen[0].tolist() == [3, 4, 5, 6]
    assert seen[1, :2].tolist() == [5, 6]
    assert 9 not in place(cache, [[5], [5]], [[0], [0]]).tolist()[1]


def test_growing_keeps_positions():
    cache = make_cache()
    first = torch.arange(128)[None] * 3
    place(cache, torch.arange(128)[None].tolist(), first.tolist())
    place(cache, [[0]], [[50]], first_row=5)
    seen = place(cache, [[200]], [[600]])
    assert seen[0, :128].tolist() == first[0].tolist()
    assert seen[0, 200] == 600
    assert place(cache, [[1]], [[51]], first_row=5).tolist() == [[50, 51]]


def test_room_reserved_before_the_first_positions_is_there():
    cache = make_cache()
    cache.reserve(4, 200)
    assert place(cache, [[199]] * 4, [[1], [2], [3], [4]])[:, 199].tolist() == [1, 2, 3, 4]


def test_a_moved_row_takes_its_positions_along_and_the_others_stay():
    cache = make_cache()
    place(cache, [[0, 1]] * 3, [[1, 2], [3, 4], [5, 6]])
    cache.move_row(2, 0)
    seen = place(cache, [[2]] * 3, [[7], [8], [9]])
    assert seen.tolist() == [[5, 6, 7], [3, 4, 8], [5, 6, 9]]
    cache.move_row(7, 1)  # a row that was never written


def test_positions_need_a_pass_that_was_aimed():
    with pytest.raises(AssertionError, match="not aimed"):
        make_cache().place(torch.zeros(1, 1, dtype=torch.long))


# Slots that are read out and written back.


@torch.inference_mode()
def test_what_is_read_from_slots_can_be_written_to_those_of_another_row():
    cache = make_cache()
    write(cache, [[0, 1, 2, 3, 4]] * 2)
    before = snapshot(cache)
    held = cache.read(1, 0, 3)
    assert held.shape == (3, LAYERS * 2 * HEADS * SIZE)
    cache.write(6, held, notes_positions=False)
    for layer, (keys, values) in zip(cache.slot_layers, before, strict=True):
        for now, then in ((layer.keys, keys), (layer.values, values)):
            assert torch.equal(now[6, :, :3], then[1, :, :3])
            assert torch.equal(now[:2, :, :5], then[:, :, :5])
            assert now[6, :, 3:].abs().sum() == 0
    assert torch.equal(cache.read(6, 1, 3), held[1:])


@torch.inference_mode()
def test_keys_and_values_of_unlike_sizes_are_kept_apart():
    cache = make_cache()
    cache.reserve(1, 4)
    aim(cache, torch.tensor([[0, 1, 2, 3]]))
    for layer in range(LAYERS):
        cache.update(torch.randn(1, HEADS, 4, 6), torch.randn(1, HEADS, 4, 3), layer)
    cache.write(3, cache.read(0, 0, 4), notes_positions=False)
    for layer in cache.slot_layers:
        assert torch.equal(layer.keys[3, :, :4], layer.keys[0, :, :4])
        assert torch.equal(layer.values[3, :, :4], layer.values[0, :, :4])


@torch.inference_mode()
def test_slots_that_are_written_back_stand_at_their_positions_where_those_count():
    cache = make_cache()
    write(cache, [[0, 1, 2]])
    held = cache.read(0, 0, 3)
    cache.write(1, held, notes_positions=True)
    place(cache, [[2]], [[9]])
    assert cache.positions(slice(0, 2), 3).tolist() == [[0, 0, 9], [0, 1, 2]]


def test_what_is_read_is_a_copy():
    cache = make_cache()
    write(cache, [[0, 1]])
    held = cache.read(0, 0, 2)
    before = held.clone()
    write(cache, [[0, 1]], seed=1)
    assert torch.equal(held, before)


# Memory.


@torch.inference_mode()
def test_a_released_cache_holds_nothing_and_starts_anew():
    cache = make_cache()
    assert not cache.release()
    write(cache, [[0, 1]] * 3)
    place(cache, [[0, 1]] * 3, [[5, 6]] * 3)
    held = cache.read(2, 0, 2)
    assert cache.release()
    assert not cache.release()
    assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in cache.slot_layers)
    assert not cache.is_empty  # the shape of keys is known
    cache.move_row(2, 1)
    cache.clear_row(1)
    cache.write(1, held, notes_positions=True)
    assert torch.equal(cache.read(1, 0, 2), held)
    assert cache.positions(slice(1, 2), 2).tolist() == [[0, 1]]
    _, seen = write(cache, [[2]], first_row=1, span=3)
    assert [keys[0, :, 2].abs().sum() > 0 for keys, _ in seen] == [True, True]
    cache.reserve(8, 1000)
    assert (cache.rows_held, cache.num_slots) == (8, 1000)


def test_growing_without_memory_loses_nothing_and_can_be_tried_again(monkeypatch):
    """One layer has grown when the next one cannot."""
    cache = make_cache()
    write(cache, [[0, 1, 127]] * 2)
    before, sizes = snapshot(cache), (cache.rows_held, cache.num_slots)
    grow = chordal.models.cache._padded
    calls = []

    def fail(held, *given, **more):
        calls.append(held)
        if len(calls) == 3:
            raise MemoryError
        return grow(held, *given, **more)

    monkeypatch.setattr(chordal.models.cache, "_padded", fail)
    with pytest.raises(MemoryError):
        cache.reserve(2, 129)
    assert (cache.rows_held, cache.num_slots) == sizes
    write(cache, [[5]] * 2, span=128, seed=1)
    for rows, slots in ((5, 10), (5, 129)):
        cache.reserve(rows, slots)
    assert len({layer.keys.shape for layer in cache.slot_layers}) == 1
    fed, _ = write(cache, [[200]], first_row=4, span=201)
    for layer, (keys, values), (new, _) in zip(cache.slot_layers, before, fed, strict=True):
        assert torch.equal(layer.keys[:2, :, :5], keys[:, :, :5])
        assert torch.equal(layer.values[:2, :, 127], values[:, :, 127])
        assert torch.equal(layer.keys[4, :, 200], new[0, :, 0])


def test_moves_read_every_layer_before_they_write_one():
    cache = make_cache()
    write(cache, [[0, 1, 2, 3]])
    before = snapshot(cache)
    cache.slot_layers[1].keys = cache.slot_layers[1].keys[:, :, :2]  # its slot 3 cannot be read
    with pytest.raises(IndexError):
        cache.move_slots(torch.tensor([0]), torch.tensor([3]), torch.tensor([0]))
    assert torch.equal(cache.slot_layers[0].keys, before[0][0])
