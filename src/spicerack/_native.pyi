from collections.abc import Sequence

import torch

class Levels:
    def __init__(self, lo: int, hi: int, half: bool, zero: bool) -> None: ...
    @staticmethod
    def table(values: Sequence[float], bounds: Sequence[float]) -> Levels: ...

def search(
    w: torch.Tensor,
    levels: Levels,
    scale_type: str,
    coarse: Sequence[float],
    shifts: Sequence[float],
    fine: Sequence[float],
    refinements: int,
    empty: float,
    importance: torch.Tensor | None,
    scale: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
    isa: str = "",
) -> tuple[bool, bool]: ...
def superblocks(
    w: torch.Tensor,
    levels: tuple[int, int],
    shape: tuple[int, int],
    has_min: bool,
    scale: tuple[bool, int, int, str],
    min: tuple[bool, int, int, str],
    steps: Sequence[float],
    shares: Sequence[float],
    refinements: int,
    rounds: int,
    importance: torch.Tensor | None,
    d: torch.Tensor,
    e: torch.Tensor,
    p: torch.Tensor,
    r: torch.Tensor,
    codes: torch.Tensor,
    isa: str = "",
) -> tuple[bool, bool]: ...
def encode(
    w: torch.Tensor,
    levels: Levels,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    isa: str = "",
) -> None: ...
def judge(
    pieces: torch.Tensor, levels: Levels, scale: float, zero: float, out: torch.Tensor, isa: str = ""
) -> None: ...
def compare(
    w: torch.Tensor, levels: Levels, scale: torch.Tensor, zero: torch.Tensor | None, codes: torch.Tensor
) -> tuple[float, float]: ...
def pack(codes: torch.Tensor, bits: int, offset: int, words: torch.Tensor) -> None: ...
def unpack(words: torch.Tensor, bits: int, offset: int, codes: torch.Tensor) -> None: ...
def to_blocks(
    words: torch.Tensor,
    bits: int,
    block: tuple[int, int],
    planes: Sequence[tuple[int, int, int, int]],
    raw: torch.Tensor,
) -> None: ...
def from_blocks(
    raw: torch.Tensor,
    bits: int,
    block: tuple[int, int],
    planes: Sequence[tuple[int, int, int, int]],
    words: torch.Tensor,
) -> None: ...
def fake(
    w: int,
    type: int,
    sizes: tuple[int, int, int, int],
    scale: int,
    zero: int,
    levels: Levels,
    out: int,
    out_type: int,
    isa: str = "",
) -> None: ...
def fake_gradients(
    grad: int,
    grad_type: int,
    w: int,
    type: int,
    sizes: tuple[int, int, int, int],
    scale: int,
    zero: int,
    levels: Levels,
    cells: bool,
    by_weight: int,
    by_scale: int,
    by_zero: int,
    rounded: int,
    rounded_type: int,
    isa: str = "",
) -> None: ...
def instruction_sets() -> list[str]: ...

class Matrix:
    def __init__(
        self,
        codes: int,
        scale: int,
        zero: int,
        outer: int,
        scale_type: int,
        outer_type: int,
        n: int,
        k: int,
        group: int,
        bits: int,
        offset: int,
        half: bool,
        minima: bool,
        block: int,
        table: Sequence[int],
    ) -> None: ...

def engines() -> list[str]: ...
def linear(
    engine: int,
    x: int,
    type: int,
    m: int,
    activations: int,
    scale: int,
    products: list[tuple[Matrix, int, int, bool]],
) -> None: ...
def attention(
    engine: int,
    type: int,
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    v: tuple[int, int, int, int],
    mask: tuple[int, int, int, int],
    y: int,
    sizes: tuple[int, int, int, int, int, int, int],
    causal: bool,
    scale: float,
) -> None: ...

class Plan:
    def __init__(self, engine: int, type: int, widths: list[int], pad: int) -> None: ...
    def look_up(self, parts: list[tuple[tuple[Matrix | None, int, int, int], int]], y: int) -> None: ...
    def take(self, y: int) -> None: ...
    def norm(
        self,
        x: int,
        more: int,
        y: int,
        weight: tuple[int, int, int],
        bias: tuple[int, int, int],
        epsilon: float,
        centered: bool,
    ) -> None: ...
    def product(
        self,
        engine: int,
        x: int,
        activations: int,
        scale: int,
        parts: list[tuple[Matrix, tuple[int, int, int], int, bool]],
    ) -> None: ...
    def attention(
        self,
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        y: int,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
        bias: int,
    ) -> None: ...
    def dense(self, x: int, weights: tuple[int, int, int], bias: tuple[int, int, int], y: int, gelu: bool) -> None: ...
    def bias(self, table: tuple[Matrix | None, int, int, int], heads: int, buckets: list[int]) -> int: ...
    def turns(self, frequencies: tuple[int, int, int], scale: float, y: int) -> None: ...
    def rotate(self, x: tuple[int, int, int], heads: int, turns: int) -> None: ...
    def gate(self, x: tuple[int, int, int], more: tuple[int, int, int] | None, y: int, function: int) -> None: ...
    def add(self, x: int, more: int, y: int, factor: tuple[int, int, int]) -> None: ...
    def run(
        self,
        ids: int,
        mask: int,
        types: int,
        positions: int,
        states: int,
        batch: int,
        length: int,
        result: int,
        y: int,
    ) -> bool: ...

def unchanged(watched: tuple[object, ...]) -> bool: ...
def rows(matrix: Matrix, which: torch.Tensor, out: torch.Tensor) -> None: ...

class Packing:
    def __init__(
        self,
        data: torch.Tensor,
        order: int,
        n: int,
        k: int,
        stored_bits: int,
        offset: int,
        most: int,
        bits: int,
        tiles: torch.Tensor,
    ) -> None: ...
    def add_lanes(self, values: torch.Tensor, size: int, add: int, lanes: torch.Tensor) -> None: ...

def pack_all(packings: list[Packing], threads: int) -> list[bool]: ...
def merge_pages(ranges: list[tuple[int, int]]) -> None: ...
def from_panels(tiles: torch.Tensor, bits: int, offset: int, codes: torch.Tensor) -> None: ...
def pooled(shape: Sequence[int], type: int) -> torch.Tensor: ...
def release() -> int: ...
def spin(engine: int, rounds: int, threads: int, floats: bool) -> int: ...
def read_all(engine: int, data: torch.Tensor, threads: int) -> None: ...
def team_size() -> int: ...
