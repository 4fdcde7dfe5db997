"""The conformance suite of samplers, and the distribution that the settings define."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from attrs import evolve

from tilewright import plugins
from tilewright.errors import NonFiniteLogitsError, PluginError, RequestError
from tilewright.types import SampledToken, Sampler, SamplerRow, SamplingParams
from tilewright_testing.state import left_alone
from tilewright_testing.suite import Implementation, PluginSuite

if TYPE_CHECKING:
    from torch import Tensor

MakeSampler = Callable[[int], Sampler]
"""Makes a sampler for a model with so many tokens in its vocabulary."""
Sample = Callable[["Tensor", Sequence[SamplerRow]], list[SampledToken]]
"""``Sampler.sample`` of a sampler that was made for the vocabulary of the logits."""

_DRAWS = 2000
_SIGMAS = 5.0
"""How far frequencies may be from probabilities, in standard deviations. The seeds are fixed, so a
sampler passes always or never; about one correct sampler in millions would never pass."""

_FILTERS: dict[str, dict[str, Any]] = {
    "top_k=1": {"top_k": 1},
    "top_k=3": {"top_k": 3},
    "top_k=1000": {"top_k": 1000},
    "top_p=0.3": {"top_p": 0.3},
    "top_p=0.8": {"top_p": 0.8},
    "top_p=0.97": {"top_p": 0.97},
    "min_p=0.1": {"min_p": 0.1},
    "min_p=0.5": {"min_p": 0.5},
    "min_p=1.0": {"min_p": 1.0},
    "top_k=5,top_p=0.7": {"top_k": 5, "top_p": 0.7},
    "top_p=0.95,min_p=0.2": {"top_p": 0.95, "min_p": 0.2},
}

_PENALTIES: dict[str, dict[str, Any]] = {
    "repetition_penalty=1.5": {"repetition_penalty": 1.5},
    "repetition_penalty=0.6": {"repetition_penalty": 0.6},
    "presence_penalty=1.0": {"presence_penalty": 1.0},
    "presence_penalty=-0.8": {"presence_penalty": -0.8},
    "frequency_penalty=0.4": {"frequency_penalty": 0.4},
    "logit_bias": {"logit_bias": {0: 2.5, 3: -4.0, 7: -math.inf}},
    "all of them": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {1: 1.0, 4: -1.5},
    },
}

_MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.3, "top_k": 4, "seed": 3},
    {"temperature": 1.0, "top_p": 0.8, "seed": 4, "logprobs": 2},
    {"temperature": 1.0, "min_p": 0.05, "seed": 2**63 - 1},
    {"temperature": 0.9, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "seed": 5},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "logit_bias": {5: 3.0}, "seed": 6},
)
"""Settings of requests that may be in one batch."""

_EQUALS = 1000
"""Equally likely tokens in the tests of seeds and positions."""

_NUMBERS = [
    *range(1200),
    *(start + i for start in (4096, 10_000, 65_536, 100_000, 10**6, 2**20) for i in range(64)),
]
"""Runs of successive numbers. All but the first start at a constant by which a sampler may multiply
the seed."""

_LINES = {
    "positions": [[(seed, i) for i in _NUMBERS] for seed in (100, 101, 100 + 2**32)],
    "seeds": [
        [(i, position) for i in [*_NUMBERS, *range(2**32, 2**32 + 64)]] for position in (0, 1)
    ],
    "exchanged numbers": [[(3, i) for i in range(10, 500)], [(i, 3) for i in range(10, 500)]],
}
"""Lines of pairs (seed, position). Where a sampler makes one number of each pair and draws by it,
as by the sum, two lines have a sequence of such numbers in common."""


def scores(logits: "Tensor", row: SamplerRow) -> "Tensor":
    """Logits [V] after penalties and bias, float64, by the definitions at GenerateConfig's fields.

    Repetition penalty is that of CTRL (Keskar et al. 2019), presence and frequency penalties are
    those of OpenAI's API.
    """
    params, changed = row.params, logits.double().clone()
    for token in {*row.prompt_token_ids, *row.output_token_ids}:
        factor = params.repetition_penalty
        changed[token] *= 1 / factor if changed[token] > 0 else factor
    for token, count in Counter(row.output_token_ids).items():
        changed[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        changed[token] += bias
    return changed


def probabilities(logits: "Tensor", row: SamplerRow) -> "Tensor":
    """The distribution of a row's token, [V] float64: the oracle of the suite.

    Simple rather than fast, and written from the settings' definitions alone. Among equally likely
    tokens, smaller ids come first.
    """
    import torch

    params, found = row.params, scores(logits, row)
    order = sorted(range(len(found)), key=lambda i: (-found[i].item(), i))
    if params.temperature == 0:
        kept = order[:1]
    else:
        found = found / params.temperature
        kept = order[: params.top_k or None]
        shares = torch.softmax(found[kept], 0).tolist()
        count, reached = 0, 0.0
        while count < len(kept) and reached < params.top_p:
            reached += shares[count]
            count += 1
        # Probabilities add up to 1 only up to rounding: at 1.0 all are kept.
        kept = kept[:count] if params.top_p < 1 else kept
        kept = [
            i for i, share in zip(kept, shares, strict=False) if share >= params.min_p * shares[0]
        ]
    result = torch.zeros(len(logits), dtype=torch.float64)
    result[kept] = torch.softmax(found[kept], 0)
    return result


class SamplerSuite(PluginSuite):
    """Checks one sampler against ``Sampler``.

    Fixtures to give: ``plugin``, and ``options`` where needed. A sampler that ignores settings
    names them in ``PluginInfo.ignores``; a sampler with its own distribution describes it in
    ``PluginInfo.distribution``. The tests that these exempt are skipped; all others apply.
    """

    kind: ClassVar[str] = "sampler"

    @pytest.fixture
    def make_sampler(self, implementation: Implementation) -> MakeSampler:
        """Makes a sampler as an engine does."""
        from tilewright_testing.models import CONFIGS

        def make(vocab_size: int) -> Sampler:
            sampler: Sampler = implementation.call(
                "create_sampler",
                model_config=evolve(CONFIGS["plain"], vocab_size=vocab_size),
                options=implementation.options,
            )
            return sampler

        return make

    @pytest.fixture
    def sample(self, make_sampler: MakeSampler) -> Sample:
        """Samples with one sampler for each size of vocabulary."""
        made: dict[int, Sampler] = {}

        def sample(logits: "Tensor", rows: Sequence[SamplerRow]) -> list[SampledToken]:
            vocab_size = logits.shape[1]
            if vocab_size not in made:
                made[vocab_size] = make_sampler(vocab_size)
            return made[vocab_size].sample(logits, rows)

        return sample

    @pytest.fixture
    def ignores(self, implementation: Implementation) -> tuple[str, ...]:
        """The settings that the sampler ignores."""
        return plugins.info(implementation.plugin).ignores

    @pytest.fixture
    def distribution(self, implementation: Implementation) -> str | None:
        """The sampler's own distribution; empty if it has none."""
        return plugins.info(implementation.plugin).distribution

    # --- results ---------------------------------------------------------------------------------

    def test_each_row_gets_a_token(self, sample: Sample) -> None:
        import torch

        logits = _logits(len(_MIXED), 40)
        if torch.accelerator.is_available():  # an executor's logits are on its device
            logits = logits.to(torch.accelerator.current_accelerator())
        tokens = sample(logits, [_row(**params) for params in _MIXED])
        assert isinstance(tokens, list), f"sample() must return a list, found {tokens!r:.100}"
        assert len(tokens) == len(_MIXED), (
            f"sample() must return one token per row: {len(_MIXED)}, found {len(tokens)}"
        )
        for token in tokens:
            assert isinstance(token, SampledToken), (
                f"sample() must return SampledToken objects, found {token!r:.100}"
            )
            assert type(token.token_id) is int, f"token_id must be an int, found {token.token_id!r}"
            assert 0 <= token.token_id < 40, f"token_id must be in 0 to 39, found {token.token_id}"
            assert token.sanitized == 0, (
                f"sanitized must be 0 for finite logits, found {token.sanitized}"
            )

    def test_logits_are_not_changed(self, sample: Sample) -> None:
        logits = _logits(len(_MIXED), 40)
        before = logits.clone()
        sample(logits, [_row(**params) for params in _MIXED])
        assert bool((logits == before).all()), "sample() must not write to the logits"

    def test_rows_are_not_changed(self, sample: Sample) -> None:
        rows = [_row(output=[1, 2, 2], **params) for params in _MIXED]
        before = [(list(r.output_token_ids), dict(r.params.logit_bias)) for r in rows]
        sample(_logits(len(rows), 40), rows)
        after = [(list(r.output_token_ids), dict(r.params.logit_bias)) for r in rows]
        assert after == before, "sample() must not write to the rows: the engine adds the tokens"

    def test_it_samples_from_a_vocabulary_of_one_token(self, sample: Sample) -> None:
        for temperature in (0.0, 1.0):
            (token,) = sample(_logits(1, 1), [_row(temperature=temperature)])
            assert token.token_id == 0, f"the only token, 0, must be chosen, found {token.token_id}"

    def test_it_samples_from_a_large_vocabulary(self, sample: Sample) -> None:
        logits = _logits(2, 152_000)
        rows = [_row(), _row(temperature=0.8, top_p=0.9, top_k=50, seed=1)]
        tokens = sample(logits, rows)
        assert tokens[0].token_id == int(logits[0].argmax()), (
            "at temperature 0 the most likely token must be chosen"
        )

    # --- temperature 0 ---------------------------------------------------------------------------

    def test_at_temperature_0_the_most_likely_token_is_chosen(self, sample: Sample) -> None:
        logits = _logits(50, 100)
        tokens = sample(logits, [_row(seed=i) for i in range(50)])
        found = [token.token_id for token in tokens]
        assert found == logits.argmax(1).tolist(), (
            "at temperature 0 the most likely token must be chosen, whatever the seed"
        )

    def test_at_temperature_0_filters_have_no_effect(self, sample: Sample) -> None:
        logits = _logits(20, 100)
        rows = [_row(top_k=7, top_p=0.5, min_p=0.3, seed=i) for i in range(20)]
        found = [token.token_id for token in sample(logits, rows)]
        assert found == logits.argmax(1).tolist(), (
            "at temperature 0 top_k, top_p and min_p must not change the chosen token"
        )

    def test_ties_go_to_the_smallest_id(self, sample: Sample) -> None:
        logits = _logits(30, 64).round().clamp(-2, 2)
        logits[0] = 0.0
        tokens = sample(logits, [_row() for _ in range(30)])
        for token, row in zip(tokens, logits.tolist(), strict=True):
            assert token.token_id == row.index(max(row)), (
                f"among equal logits the smallest id, {row.index(max(row))}, must be chosen, found "
                f"{token.token_id}"
            )

    # --- penalties and bias ----------------------------------------------------------------------

    @pytest.mark.parametrize("penalty", _PENALTIES)
    def test_penalties_apply_at_temperature_0(
        self, sample: Sample, ignores: tuple[str, ...], penalty: str
    ) -> None:
        params = _PENALTIES[penalty]
        _skip_ignored(ignores, params)
        logits = _logits(300, 12, scale=1.0)
        logits[::2] -= 3  # negative largest logits show penalties that multiply
        rows = _with_history(300, **params)
        changed = 0
        for token, values, row in zip(sample(logits, rows), logits, rows, strict=True):
            best, second = scores(values, row).topk(2).values.tolist()
            if best - second < 1e-4:  # rounding could decide
                continue
            expected = probabilities(values, row).argmax().item()
            changed += expected != values.argmax().item()
            assert token.token_id == expected, (
                f"{penalty}, prompt {list(row.prompt_token_ids)}, output "
                f"{list(row.output_token_ids)}: token {expected} must be chosen, found "
                f"{token.token_id}; see the settings' help at tilewright.types.GenerateConfig"
            )
        assert changed > 5, f"{penalty} changed only {changed} of 300 tokens: too few to test it"

    @pytest.mark.parametrize("penalty", _PENALTIES)
    def test_penalties_change_the_distribution(
        self,
        sample: Sample,
        ignores: tuple[str, ...],
        distribution: str,
        penalty: str,
    ) -> None:
        _skip_own(distribution)
        params = {"temperature": 0.9, **_PENALTIES[penalty]}
        _skip_ignored(ignores, [*params, "seed"])
        row = _row(prompt=[0, 1, 1, 8], output=[1, 2, 2, 2, 5], **params)
        _check_draws(sample, _logits(1, 12, scale=1.2)[0], row)

    def test_a_token_with_bias_minus_infinity_is_never_chosen(
        self, sample: Sample, ignores: tuple[str, ...]
    ) -> None:
        import torch

        _skip_ignored(ignores, ["logit_bias"])
        logits = torch.tensor([5.0, 0.0, 0.0, 5.0]).repeat(200, 1)
        bias = {0: -math.inf, 3: -math.inf}
        for temperature in (0.0, 1.0, 50.0):
            rows = [_row(temperature=temperature, seed=i, logit_bias=bias) for i in range(200)]
            found = {token.token_id for token in sample(logits, rows)}
            assert found <= {1, 2}, (
                f"tokens 0 and 3 have logit_bias -inf and must not be chosen, found {found}"
            )

    # --- draws -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    def test_draws_follow_the_softmax_at_each_temperature(
        self,
        sample: Sample,
        ignores: tuple[str, ...],
        distribution: str,
        temperature: float,
    ) -> None:
        _skip_own(distribution)
        _skip_ignored(ignores, ["temperature", "seed"])
        _check_draws(sample, _logits(1, 12)[0], _row(temperature=temperature))

    @pytest.mark.parametrize("filters", _FILTERS)
    def test_filters_keep_the_most_likely_tokens(
        self,
        sample: Sample,
        ignores: tuple[str, ...],
        distribution: str,
        filters: str,
    ) -> None:
        _skip_own(distribution)
        params = {"temperature": 0.7, **_FILTERS[filters]}
        _skip_ignored(ignores, [*params, "seed"])
        _check_draws(sample, _logits(1, 12, seed=1, scale=1.5)[0], _row(**params))

    def test_successive_draws_of_one_request_follow_the_softmax(
        self, sample: Sample, ignores: tuple[str, ...], distribution: str
    ) -> None:
        _skip_own(distribution)
        _skip_ignored(ignores, ["temperature"])
        logits = _logits(1, 8, scale=1.0)
        rows = [_row(output=[0] * step, temperature=1.0, seed=11) for step in range(1500)]
        tokens = [t.token_id for t in sample(logits.repeat(1500, 1), rows)]
        _check_frequencies(
            tokens, probabilities(logits[0], rows[0]), "with one seed in successive steps"
        )
        pairs = [8 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
        single = probabilities(logits[0], rows[0])
        _check_frequencies(
            pairs, (single[:, None] * single).flatten(), "of pairs of successive steps"
        )

    def test_different_seeds_and_positions_draw_different_tokens(
        self, sample: Sample, ignores: tuple[str, ...], distribution: str
    ) -> None:
        _skip_ignored(ignores, ["seed"])
        least = 2 if distribution else 40
        for what, pairs in (
            ("seeds at position 0", [(seed, 0) for seed in range(50)]),
            ("seeds at position 5", [(seed, 5) for seed in range(50)]),
            ("positions with seed 0", [(0, position) for position in range(50)]),
            ("positions with seed 7", [(7, position) for position in range(50)]),
        ):
            found = set(_draw_from_equals(sample, pairs))
            assert len(found) >= least, (
                f"50 {what} must draw at least {least} different tokens of {_EQUALS} equally "
                f"likely ones, found {len(found)}: draw by SamplingParams.seed and "
                "SamplerRow.position"
            )

    @pytest.mark.parametrize("along", _LINES)
    def test_different_seeds_and_positions_draw_no_sequence_twice(
        self, sample: Sample, ignores: tuple[str, ...], along: str
    ) -> None:
        """Prompts of one batch have the seeds n, n + 1, ...; a generator keyed by seed + position
        would give them the same sequence, shifted by one token.

        The sequences that are compared are too long to be equal by chance, whatever the sampler's
        distribution.
        """
        _skip_ignored(ignores, ["seed"])
        lines = _LINES[along]
        drawn = [_draw_from_equals(sample, line) for line in lines]
        length = _length_without_repeats([token for tokens in drawn for token in tokens])
        assert length <= len(lines[0]), (
            f"seeds and positions must draw different tokens of {_EQUALS} equally likely ones, but "
            f"almost all drew {Counter(drawn[0]).most_common(1)[0][0]}"
        )
        first: dict[tuple[int, ...], tuple[int, int]] = {}
        for line, tokens in zip(lines, drawn, strict=True):
            for at in range(len(line) - length + 1):
                seed, position = first.setdefault(tuple(tokens[at : at + length]), line[at])
                assert (seed, position) == line[at], (
                    f"along {along}, the same {length} tokens were drawn from seed {seed}, "
                    f"position {position}, and from seed {line[at][0]}, position {line[at][1]}: "
                    "draws must depend on seed and position, not on their sum or another number "
                    "that pairs share; draw with tilewright.sampling.uniform(seed, position)"
                )

    def test_a_tiny_temperature_chooses_the_most_likely_token(
        self, sample: Sample, distribution: str
    ) -> None:
        _skip_own(distribution)
        logits = _logits(20, 100)
        for temperature in (1e-6, 1e-40, 5e-324):
            rows = [_row(temperature=temperature, seed=i) for i in range(20)]
            found = [token.token_id for token in sample(logits, rows)]
            assert found == logits.argmax(1).tolist(), (
                f"temperature {temperature} must choose the most likely token: check the division "
                "by the temperature"
            )

    def test_what_it_ignores_are_settings(self, implementation: Implementation) -> None:
        try:
            plugins.check_ignores(implementation.who, plugins.info(implementation.plugin))
        except PluginError as error:
            pytest.fail(str(error), pytrace=False)

    def test_ignored_settings_have_no_effect(
        self, sample: Sample, ignores: tuple[str, ...]
    ) -> None:
        if not ignores:
            pytest.skip("all settings have an effect")
        values: dict[str, Any] = {
            "temperature": 1.5,
            "top_k": 1,
            "top_p": 0.01,
            "min_p": 1.0,
            "repetition_penalty": 9.0,
            "presence_penalty": 9.0,
            "frequency_penalty": 9.0,
            "logit_bias": {3: 50.0},
            "seed": 12345,
            "logprobs": 2,
        }
        logits = _logits(60, 12, scale=1.0)
        temperature = 0.0 if "temperature" in ignores else 1.0
        plain = [_row(prompt=[0, 1], output=[2, 3], temperature=temperature) for _ in range(60)]
        expected = sample(logits, plain)
        for name in ignores:
            assert name in values, f"PluginInfo.ignores must name settings, found {name!r}"
            rows = [evolve(r, params=evolve(r.params, **{name: values[name]})) for r in plain]
            try:
                found = sample(logits, rows)
            except RequestError:  # refusing the setting is valid too
                continue
            assert found == expected, (
                f"PluginInfo.ignores names {name}, but {name}={values[name]} changed the tokens"
            )

    # --- independence ----------------------------------------------------------------------------

    def test_a_token_does_not_depend_on_other_rows_of_the_batch(self, sample: Sample) -> None:
        count = len(_MIXED)
        logits = _logits(count, 40, scale=1.0)
        rows = [
            _row(prompt=range(i), output=range(2 * i), request_id=f"r{i}", **params)
            for i, params in enumerate(_MIXED)
        ]
        alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(count)]
        for order in (range(count), reversed(range(count)), [3, 0, 6], [5, 5, 1]):
            chosen = list(order)
            together = sample(logits[chosen], [rows[i] for i in chosen])
            assert together == [alone[i] for i in chosen], (
                f"a row's token must depend on that row alone, but rows {chosen} gave "
                f"{[t.token_id for t in together]} in one batch and "
                f"{[alone[i].token_id for i in chosen]} one by one"
            )

    def test_the_same_seed_and_position_always_draw_the_same_token(
        self, make_sampler: MakeSampler
    ) -> None:
        import torch

        logits = torch.zeros(40, _EQUALS)
        rows = [_row(output=[1] * (i % 5), temperature=1.0, seed=i) for i in range(40)]
        one, other = make_sampler(_EQUALS), make_sampler(_EQUALS)
        expected = one.sample(logits, rows)
        other.sample(_logits(40, _EQUALS), rows)
        reordered = one.sample(logits, rows[::-1])[::-1]
        for when, found in (
            ("in a second call", one.sample(logits, rows)),
            ("after other calls", other.sample(logits, rows)),
            ("at another place in the batch", reordered),
        ):
            assert found == expected, (
                "the same seed, position and logits must give the same tokens, which differed "
                f"{when}"
            )

    def test_a_token_does_not_depend_on_the_request_id(self, sample: Sample) -> None:
        logits = _logits(40, 40, scale=0.5)
        for_names = [
            [t.token_id for t in sample(logits, rows)]
            for rows in (
                [_row(request_id=f"{name}-{i}", temperature=1.0, seed=i) for i in range(40)]
                for name in ("first", "second")
            )
        ]
        assert for_names[0] == for_names[1], (
            "the same seed must give the same tokens, whatever the request id"
        )

    def test_the_random_state_of_torch_is_not_used_or_changed(
        self, make_sampler: MakeSampler
    ) -> None:
        import torch

        logits = _logits(len(_MIXED), 40)
        rows = [_row(**params) for params in _MIXED]
        with left_alone("sample(), which must not draw from torch's global generator,"):
            sampler = make_sampler(40)
            expected = sampler.sample(logits, rows)
        state = torch.get_rng_state()
        try:
            torch.manual_seed(987654321)
            found = sampler.sample(logits, rows)
        finally:
            torch.set_rng_state(state)
        assert found == expected, (
            "tokens must depend on the request's seed, not on torch's global seed"
        )

    def test_samplers_in_several_threads_are_independent(self, make_sampler: MakeSampler) -> None:
        logits = _logits(20, 40, scale=0.5)
        rows = [_row(temperature=1.0, top_p=0.9, seed=i) for i in range(20)]
        expected = make_sampler(40).sample(logits, rows)

        def sample(_: int) -> list[bool]:
            sampler = make_sampler(40)
            return [sampler.sample(logits, rows) == expected for _ in range(10)]

        with ThreadPoolExecutor(4) as pool:
            same = [equal for found in pool.map(sample, range(4)) for equal in found]
        assert all(same), (
            "samplers in several threads must choose the tokens that they choose in one thread"
        )

    # --- log-probabilities -----------------------------------------------------------------------

    def test_log_probabilities_are_returned_when_requested(
        self, sample: Sample, ignores: tuple[str, ...]
    ) -> None:
        _skip_ignored(ignores, ["logprobs"])
        logits = _logits(6, 30)
        params: dict[str, Any] = {"temperature": 1.0, "seed": 5}
        wanted = [None, 0, 1, 5, 30, 50]
        rows = [_row(logprobs=count, **params) for count in wanted]
        tokens = sample(logits, rows)
        assert tokens[0].logprobs is None, "logprobs=None must give logprobs None"
        for token, count in zip(tokens[1:], wanted[1:], strict=True):
            assert token.logprobs is not None, f"logprobs={count} must give TokenLogprobs"
            assert token.logprobs.token_id == token.token_id, (
                "TokenLogprobs.token_id must be the chosen token"
            )
            assert len(token.logprobs.top) == min(count or 0, 30), (
                f"logprobs={count} must give the {min(count or 0, 30)} most likely of 30 tokens, "
                f"found {len(token.logprobs.top)}"
            )

    def test_log_probabilities_are_those_of_the_raw_logits(
        self, sample: Sample, ignores: tuple[str, ...]
    ) -> None:
        _skip_ignored(ignores, ["logprobs"])
        logits = _logits(4, 30)
        rows = [
            _row(logprobs=5),
            _row(logprobs=5, temperature=3.0, seed=1),
            _row(logprobs=5, temperature=0.5, top_k=2, seed=2),
            _row(prompt=[1, 2, 3], output=[4], logprobs=5, repetition_penalty=2.0),
        ]
        for token, values in zip(sample(logits, rows), logits, strict=True):
            expected = values.double().log_softmax(0)
            said = token.logprobs
            assert said is not None, "logprobs=5 must give TokenLogprobs"
            assert said.logprob == pytest.approx(expected[token.token_id].item(), abs=1e-4), (
                "logprob must be the natural logarithm of the softmax of the raw logits, before "
                "temperature, penalties and filters"
            )
            top = expected.topk(5)
            assert [i for i, _ in said.top] == top.indices.tolist(), (
                "top must hold the most likely tokens by the raw logits, the most likely first"
            )
            assert [p for _, p in said.top] == pytest.approx(top.values.tolist(), abs=1e-4), (
                "top must hold the natural logarithms of the probabilities"
            )

    # --- logits that are not finite --------------------------------------------------------------

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_non_finite_logits_raise_an_error_that_locates_them(
        self, sample: Sample, value: str, temperature: float
    ) -> None:
        logits = _logits(3, 40)
        logits[1, [7, 31]] = float(value)
        rows = [
            _row(request_id=f"request-{i}", output=[1], position=i + 5, temperature=temperature)
            for i in range(3)
        ]
        try:
            sample(logits, rows)
        except NonFiniteLogitsError as error:
            found = (error.request_id, error.step, error.token_ids)
        except Exception as error:
            pytest.fail(
                f"{value} among the logits must raise NonFiniteLogitsError, not {error!r}",
                pytrace=False,
            )
        else:
            pytest.fail(
                f"{value} among the logits must raise NonFiniteLogitsError, but a token was "
                "returned",
                pytrace=False,
            )
        assert found == ("request-1", 6, (7, 31)), (
            "NonFiniteLogitsError must name the request, its step (the row's position) and the "
            f"token ids: ('request-1', 6, (7, 31)), found {found}"
        )

    def test_large_finite_logits_are_accepted(self, sample: Sample) -> None:
        import torch

        logits = torch.full((2, 100), 3.4e38)
        logits[:, 50:] = -3.4e38
        rows = [_row(), _row(temperature=1.0, seed=1)]
        tokens = sample(logits, rows)
        assert all(0 <= token.token_id < 50 for token in tokens), (
            "logits up to 3.4e38 are finite, so one of tokens 0 to 49 must be chosen, found "
            f"{[token.token_id for token in tokens]}"
        )


