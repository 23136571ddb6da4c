"""`QuantizedCache`: keys and values of attention in 8 or 4 bits, for the models and the `generate` of transformers.

    model.generate(ids, cache=QuantizedCache(model.config, bits=4))

The last tokens stay in float; whole blocks of older ones are packed (`cache_blocks`). What a layer gives to attention
is decoded each time, for one layer at a time, and new tokens reach it as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from spicerack.errors import ShapeError, UsageError
from spicerack.nn.cache_blocks import TOKENS, Blocks, CacheScheme, encode


class QuantizedLayer(DynamicLayer):
    """Keys and values of one attention layer. keys, values [B, H, r, D]: the last r tokens, in float.

    A rollback (`crop`) behind the float tokens keeps what was rounded, so that `is_croppable`, which promises the bits
    from before, is False and transformers' assisted decoding refuses this cache.
    """

    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, scheme: CacheScheme) -> None:
        DynamicLayer.__init__(self)
        self.scheme = scheme
        self.packed: tuple[Blocks, Blocks] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Without tokens, in the type, shape and place of these [B, H, n, D]."""
        if key_states.dim() != 4 or key_states.shape[:3] != value_states.shape[:3]:
            raise ShapeError(
                f"keys {list(key_states.shape)}, values {list(value_states.shape)}", "a cache takes [B, H, n, D]"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, n, D] -> all keys and values [B, H, N, D], decoded. Raises ShapeError, ActivationError."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat((self.keys, key_states), dim=2)
        self.values = torch.cat((self.values, value_states), dim=2)
        whole = self._decoded()
        self._pack()
        return whole

    def _decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.packed is None:
            return self.keys, self.values
        return _joined(self.packed[0], self.keys), _joined(self.packed[1], self.values)

    def _pack(self) -> None:
        """Blocks of the oldest float tokens, as long as `residual` are left."""
        count = max(self.keys.shape[2] - self.scheme.residual, 0) // TOKENS * TOKENS
        if not count:
            return
        keys = encode(self.keys[:, :, :count], self.scheme, self.scheme.keys)
        values = encode(self.values[:, :, :count], self.scheme, self.scheme.values)
        self.packed = (keys, values) if self.packed is None else (
            self.packed[0].append(keys), self.packed[1].append(values)
        )  # fmt: skip
        # Copies: a view would keep the memory of what was packed.
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()

    @property
    def stored(self) -> int:
        """Tokens that are held."""
        if not self.is_initialized:
            return 0
        return int(self.keys.shape[2]) + (self.packed[0].tokens if self.packed is not None else 0)

    def get_seq_length(self) -> int:
        """Tokens that the layer has seen."""
        return self.stored

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens (a number not above 0, as in transformers). Raises UsageError."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.stored:
            raise UsageError(
                f"crop({tokens_to_remove}) of a cache of {self.stored} tokens", "give minus the tokens to remove"
            )
        if not self.is_initialized or not tokens_to_remove:
            return
        left, floats = self.stored + tokens_to_remove, int(self.keys.shape[2])
        if -tokens_to_remove <= floats or self.packed is None:
            keep = floats + tokens_to_remove
            self.keys, self.values = self.keys[:, :, :keep].clone(), self.values[:, :, :keep].clone()
            return
        whole, rest = divmod(left, TOKENS)
        tails = []
        for blocks, floating in zip(self.packed, (self.keys, self.values), strict=True):
            tail = _joined(blocks.blocks(whole, whole + 1), floating[:, :, :0])  # a block that is cut, or none
            tails.append(tail[:, :, :rest].clone())
        self.keys, self.values = tails
        self._keep_blocks(0, whole)

    def _keep_blocks(self, first: int, last: int) -> None:
        if self.packed is not None:
            keys, values = self.packed
            self.packed = (keys.blocks(first, last), values.blocks(first, last)) if last > first else None

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the sequences, axis 0 of every tensor."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            if self.packed is not None:
                self.packed = self.packed[0].map(change), self.packed[1].map(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """For beam search: sequence i becomes what sequence beam_idx[i] was."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences."""
        self._each(lambda t: t[indices])

    def reset(self) -> None:
        """As new."""
        self.packed = None
        super().reset()


class QuantizedSlidingLayer(QuantizedLayer):
    """The same for attention that sees the last `sliding_window` tokens: blocks wholly before them are dropped."""

    is_sliding = True

    def __init__(self, scheme: CacheScheme, sliding_window: int) -> None:
        super().__init__(scheme)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Drop nothing until `crop`."""
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, n, D] -> the last sliding_window - 1 + n keys and values, or as many as there were."""
        seen = self.get_mask_sizes(key_states.shape[2])[0]
        self.cumulative_length += int(key_states.shape[2])
        keys, values = super().update(key_states, value_states)
        if not self.record_past:
            self._drop()
        return keys[:, :, keys.shape[2] - seen :], values[:, :, values.shape[2] - seen :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that `update` will return for so many new ones, and the position of the first of them."""
        past = min(self.cumulative_length, self.sliding_window - 1)
        return past + query_length, self.cumulative_length - past

    def get_seq_length(self) -> int:
        """Tokens that the layer has seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """As transformers defines it: the window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. Raises UsageError if the window before them is gone already."""
        left = self.cumulative_length + tokens_to_remove
        if tokens_to_remove <= 0 and self.stored + tokens_to_remove < min(left, self.sliding_window - 1):
            raise UsageError(
                f"crop({tokens_to_remove}): the {self.sliding_window} tokens before are not there any more",
                "call activate_past_recording first",
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = left
        self._drop()

    def _drop(self) -> None:
        gone = max(self.stored - (self.sliding_window - 1), 0)
        blocks = 0 if self.packed is None else self.packed[0].tokens // TOKENS
        if gone >= TOKENS and blocks:
            self._keep_blocks(min(gone // TOKENS, blocks), blocks)
        if self.packed is None and self.stored > self.sliding_window - 1:
            first = self.stored - (self.sliding_window - 1)
            self.keys, self.values = self.keys[:, :, first:].clone(), self.values[:, :, first:].clone()

    def reset(self) -> None:
        """As new."""
        super().reset()
        self.cumulative_length = 0


class QuantizedCache(Cache):
    """A cache for models with this config. bits: 8 or 4.

    Raises SchemeError for other widths, UsageError for a model that keeps something else than keys and values.
    """

    def __init__(self, config: PreTrainedConfig, bits: int = 8, *, scheme: CacheScheme | None = None) -> None:
        self.scheme = scheme or CacheScheme(bits)
        super().__init__(layers=layers_for(config, self.scheme))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache keeps between two calls."""
        return nbytes(self)


def layers_for(config: PreTrainedConfig, scheme: CacheScheme) -> list[Any]:
    """A fresh layer for each of a model's layers, in place of those that transformers would make. Raises UsageError."""
    layers: list[Any] = []
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            layers.append(QuantizedLayer(scheme))
        elif type(layer) is DynamicSlidingWindowLayer:
            layers.append(QuantizedSlidingLayer(scheme, layer.sliding_window))
        elif type(layer) is DummyLayer:  # shares another layer's keys, or has no attention
            layers.append(layer)
        else:
            raise UsageError(
                f"{config.model_type}: layer {number} keeps a {type(layer).__name__}, not keys and values alone",
                "load it without cache",
            )
    windows = [layer.sliding_window for layer in layers if isinstance(layer, QuantizedSlidingLayer)]
    if windows and max(windows) < scheme.residual + TOKENS and not any(type(x) is QuantizedLayer for x in layers):
        raise UsageError(
            f"{config.model_type}: in its window of {max(windows)} tokens no block would ever be packed",
            f"{scheme.residual} stay in float and blocks have {TOKENS}: load it without cache",
        )
    return layers


def nbytes(cache: Cache) -> int:
    """Bytes of memory that any cache, quantized or not, keeps between two calls; storages count whole."""
    tensors = [t for layer in cache.layers for t in _tensors(vars(layer)) if t.dim()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(held: object) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Blocks):
        yield from (held.codes, held.scale, held.low)
    elif isinstance(held, (dict, list, tuple)):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors(part)


def _joined(blocks: Blocks, tail: torch.Tensor) -> torch.Tensor:
    """[B, H, n * 32 + r, D] from packed tokens and the float ones [B, H, r, D] behind them."""
    batch, heads, count, width = tail.shape
    out = tail.new_empty(batch, heads, blocks.tokens + count, width)
    blocks.decode(out[:, :, : blocks.tokens])
    out[:, :, blocks.tokens :] = tail
    return out
