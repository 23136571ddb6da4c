"""Let a transformers model quantize its key-value cache by itself: in `generate`, and in `forward` with `use_cache`.

Who generates with a model makes no cache and passes none; the model, or `generate`, does. So the decision cannot be
left to callers: a hook of torch on the decoder meets every call. Where the model would make a cache, it gets a
quantized one; an empty `DynamicCache`, such as `generate` makes, gets quantized layers instead of its own and stays the
object that its caller holds. Nothing of transformers is replaced.

What is given up. A cache that has tokens in float already is refused, because they cannot be packed as if they had been
from the start; so are caches that offload, or are of other classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer

from spicerack.errors import UsageError
from spicerack.models.families.names import KEY_VALUE_CACHES
from spicerack.nn.cache import QuantizedCache, QuantizedLayer, layers_for
from spicerack.nn.cache_segments import CacheScheme


@dataclass(frozen=True, slots=True)
class _Hook:
    """Called before the decoder's forward, and may change its arguments.

    config       of the decoder
    scheme       of the caches that it makes
    parameters   names of forward's arguments, in order
    name         that of the cache among them
    """

    config: PreTrainedConfig
    scheme: CacheScheme
    parameters: tuple[str, ...]
    name: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with a quantized cache where the model would make one of its own; None leaves them alone."""
        given = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        cache = next((given[name] for name in KEY_VALUE_CACHES if given.get(name) is not None), None)
        if cache is not None:
            self._adopt(cache)
            return None
        wanted = given.get("use_cache")
        if not (self.config.use_cache if wanted is None else wanted):
            return None
        return (), {**given, self.name: QuantizedCache(self.config, scheme=self.scheme)}

    def _adopt(self, cache: object) -> None:
        """Give a cache that was passed quantized layers, if it has no tokens yet. Raises UsageError if it has."""
        if isinstance(cache, Cache) and cache.layers and all(map(_ours, cache.layers)):
            return
        if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
            cache.layers = layers_for(self.config, self.scheme)
            return
        filled = isinstance(cache, DynamicCache) and cache.get_seq_length()
        raise UsageError(
            f"the model was loaded with a cache of {self.scheme.bits} bits and was given a {type(cache).__name__}"
            + (" with tokens in float" if filled else ""),
            "give it none, or a spicerack.QuantizedCache; or load it without cache",
        )


def use_quantized_cache(model: PreTrainedModel, bits: int) -> None:
    """From now on `model` keeps keys and values in 8 or 4 bits. Who passes a `QuantizedCache` gets what that says.

    The model is changed in place: its decoder gets a hook, which stays. bits: of a packed number. Raises SchemeError
    for other widths, UsageError for encoders and for models whose cache is not (or not only) keys and values:
    encoder-decoders, state spaces, linear attention.
    """
    scheme = CacheScheme(bits)
    name = type(model).__name__
    if model.config.is_encoder_decoder or not model.can_generate():
        reason = "is an encoder-decoder model" if model.config.is_encoder_decoder else "does not generate text"
        raise UsageError(
            f"{name} {reason}: there is no cache to quantize", "only decoders have one; load without cache"
        )
    typed: Any = model
    decoder: nn.Module = typed.get_decoder()
    parameters = tuple(inspect.signature(decoder.forward).parameters)
    names = [cache for cache in KEY_VALUE_CACHES if cache in parameters]
    if not names:
        raise UsageError(f"{name} takes no cache that could be quantized", "load it without cache")
    kept = inspect.signature(decoder.forward).parameters[names[0]].annotation
    own = [part for part in get_args(kept) or (kept,) if isinstance(part, type) and part not in (type(None), Any)]
    if own and not any(issubclass(part, Cache) for part in own):
        raise UsageError(f"{name} keeps a {own[0].__name__}, not keys and values alone", "load it without cache")
    config = model.config.get_text_config(decoder=True)
    layers_for(config, scheme)
    decoder.register_forward_pre_hook(_Hook(config, scheme, parameters, names[0]), with_kwargs=True)


def _ours(layer: object) -> bool:
    """Whether a cache's layer is as `layers_for` makes them."""
    return isinstance(layer, (QuantizedLayer, DummyLayer))
