"""Memory with room for the next tokens: transformers' own cache, token by token, without its copies."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from reinforce import kv_cache, sampler
from reinforce.kv_cache import RoomyLayer, give_room
from reinforce.sampler import Sampling, row_seed, sample

PROMPTS = [[1, 5, 9], [1, 7, 4, 4, 8]]
SEEDS = [row_seed(0, 0, i, k) for i in range(2) for k in range(3)]


def states(n, rows, draw):
    return [torch.randn(rows, 2, n, 4, generator=draw) for _ in range(2)]


@given(st.lists(st.tuples(st.sampled_from(["token", "tokens", "rows", "crop"]), st.integers(0, 2**16)), max_size=12))
def test_a_layer_holds_what_the_plain_one_holds_after_any_calls(calls):
    draw, rows = torch.Generator().manual_seed(0), 4
    plain, roomy = DynamicCache(), DynamicCache()
    for cache, x in zip((plain, roomy), [states(5, rows, draw)] * 2, strict=True):
        cache.update(*x, 0)
    before, kv_cache.ROOM = kv_cache.ROOM, 2  # else twelve calls never fill it
    try:
        give_room(roomy)
        assert type(roomy.layers[0]) is RoomyLayer
        for call, number in calls:
            if call == "rows":
                kept = torch.arange(rows)[torch.arange(rows) != number % rows] if rows > 1 else torch.arange(1)
                rows = len(kept)
                plain.batch_select_indices(kept)
                roomy.batch_select_indices(kept)
            elif call == "crop":
                plain.crop(-1)
                roomy.crop(-1)
            else:
                x = states(1 if call == "token" else 1 + number % 4, rows, draw)
                for a, b in zip(plain.update(*x, 0), roomy.update(*x, 0), strict=True):
                    assert torch.equal(a, b)
            assert torch.equal(plain.layers[0].keys, roomy.layers[0].keys)
            assert torch.equal(plain.layers[0].values, roomy.layers[0].values)
            assert plain.get_seq_length() == roomy.get_seq_length()
    finally:
        kv_cache.ROOM = before


def test_a_new_token_is_written_in_place():
    draw = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    cache.update(*states(5, 4, draw), 0)
    give_room(cache)
    places = {cache.update(*states(1, 4, draw), 0)[0].data_ptr() for _ in range(kv_cache.ROOM)}
    assert len(places) == 1


def test_under_autocast_keys_are_kept_in_the_type_that_attention_casts_them_to():
    cache = DynamicCache()
    cache.update(*states(5, 4, torch.Generator().manual_seed(0)), 0)
    with torch.autocast("cpu", torch.bfloat16):
        give_room(cache)
        keys, values = cache.update(*states(1, 4, torch.Generator().manual_seed(1)), 0)
    assert keys.dtype == values.dtype == torch.bfloat16


def test_a_layer_of_another_kind_stays():
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    cache.update(*states(5, 4, torch.Generator().manual_seed(0)), 0)
    give_room(cache)
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("room", [1, 64])
def test_tokens_and_log_probs_are_the_same_to_the_last_bit(make, bf16, room, monkeypatch):
    model, how = make(), Sampling(12, tuple(range(2, 9)), 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        monkeypatch.setattr(kv_cache, "ROOM", room)
        ours = sample(model, PROMPTS, SEEDS, how)
        monkeypatch.setattr(sampler, "give_room", lambda cache: None)
        plain = sample(model, PROMPTS, SEEDS, how)
    assert len(ours.mask.sum(1).unique()) > 1  # rows have left the batch
    assert torch.equal(ours.response, plain.response)
    assert torch.equal(ours.logp, plain.logp)
