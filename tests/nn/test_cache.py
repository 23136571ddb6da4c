"""The quantized cache: its error in closed form, its bytes by formula, and its layers beside transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
)
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

import spicerack
from spicerack.errors import ActivationError, SchemeError, ShapeError, UsageError
from spicerack.nn import cache_segments
from spicerack.nn.cache import QuantizedCache, QuantizedLayer, QuantizedSlidingLayer, nbytes
from spicerack.nn.cache_segments import TOKENS, CacheScheme, Share, encode, packed_bytes

SHARES: tuple[Share, ...] = ("channel", "token")
CONFIG = LlamaConfig(num_hidden_layers=2)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- segments --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 4]), share=st.sampled_from(SHARES), segments=st.integers(1, 3), heads=st.integers(1, 2),
    width=st.sampled_from([1, 5, 16, 32, 64]), offset=st.sampled_from([0.0, 1.0, -300.0, 1000.0]),
    spread=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 50.0]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
@example(8, "channel", 1, 1, 16, 1.0, 1e-3, 0, torch.float32)  # low is rounded by more than a step
@example(8, "token", 1, 1, 16, -300.0, 1e-3, 0, torch.float32)
@example(4, "channel", 1, 1, 16, 0.0, 1e-7, 0, torch.float32)  # a step among float16's subnormals
def test_no_number_moves_by_more_than_half_a_step(
    bits: int, share: Share, segments: int, heads: int, width: int, offset: float, spread: float, seed: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    x = (values(2, heads, segments * TOKENS, width, seed=seed) * spread + offset).to(dtype)
    packed = encode(x, CacheScheme(bits, group=16), share)
    out = torch.empty_like(x, dtype=torch.float32)
    packed.decode(out)
    step = packed.scale.float().expand(
        2, heads, segments, TOKENS, -1, -1 if share == "channel" else width // packed.low.shape[4]
    )
    error = (out.double() - x.double()).abs()
    rounding = torch.finfo(torch.float32).eps * (
        3 * x.double().abs().max() + 1e-3
    )  # of float32 arithmetic: low, product, sum
    assert (error <= step.reshape(x.shape).double() / 2 + rounding).all()
    # The step is as small as it can be: range / levels, beyond what float16 adds to low and to itself.
    full = x.float().unflatten(2, (-1, TOKENS)).unflatten(-1, (packed.scale.shape[4], -1))
    low, high = torch.aminmax(full, dim=3 if share == "channel" else 5, keepdim=True)
    most = (high - low + 2**-10 * low.abs() + 2**-23) * (1 + 2**-9) / (2**bits - 1) + 2**-23
    assert (packed.scale.float() <= most).all()


@pytest.mark.parametrize("share", SHARES)
def test_four_bit_codes_are_where_the_layout_says(share: Share) -> None:
    x = values(1, 2, 2 * TOKENS, 32)
    packed = encode(x, CacheScheme(4), share)
    assert packed.codes.shape == (1, 2, 2, TOKENS // 2, 32) and packed.codes.dtype == torch.uint8
    codes = torch.cat((packed.codes & 15, packed.codes >> 4), dim=3).unsqueeze(4)
    exact = packed.low.double() + packed.scale.double() * codes
    out = torch.empty_like(x)
    packed.decode(out)
    assert torch.allclose(out.double(), exact.reshape(x.shape), rtol=0, atol=1e-6)
    assert codes.unique().tolist() == list(range(16)), "every level is used"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("width", [20, 64])
def test_bytes_are_those_of_the_formula(bits: int, share: Share, width: int) -> None:
    scheme = CacheScheme(bits, group=32)
    packed = encode(values(2, 3, 64, width), scheme, share)
    held = packed.codes.nbytes + packed.scale.nbytes + packed.low.nbytes
    assert held == 6 * packed_bytes(scheme, 64, width, share)
    groups = {("channel", 20): 40, ("channel", 64): 128, ("token", 20): 64, ("token", 64): 128}[share, width]
    assert packed_bytes(scheme, 64, width, share) == 64 * width * bits // 8 + 4 * groups


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1e5, 3e38])
def test_what_float16_cannot_hold_is_refused(bad: float) -> None:
    x = values(1, 1, TOKENS, 16)
    x[0, 0, 3, 5] = bad
    for share in SHARES:
        with pytest.raises(ActivationError, match="do not fit a quantized cache"):
            encode(x, CacheScheme(8), share)


@pytest.mark.parametrize("bits", [3, 2, 16, 0])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(SchemeError, match="use 8 or 4"):
        QuantizedCache(CONFIG, bits)
    with pytest.raises(SchemeError, match="use 8 or 4"):
        spicerack.load("there is no such folder, and it does not matter", cache=bits)
    with pytest.raises(UsageError, match="bits is True"):
        QuantizedCache(CONFIG, True)


# ---- layers, beside transformers' own --------------------------------------------------------------------------------


def layer(bits: int = 8, window: int | None = None, residual: int = 32) -> QuantizedLayer:
    scheme = CacheScheme(bits, residual=residual)
    return QuantizedLayer(scheme) if window is None else QuantizedSlidingLayer(scheme, window)


def fed(
    cache: Any, steps: list[int], width: int = 16, seed: int = 0, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives tokens in these steps -> last keys and values from `update`, and all keys that went in."""
    keys = values(batch, 2, sum(steps), width, seed=seed)
    for part in keys.split(steps, dim=2):
        out = cache.update(part, -part)
    return out[0], out[1], keys


