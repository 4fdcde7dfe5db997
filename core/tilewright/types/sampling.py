"""How tokens are chosen: a request's settings, and a sampler's input and output."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import field, fields, frozen, validators

from tilewright.types.fields import checked, described, if_set

if TYPE_CHECKING:
    from attrs import Attribute
    from torch import Tensor


@frozen
class SamplingParams:
    """How one request's next token is chosen: the input of a sampler, with all values set.

    The fields of GenerateConfig explain them. They apply in this order: repetition
    penalty; presence and frequency penalty; logit bias; at temperature 0 the most likely token,
    else temperature, top_k, top_p and min_p, each to what the one before it leaves.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(factory=dict)
    seed: int = 0
    logprobs: int | None = None


def _at_most_max_new_tokens(
    config: "GenerateConfig", of: "Attribute[Any]", value: int | None
) -> None:
    most = config.max_new_tokens
    if value is not None and most is not None and value > most:
        raise ValueError(
            f"'min_new_tokens' must be <= max_new_tokens = {most}: {value}; lower it, or raise "
            "max_new_tokens"
        )


def _without_minus_1(top_k: int | None) -> int | None:
    """vLLM and llama.cpp write all tokens as -1."""
    return 0 if top_k == -1 else top_k


def _above_0_unless_greedy(
    config: "GenerateConfig", of: "Attribute[Any]", value: float | None
) -> None:
    if value == 0 and config.temperature:  # not known yet: checked once it is
        raise ValueError(
            f"'top_p' must be > 0 unless temperature is 0: {value}; for the most likely token, "
            "set temperature to 0"
        )


def _no_empty_string(
    config: "GenerateConfig", of: "Attribute[Any]", value: tuple[str, ...]
) -> None:
    if "" in value:
        raise ValueError(
            "'stop' must be a list of strings of at least one character, found an empty one"
        )


@frozen(field_transformer=checked)
class GenerateConfig:
    """A user's settings for one generation. None: as the model's files recommend, else built-in."""

    max_new_tokens: int | None = described(
        "maximum number of tokens to generate (128)", validator=if_set(validators.ge(1))
    )
    min_new_tokens: int | None = described(
        "number of tokens before which neither an end-of-sequence token, nor a stop token id, nor "
        "a stop string that these tokens complete ends the text (0)",
        validator=if_set(validators.ge(0), _at_most_max_new_tokens),
    )
    temperature: float | None = described(
        "randomness of sampling; 0: always the most likely token (0)",
        validator=if_set(validators.ge(0.0), validators.lt(float("inf"))),
    )
    top_k: int | None = described(
        "sample among the k most likely tokens; 0 or -1: all (0)",
        converter=_without_minus_1,
        validator=if_set(validators.ge(0)),
    )
    top_p: float | None = described(
        "sample among the fewest tokens whose probabilities add up to at least p (1)",
        validator=if_set(validators.ge(0.0), validators.le(1.0), _above_0_unless_greedy),
    )
    min_p: float | None = described(
        "drop tokens less likely than min_p times the most likely one (0)",
        validator=if_set(validators.ge(0.0), validators.le(1.0)),
    )
    repetition_penalty: float | None = described(
        "divide positive logits, and multiply negative ones, of tokens in the prompt or output (1)",
        validator=if_set(validators.gt(0.0), validators.lt(float("inf"))),
    )
    presence_penalty: float | None = described(
        "subtract once from the logit of each token in the output (0)",
        validator=if_set(validators.gt(float("-inf")), validators.lt(float("inf"))),
    )
    frequency_penalty: float | None = described(
        "subtract from the logit of a token for each of its occurrences in the output (0)",
        validator=if_set(validators.gt(float("-inf")), validators.lt(float("inf"))),
    )
    logit_bias: Mapping[int, float] | None = described(
        "add a value to the logit of a token id; -inf forbids the token",
        validator=if_set(validators.deep_mapping(validators.ge(0), validators.lt(float("inf")))),
    )
    seed: int | None = described(
        "random seed; equal seeds give equal tokens, whatever else is in the batch (but for "
        "rounding, which may differ with the batch's shape in bfloat16 and float16); with several "
        "prompts, result j of prompt i, both counted from 0, uses seed + i * n + j (random)",
        validator=if_set(validators.ge(0), validators.lt(2**63)),
    )
    n: int | None = described(
        "results for each prompt; only generate_batch and the command line take more than 1 (1)",
        validator=if_set(validators.ge(1), validators.le(2**16)),
    )
    logprobs: int | None = described(
        "return log-probabilities of the chosen token and of the n most likely tokens",
        validator=if_set(validators.ge(0)),
    )
    prompt_logprobs: int | None = described(
        "return log-probabilities of each prompt token and of the n most likely tokens there",
        validator=if_set(validators.ge(0)),
    )
    logits_processors: Mapping[str, Any] | None = described(
        "logits processors of this generation: each plugin's name, with what it needs to know"
    )
    stop: tuple[str, ...] | None = described(
        "end the text before any of these strings", validator=if_set(_no_empty_string)
    )
    include_stop_str: bool | None = described(
        "keep the stop string that ended the text; unlike in vLLM, the text of a stop token id is "
        "never kept (false)"
    )
    stop_token_ids: tuple[int, ...] | None = described("end generation at any of these token ids")
    ignore_eos: bool | None = described("continue after an end-of-sequence token (false)")
    stream: bool | None = described("make generate() return a stream of text (false)")

    def over(self, defaults: "GenerateConfig") -> "GenerateConfig":
        """This configuration, with unset fields taken from defaults."""
        names = [a.name for a in fields(GenerateConfig)]
        mine = {n: v for n in names if (v := getattr(self, n)) is not None}
        return GenerateConfig(**{n: getattr(defaults, n) for n in names} | mine)


