"""Names of PyPTO's language that are not emulated, and what the error for a name says.

The names are those of ``pypto.language`` in PyPTO e2d0f78 (2026-08-21), apart from the emulated.
"""

from collections.abc import Collection

from tilewright.errors import nearest

PYPTO = "e2d0f78"
TABLE = "docs/kernel-language.md"

INSTEAD = {
    "use pl.parallel or pl.range": "cluster spmd spmd_submit split_aiv submit",
    "use pl.range with bounds that the kernel computes, and if": "cond while_",
    "bind the name again in the loop or branch": "yield_",
    "slice the tensor in a task, which loads a tile": "load move create_tile create_l1 tile Tile",
    "assign the tile to a window of a tensor": "store",
    "store a tile that holds the value: pl.full, or a slice": "write scatter scatter_update",
    "read each index with pl.read, and slice": "gather gather_row paged_gather mgather gatherb",
    "use pl.maximum": "maximums relu",
    "use pl.minimum": "minimums",
    "use pl.full": "expands expand_clone",
    "use the row_expand operator that computes with it": "row_expand",
    "use the col_expand operator that computes with it": "col_expand",
    "use pl.exp of pl.col_expand_sub": "col_expand_expdif",
    "use pl.slice with valid_shape": "set_validshape",
    "use pl.slice and pl.fillpad": "fillpad_expand",
    "use pl.matmul on each matrix": "batch_matmul",
    "use pl.matmul, and pl.col_expand_add in another task": "matmul_bias",
    "use pl.matmul with a tile of 16 rows": "gemv gemv_acc gemv_bias",
    "pass the values as a parameter of the kernel": "arange random tri sin cos",
    "write the number": "const",
    "kernels compute in FP32, and store BF16, FP16, FP32 and INT32": (
        "BOOL FP4 FP8E4M3FN FP8E5M2 FP8E8M0 HF4 HF8 INT4 INT8 INT16 INT64 UINT4 UINT8 UINT16 "
        "UINT32 UINT64"
    ),
    "a kernel is a function under @pl.jit": "function program",
    "use @pl.jit.inline": "inline",
    "use a number or a pl.dynamic extent": "IntLike RUNTIME DynVar",
}
"""What to use instead, and for which names, divided by spaces."""

OTHERS = """
    AUTO Array AsyncEvent AsyncSession AtomicType CompactMode DN DataType ForKind FunctionType
    InlineFunction JITFunction MX_A_ZZ MX_B_NN Mem MemRef MemRefType MemorySpace ND NZ PipeType
    PrefetchAsyncContext Ptr PtrType Role ScopeMode SplitMode TASK_ID TaskId TensorLayout TensorView
    TileLayout TileView Tuple addc addsc adir aic_gather aic_initialize_pipe aiv_initialize_pipe
    aiv_shard and_ ands arg_direction array cmp cmps col_argmax col_argmin col_prod cross_core_slot
    distributed dump_tag fmod fmods func_attr get_block_idx get_block_num get_subblock_idx
    import_peer_buffer loads loads_program lrelu manual_scope matmul_mx matmul_mx_acc matmul_mx_bias
    mrgsort mscatter no_dep not_ optimizations or_ ors parse parse_program part_add part_max
    part_min part_mul prefetch prelu reinterpret_view rem rems reserve_buffer row_argmax row_argmin
    row_prod scope sel sels shl shls shr shrs sort32 split static_assert static_print subc subsc
    system tfree_to_aic tfree_to_aiv tpop_from_aic tpop_from_aiv tpush_to_aic tpush_to_aiv xor xors
"""
"""The rest, for which nothing that is emulated stands in."""

NOT_EMULATED = {
    **dict.fromkeys(OTHERS.split(), ""),
    **{name: use for use, names in INSTEAD.items() for name in names.split()},
}
"""Maps each name to what to use instead, or to an empty string."""


def explained(name: str, emulated: Collection[str]) -> str:
    """What an error says of a name that is not emulated. emulated: the names that are."""
    if name in NOT_EMULATED:
        use = NOT_EMULATED[name]
        return f"pl.{name}, which PyPTO has but the emulation does not" + (
            f": {use} ({TABLE})" if use else f" ({TABLE} lists what it has)"
        )
    known = [*emulated, *NOT_EMULATED]
    return f"pl.{name}, which PyPTO {PYPTO} does not have{nearest(name, known)} ({TABLE})"