def near(got: torch.Tensor, want: torch.Tensor, bits: int) -> bool:
    """Within half a step of a range below 10 (normal numbers), and what float16 adds."""
    return got.shape == want.shape and bool((got - want).abs().max() <= 0.5 * 10 / (2**bits - 1) + 0.01)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("steps", [[1] * 120, [100, 1, 1, 40], [7, 31, 33, 64, 1], [200]])
def test_a_layer_gives_back_what_it_was_given(bits: int, steps: list[int]) -> None:
    cache = layer(bits)
    keys, out, given = fed(cache, steps)
    assert near(keys, given, bits) and near(out, -given, bits)
    total, new = sum(steps), steps[-1]
    assert cache.get_seq_length() == total and cache.get_mask_sizes(5) == (total + 5, 0)
    assert torch.equal(keys[:, :, -max(new, 32) :], given[:, :, -max(new, 32) :]), (
        "new tokens and the last 32 are float"
    )
    if len(steps) > 1:
        assert not torch.equal(keys, given), "older ones are not"
    packed = (total - 32) // TOKENS * TOKENS
    assert cache.keys.shape[2] == total - packed and 32 <= cache.keys.shape[2] < 64


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [10, 63, 64, 400])
def test_memory_shrinks_as_the_formula_says(bits: int, tokens: int) -> None:
    cache = QuantizedCache(CONFIG, bits)
    scheme = cache.scheme
    for number in range(2):
        cache.update(*[values(3, 2, tokens, 16, dtype=torch.bfloat16)] * 2, number)
    packed = max(tokens - 32, 0) // TOKENS * TOKENS
    each = packed_bytes(scheme, packed, 16, "channel") + packed_bytes(scheme, packed, 16, "token")
    assert cache.nbytes == nbytes(cache) == 2 * 3 * 2 * (each + 2 * (tokens - packed) * 16 * 2)
    plain = DynamicCache(config=CONFIG)
    for number in range(2):
        plain.update(*[values(3, 2, tokens, 16, dtype=torch.bfloat16).clone() for _ in range(2)], number)
    assert nbytes(plain) == 2 * 2 * 3 * 2 * tokens * 16 * 2
    plain.layers[0].keys = torch.zeros(1000)[:10]
    plain.layers[0].values = plain.layers[0].keys[5:]
    assert nbytes(plain) == 4000 + 2 * 3 * 2 * tokens * 16 * 2, "a view keeps the whole, and shared memory counts once"