BUILTIN_GENERATE = GenerateConfig(
    max_new_tokens=128,
    min_new_tokens=0,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    n=1,
    stop=(),
    include_stop_str=False,
    stop_token_ids=(),
    ignore_eos=False,
    stream=False,
)
"""Defaults for what neither the user nor the model's files set."""


@frozen(kw_only=True, eq=False)
class SamplerRow:
    """One request's part of a sampling step."""

    request_id: str
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Tokens generated so far, as far as they are known."""
    position: int
    """Index of the sampled token in the request's output, from 0.

    It differs from ``len(output_token_ids)`` where earlier tokens are not known yet, or where the
    row follows tokens that are only proposed.
    """


@frozen(kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities at one step, of the distribution before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


@frozen(kw_only=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None
    sanitized: int = 0
    """How many non-finite logits were replaced; always 0 unless sanitising was asked for."""


class Sampler(Protocol):
    """Chooses each request's next token.

    A draw depends on the row's seed and position and on nothing else: rows that agree in both and
    in their logits get equal tokens, and draws of rows that differ in one of them are independent.

    The shipped samplers draw with the number ``tilewright.sampling.uniform(seed, position)``. It
    is a hash, so that an executor that samples on its own device can compute the same number:
    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) with the key
    (seed % 2**32, seed // 2**32) and the counter (position, 0, 0, 0) gives words w, and the number
    is ``((w[0] * 2**32 + w[1]) >> 11) / 2**53``.
    """

    def sample(self, logits: "Tensor", rows: Sequence[SamplerRow]) -> list[SampledToken]:
        """Sample B tokens from logits [B, vocab_size] float32, all rows of a step at once.

        The logits are where the executor computes them: on its device, whatever that is. A row's
        result depends on that row alone. Ties go to the smallest id. The logits are not changed.
        Raises NonFiniteLogitsError, whose step is the row's position, for NaN or infinity (-inf
        included).
        """
        ...


@runtime_checkable
class ReplaceableSampler(Sampler, Protocol):
    """A sampler whose place an executor that samples may take (``SamplingExecutor``).

    Optional: the engine calls any other sampler for every token.
    """

    def replaceable(self, params: SamplingParams) -> bool:
        """Whether the tokens of a request with these parameters are those of the shipped sampler
        ``top-p``, and logits that are not finite are an error: what such an executor computes."""
        ...
