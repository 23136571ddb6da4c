"""What an encoder was asked for, as a native plan takes it, and what it is asked for when it is checked."""

from __future__ import annotations

from typing import Any, overload

import torch
from transformers import PreTrainedModel

from spicerack.kernels.plan import Inputs
from spicerack.models.families.encoders import Encoder

_SWITCHES = {"return_dict": (None, True), "output_attentions": (None, False), "output_hidden_states": (None, False),
             "use_cache": (None, False, True)}  # fmt: skip
"""Arguments that say how, and what they may say; only decoders have a cache to use."""
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_IMAGE = "pixel_values"
_INTEGERS = (torch.int64, torch.int32)
_MOST_BEYOND = 128
"""Tokens that are worth checking that a window ends: those of ModernBERT reach 64 to both sides."""


def inputs(model: PreTrainedModel, family: Encoder, asked: dict[str, Any], dtype: torch.dtype) -> Inputs | None:
    """What a plan of this type is run on, of the arguments `asked`, by name; None if it cannot do what they ask.

    The states of an image are computed here, by the model's own code, and nothing is refused behind that but their
    type. Raises what that code raises.
    """
    taken = (_IMAGE, *family.images) if family.embed else _TEXT
    for name, value in asked.items():
        if value is None or name in taken:
            continue
        if name not in _SWITCHES or value not in _SWITCHES[name]:
            return None
    return _of_image(model, family, asked, dtype) if family.embed else _of_text(family, asked)


def batches(model: PreTrainedModel, family: Encoder) -> list[dict[str, Any]]:
    """Arguments of two calls: a sentence of five tokens, and one of seven beside one of three, or as many more tokens
    as make a window end within them; or an image of four patches, and two of six."""
    return _images(model, family) if family.embed else _texts(model, family)


def _of_text(family: Encoder, asked: dict[str, Any]) -> Inputs | None:
    ids, mask, types, positions = map(asked.get, _TEXT)
    if types is not None and "types" not in {index for _, index in family.tables}:
        return None
    if type(ids) is not torch.Tensor or ids.dim() != 2 or not ids.shape[1]:
        return None
    if type(positions) is torch.Tensor and positions.shape == (1, ids.shape[1]):
        positions = positions.expand(ids.shape)
    if type(mask) is torch.Tensor and mask.dtype == torch.bool:
        mask = mask.to(torch.int64)
    for index in (ids, mask, types, positions):
        if index is None:
            continue
        if type(index) is not torch.Tensor or index.dtype not in _INTEGERS:
            return None
        if index.shape != ids.shape or not index.is_cpu:
            return None
    return Inputs(_whole(ids), _whole(mask), _whole(types), _whole(positions))


def _of_image(model: PreTrainedModel, family: Encoder, asked: dict[str, Any], dtype: torch.dtype) -> Inputs | None:
    pixels = asked.get(_IMAGE)
    if type(pixels) is not torch.Tensor or pixels.dim() != 4 or not pixels.is_floating_point() or not pixels.is_cpu:
        return None
    if torch.is_grad_enabled() and pixels.requires_grad:
        return None
    given = {name: asked[name] for name in family.images if asked.get(name) is not None}
    states = model.get_submodule(family.embed)(pixels.to(dtype), **given)
    if type(states) is not torch.Tensor or states.dtype != dtype:
        return None
    return Inputs(states=states.contiguous())


@overload
def _whole(index: torch.Tensor) -> torch.Tensor: ...
@overload
def _whole(index: torch.Tensor | None) -> torch.Tensor | None: ...
def _whole(index: torch.Tensor | None) -> torch.Tensor | None:
    return None if index is None else index.to(torch.int64).contiguous()


def _texts(model: PreTrainedModel, family: Encoder) -> list[dict[str, Any]]:
    table = model.get_submodule(family.tables[0][0])
    rows, pad = vars(table)["num_embeddings"], vars(table)["padding_idx"]
    known = torch.tensor([id for id in range(min(rows, 100)) if id != pad], dtype=torch.int64, device="cpu")
    beyond = 0
    if family.block.kind:
        beyond = max(min(model.config.sliding_window, _MOST_BEYOND), 0)
    length = max(min(7 + beyond, model.config.max_position_embeddings - 2), 1)
    ids = known[(torch.arange(2 * length, device="cpu") * 37 % len(known)).view(2, length)]
    mask = torch.ones(2, length, dtype=torch.int64, device="cpu")
    mask[1, 3:] = 0
    return [{"input_ids": ids[:1, 2:7] if length > 2 else ids[:1]}, {"input_ids": ids, "attention_mask": mask}]


def _images(model: PreTrainedModel, family: Encoder) -> list[dict[str, Any]]:
    config = model.config
    whole, patch = _pair(config.image_size), _pair(config.patch_size)
    resized = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in family.images else {}
    sizes = [(2 * patch[0], 2 * patch[1]), (2 * patch[0], 3 * patch[1])]
    if whole[0] != whole[1] or patch[0] != patch[1]:  # of which models cannot interpolate positions
        resized, sizes = {}, [whole]
    calls = []
    for count, (height, width) in enumerate(sizes, 1):
        shape = (count, config.num_channels, height, width)
        pixels = (
            torch.arange(count * config.num_channels * height * width, dtype=torch.float32, device="cpu")
            * 37
            % 101
            / 50
            - 1
        )
        calls.append({_IMAGE: pixels.view(shape), **resized})
    return calls


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of what may be given as one number."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
