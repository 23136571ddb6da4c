"""`QuantizedCache`: keys and values of attention in 8 or 4 bits, for the models and the `generate` of transformers.

    model.generate(ids, cache=QuantizedCache(model.config, bits=4))

The last tokens stay in float; whole segments of older ones are packed (`cache_segments`). What a layer gives to
attention is decoded each time, for one layer at a time, and new tokens reach it as they are. So memory is that of the
packed segments and one decoded layer, and each step pays for decoding the whole cache. Given up is the way back: a
segment that was packed is never again what it was, so that whoever rolls back past it gets rounded numbers (assisted
decoding is refused).

Layers are subclasses of transformers' own, because its models ask a cache's layers for sizes and masks by methods that
change with its versions: what is not overridden here is as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from spicerack.arguments import checked
from spicerack.errors import ShapeError, UsageError
from spicerack.nn.cache_segments import TOKENS, CacheScheme, Segments, encode


class QuantizedLayer(DynamicLayer):
    """Keys and values of one attention layer, in place of transformers' `DynamicLayer`.

    keys, values   [B, H, r, D]: the last r tokens, in float
    packed         segments of keys and of values, all tokens before those; None if there are none

    A rollback (`crop`) behind the float tokens keeps what was rounded, so that `is_croppable`, which promises the bits
    from before, is False and transformers' assisted decoding refuses this cache.
    """

    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, scheme: CacheScheme) -> None:
        DynamicLayer.__init__(self)
        self.scheme = scheme
        self.packed: tuple[Segments, Segments] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Become a layer without tokens, in the type, width and place of these [B, H, n, D], as transformers does at
        first use.

        The widths of keys and values may differ, their other axes may not: ShapeError.
        """
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
        """Append n tokens [B, H, n, D] -> all N keys and values [B, H, N, D], decoded, the new ones as they came.

        What is packed by this call is decoded from the next one on. Raises ShapeError, and ActivationError for numbers
        that are not finite or beyond float16.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat((self.keys, key_states), dim=2)
        self.values = torch.cat((self.values, value_states), dim=2)
        whole = self._decoded()
        self._pack()
        return whole

    def _decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [B, H, N, D], in the type that they came in: packed tokens decoded, float ones behind
        them."""
        if self.packed is None:
            return self.keys, self.values
        return _joined(self.packed[0], self.keys), _joined(self.packed[1], self.values)

    def _pack(self) -> None:
        """Pack whole segments of the oldest float tokens, as long as `residual` of them are left.

        So between `residual` and residual + 31 tokens are in float: the last ones matter most to what comes next, and a
        segment that is not full would have a scale that later tokens do not fit.
        """
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
        """Number of tokens that are held, packed or not."""
        if not self.is_initialized:
            return 0
        return int(self.keys.shape[2]) + (self.packed[0].tokens if self.packed is not None else 0)

    def get_seq_length(self) -> int:
        """Number of tokens that came in so far, less those that were cropped."""
        return self.stored

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens (a number not above 0, as in transformers).

        Where the cut goes through a packed segment, the segment's other tokens become float ones, decoded. Raises
        UsageError for a number above 0, or for more tokens than there are.
        """
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
        for segments, floating in zip(self.packed, (self.keys, self.values), strict=True):
            tail = _joined(segments.part(whole, whole + 1), floating[:, :, :0])  # a segment that is cut, or none
            tails.append(tail[:, :, :rest].clone())
        self.keys, self.values = tails
        self._keep_segments(0, whole)

    def _keep_segments(self, first: int, last: int) -> None:
        """Of the packed segments keep number `first` to `last`, the latter left out; none at all makes `packed`
        None."""
        if self.packed is not None:
            keys, values = self.packed
            self.packed = (keys.part(first, last), values.part(first, last)) if last > first else None

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change`, which acts on sequences, the first axis, to every tensor that is held."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            if self.packed is not None:
                self.packed = self.packed[0].map(change), self.packed[1].map(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """For beam search: sequence i becomes what sequence beam_idx[i] was."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold each sequence `repeats` times, one copy behind the other."""
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Hold these sequences only, in this order."""
        self._each(lambda t: t[indices])

    def reset(self) -> None:
        """Forget all tokens, and be as new."""
        self.packed = None
        super().reset()


class QuantizedSlidingLayer(QuantizedLayer):
    """The same for attention that sees the last `sliding_window` tokens: segments wholly before them are dropped.

    cumulative_length: tokens that came in so far. record_past: nothing is dropped until `crop`, which assisted decoding
    asks for.
    """

    is_sliding = True

    def __init__(self, scheme: CacheScheme, sliding_window: int) -> None:
        super().__init__(scheme)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Drop no token from now on until `crop` is called."""
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append n tokens [B, H, n, D] -> the last sliding_window - 1 + n keys and values, or as many as there were.

        The first of the new tokens sees sliding_window - 1 before it. Raises as `QuantizedLayer.update` does.
        """
        visible = self.get_mask_sizes(key_states.shape[2])[0]
        self.cumulative_length += int(key_states.shape[2])
        keys, values = super().update(key_states, value_states)
        if not self.record_past:
            self._drop()
        return keys[:, :, keys.shape[2] - visible :], values[:, :, values.shape[2] - visible :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of tokens that `update` will return for so many new ones, and the position of the first of them."""
        past = min(self.cumulative_length, self.sliding_window - 1)
        return past + query_length, self.cumulative_length - past

    def get_seq_length(self) -> int:
        """Number of tokens that came in so far, dropped ones too."""
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
        """Drop what no later token will see: whole segments, then, if none is left, float tokens."""
        gone = max(self.stored - (self.sliding_window - 1), 0)
        count = 0 if self.packed is None else self.packed[0].tokens // TOKENS
        if gone >= TOKENS and count:
            self._keep_segments(min(gone // TOKENS, count), count)
        if self.packed is None and self.stored > self.sliding_window - 1:
            first = self.stored - (self.sliding_window - 1)
            self.keys, self.values = self.keys[:, :, first:].clone(), self.values[:, :, first:].clone()

    def reset(self) -> None:
        """Forget all tokens, and be as new."""
        super().reset()
        self.cumulative_length = 0


class QuantizedCache(Cache):
    """A cache of keys and values in few bits, for any transformers model: `model.generate(ids, cache=...)`.

    config: of the model that will fill it. bits: 8 or 4, of a packed number. scheme: says that and more, such as how
    many tokens stay in float; it wins over bits. Raises SchemeError for other widths, UsageError for a model that keeps
    something else than keys and values.
    """

    @checked
    def __init__(self, config: PreTrainedConfig, bits: int = 8, *, scheme: CacheScheme | None = None) -> None:
        self.scheme = scheme or CacheScheme(bits)
        super().__init__(layers=layers_for(config, self.scheme))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache keeps between two calls."""
        return nbytes(self)


def layers_for(config: PreTrainedConfig, scheme: CacheScheme) -> list[Any]:
    """A fresh layer for each of a model's layers, in place of those that transformers would make.

    config: of the model, which transformers' own cache is asked about: a layer is packed where that has keys and
    values, whole or of a window. scheme: how they are stored. Layers without keys of their own get transformers'.
    Raises UsageError for a layer that keeps something else (the state of a recurrence), and for a model in whose
    windows no segment would ever be packed.
    """
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
    """The tensors in an attribute of a layer, in containers and packed segments too; each as often as it is met."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Segments):
        yield from (held.codes, held.scale, held.low)
    elif isinstance(held, (dict, list, tuple)):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors(part)


def _joined(segments: Segments, tail: torch.Tensor) -> torch.Tensor:
    """[B, H, n * 32 + r, D] from packed tokens and the float ones [B, H, r, D] behind them, in the float ones' type.

    One tensor is made and written to: decoding into it saves a copy of all that is packed.
    """
    batch, heads, count, width = tail.shape
    out = tail.new_empty(batch, heads, segments.tokens + count, width)
    segments.decode(out[:, :, : segments.tokens])
    out[:, :, segments.tokens :] = tail
    return out
