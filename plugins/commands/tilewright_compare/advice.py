"""What to check, and what to run next, after a comparison."""

from attrs import evolve

from tilewright_compare.comparison import Comparison
from tilewright_compare.judge import Finding, Phase

CHECKS = {
    "embed": "the embedding table, and the token ids that the step was given",
    "attn_norm": "the RMSNorm before attention: its weight, its eps, its axis",
    "q_proj": "the query projection: its weight's transposition and order of rows, its bias",
    "k_proj": "the key projection: its weight's transposition and order of rows, its bias",
    "v_proj": "the value projection: its weight's transposition and order of rows, its bias",
    "q_norm": "the RMSNorm of query heads: its weight, its eps, per head and before RoPE",
    "k_norm": "the RMSNorm of key heads: its weight, its eps, per head and before RoPE",
    "q_rope": "RoPE of queries: positions, theta, scaling, which dimensions rotate together",
    "k_rope": "RoPE of keys: positions, theta, scaling, which dimensions rotate together",
    "k_cache": "how keys are stored: slots, row order, page size, dtype",
    "v_cache": "how values are stored: slots, row order, page size, dtype",
    "attention": "attention: the scale, the causal mask, which KV head a query head reads, and "
    "which slots of the cache",
    "o_proj": "the output projection: its weight's transposition, the order of heads",
    "attn_residual": "the first residual: what is added to the layer's input",
    "mlp_norm": "the RMSNorm before the MLP: its weight, its eps, its input",
    "gate_proj": "the gate projection: its weight, and whether it is up's",
    "up_proj": "the up projection: its weight, and whether it is gate's",
    "activation": "SiLU of the gate, times up",
    "down_proj": "the down projection: its weight's transposition",
    "output": "the second residual: what is added to attn_residual",
    "final_norm": "the last RMSNorm: its weight, and which rows it gets",
    "logits": "the head: its weight, tied or not, and which rows it gets",
}
"""What to check, keyed by the first wrong stage, in the order of docs/tensors.md."""


def advice(comparison: Comparison) -> list[str]:
    """What to check, and what to run, when the two differ."""
    if wrong := comparison.wrong_weights:
        return [f"look at how {comparison.candidate} loads and packs {wrong[0].name}"]
    first = comparison.divergence
    if first is None:
        return _advice_without_tensor(comparison)
    if first.place.mode == "untapped":
        return _advice_without_taps(first)
    if gap := _untapped_stages(comparison, first):
        hints = [
            f"look between {gap[0]}, which is right, and {gap[-1]}: to narrow it down, let the "
            f"candidate tap {', '.join(gap[1:-1])}"
        ]
    else:
        hints = [_check(comparison, first)]
    if comparison.fused and (before := _advice_fused(comparison, first)):
        hints.append(before)
    modes = {f.place.mode for f in comparison.findings}
    if first.place.mode == "chained" and comparison.finished:
        hints.append(
            "each layer is right by itself: look at what goes from layer to layer, or adds up"
            if "isolated" in modes
            else "to try each layer alone, both executors must be able to run layer by layer"
        )
    if first.place.mode == "chained" and (hint := _ABOUT_PHASES.get(first.place.phase)):
        hints.append(hint)
    if without := comparison.first_wrong("untapped"):
        place = without.place
        hints.append(
            f"without taps, it is wrong too, first in {place.phase} step {place.step}, "
            f"{place.tensor}: {without.why}"
        )
    return hints


def _check(comparison: Comparison, first: Finding) -> str:
    """What to check at the first wrong tensor. A cache of which only the keys or only the values
    are wrong is stored in the right slots."""
    check = CHECKS.get(first.place.stage, first.place.tensor)
    if first.place.stage not in COMPUTED:
        return f"check {check}"
    caches = {
        f.place.stage: f
        for f in comparison.findings
        if evolve(f.place, tensor=first.place.tensor) == first.place
    }
    other = caches.get("v_cache" if first.place.stage == "k_cache" else "k_cache")
    if other is None:
        return f"check {check}"
    what, others = COMPUTED[first.place.stage]
    if other.passed and first.candidate is not None and first.candidate.more_nonfinite:
        return f"check which tokens are written, and in which slots: the {others} are right"
    if other.passed:
        return f"check {what}: the {others} beside them are in their slots, and right"
    if first.pattern == other.pattern:
        return f"check {check}: keys and values are wrong in the same way"
    return f"check {check}; or what both are computed from, such as attn_norm"


COMPUTED = {
    "k_cache": ("the key projection, its norm and RoPE", "values"),
    "v_cache": (
        "the value projection, which tensor is stored as values, and the scale of attn_norm, which "
        "a norm of keys would hide",
        "keys",
    ),
}
"""What computes the keys or values of a cache, and what the other cache holds."""

_ABOUT_PHASES: dict[Phase, str] = {
    "decode": "prefill is right: look at positions, slots and the cache of decode steps",
    "mixed": "prefill and decode are right in steps of their own: look at what each sequence of a "
    "step takes from query_starts, context_lens and block_table",
}


def _advice_without_tensor(comparison: Comparison) -> list[str]:
    """What to check if every compared tensor is within its limits."""
    hints = [f"to reach more: {comparison.wider}"] if comparison.wider else []
    if comparison.perplexity and not comparison.perplexity.passed:
        hints.append("check rows of logits other than the last one of each sequence")
    if comparison.drift:
        hints.append(f"keep the sums of {comparison.drift.projection} in float32 to the last term")
    if comparison.against and not comparison.against.passed:
        stage = comparison.against.grown[0].now.stage
        hints.append(f"look at what changed in {stage} since {comparison.against.date}")
    return hints


def _advice_fused(comparison: Comparison, first: Finding) -> str:
    """Where else to look if no layer's output is tapped; empty if the tensor needs no layer."""
    layer = first.place.layer
    if first.place.stage == "logits":
        layer = max((f.place.layer or 0 for f in comparison.findings), default=0) + 1
    if not layer:
        return ""
    return f"layer {layer - 1} from its attention on may be wrong too: its output is not tapped"


def _advice_without_taps(first: Finding) -> list[str]:
    layer = first.place.layer
    where = f"the keys and values of layer {layer}"
    if layer is None:
        where = "the last layer and the head"
    elif layer:
        where += f", and what layer {layer - 1} puts out"
    hints = [f"look at what forward runs when it has no tap: {where}"]
    if hint := _ABOUT_PHASES.get(first.place.phase):
        hints.append(hint)
    if first.baseline is None and first.candidate is not None:
        hints.append(
            "if rounding explains the difference, set the executor's limits.tap_exact to False: "
            "the run without taps is then judged by its distance from the truth"
        )
    return hints


def _untapped_stages(comparison: Comparison, first: Finding) -> list[str]:
    """The last stage before the first wrong one, the untapped stages between, and the wrong one."""
    order = list(CHECKS)
    layer, stage = first.place.layer, first.place.stage
    tapped = {
        f.place.stage
        for f in comparison.findings
        if f.place.layer == layer and f.place.step == first.place.step and f.candidate is not None
    }
    if layer is None or stage not in order or stage.endswith("_cache"):
        return []
    gap = [stage]
    for before in reversed(order[: order.index(stage)]):
        gap.insert(0, before)
        if before in tapped:
            return gap if len(gap) > 2 else []
    return []
