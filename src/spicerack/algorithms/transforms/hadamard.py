"""Rotation by a Hadamard matrix with random signs: outliers are spread over all channels (QuaRot, arXiv:2404.00456).

    x' = x R,    R = diag(signs) H / sqrt(n),    H of entries +-1 with H H^T = n I

All entries of a row of R that are not 0 have one size, so that a channel which is a thousand times the others becomes a
share of all that it is mixed with; and R is orthogonal, so that a layer behind the stream, W R, gives for x' what W
gave for x. Norms without a mean do not see the rotation once their gains are in the layers behind them. Nothing has to
be computed for it when the model runs.

H is a Kronecker product of Sylvester's matrix of size 2^k with one of Paley's, of size m, where n = 2^k m and there is
one; else it is block diagonal, of Sylvester's of size 2^k. Takes n log n operations for the power of two.
"""

from __future__ import annotations

import functools
import math

import torch

from spicerack.algorithms.transform import Rotation


def rotate(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """x R, float32 [..., n], for x [..., n] of any float type. seed: of R's signs, which are the same each time."""
    n = x.shape[-1]
    two, m = factors(n)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator, device="cpu").float() * 2 - 1
    y = (x.float() * signs).reshape(-1, n // two, two)
    step = 1
    while step < two:  # Sylvester's: sums and differences of halves, log2 times
        pairs = y.reshape(len(y), n // two, two // (2 * step), 2, step)
        y = torch.stack((pairs.sum(3), pairs[..., 0, :] - pairs[..., 1, :]), 3).reshape(len(y), n // two, two)
        step *= 2
    if m > 1:
        y = torch.einsum("bit,ij->bjt", y, paley(m))
    return (y.reshape(x.shape) / math.sqrt(two * m)).contiguous()


def factors(n: int) -> tuple[int, int]:
    """The sizes of the two matrices that H is a product of, (2^k, m), for n columns.

    m = 1 where none is needed, or none is known for the odd part of n: H then has n / 2^k blocks. m is the odd part
    times 4, 8, 16 or 32, because Paley's matrices have sizes that 4 divides.
    """
    two = n & -n
    if two == n:
        return n, 1
    odd = n // two
    for share in (4, 8, 16, 32):
        if two % share == 0 and _paley_prime(odd * share):
            return two // share, odd * share
    return two, 1


@functools.cache
def paley(m: int) -> torch.Tensor:
    """Paley's Hadamard matrix, float32 [m, m]: of a prime q = m - 1 = 3 mod 4, or q = m / 2 - 1 = 1 mod 4."""
    q = _paley_prime(m)
    assert q, f"no such matrix of size {m}"
    squares = {i * i % q for i in range(1, q)}
    legendre = torch.tensor(
        [0 if i == 0 else 1 if i in squares else -1 for i in range(q)], dtype=torch.int64, device="cpu"
    )
    index = torch.arange(q, device="cpu")
    jacobsthal = legendre[(index[:, None] - index[None, :]) % q]
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.long, device="cpu")
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, -1 if q % 4 == 3 else 1, jacobsthal
    eye = torch.eye(q + 1, dtype=torch.long, device="cpu")
    if q % 4 == 3:
        return (eye + bordered).float()
    one, other = (
        torch.tensor([[1, 1], [1, -1]], dtype=torch.int64, device="cpu"),
        torch.tensor([[1, -1], [-1, -1]], dtype=torch.int64, device="cpu"),
    )
    return (torch.kron(bordered, one) + torch.kron(eye, other)).float()


def _paley_prime(m: int) -> int:
    """The prime q that `paley` makes a matrix of size m from; 0 if there is none."""
    for q, rest in ((m - 1, 3), (m // 2 - 1, 1)):
        if m % 4 == 0 and q % 4 == rest and q > 1 and all(q % i for i in range(2, math.isqrt(q) + 1)):
            return q
    return 0


def memory(weights: int, itemsize: int) -> int:
    """Bytes of a block's rotated weights: in their stored type, made when they are read, and not mapped from files."""
    return itemsize * weights


TRANSFORM = Rotation(rotate=rotate, memory=memory)
