"""`Pair`: the block that is being calibrated, twice in float32: `exact`, which stays in float, and `quantized`.

The exact block has the model's own weights, moved factors included; the quantized one begins as its equal, and gets the
codes of one layer after another. Who solves, transforms or observes asks the pair for weights and hands it what it
chose; nobody else writes into either block, nor into what rounds their inputs. So there is one place to look for how a
block came to be what it is, and what must hold between the two:

    a parameter that is no target's      equal in both, moved factors included
    a target without codes               equal in both; the quantized block rounds its inputs, if its scheme has that
    a target with codes                  what they decode to, in the quantized block only
    behind a trial                       as before it

Both keep no float32 weights: a layer has its weight while it is called (`weights`), so that the pair of them costs two
bytes of codes a weight, and the file's own pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from spicerack.machine.devices import CPU
from spicerack.numerics import rounding
from spicerack.numerics.activations import quantize_fixed, quantize_tokens
from spicerack.numerics.qtensor import QTensor, moved
from spicerack.numerics.search import Range
from spicerack.quantization.calibration import folding
from spicerack.quantization.calibration.folding import Site
from spicerack.quantization.calibration.targets import BlockTensors, Target
from spicerack.quantization.calibration.weights import columns_of, float_copy
from spicerack.quantization.rotation import Rotated
from spicerack.storage.reader import Checkpoint


class ActivationRounding:
    """The hook that rounds a layer's inputs to int8, as its kernel will; gradients pass straight through.

    static: by `scale`, float32 [1], and not at all until that is known; else by a scale for each token. factors: [K],
    what inputs are divided by before they are rounded, and multiplied by after; None: nothing.
    """

    factors: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def __init__(self, *, static: bool) -> None:
        self.static = static

    def __call__(self, _layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.static and self.scale is None:
            return inputs
        x = inputs[0]
        scaled = (x if self.factors is None else x / self.factors).detach()
        if self.scale is not None:
            codes, scale = quantize_fixed(scaled, self.scale), self.scale
        else:
            codes, scale = quantize_tokens(scaled)
        rounded = codes * scale if self.factors is None else codes * scale * self.factors
        return (x + (rounded - x).detach(), *inputs[1:])


class Pair:
    """Two copies of one block of the model, in float32 on one device; see the top of this file.

    targets: the layers to quantize. others: path of every other parameter -> name of its tensor. exact, quantized: the
    copies, to be run and looked at. Paths are those in the block, the same in both.
    """

    def __init__(
        self, original: nn.Module, tensors: BlockTensors, source: Checkpoint, device: torch.device, range_: Range,
        threads: int,
    ) -> None:  # fmt: skip
        """Copy a block, whose inputs are rounded from now on where its targets' schemes have int8 activations.

        original    the model's block, as it is in the checkpoint before any rotation; it is not changed
        tensors     what it has of the model's tensors
        source      where a rotated model's weights are read from; of another model nothing is read
        device      where both copies compute
        range_      how scales of weights are searched for rounding to nearest
        threads     of that search
        """
        self.targets, self.others = tensors.targets, tensors.others
        self.device, self._range, self._threads = device, range_, threads
        self._types = {path: parameter.dtype for path, parameter in original.named_parameters()}
        self.exact, self._exact = float_copy(original, device)
        self.quantized, self._quantized = float_copy(original, device)
        if isinstance(source, Rotated):  # the model that runs is the original; nothing else is in the block
            names = {f"{target.path}.weight": target.tensor for target in self.targets} | dict(self.others)
            self._become({path: source.read(tensor) for path, tensor in names.items()})
        self._roundings: dict[str, ActivationRounding] = {}
        for target in self.targets:
            if target.stored.scheme.activations is not None:
                hook = ActivationRounding(static=target.stored.scheme.activations == "static")
                self.quantized.get_submodule(target.path).register_forward_pre_hook(hook)
                self._roundings[target.path] = hook

    # ---- weights -----------------------------------------------------------------------------------------------------

    def weight(self, target: Target) -> torch.Tensor:
        """The target's weight in the exact block, float32 [N, K]."""
        weight = self._exact[target.path].weight()
        return weight.t().contiguous() if target.stored.transposed else weight

    def type_of(self, path: str) -> torch.dtype:
        """The type of a layer's weight in the model, as the folder has it: what scales of its inputs are stored in."""
        return self._types[f"{path}.weight"]

    def columns(self, path: str) -> int:
        """K, how many columns a layer's inputs have."""
        return columns_of(self.quantized.get_submodule(path))

    def nearest(self, target: Target, importance: torch.Tensor | None, w: torch.Tensor | None = None) -> QTensor:
        """The target's weight, or `w` [N, K] in its place, rounded to nearest; on the CPU, where the search is.

        importance: [K], how much an error in each column matters; None, or zeros: the same everywhere.
        """
        importance = moved(importance, CPU) if importance is not None and bool(importance.any()) else None
        q = rounding.to_nearest(
            moved(self.weight(target) if w is None else w, CPU), target.stored.scheme, range_=self._range,
            name=target.tensor, importance=importance, source=target.stored.source_dtype, threads=self._threads,
        )  # fmt: skip
        hook = self._roundings.get(target.path)
        return q if hook is None else dataclasses.replace(q, input_scale=moved(hook.scale, CPU))

    def put(self, target: Target, w: QTensor | torch.Tensor) -> None:
        """Let the quantized block compute with `w`, [N, K], codes or floats, in place of the target's weight."""
        if isinstance(w, torch.Tensor) and target.stored.transposed:
            w = w.t()
        self._quantized[target.path].source = moved(w, self.device)

    def error(self, target: Target, q: QTensor) -> float:
        """||decoded - w|| / ||w|| of codes, on the CPU, for the target's weight w."""
        return rounding.relative_error(moved(self.weight(target), CPU), q, threads=self._threads)

    # ---- what rounds inputs ------------------------------------------------------------------------------------------

    def static(self, paths: Iterable[str]) -> list[str]:
        """Those of these layers whose inputs are rounded by one scale for all of them."""
        return [path for path in paths if path in self._roundings and self._roundings[path].static]

    def fix_scale(self, path: str, scale: torch.Tensor) -> None:
        """Round the inputs of a static layer by `scale`, float32 [1], from now on; its codes are stored with that."""
        self._roundings[path].scale = scale

    @contextmanager
    def trial(self, targets: Collection[Target], factors: torch.Tensor, scale: torch.Tensor | None) -> Iterator[None]:
        """Within, weights may be put in place of these targets', whose inputs are rounded behind `factors` [K].

        scale: of those that are static, None for others. Behind it the quantized block is again what it was, which for
        these targets is the exact one with inputs that no scale is known of.
        """
        hooks = [self._roundings[target.path] for target in targets if target.path in self._roundings]
        for hook in hooks:
            hook.factors, hook.scale = factors, scale if hook.static else None
        try:
            yield
        finally:
            for target in targets:
                self._follow(f"{target.path}.weight")
            for hook in hooks:
                hook.factors = hook.scale = None

    # ---- parameters that change in both ------------------------------------------------------------------------------

    def move(self, site: Site, factors: torch.Tensor, keeps: Callable[[], bool]) -> dict[str, torch.Tensor] | None:
        """Move factors [K] from a site's source into its readers, in both blocks -> the changed tensors but for weights
        of targets, by name, on the CPU as they are stored.

        keeps: asked behind it whether the exact block still computes what it did; where not, or where something would
        change that the block has no tensor of, all is undone, and None comes back.
        """
        touched = {f"{site.source}.bias", *(f"{path}.weight" for path in (site.source, *site.readers))}
        for path, weight in self._exact.items():
            if f"{path}.weight" in touched:
                weight.own()
        before = {path: value.clone() for path, value in self.exact.named_parameters() if path in touched}
        _, changed = folding.move(self.exact, site, factors, self._types[f"{site.source}.weight"])
        if not set(changed) <= set(self.others) or not keeps():
            for path, value in before.items():
                self.exact.get_parameter(path).copy_(value)
            return None
        for path in before:
            self._follow(path)
        return {self.others[path]: moved(self.exact.get_parameter(path).to(self._types[path]), CPU) for path in changed}

    def _follow(self, path: str) -> None:
        """A parameter of the quantized block is again what it is in the exact one."""
        layer = path.removesuffix(".weight")
        if layer in self._quantized and path != layer:
            self._quantized[layer].source = self._exact[layer].source
        else:
            self.quantized.get_parameter(path).copy_(self.exact.get_parameter(path))

    def _become(self, values: Mapping[str, torch.Tensor]) -> None:
        """These are the parameters of both blocks from now on, by path."""
        for path, value in values.items():
            layer = path.removesuffix(".weight")
            if layer in self._exact and path != layer:
                self._exact[layer].source = value
            else:
                with torch.no_grad():
                    self.exact.get_parameter(path).copy_(value)
            self._follow(path)
