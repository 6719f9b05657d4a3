"""Least work of the decompositions: floating-point operations and bytes, from sizes alone.

Counted is what the Gram way needs, as no exact way is known here that needs less: one symmetric product (half of a full
one), the eigenvectors, one product with the basis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """Operations (an addition or a multiplication each) of products and of eigenvectors, and bytes moved."""

    products: float = 0.0
    eigen: float = 0.0
    nbytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.products + self.eigen

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.eigen + other.eigen, self.nbytes + other.nbytes)


def product(rows: int, inner: int, cols: int) -> Work:
    """(rows, inner) times (inner, cols)."""
    return Work(2.0 * rows * inner * cols, 0.0, FLOAT * float(rows * inner + inner * cols + rows * cols))


def truncation(rows: int, cols: int, rank: int) -> Work:
    """The best rank-``rank`` approximation of a (rows, cols) matrix, as two factors.

    Eigenvectors: 4/3 n^3 to make the Gram matrix tridiagonal and 2 n^2 ``rank`` to turn the kept vectors back. Source:
    Golub, Van Loan, Matrix Computations, 4th edition: section 8.3.
    """
    n, m = sorted((rows, cols))
    gram = Work(float(n * n) * m, 4 / 3 * n**3 + 2.0 * n * n * rank, FLOAT * float(n * m))
    return gram + product(rank, n, m)


def tensor_train(shape: Sequence[int], ranks: Sequence[int]) -> Work:
    """Truncations from left to right."""
    total, left = Work(), 1
    for k, rank in enumerate(ranks):
        total += truncation(left * shape[k], prod(shape[k + 1 :]), rank)
        left = rank
    return total


def rebuilt_train(shape: Sequence[int], ranks: Sequence[int]) -> Work:
    """Cores multiplied to the dense tensor."""
    total, rows = Work(), shape[0]
    for k, rank in enumerate(ranks):
        right = ranks[k + 1] if k + 1 < len(ranks) else 1
        total += product(rows, rank, shape[k + 1] * right)
        rows *= shape[k + 1]
    return total


def tucker(shape: Sequence[int], ranks: Sequence[int]) -> Work:
    """One side after the other, then one sweep of orthogonal iteration: the weight is (O, I, ..), ranks (in, out)."""
    (out, inp, *kernel), (r_in, r_out) = shape, ranks
    area = prod(kernel)
    first = truncation(out, inp * area, r_out) + truncation(inp, r_out * area, r_in)
    sweep = product(out * area, inp, r_in) + truncation(out, r_in * area, r_out)
    return first + sweep + product(r_out, out, inp * area) + truncation(inp, r_out * area, r_in)
