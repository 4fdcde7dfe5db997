"""The suite of samplers finds each of these broken ones, by the test that is meant for it."""

import math
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import count, product
from random import Random
from typing import Any

import pytest
import torch
from attrs import evolve, field, frozen
from conformance import Fault, full_name, missed, run
from sampler_oracle import warped
from torch import Tensor
from transformers.generation import logits_process as oracle

from tilewright import hookimpl
from tilewright.errors import NonFiniteLogitsError
from tilewright.sampling import uniform
from tilewright.types import (
    Check,
    PluginInfo,
    SampledToken,
    Sampler,
    SamplerRow,
    SamplingParams,
    TokenLogprobs,
)
from tilewright_sampling import logits as steps
from tilewright_sampling.sampler import LogitsSampler, Options
from tilewright_testing import SamplerSuite
from tilewright_testing.sampler import probabilities, scores


class Samplers:
    """A plugin that makes samplers in some way."""

    tilewright_api = 2

    def __init__(self, make: Callable[[], Sampler], **said: Any):
        self.make = make
        self.info = PluginInfo(summary="chooses tokens", **said)

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return self.info

    @hookimpl
    def create_sampler(self) -> Sampler:
        return self.make()


class Right(LogitsSampler):
    def __init__(self) -> None:
        super().__init__(Options(), greedy=False)

    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        """The token of one row, as the shipped sampler chooses it."""
        return self._choose(logits, row)

    def token(self, logits: Tensor, row: SamplerRow) -> SampledToken:
        token, count = self.choose(logits, row), row.params.logprobs
        said = None if count is None else steps.logprobs(logits, token, count)
        return SampledToken(token_id=token, logprobs=said)

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        super().sample(logits, rows)  # for its errors
        return [self.token(values, row) for values, row in zip(logits, rows, strict=True)]


def drawn(logits: Tensor, row: SamplerRow, u: float) -> int:
    """The token at u of the row's distribution."""
    scores = steps.penalise(logits, row)
    if row.params.temperature == 0:
        return int(scores.argmax())
    return steps.draw(*steps.shortlist(scores, row.params), u)


