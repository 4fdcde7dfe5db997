"""The sizes that the kernels of this package are compiled for."""

from collections.abc import Iterator

from attrs import Factory, asdict, field, frozen

from tilewright.types import ModelConfig, RuntimeConfig

PAGE_SIZE = 128
"""Default number of tokens per page of the KV cache: the keys of attention's widest tile."""
TILES = (256, 128, 64, 32, 16)
ACCUMULATOR_BYTES = 128 * 1024
"""L0C of an a2a3 core: the FP32 tile of a product must fit in it."""
OPERAND_BYTES = 64 * 1024
"""L0B of an a2a3 core: an operand's tile must fit in it, or the compiler must split it."""
SCRATCH_BYTES = 1 << 30
"""Limit for the queries of a prefill step: a quarter of the largest heap known to work."""


def _widest(*sizes: int, limit: int = 256) -> int:
    """The widest tile that divides all sizes; if none does, 16, which the check refuses."""
    fitting = (t for t in TILES if t <= limit and all(size % t == 0 for size in sizes))
    return next(fitting, 16)


@frozen(kw_only=True)
class LayerShape:
    """One decoder layer's sizes, and the tiles and limits that its kernels are compiled with.

    Raises ValueError for a shape that the tiles do not support, naming the constraint.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    """Tokens per page of the KV cache."""
    norm_eps: float = 1e-6
    max_batch: int = 16
    """Maximum sequences per step."""
    max_tokens: int = 512
    """Maximum tokens per prefill step, over all its sequences."""

    prefill_rows: int = field(
        default=Factory(lambda s: 64 if s.hidden >= 1024 else 16, takes_self=True)
    )
    """Tokens in a tile of prefill. The weights are read once per tile: where they are large, more
    rows outweigh the padding of short prompts."""
    decode_rows: int = 16
    kv_tile: int = field(
        default=Factory(lambda s: _widest(s.page_size, limit=128), takes_self=True)
    )
    """Keys in one step of attention."""
    vec_tile: int = field(
        default=Factory(
            lambda s: _widest(
                s.hidden, s.intermediate, s.kv_heads * s.head_dim, limit=s._two_rounds
            ),
            takes_self=True,
        )
    )
    """Columns that vector code works on at a time."""
    n_tile: int = field(
        default=Factory(
            lambda s: _widest(
                s.hidden,
                s.intermediate,
                s.heads * s.head_dim,
                s.kv_heads * s.head_dim,
                limit=s._two_rounds,
            ),
            takes_self=True,
        )
    )
    """Output columns of a matrix product's tile."""
    k_tile: int = field(
        default=Factory(
            lambda s: _widest(
                s.hidden, s.intermediate, s.heads * s.head_dim, limit=min(128, s._two_rounds)
            ),
            takes_self=True,
        )
    )
    """Inner dimension of a matrix product's tile."""
    vocab_tile: int = 128
    """Output columns of a tile of the LM head."""

    def __attrs_post_init__(self) -> None:
        broken = next(self._broken(), None)
        if broken:
            raise ValueError(f"the kernels cannot serve this layer shape: {broken}")

    def _broken(self) -> Iterator[str]:
        """Each constraint that the shape breaks, with the sizes found."""
        for name, size in asdict(self).items():
            if size <= 0:
                yield f"{name} must be above zero, found {size}"
                return
        if self.heads % self.kv_heads:
            yield f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}"
        if self.head_dim % 32:
            yield f"head_dim {self.head_dim} must be a multiple of 32: half a head is 32-byte rows"
        for name in ("prefill_rows", "decode_rows", "kv_tile", "n_tile", "k_tile", "vocab_tile"):
            if getattr(self, name) % 16:
                yield f"{name} {getattr(self, name)} must be a multiple of 16, the cube's tile"
        if self.vec_tile % 16:
            yield f"vec_tile {self.vec_tile} must be a multiple of 16: BF16 rows of 32 bytes"
        if self.page_size % self.kv_tile:
            yield f"page_size {self.page_size} must be a multiple of kv_tile {self.kv_tile}"
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, size, tiles in (
            ("hidden", self.hidden, ("vec_tile", "n_tile", "k_tile")),
            ("intermediate", self.intermediate, ("vec_tile", "n_tile", "k_tile")),
            ("heads * head_dim", q_dim, ("n_tile", "k_tile")),
            ("kv_heads * head_dim", kv_dim, ("vec_tile", "n_tile")),
        ):
            for tile in tiles:
                if size % getattr(self, tile):
                    yield f"{name} {size} must be a multiple of {tile} {getattr(self, tile)}"
        rows = max(self.prefill_rows, self.decode_rows)
        width = max(self.n_tile, self.vocab_tile, self.kv_tile, self.head_dim)
        if rows * width * 4 > ACCUMULATOR_BYTES:
            yield (
                f"a product's tile of {rows} x {width} in FP32 must fit in {ACCUMULATOR_BYTES} "
                "bytes: make the rows or the tiles smaller"
            )

        if self.k_tile * max(self.n_tile, self.vocab_tile) * 2 > OPERAND_BYTES:
            yield (
                f"an operand's tile of {self.k_tile} x {max(self.n_tile, self.vocab_tile)} in BF16 "
                f"must fit in {OPERAND_BYTES} bytes: make k_tile smaller"
            )
        scratch = self._scratch_rows * q_dim * 2
        if scratch > SCRATCH_BYTES:
            yield (
                f"a prefill of max_tokens {self.max_tokens} in max_batch {self.max_batch} "
                f"sequences takes {scratch} bytes of scratch, and {SCRATCH_BYTES} is the most"
            )

    @property
    def _two_rounds(self) -> int:
        """Widest tile with which loops over hidden run twice, so that the results of small models
        depend on what the loops carry over."""
        return min(256, self.hidden // 2)

    @property
    def _scratch_rows(self) -> int:
        """Rows for a step's tokens when each sequence begins a new tile."""
        return self.max_tokens + self.max_batch * self.prefill_rows

    def constants(self, kernel: str) -> dict[str, int | float]:
        """The constants that a kernel's source expects in its module."""
        prefill = kernel == "prefill_layer"
        group = -(-(self.heads // self.kv_heads) // 16) * 16
        return {
            "HIDDEN": self.hidden,
            "INTERMEDIATE": self.intermediate,
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "PAGE": self.page_size,
            "ROWS": self.prefill_rows if prefill else self.decode_rows,
            # The queries of a tile are one head's tokens in prefill, one token's heads in decode.
            "Q_ROWS": self.prefill_rows if prefill else group,
            "KV_TILE": self.kv_tile,
            "VEC_TILE": self.vec_tile,
            "N_TILE": self.n_tile,
            "K_TILE": self.k_tile,
            "VOCAB_TILE": self.vocab_tile,
            "SCRATCH_ROWS": self._scratch_rows,
            "EPS": self.norm_eps,
            "SCALE": self.head_dim**-0.5,
        }


def layer_shape(config: ModelConfig, runtime: RuntimeConfig) -> LayerShape:
    """The shape to compile the kernels for. Raises ValueError as LayerShape does."""
    return LayerShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        page_size=runtime.page_size or PAGE_SIZE,
        max_batch=runtime.max_batch_size,
        max_tokens=max(runtime.max_batch_tokens, runtime.max_batch_size),
    )


QWEN3_14B = LayerShape(
    hidden=5120,
    intermediate=17408,
    heads=40,
    kv_heads=8,
    head_dim=128,
    page_size=128,
    max_tokens=2048,
)
DEMO = LayerShape(
    hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=128, page_size=64, max_tokens=2048
)
"""The model that comes with tilewright."""
