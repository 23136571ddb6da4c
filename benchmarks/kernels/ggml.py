"""How fast one row of x is multiplied by llama.cpp's types: our kernels and ggml's own, taking turns.

ggml is that of the wheel `xllamacpp`, compiled for AVX2, or of a `--library` of your own build. Its weights lie in the
buffer that repacks them, where the type has one, as in llama.cpp itself. Layers together have `--megabytes`, so that
they come from memory, and each call is timed by itself: of all, the fastest but for two in a hundred counts.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from benchmarks.harness import machine
from spicerack.kernels import kernel, panels
from spicerack.numerics.qtensor import QTensor, codes_dtype
from spicerack.numerics.scales import dtype_of
from spicerack.numerics.scheme import FloatType, Scheme, parse

TYPES = {
    "Q4_0": (2, "w4g32"), "Q4_1": (3, "q4_1"), "Q5_0": (6, "w5g32"), "Q5_1": (7, "q5_1"), "Q8_0": (8, "w8g32"),
    "Q2_K": (10, "q2_k"), "Q3_K": (11, "q3_k"), "Q4_K": (12, "q4_k"), "Q5_K": (13, "q5_k"), "Q6_K": (14, "q6_k"),
    "IQ4_NL": (20, "iq4_nl"), "MXFP4": (39, "mxfp4"),
}  # fmt: skip
"""ggml's name -> its number, and our scheme."""
REPACKED = ("Q4_0", "Q4_K", "IQ4_NL")
"""Those that ggml repacks on x86."""
SHAPES = ((4096, 4096), (2048, 5632), (5632, 2048))
_ARENA = 64 << 20
"""Bytes of a context, which holds no tensor's data."""
Call = Callable[[], object]


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("bytes", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """ggml's functions, by their C names without `ggml_`."""

    def __init__(self, library: Path, threads: int) -> None:
        self._library = ctypes.CDLL(str(library))
        self._backend = self("backend_cpu_init")
        self._library.ggml_backend_cpu_set_n_threads(ctypes.c_void_p(self._backend), threads)
        self._held: list[int] = []

    def __call__(self, name: str, *arguments: object) -> int:
        """What a function that returns an address, or nothing, returns; addresses are given as integers."""
        function = getattr(self._library, name if name.startswith("_Z") else f"ggml_{name}")
        function.restype = ctypes.c_void_p
        kinds = {int: ctypes.c_void_p, _Parameters: _Parameters, ctypes.c_int: ctypes.c_int}
        function.argtypes = [kinds.get(type(argument), type(argument)) for argument in arguments]
        return int(function(*arguments) or 0)

    def layers(self, name: str, n: int, k: int, count: int) -> list[Call]:
        """`count` products of one row of x, each by a weight [n, k] of its own, whose numbers are any."""
        width, height, one = ctypes.c_int64(k), ctypes.c_int64(n), ctypes.c_int64(1)
        repacks = "_Z35ggml_backend_cpu_repack_buffer_typev" if name in REPACKED else "backend_cpu_buffer_type"
        weights, work = (self("init", _Parameters(_ARENA, None, True)) for _ in range(2))
        type_ = ctypes.c_int(TYPES[name][0])
        tensors = [self("new_tensor_2d", weights, type_, width, height) for _ in range(count)]
        x = self("new_tensor_2d", work, ctypes.c_int(0), width, one)
        graphs = [self("new_graph", work) for _ in tensors]
        for graph, tensor in zip(graphs, tensors, strict=True):
            self("build_forward_expand", graph, self("mul_mat", work, tensor, x))
        self._held = [
            self("backend_alloc_ctx_tensors_from_buft", weights, self(repacks)),
            self("backend_alloc_ctx_tensors_from_buft", work, self("backend_cpu_buffer_type")),
        ]
        for tensor, byte in [*((tensor, 0x11) for tensor in tensors), (x, 0x3D)]:
            size = self("nbytes", tensor)
            data = ctypes.create_string_buffer(bytes([byte]) * size, size)
            self("backend_tensor_set", tensor, data, ctypes.c_size_t(0), ctypes.c_size_t(size))
        return [lambda graph=graph: self("backend_graph_compute", self._backend, graph) for graph in graphs]

    def release(self) -> None:
        """The memory of the last `layers`."""
        for buffer in self._held:
            self("backend_buffer_free", buffer)
        self._held = []


def random(scheme: Scheme, n: int, k: int) -> QTensor:
    """Any numbers of a scheme, [n, k]."""
    shape, levels = scheme.scale_shape((n, k)), scheme.levels
    codes = torch.randint(levels.lo, levels.hi + 1, scheme.codes_shape((n, k)), dtype=torch.int16)

    def part(kind: FloatType | Scheme) -> torch.Tensor | QTensor:
        if isinstance(kind, Scheme):
            return random(kind, shape[-2], shape[-1])
        return (torch.rand(shape) * 0.01 + 0.001).to(dtype_of(kind, torch.float16))

    low = None if scheme.min is None else part(scheme.min)
    return QTensor(scheme, codes.to(codes_dtype(scheme)), part(scheme.scale), min=low)


def ours(scheme: Scheme, n: int, k: int, count: int, engine: str | None) -> list[Call]:
    """`count` products of one row of x, each by panels [n, k] of its own."""
    row = kernel.pick(scheme, (n, k), torch.float32, torch.device("cpu"), "int8", engine).kernel
    packed, x = row.pack(random(scheme, n, k)), torch.randn(1, k)
    copies = ({name: tensor.clone() for name, tensor in packed.items()} for _ in range(count))
    matrices = [row.prepare(scheme, (n, k), tensors) for tensors in copies]
    return [lambda matrix=matrix: row.run(x, (matrix,), (None,)) for matrix in matrices]


def fastest(calls: Sequence[Call], turns: int) -> float:
    """Seconds of a call, the fastest but for two in a hundred."""
    times = []
    for _ in range(turns):
        for call in calls:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 50]


@click.command(help=__doc__)
@click.option(
    "--library", type=click.Path(path_type=Path, exists=True), help="With ggml's symbols; xllamacpp's without."
)
@click.option("--type", "types", multiple=True, type=click.Choice(list(TYPES)), help="All without; repeatable.")
@click.option("--engine", type=click.Choice(panels.NAMES), help="Of ours; the fastest without.")
@click.option("--megabytes", default=100, show_default=True)
@click.option("--turns", default=15, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    library: Path | None, types: tuple[str, ...], engine: str | None, megabytes: int, turns: int, threads: int
) -> None:
    if library is None:
        wheel = importlib.util.find_spec("xllamacpp")
        if wheel is None or wheel.origin is None:
            raise click.UsageError("pip install xllamacpp, or name a library")
        library = next(Path(wheel.origin).parent.glob("xllamacpp*.so"))
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    ggml = Ggml(library, threads)
    click.echo(f"{machine.describe(threads)['cpu']}, {threads} thread(s), {engine or panels.NAMES[0]}, us\n")
    heads = " | ".join(f"{n} x {k}: ours, ggml" for n, k in SHAPES)
    click.echo(f"| | {heads} |\n{'|---' * (len(SHAPES) + 1)}|")
    for name in types or TYPES:
        scheme, cells = parse(TYPES[name][1]), []
        for n, k in SHAPES:
            count = -(-megabytes * 8_000_000 // scheme.stored_bits((n, k)))
            a = fastest(ours(scheme, n, k, count, engine), turns)
            b = fastest(ggml.layers(name, n, k, count), turns)
            ggml.release()
            cells.append(f"{a * 1e6:.0f}, {b * 1e6:.0f} ({b / a:.2f})")
        click.echo(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