class LastOfEquals(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        if row.params.temperature == 0:
            return len(logits) - 1 - int(logits.flip(0).argmax())
        return super().choose(logits, row)


class WritesToLogits(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        if row.params.temperature > 0:
            logits /= row.params.temperature
        return super().choose(logits, row)


class WritesToRows(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        token = super().choose(logits, row)
        row.output_token_ids.append(token)  # type: ignore[attr-defined]
        return token


class DrawsFromTorch(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        if row.params.temperature == 0:
            return super().choose(logits, row)
        return int(torch.multinomial(probabilities(logits, row), 1))


class SeedsTorch(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        torch.manual_seed(hash((row.params.seed, row.position)))
        return super().choose(logits, row)


def seeded(key: Callable[[int, int], int]) -> type[Right]:
    """One that draws by a single number, made from seed and position."""

    class Seeded(Right):
        def choose(self, logits: Tensor, row: SamplerRow) -> int:
            u = Random(key(row.params.seed, row.position)).random()
            return drawn(logits, row, u)

    return Seeded


def one_of_two(draw: Callable[[int, int], float]) -> type[Right]:
    """One that draws only the two most likely tokens, the first of them nine times in ten."""

    class OneOfTwo(Right):
        def choose(self, logits: Tensor, row: SamplerRow) -> int:
            u = draw(row.params.seed, row.position) if row.params.temperature else 0.0
            return int(steps.largest(logits, 2)[int(u >= 0.9)])

    return OneOfTwo


class CountsTheOutput(Right):
    """Takes the number of tokens so far for the position."""

    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        return drawn(logits, row, uniform(row.params.seed, len(row.output_token_ids)))


class SeedsByName(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        named = zlib.crc32(row.request_id.encode())
        return drawn(logits, row, uniform(named ^ row.params.seed, row.position))


class DrawsForTheBatch(Right):
    """One generator of the first row's seed for all rows."""

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        tokens = super().sample(logits, rows)
        generator = torch.Generator().manual_seed(rows[0].params.seed % 2**62)
        draws = torch.rand(len(rows), generator=generator).tolist()
        return [
            evolve(token, token_id=drawn(values, row, u)) if row.params.temperature else token
            for token, values, row, u in zip(tokens, logits, rows, draws, strict=True)
        ]


class DrawsByPlace(Right):
    """Mixes the row's place in the batch into its seed."""

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        moved = [
            evolve(row, params=evolve(row.params, seed=row.params.seed ^ place << 40))
            for place, row in enumerate(rows)
        ]
        return super().sample(logits, moved)


class CountsItsCalls(Right):
    def __init__(self) -> None:
        super().__init__()
        self.calls = count()

    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        return drawn(logits, row, uniform(row.params.seed, next(self.calls)))


class CoarseDraws(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        u = uniform(row.params.seed, row.position)
        return drawn(logits, row, int(u * 16) / 16)


class OneScratchpad(Right):
    """What threads of other engines write over."""

    row: SamplerRow

    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        OneScratchpad.row = row
        time.sleep(1e-5)
        return super().choose(logits, OneScratchpad.row)


class TakesTwo(Right):
    """Looks at the runner-up too."""

    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        first, second = logits.topk(2).indices.tolist()
        return first if logits[first] > logits[second] else min(super().choose(logits, row), first)


class DrawsWhereThereAreFilters(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        if row.params.top_k and not row.params.temperature:
            row = evolve(row, params=evolve(row.params, temperature=1.0))
        return super().choose(logits, row)


class DividesByAnyTemperature(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        if not 0 < row.params.temperature < 1e-30:
            return super().choose(logits, row)
        p = torch.softmax(logits / row.params.temperature, 0)
        return int(p.argmin())


def instead(**changed: Callable[[Any], Any]) -> type[Right]:
    """One that sees other settings than were given."""

    class Changed(Right):
        def choose(self, logits: Tensor, row: SamplerRow) -> int:
            new = {name: change(row.params) for name, change in changed.items()}
            return super().choose(logits, evolve(row, params=evolve(row.params, **new)))

    return Changed


def scored(change: Callable[[Tensor, SamplerRow], Tensor], *settings: str) -> type[Right]:
    """One with scores of its own in place of those of some settings."""

    class Scored(Right):
        def choose(self, logits: Tensor, row: SamplerRow) -> int:
            plain = SamplingParams()
            neutral = {name: getattr(plain, name) for name in settings}
            row_left = evolve(row, params=evolve(row.params, **neutral))
            return super().choose(change(logits.clone(), row).float(), row_left)

    return Scored


def divides_below_zero(scores: Tensor, row: SamplerRow) -> Tensor:
    ids = list({*row.prompt_token_ids, *row.output_token_ids})
    scores[ids] /= row.params.repetition_penalty
    return scores


def forgets_the_prompt(scores: Tensor, row: SamplerRow) -> Tensor:
    return steps.penalise(scores, evolve(row, prompt_token_ids=()))


def penalises_the_prompt(scores: Tensor, row: SamplerRow) -> Tensor:
    both = [*row.prompt_token_ids, *row.output_token_ids]
    return steps.penalise(scores, evolve(row, output_token_ids=both))


def counts_presence(scores: Tensor, row: SamplerRow) -> Tensor:
    for token in row.output_token_ids:
        scores[token] -= row.params.presence_penalty
    return scores


def weak_bias(scores: Tensor, row: SamplerRow) -> Tensor:
    for token, bias in row.params.logit_bias.items():
        scores[token] += max(bias, -10.0)
    return scores


def multiplied(scores: Tensor, row: SamplerRow) -> Tensor:
    return scores * (row.params.temperature or 1.0) ** 2


class DropsTheCrossing(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        if not (row.params.temperature and row.params.top_p < 1):
            return super().choose(logits, row)
        p = torch.softmax(logits / row.params.temperature, 0)
        values, ids = p.sort(descending=True)
        kept = max(1, int((values.cumsum(0) <= row.params.top_p).sum()))
        u = uniform(row.params.seed, row.position)
        return steps.draw(ids[:kept], values[:kept], u)


class AbsoluteMinP(Right):
    def choose(self, logits: Tensor, row: SamplerRow) -> int:
        if not (row.params.temperature and row.params.min_p):
            return super().choose(logits, row)
        p = torch.softmax(logits / row.params.temperature, 0)
        p[p < min(row.params.min_p, float(p.max()))] = 0
        u = uniform(row.params.seed, row.position)
        return steps.draw(torch.arange(len(p)), p, u)


class Says(Right):
    """Log-probabilities in some way."""

    def say(self, logits: Tensor, row: SamplerRow, said: TokenLogprobs) -> TokenLogprobs | None:
        return said

    def token(self, logits: Tensor, row: SamplerRow) -> SampledToken:
        sampled = super().token(logits, row)
        if sampled.logprobs is None:
            return sampled
        return evolve(sampled, logprobs=self.say(logits, row, sampled.logprobs))


class SaysAfterTemperature(Says):
    def say(self, logits: Tensor, row: SamplerRow, said: TokenLogprobs) -> TokenLogprobs:
        logits = logits / (row.params.temperature or 1.0)
        return steps.logprobs(logits, said.token_id, row.params.logprobs or 0)


class SaysBits(Says):
    def say(self, logits: Tensor, row: SamplerRow, said: TokenLogprobs) -> TokenLogprobs:
        return evolve(said, logprob=said.logprob / math.log(2))


class SaysLeastFirst(Says):
    def say(self, logits: Tensor, row: SamplerRow, said: TokenLogprobs) -> TokenLogprobs:
        return evolve(said, top=said.top[::-1])


class SaysNothing(Says):
    def say(self, logits: Tensor, row: SamplerRow, said: TokenLogprobs) -> None:
        return None


class Tolerates(Right):
    """Some values that are not finite."""

    values: tuple[float, ...] = ()

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        for value in self.values:
            here = logits.isnan() if math.isnan(value) else logits == value
            logits = torch.where(here, -1e9, logits)
        return super().sample(logits, rows)


class ToleratesNaN(Tolerates):
    values = (math.nan,)


class ToleratesMinusInfinity(Tolerates):
    values = (-math.inf,)


class NamesThe(Right):
    """Something else in NonFiniteLogitsError."""

    def __init__(self, **changed: Any) -> None:
        super().__init__()
        self.changed = changed

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        try:
            return super().sample(logits, rows)
        except NonFiniteLogitsError as error:
            said = {n: getattr(error, n) for n in ("request_id", "step", "token_ids")}
            raise NonFiniteLogitsError(**said | self.changed, vocab_size=40) from error


class ChecksTheSum(Right):
    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        for values, row in zip(logits, rows, strict=True):
            if not math.isfinite(values.abs().sum()):
                raise NonFiniteLogitsError(row.request_id, row.position, [0], len(values))
        return super().sample(logits, rows)


class GivesTensors(Right):
    def token(self, logits: Tensor, row: SamplerRow) -> SampledToken:
        sampled = super().token(logits, row)
        return evolve(sampled, token_id=torch.tensor(sampled.token_id))


class GivesAnIterator(Right):
    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Any:
        return iter(super().sample(logits, rows))


# --- what is wrong with the plugin itself ---------------------------------------------------------


class SaysNothingOfItself:
    tilewright_api = 2

    @hookimpl
    def create_sampler(self) -> Sampler:
        return Right()


class OfAnotherApi(Samplers):
    tilewright_api = 3


class Misspelt(Samplers):
    @hookimpl
    def create_sampelr(self) -> None: ...


class NeedsADevice(Samplers):
    @hookimpl
    def doctor_checks(self) -> list[Check]:
        raise RuntimeError("no device")


@frozen
class Bare:
    size: int = 1
    depth: int = field(default=2, metadata={"help": "how deep"})


class HelpsNobody(Samplers):
    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="has options", options=Bare)


# name, plugin or the class of its samplers, test that fails, words of the failure
_FAULTS: list[tuple[str, Any, str, str]] = [
    (
        "was written for another API",
        OfAnotherApi(Right),
        "it_targets_this_api_version_and_its",
        "API version 3",
    ),
    (
        "has a hook that is none",
        Misspelt(Right),
        "it_targets_this_api_version_and_its",
        "create_sampler",
    ),
    (
        "says nothing of itself",
        SaysNothingOfItself(),
        "it_describes_itself_in_one_line",
        "PluginInfo",
    ),
    ("has an option without help", HelpsNobody(Right), "each_option_has", "size"),
    ("raises in doctor_checks", NeedsADevice(Right), "its_doctor_checks_do_not_raise", "no device"),
    ("gives token ids as tensors", GivesTensors, "each_row_gets_a_token", "must be an int"),
    ("gives an iterator", GivesAnIterator, "each_row_gets_a_token", "must return a list"),
    ("writes to the logits", WritesToLogits, "logits_are_not_changed", "must not write"),
    ("adds the token to the row", WritesToRows, "rows_are_not_changed", "must not write"),
    (
        "looks at two tokens always",
        TakesTwo,
        "it_samples_from_a_vocabulary_of_one_token",
        "selected index k",
    ),
    ("takes the last of equals", LastOfEquals, "ties_go_to_the_smallest_id", "smallest id"),
    (
        "draws at temperature 0 when there is a top_k",
        DrawsWhereThereAreFilters,
        "at_temperature_0_filters_have_no_effect",
        "must not change the chosen",
    ),
    (
        "divides by a tiny temperature",
        DividesByAnyTemperature,
        "a_tiny_temperature_chooses_the_most",
        "check the division",
    ),
    (
        "multiplies by the temperature",
        scored(multiplied),
        "draws_follow_the_softmax_at_each_temperature[2.5]",
        "never drawn",
    ),
    (
        "keeps one token too many of top_k",
        instead(top_k=lambda p: p.top_k and p.top_k + 1),
        "filters_keep_the_most_likely_tokens[top_k=3]",
        "were drawn as well",
    ),
    (
        "drops the token that crosses top_p",
        DropsTheCrossing,
        "filters_keep_the_most_likely_tokens[top_p=0.8]",
        "never drawn",
    ),
    (
        "takes min_p as absolute",
        AbsoluteMinP,
        "filters_keep_the_most_likely_tokens[min_p=0.1]",
        "settings allow",
    ),
    (
        "ignores min_p",
        instead(min_p=lambda p: 0.0),
        "filters_keep_the_most_likely_tokens[min_p=0.1]",
        "were drawn as well",
    ),
    (
        "divides logits below 0 by the repetition penalty",
        scored(divides_below_zero, "repetition_penalty"),
        "penalties_apply_at_temperature_0[repetition_penalty=1.5]",
        "repetition_penalty",
    ),
    (
        "forgets the prompt in the repetition penalty",
        scored(
            forgets_the_prompt,
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
        ),
        "penalties_apply_at_temperature_0[repetition_penalty=1.5]",
        "repetition_penalty",
    ),
    (
        "counts the prompt in the frequency penalty",
        scored(
            penalises_the_prompt,
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
        ),
        "penalties_apply_at_temperature_0[frequency_penalty=0.4]",
        "frequency_penalty",
    ),
    (
        "subtracts the presence penalty for each occurrence",
        scored(counts_presence, "presence_penalty"),
        "penalties_apply_at_temperature_0[presence_penalty=1.0]",
        "presence_penalty",
    ),
    (
        "takes a bias of -inf for a small one",
        scored(weak_bias, "logit_bias"),
        "a_token_with_bias_minus_infinity_is",
        "must not be chosen",
    ),
    (
        "draws with four bits",
        CoarseDraws,
        "successive_draws_of_one_request_follow",
        "settings allow|must follow",
    ),
    (
        "draws from torch's generator",
        DrawsFromTorch,
        "the_random_state_of_torch_is_not_used_or",
        "torch's random state",
    ),
    (
        "seeds torch's generator",
        SeedsTorch,
        "the_random_state_of_torch_is_not_used_or",
        "torch's random state",
    ),
    (
        "draws by the request's name",
        SeedsByName,
        "a_token_does_not_depend_on_the_request_id",
        "whatever the request id",
    ),
    (
        "has one scratchpad for all threads",
        OneScratchpad,
        "samplers_in_several_threads_are_independent",
        "several threads",
    ),
    (
        "says that settings that it heeds have no effect",
        Samplers(Right, ignores=("top_k", "seed")),
        "ignored_settings_have_no_effect",
        "ignores names (top_k|seed)",
    ),
    (
        "names settings that are none",
        Samplers(Right, ignores=("top_q",)),
        "what_it_ignores_are_settings",
        "found 'top_q'; did you mean 'top_[pk]'",
    ),
    (
        "names settings in one text",
        Samplers(Right, ignores="seed"),
        "what_it_ignores_are_settings",
        "must name settings",
    ),
    (
        "gives no log-probabilities",
        SaysNothing,
        "log_probabilities_are_returned_when",
        "must give TokenLogprobs",
    ),
    (
        "gives log-probabilities at the temperature",
        SaysAfterTemperature,
        "log_probabilities_are_those_of_the_raw_logits",
        "of the raw logits",
    ),
    (
        "gives log-probabilities in bits",
        SaysBits,
        "log_probabilities_are_those_of_the_raw_logits",
        "natural logarithm",
    ),
    (
        "lists the least likely first",
        SaysLeastFirst,
        "log_probabilities_are_those_of_the_raw_logits",
        "the most likely first",
    ),
    (
        "takes NaN for unlikely",
        ToleratesNaN,
        "non_finite_logits_raise_an_error_that",
        "nan among the logits",
    ),
    (
        "takes -inf for unlikely",
        ToleratesMinusInfinity,
        "non_finite_logits_raise_an_error_that",
        "-inf among the logits",
    ),
    (
        "names another request in the error",
        Samplers(lambda: NamesThe(request_id="request-0")),
        "non_finite_logits_raise_an_error_that",
        "must name the request",
    ),
    (
        "names the number of tokens in place of the step",
        Samplers(lambda: NamesThe(step=1)),
        "non_finite_logits_raise_an_error_that",
        "must name the request, its step",
    ),
    (
        "names the row in place of the step",
        Samplers(lambda: NamesThe(step=2)),
        "non_finite_logits_raise_an_error_that",
        "must name the request, its step",
    ),
    (
        "takes a sum that overflows for infinity",
        ChecksTheSum,
        "large_finite_logits_are_accepted",
        "not finite",
    ),
]

_VARY = "different_seeds_and_positions_draw_different_tokens"
_REPEAT = "different_seeds_and_positions_draw_no_sequence_twice"
_SAME = "the_same_seed_and_position_always_draw"

# The draws of these are wrong whatever they are drawn from: name, class, test that fails, words of
# the failure.
_DRAWS: list[tuple[str, Any, str, str]] = [
    ("draws the same at each position", seeded(lambda s, p: s), _VARY, "50 positions"),
    ("draws the same for each seed", seeded(lambda s, p: p), _VARY, "50 seeds"),
    ("draws the same always", seeded(lambda s, p: 0), _VARY, "50 seeds"),
    ("draws by seed * position", seeded(lambda s, p: s * p), _VARY, "50 seeds at position 0"),
    ("draws by the number of tokens so far", CountsTheOutput, _VARY, "50 positions"),
    ("draws by seed + position", seeded(lambda s, p: s + p), _REPEAT, "not on their sum"),
    ("draws by seed - position", seeded(lambda s, p: s - p), _REPEAT, "not on their sum"),
    ("draws by 1000 * seed + position", seeded(lambda s, p: 1000 * s + p), _REPEAT, "seed 101"),
    ("draws by 2**16 * seed + position", seeded(lambda s, p: (s << 16) + p), _REPEAT, "seed 101"),
    ("draws by seed + 31 * position", seeded(lambda s, p: s + 31 * p), _REPEAT, "along seeds"),
    ("draws by seed ^ position", seeded(lambda s, p: s ^ p), _REPEAT, "along exchanged numbers"),
    ("draws by 32 bits of the seed", seeded(lambda s, p: hash((s % 2**32, p))), _REPEAT, "42949"),
    ("draws again after 256 tokens", seeded(lambda s, p: hash((s, p % 256))), _REPEAT, "256"),
    ("draws once for the batch", DrawsForTheBatch, "a_token_does_not_depend_on_other", "alone"),
    ("draws by the place in the batch", DrawsByPlace, _SAME, "at another place in the batch"),
    ("counts its calls", CountsItsCalls, _SAME, "differed in a second call"),
]

FAULTS = [
    Fault(
        name,
        Samplers(plugin) if isinstance(plugin, type) else plugin,
        full_name(SamplerSuite, test),
        why=why,
    )
    for name, plugin, test, why in _FAULTS
] + [
    Fault(
        f"{name}, {words or 'the softmax'}",
        Samplers(sampler, distribution=words),
        full_name(SamplerSuite, test),
        why=why,
    )
    for (name, sampler, test, why), words in product(_DRAWS, ("", "a distribution of its own"))
]
FAULTS.append(
    Fault(
        "draws one of two tokens by seed + position",
        Samplers(one_of_two(lambda s, p: uniform(s + p, 0)), distribution="one of two tokens"),
        full_name(SamplerSuite, _REPEAT),
        why="not on their sum",
    )
)
SUITE = SamplerSuite


def test_each_broken_sampler_is_found() -> None:
    assert missed(SUITE, FAULTS) == []


def test_draws_from_few_tokens_are_not_taken_for_repeated_ones() -> None:
    plugin = Samplers(one_of_two(uniform), distribution="one of two tokens")
    outcome = run(SamplerSuite, plugin, [full_name(SamplerSuite, t) for t in (_VARY, _REPEAT)])
    assert set(outcome.found.values()) == {"passed"}, outcome.why


# --- the suite's oracle ---------------------------------------------------------------------------


def row(prompt: Sequence[int] = (), output: Sequence[int] = (), **params: Any) -> SamplerRow:
    return SamplerRow(
        request_id="r",
        params=SamplingParams(**params),
        prompt_token_ids=prompt,
        output_token_ids=output,
        position=len(output),
    )


def random_logits(size: int, seed: int) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_suites_filters_are_those_of_transformers(size: int, temperature: float) -> None:
    logits = random_logits(size, size)
    for top_k, top_p, min_p in product([0, 1, 5, 1000], [1.0, 0.9, 0.3], [0.0, 0.05, 0.5, 1.0]):
        drawn = row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        expected = warped(logits, drawn.params).softmax(0)
        found = probabilities(logits, drawn)
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_the_suites_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(50, 3)
    ids = torch.randint(50, (40,), generator=torch.Generator().manual_seed(1))
    expected = oracle.RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None].clone())
    found = scores(logits, row(ids[:30].tolist(), ids[30:].tolist(), repetition_penalty=penalty))
    torch.testing.assert_close(found.float(), expected[0])


def test_the_suites_bias_is_that_of_transformers() -> None:
    logits, bias = random_logits(20, 4), {3: 2.5, 7: -4.0, 0: -math.inf}
    processor = oracle.SequenceBiasLogitsProcessor([[[i], value] for i, value in bias.items()])
    expected = processor(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())[0]
    torch.testing.assert_close(scores(logits, row(logit_bias=bias)).float(), expected)


def test_the_suites_presence_and_frequency_penalties_count_the_output() -> None:
    found = scores(
        torch.zeros(4), row([0, 0, 1], [1, 2, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    )
    assert found.tolist() == [0.0, -0.75, -1.25, 0.0]
