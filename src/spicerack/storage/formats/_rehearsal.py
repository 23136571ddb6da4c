"""Whether transformers can load a compressed-tensors folder: its own loading, rehearsed without a weight or a file.

    choose   how `from_pretrained` loads it, or why it fails or leaves a parameter unfilled

The model is on the meta device, and so are the tensors that the folder will have: what runs is transformers' code for
names, conversions and missing parameters, with the numbers left out. compressed-tensors is not needed for that; what it
does to a model before loading is to put tensors of other names in the place of `weight`.

What the float folder of the same model does is subtracted: it is loaded in the same way beside it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from spicerack.storage.format import Layout, StoredTensor

if TYPE_CHECKING:
    from transformers import CompressedTensorsConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.quantizers.base import HfQuantizer

_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
           ValueError)  # fmt: skip
"""What initialisers and conversions raise where a weight is not what they look for."""
_FEW = 2
"""Layers that are loaded of each kind, beside the last: one may be the first, which is special in some families."""
_LENGTH = 160
"""Characters of somebody else's message that are quoted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a loading.

    unfilled   parameters that no tensor reached, or one of another shape
    errors     what was raised on the way, as sentences
    """

    unfilled: frozenset[str]
    errors: tuple[str, ...]


def choose(
    model: PreTrainedModel,
    tensors: Layout,
    packed: Mapping[str, tuple[StoredTensor, Layout]],
    paths: Mapping[str, str],
    ways: Sequence[bool],
) -> tuple[bool, str | None]:
    """The first of `ways` in which transformers loads the folder, and None; else the first, and why it does not.

    model: float, on the meta device; it is not changed. tensors: of the float folder. packed: module of the checkpoint
    -> what is packed there, and its tensors in the folder. paths: module of the checkpoint -> path of the layer in the
    model; modules that are stacked while loading have none. ways: whether the folder says `dequantize`.

    Of layers that are alike a few are loaded, and the others left empty.
    """
    loaded = {name: tensors[name] for name in _alike(tensors)}
    modules = [module for module in (name.removesuffix(".weight") for name in loaded) if module in packed]
    stored = {name: header for name, header in loaded.items() if name.removesuffix(".weight") not in modules}
    for module in modules:
        stored |= packed[module][1]
    before = _loaded(copy.deepcopy(model), loaded, None)
    obstacles = []
    for decode in ways:
        quantizer, ready = _quantizer(decode, _columns(packed)), copy.deepcopy(model)
        layers = {} if decode else {paths[module]: (module, packed[module][1]) for module in modules if module in paths}
        half_tied = None if decode else _half_tied(model, set(paths.values()))
        obstacles.append(half_tied or _obstacle(ready, quantizer, layers, stored, before))
        if obstacles[-1] is None:
            return decode, None
    return ways[0], obstacles[0]


def _alike(tensors: Iterable[str]) -> list[str]:
    """Those of the first two and the last of each kind of layer: the names that differ in the first number alone."""
    kinds: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in tensors:
        number = re.search(r"[0-9]+|$", name)
        assert number is not None, "the end of a name is always found"
        before, behind = name[: number.start()], name[number.end() :]
        kinds.setdefault((before, re.sub(r"[0-9]+", "0", behind)), {}).setdefault(number[0], []).append(name)
    return [
        name
        for kind in kinds.values()
        for layer in dict.fromkeys([*list(kind)[:_FEW], list(kind)[-1]])
        for name in kind[layer]
    ]


def _half_tied(model: PreTrainedModel, packed: set[str]) -> str | None:
    """Which float layer reads the codes of another as its weight, by being tied to it; None if there is none.

    packed: paths of the layers that have codes.
    """
    for alias, owner in model.all_tied_weights_keys.items():
        if owner.rpartition(".")[0] in packed and alias.rpartition(".")[0] not in packed:
            return f"{alias} is tied to {owner}, which is packed, and would be read as it lies"
    return None


def _obstacle(
    model: PreTrainedModel,
    quantizer: HfQuantizer,
    layers: Mapping[str, tuple[str, Layout]],
    stored: Layout,
    before: Outcome,
) -> str | None:
    """Why the folder does not load; None if it does.

    model: is changed. layers: path -> module of the checkpoint, and the tensors that it has in the place of `weight`.
    stored: the folder's tensors. before: what became of the float folder.
    """
    try:
        quantizer._convert_model_for_quantization(model)
        for path, (module, layout) in layers.items():
            _put(model, path, layout, module)
    except _ERRORS as error:
        return _told(error)
    after = _loaded(model, stored, quantizer)
    news = [error for error in after.errors if error not in before.errors]
    if news:
        return news[0]
    unfilled = sorted(after.unfilled - before.unfilled)
    return f"nothing fills {unfilled[0]}" if unfilled else None


def _put(model: PreTrainedModel, path: str, layout: Layout, module: str) -> None:
    """What compressed-tensors does to a layer before loading: `weight` gives way to the tensors of `layout`."""
    layer = model.get_submodule(path)
    layer._parameters.pop("weight", None)
    for name, tensor in _on_meta(layout).items():
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(name.removeprefix(f"{module}."), parameter)


def _columns(packed: Mapping[str, tuple[StoredTensor, Layout]]) -> dict[Any, int]:
    """Shapes of codes and of scales -> the columns of the matrix: a stream of bits hides them."""
    return {
        (layout[f"{module}.weight_packed"][1], layout[f"{module}.weight_scale"][1]): stored.shape[1]
        for module, (stored, layout) in packed.items()
        if f"{module}.weight_packed" in layout
    }


def _on_meta(layout: Layout) -> dict[str, torch.Tensor]:
    """Its tensors, without numbers."""
    types = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16}
    return {
        name: torch.empty(shape, dtype=types.get(dtype, torch.float32), device="meta")
        for name, (dtype, shape) in layout.items()
    }


def _loaded(model: PreTrainedModel, tensors: Layout, quantizer: HfQuantizer | None) -> Outcome:
    """The end of `from_pretrained`: conversions, then what is missing initialized, then what is tied tied.

    model: is changed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    try:
        mapping = get_model_conversion_mapping(model, None, quantizer)
        how = LoadStateDictConfig(
            device_map={"": "meta"},
            dtype=model.dtype,
            hf_quantizer=quantizer,
            weight_mapping=cast("list[WeightConverter | WeightRenaming]", mapping),
        )
        with _without_bars():
            info, _ = convert_and_load_state_dict_in_model(model, _on_meta(tensors), how)
        shapes = {name for name, *_ in info.mismatched_keys}
        unfilled = frozenset((info.missing_keys | shapes) - set(model.all_tied_weights_keys))
        if info.conversion_errors:
            return Outcome(unfilled, tuple(_raised(text) for _, text in sorted(info.conversion_errors.items())))
        model.mark_tied_weights_as_initialized(info)
        model._initialize_missing_keys(quantizer is not None)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    except _ERRORS as error:
        return Outcome(frozenset(), (_told(error),))
    return Outcome(unfilled, ())


