"""What passes between the engine and its plugins: plain, frozen data and small protocols.

``ModelConfig`` describes a model, from its files; ``RuntimeConfig`` describes how this machine runs
it. They share no field. Nothing here imports torch at run time.
"""

from tilewright.types.executor import (
    Admission,
    Executor,
    ExecutorLimits,
    LayerwiseExecutor,
    PendingStep,
    ResolvedRuntime,
    RuntimeConfig,
    SamplingExecutor,
    StepBatch,
    StepOutput,
    Tap,
)
from tilewright.types.fields import described
from tilewright.types.kv_cache import KvAllocator, KvCacheSpec, KvLayer, RowOrder
from tilewright.types.logits_processor import LogitsEdits, LogitsProcessor
from tilewright.types.model import (
    DTYPES,
    DType,
    LoadedModel,
    ModelConfig,
    PackedTensor,
    PackedWeights,
    Packing,
    RopeConfig,
    RopeKind,
    Sample,
    TensorInfo,
    TensorSource,
    TextAssets,
)
from tilewright.types.plugin import (
    Check,
    CheckStatus,
    Command,
    Hypothesis,
    PluginInfo,
    Report,
    WeightFormats,
)
from tilewright.types.results import FinishReason, GenerateResult, Phase, StepEvent, Timings
from tilewright.types.sampling import (
    BUILTIN_GENERATE,
    GenerateConfig,
    SampledToken,
    Sampler,
    SamplerRow,
    SamplingParams,
    TokenLogprobs,
)

__all__ = [
    "BUILTIN_GENERATE",
    "DTYPES",
    "Admission",
    "Check",
    "CheckStatus",
    "Command",
    "DType",
    "Executor",
    "ExecutorLimits",
    "FinishReason",
    "GenerateConfig",
    "GenerateResult",
    "Hypothesis",
    "KvAllocator",
    "KvCacheSpec",
    "KvLayer",
    "LayerwiseExecutor",
    "LoadedModel",
    "LogitsEdits",
    "LogitsProcessor",
    "ModelConfig",
    "PackedTensor",
    "PackedWeights",
    "Packing",
    "PendingStep",
    "Phase",
    "PluginInfo",
    "Report",
    "ResolvedRuntime",
    "RopeConfig",
    "RopeKind",
    "RowOrder",
    "RuntimeConfig",
    "Sample",
    "SampledToken",
    "Sampler",
    "SamplerRow",
    "SamplingExecutor",
    "SamplingParams",
    "StepBatch",
    "StepEvent",
    "StepOutput",
    "Tap",
    "TensorInfo",
    "TensorSource",
    "TextAssets",
    "Timings",
    "TokenLogprobs",
    "WeightFormats",
    "described",
]
