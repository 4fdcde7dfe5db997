"""What the kernels take from the shape that they are loaded for (``LayerShape.constants``).

``source.load`` puts a module with the values in this one's place: PyPTO takes integers and floats
from a function's globals, and nothing else.
"""

HIDDEN: int
INTERMEDIATE: int
HEADS: int
KV_HEADS: int
HEAD_DIM: int

PAGE: int
"""Tokens in a page of the KV cache."""

ROWS: int
"""Tokens in a tile."""

Q_ROWS: int
"""Queries in a tile of attention: in prefill one head's tokens, in decode one token's heads."""

KV_TILE: int
"""Keys in a tile of attention; divides PAGE."""

VEC_TILE: int
"""Columns that vector code works on at a time."""

N_TILE: int
K_TILE: int
"""Columns of a matrix product's tile, and of its operand's."""

VOCAB_TILE: int

SCRATCH_ROWS: int
"""Rows that a prefill step's tokens take when each sequence begins a new tile."""

EPS: float
SCALE: float
"""Of attention scores: 1 / sqrt(HEAD_DIM)."""