def _quantizer(decode: bool, columns: Mapping[Any, int]) -> HfQuantizer:
    """transformers' own for compressed-tensors, without the package of that name, and without numbers.

    decode: as the folder says. columns: as `_columns` tells them.
    """
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    class Decode(ConversionOps):
        """`CompressedTensorsDequantize` as to names and shapes: a layer's tensors become its weight, and of experts
        those that are streams of bits a stack of weights. Others of theirs it drops, floats too."""

        def __init__(self, hf_quantizer: HfQuantizer) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **how: Any
        ) -> dict[str, Any]:
            name, model = how["full_layer_name"], how["model"]
            if "weight" in input_dict or "weight_scale" in input_dict:
                given = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
                if "weight_scale" in given:
                    return {name: torch.empty_like(model.get_parameter(name))}
                return {name: given["weight"].to(model.get_parameter(name).dtype)}
            stacks = {}
            for key, parts in input_dict.items():
                if "weight_packed" in key:
                    scales = input_dict[key.replace("weight_packed", "weight_scale")]
                    words = tuple(parts[0].shape)
                    shape = (len(parts), words[0], columns[words, tuple(scales[0].shape)])
                    stacks[key] = torch.empty(shape, dtype=torch.float32, device="meta")
            return stacks

    class Quantizer(CompressedTensorsHfQuantizer):
        """Knows whether weights are decoded, and nothing of the package."""

        def __init__(self) -> None:
            self.pre_quantized, self.use_fp8_kernel = True, False
            method = QuantizationMethod.COMPRESSED_TENSORS
            config = SimpleNamespace(dequantize=decode, quant_method=method)
            self.quantization_config = cast("CompressedTensorsConfig", config)

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": Decode}

    return Quantizer()


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows what it loads; nothing is loaded here."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _told(error: Exception) -> str:
    """The error's type and the beginning of what it says, on one line."""
    return f"from_pretrained raises {type(error).__name__}: {' '.join(str(error).split())}"[:_LENGTH]


def _raised(text: str) -> str:
    """Which conversion failed, of what, as the last line of transformers' record of it says."""
    told = re.search(r"Error: (\w+) on tensors destined for (.+?)\. Ckpt", text)
    where = f"{told[1]} for {told[2]}" if told else " ".join(text.split()[-10:])
    return f"from_pretrained fails in a conversion: {where}"[:_LENGTH]
