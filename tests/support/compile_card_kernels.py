"""Compiles each kernel of the torch executor for a CUDA device that need not be there.

Usage: compile_card_kernels.py CAPABILITY, such as 80 or 90; not with TRITON_INTERPRET=1. Prints the
shared memory that each variant takes, and fails for one that does not compile, or that takes more
than a card of that capability has.
"""

import sys
from itertools import product

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewright_torch import card_kernels as kernels

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
POINTER = "*"


def compiled(capability, kernel, signature, constants, warps, stages=3):
    """Bytes of shared memory of a kernel, as it is compiled for pointers that torch allocates, and
    for whole numbers that 16 divides."""
    names = list(kernel.arg_names)
    source = ASTSource(
        kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith(POINTER) or kind == "i32"
        },
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=target, options=options).metadata.shared


def variants():
    """Each kernel with the arguments of a launch: name, kernel, signature, constants, warps, and
    stages where they matter."""
    shapes = [(128, 5, 8, 0), (256, 2, 4, 1024), (80, 1, 4, 0)]
    for dtype, (head_dim, group, kv_heads, window) in product(NAMES, shapes):
        name, padded = POINTER + NAMES[dtype], max(16, triton.next_power_of_2(head_dim))
        constants = {
            "GROUP": group,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "PADDED_DIM": padded,
            "PAGE_SIZE": 16,
            "WINDOW": window,
            "BLOCK": kernels.key_block(padded, dtype.itemsize),
            "COMPUTE": getattr(tl, str(dtype).removeprefix("torch.")),
        }
        of_step = dict.fromkeys(("table", "width", "lengths", "starts"), "*i32")
        read = {"q": name, "keys": name, "values": name, **of_step}
        for splits in (1, 32):
            parts = name if splits == 1 else "*fp32"
            signature = {**read, "out": name, "parts": parts, "sums": parts, "scale": "fp32"}
            fixed = {**constants, "SPLITS": splits, "ROWS": 16}
            what = f"decode attention {NAMES[dtype]} {head_dim} in {splits}"
            stages = kernels.DECODE_STAGES[dtype.itemsize]
            yield what, kernels.decode_attention_kernel, signature, fixed, 4, stages
        signature = {**read, "query_blocks": "*i32", "out": name, "scale": "fp32"}
        fixed = {**constants, "ROWS": kernels.QUERY_BLOCK[dtype.itemsize]}
        what = f"prefill attention {NAMES[dtype]} {head_dim}"
        stages = kernels.PREFILL_STAGES[dtype.itemsize]
        yield what, kernels.prefill_attention_kernel, signature, fixed, 4, stages
    for dtype in NAMES:
        name = POINTER + NAMES[dtype]
        signature = {"parts": "*fp32", "sums": "*fp32", "starts": "*i32", "out": name}
        fixed = {"HEADS": 40, "HEAD_DIM": 128, "PADDED_DIM": 128, "SPLITS": 32}
        yield f"joining parts {NAMES[dtype]}", kernels.join_parts_kernel, signature, fixed, 4
        for adds in (False, True):
            signature = dict.fromkeys(("x", "delta", "weight", "total", "out"), name)
            fixed = {"SIZE": 5120, "PADDED": 8192, "ADDS": adds}
            what = f"norm {NAMES[dtype]}"
            yield what, kernels.norm_kernel, {**signature, "eps": "fp32"}, fixed, 16
        for norms in (False, True):
            signature = dict.fromkeys(("qkv", "q_norm", "k_norm", "q_out", "keys", "values"), name)
            signature |= {"cos": "*fp32", "sin": "*fp32", "rope_rows": "*i32", "slots": "*i32"}
            fixed = {"HEADS": 40, "KV_HEADS": 8, "HEAD_DIM": 128, "PADDED_HALF": 64, "NORMS": norms}
            what = f"rotation {NAMES[dtype]}"
            yield what, kernels.rotate_kernel, {**signature, "eps": "fp32"}, fixed, 1
        signature, fixed = {"gate_up": name, "out": name}, {"SIZE": 17408, "BLOCK": 1024}
        yield f"silu {NAMES[dtype]}", kernels.silu_kernel, signature, fixed, 4
        for (rows, block, warps, stages), even in product(kernels.ONE_ROW_CONFIGS, (False, True)):
            signature = dict.fromkeys(("x", "weight", "bias", "out"), name)
            signature |= {"columns": "i32", "count": "i32"}
            fixed = {"BIASED": even, "EVEN": even, "ROWS": rows, "BLOCK": block, "STAGES": stages}
            what = f"one row {NAMES[dtype]} {rows} by {block} in {stages} stages"
            yield what, kernels.one_row_kernel, signature, fixed, warps


def main():
    capability = int(sys.argv[1])
    for what, kernel, signature, constants, *launch in variants():
        shared = compiled(capability, kernel, signature, constants, *launch)
        print(f"sm_{capability} {what}: {shared} bytes of shared memory", flush=True)
        if shared > SHARED_BYTES[capability]:
            sys.exit(f"{what} takes {shared} bytes, more than {SHARED_BYTES[capability]}")


if __name__ == "__main__":
    main()
