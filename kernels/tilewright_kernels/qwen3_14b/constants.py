"""Constants of the shape that the kernels are loaded for (``LayerShape.constants``).

``source.load`` replaces this module with one that holds the values: PyPTO takes only integers and
floats from a function's globals.
"""

HIDDEN: int
INTERMEDIATE: int
HEADS: int
KV_HEADS: int
HEAD_DIM: int

PAGE: int
"""Tokens per page of the KV cache."""

ROWS: int
"""Tokens in a tile."""

Q_ROWS: int
"""Queries in a tile of attention: one head's tokens in prefill, one token's heads in decode."""

KV_TILE: int
"""Keys in a tile of attention; divides PAGE."""

VEC_TILE: int
"""Columns that vector code works on at a time."""

N_TILE: int
K_TILE: int
"""Columns of a matrix product's tile, and of its operand's tile."""

VOCAB_TILE: int

SCRATCH_ROWS: int
"""Rows that a prefill step's tokens take when each sequence begins a new tile."""

EPS: float
SCALE: float
"""Scale of attention scores: 1 / sqrt(HEAD_DIM)."""