def test_batches_are_reordered_repeated_and_selected() -> None:
    cache = layer()
    before = fed(cache, [50, 70], batch=3)[2]
    held = [t.clone() for t in cache._decoded()]
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert all(torch.equal(a, b[order]) for a, b in zip(cache._decoded(), held, strict=True))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert all(torch.equal(a, b[[2, 0]]) for a, b in zip(cache._decoded(), held, strict=True))
    assert near(cache._decoded()[0], before[[2, 0]], 8)


@pytest.mark.parametrize("remove", [0, 1, 20, 40, 41, 56, 57, 100, 119, 120])
def test_crop_leaves_the_tokens_before(remove: int) -> None:
    cache = layer()
    given = fed(cache, [100, 20])[2]
    held = cache._decoded()[0].clone()
    cache.crop(-remove)
    left = 120 - remove
    assert cache.get_seq_length() == left and torch.equal(cache._decoded()[0], held[:, :, :left])
    more = values(2, 2, 70, 16, seed=5)
    keys = cache.update(more, more)[0]
    assert near(keys, torch.cat((given[:, :, :left], more), dim=2), 8)
    assert cache.packed is not None
    packed, floats = cache.packed[0].tokens, cache.keys.shape[2]
    each = packed_bytes(cache.scheme, packed, 16, "channel") + packed_bytes(cache.scheme, packed, 16, "token")
    assert packed + floats == left + 70 and floats >= 32
    assert nbytes(Cache(layers=[cache])) == 2 * 2 * (each + 2 * floats * 16 * 4), "nothing that was cut is kept"


def test_crop_refuses_what_it_cannot_do_and_reset_empties() -> None:
    cache = layer()
    fed(cache, [100])
    for wrong in (1, -101):
        with pytest.raises(UsageError, match="minus the tokens"):
            cache.crop(wrong)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.packed is None
    assert fed(cache, [5])[0].shape[2] == 5
    with pytest.raises(ShapeError, match=r"\[B, H, n, D\]"):
        layer().update(values(2, 3), values(2, 3))


@pytest.mark.parametrize("window", [2, 20, 40, 100])
@pytest.mark.parametrize("steps", [[1] * 90, [150, 1, 1, 60, 1], [30, 10, 100, 7]])
def test_sliding_layers_return_what_transformers_own_do(window: int, steps: list[int]) -> None:
    ours, theirs = layer(8, window, residual=8), DynamicSlidingWindowLayer(window)
    for number, part in enumerate(values(2, 2, sum(steps), 16).split(steps, dim=2)):
        assert ours.get_mask_sizes(part.shape[2]) == theirs.get_mask_sizes(part.shape[2])
        for got, want in zip(ours.update(part, -part), theirs.update(part, -part), strict=True):
            assert near(got, want, 8), number
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.stored < window + TOKENS + 8 + TOKENS, "old segments are dropped"


def test_sliding_layers_roll_back_while_they_record() -> None:
    cache = layer(8, 20, residual=8)
    fed(cache, [60])
    with pytest.raises(UsageError, match="activate_past_recording"):
        cache.crop(-40)
    assert isinstance(cache, QuantizedSlidingLayer)
    cache.activate_past_recording()
    held = cache._decoded()[0][:, :, -19:].clone()
    more = values(2, 2, 45, 16, seed=3)
    cache.update(more, more)
    cache.crop(-45)
    assert cache.get_seq_length() == 60
    assert near(cache._decoded()[0][:, :, -19:], held, 8)


def test_windows_too_short_to_be_packed_are_refused() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=63)
    with pytest.raises(UsageError, match="window of 63 tokens"):
        QuantizedCache(config, 8)
    config.sliding_window = 64
    cache = QuantizedCache(config, 8)
    fed(cache.layers[0], [50, *[1] * 14])
    assert cache.layers[0].packed is not None


def test_the_segments_are_as_the_docs_say() -> None:
    assert cache_segments.TOKENS == 32 and CacheScheme(4) == CacheScheme(4, 32, 32, "channel", "token")