def _logits(*shape: int, seed: int = 0, scale: float = 2.0) -> "Tensor":
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _row(
    prompt: Iterable[int] = (),
    output: Iterable[int] = (),
    request_id: str = "a request",
    position: int | None = None,
    **params: Any,
) -> SamplerRow:
    output = list(output)
    return SamplerRow(
        request_id=request_id,
        params=SamplingParams(**params),
        prompt_token_ids=list(prompt),
        output_token_ids=output,
        position=len(output) if position is None else position,
    )


def _draw_from_equals(sample: Sample, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens that each (seed, position) draws from equal logits, at temperature 1."""
    import torch

    rows = [_row(position=position, temperature=1.0, seed=seed) for seed, position in pairs]
    steps = [rows[start : start + 256] for start in range(0, len(rows), 256)]
    return [
        token.token_id for step in steps for token in sample(torch.zeros(len(step), _EQUALS), step)
    ]


def _length_without_repeats(tokens: Sequence[int]) -> int:
    """How long sequences must be so that chance repeats one with a probability below 1e-9.

    Two draws are equal with probability q, estimated from the tokens, and two of n sequences of m
    draws with at most n**2 * q**m. The number of tokens if they are all equal.
    """
    n = len(tokens)
    q = sum(count**2 for count in Counter(tokens).values()) / n**2
    return math.ceil(math.log(1e9 * n**2) / -math.log(q)) if q < 1 else n


def _with_history(count: int, **params: Any) -> list[SamplerRow]:
    """Rows of requests whose prompts and outputs repeat tokens of 0 to 11."""
    import torch

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(12, (count, 12), generator=generator).tolist()
    return [
        _row(prompt=some[:4], output=some[4 : 4 + i % 9], **params) for i, some in enumerate(ids)
    ]


def _skip_ignored(ignores: tuple[str, ...], settings: Iterable[str]) -> None:
    ignored = [name for name in settings if name in ignores]
    if ignored:
        pytest.skip(f"the sampler ignores {', '.join(ignored)}")


def _skip_own(distribution: str) -> None:
    if distribution:
        pytest.skip(f"the sampler has its own distribution: {distribution}")


def _check_draws(sample: Sample, logits: "Tensor", row: SamplerRow) -> None:
    """Fail unless the tokens of many seeds are distributed as the oracle says."""
    rows = [evolve(row, params=evolve(row.params, seed=seed)) for seed in range(_DRAWS)]
    tokens = [t.token_id for t in sample(logits.repeat(_DRAWS, 1), rows)]
    _check_frequencies(tokens, probabilities(logits, row), "over many seeds")


def _check_frequencies(tokens: Sequence[int], expected: "Tensor", of: str) -> None:
    """Pearson's chi-squared test, by the normal approximation of Wilson and Hilferty (1931)."""
    import torch

    counts = torch.tensor(tokens).bincount(minlength=len(expected)).double()
    never = [i for i in counts.nonzero().flatten().tolist() if expected[i] == 0]
    left = expected.nonzero().flatten().tolist()
    assert not never, (
        f"draws {of}: the settings allow tokens {left}, but {never} were drawn as well"
    )
    wanted = expected * len(tokens)
    absent = [i for i in left if counts[i] == 0 and wanted[i] > 30]
    assert not absent, (
        f"draws {of}: the settings allow tokens {left}, but {absent} were never drawn"
    )
    rare = wanted < 5
    groups = [(counts[~rare], wanted[~rare])]
    if wanted[rare].sum() >= 5:
        groups.append((counts[rare].sum()[None], wanted[rare].sum()[None]))
    found = torch.cat([g[0] for g in groups])
    means = torch.cat([g[1] for g in groups])
    freedom = len(found) - 1
    if freedom < 1:
        return
    statistic = ((found - means) ** 2 / means).sum().item()
    spread = 2 / (9 * freedom)
    sigmas = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    worst = int(((counts - wanted).abs() / wanted.clamp(min=1)).argmax())
    assert sigmas < _SIGMAS, (
        f"draws {of} must follow the probabilities of the settings: token {worst} was drawn "
        f"{int(counts[worst])} times in {len(tokens)}, expected about {wanted[worst].item():.0f}"
    )
