"""Sampling agrees with transformers' processors, is reproducible, and refuses broken logits."""

import math
import warnings
from collections import Counter
from functools import cache
from importlib.metadata import entry_points
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_oracle import warped
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process as oracle

from tilewright.errors import NonFiniteLogitsError, RequestError
from tilewright.sampling import uniform
from tilewright.types import SampledToken, Sampler, SamplerRow, SamplingParams
from tilewright_sampling import logits as steps
from tilewright_sampling.sampler import LogitsSampler, Options

INF = math.inf
VOCAB_SIZES = [1, 2, 7, 100, 1003, 32001]


@cache
def plugin(name: str) -> Any:
    (entry_point,) = entry_points(group="tilewright.samplers", name=name)
    return entry_point.load()


def make_sampler(name: str = "top-p", **options: Any) -> Sampler:
    sampler: Sampler = plugin(name).create_sampler(Options(**options))
    return sampler


def make_row(
    prompt: Any = (),
    output: Any = (),
    request_id: str = "r",
    position: int | None = None,
    **params: Any,
) -> SamplerRow:
    return SamplerRow(
        request_id=request_id,
        params=SamplingParams(**params),
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
        position=len(list(output)) if position is None else position,
    )


def sample_one(logits: Any, name: str = "top-p", **row: Any) -> SampledToken:
    (token,) = make_sampler(name).sample(torch.as_tensor(logits).float()[None], [make_row(**row)])
    return token


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("penalty", [0.5, 1.1, 3.0])
def test_repetition_penalty_matches_transformers(vocab_size: int, penalty: float) -> None:
    logits = random_logits(vocab_size)
    ids = torch.randint(vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    expected = oracle.RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None].clone())[0]
    row = make_row(prompt=ids[:30].tolist(), output=ids[30:].tolist(), repetition_penalty=penalty)
    torch.testing.assert_close(steps.penalise(logits, row), expected)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_filtered_probabilities_match_transformers(vocab_size: int, temperature: float) -> None:
    logits = random_logits(vocab_size, seed=vocab_size)
    for top_k, top_p, min_p in product(
        [0, 1, 5, 50, 10**6], [1.0, 0.999, 0.9, 0.5, 0.01], [0.0, 0.02, 0.5, 1.0]
    ):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        expected = warped(logits, params)
        ids, weights = steps.shortlist(logits, params)
        probabilities = torch.zeros(vocab_size).index_put((ids,), weights / weights.sum())
        assert len(set(ids.tolist())) == len(ids)
        torch.testing.assert_close(probabilities, expected.softmax(0), rtol=1e-4, atol=1e-6)


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, left in [(0.4, [0]), (0.6, [0, 1]), (0.85, [0, 1, 2]), (0.99, [0, 1, 2, 3])]:
        ids, _ = steps.shortlist(logits, SamplingParams(temperature=1.0, top_p=top_p))
        assert ids.tolist() == left


def test_presence_and_frequency_penalties_count_only_the_output() -> None:
    row = make_row(
        prompt=[0, 0, 1], output=[1, 2, 2, 2], presence_penalty=0.5, frequency_penalty=0.25
    )
    torch.testing.assert_close(
        steps.penalise(torch.zeros(4), row), torch.tensor([0.0, -0.75, -1.25, 0.0])
    )


def test_penalties_apply_in_order_and_the_bias_last() -> None:
    row = make_row(
        output=[0], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 10.0, 1: -1.0}
    )
    torch.testing.assert_close(
        steps.penalise(torch.tensor([4.0, 4.0]), row), torch.tensor([4.0 / 2 - 1 + 10, 3.0])
    )


# --- ties -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_ties_are_resolved_in_favour_of_the_smaller_token_ids(
    values: list[int], top_k: int, data: st.DataObject
) -> None:
    logits = torch.tensor(values).float()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for name in ("greedy", "top-p"):
        assert sample_one(logits, name).token_id == order[0]
    if top_k < len(values):
        ids, _ = steps.shortlist(logits, SamplingParams(temperature=1.0, top_k=top_k))
        assert ids.tolist() == order[:top_k]
    top_p = data.draw(st.floats(0.01, 0.99))
    ids, _ = steps.shortlist(logits, SamplingParams(temperature=1.0, top_p=top_p))
    assert ids.tolist() == order[: len(ids)]
    count = data.draw(st.integers(0, 50))
    top = sample_one(logits, logprobs=count).logprobs
    assert top is not None
    assert [i for i, _ in top.top] == order[:count]


def test_ties_in_a_large_vocabulary_go_to_the_smaller_token_ids() -> None:
    logits = random_logits(152_000).round()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    assert sample_one(logits).token_id == order[0]
    for params in ({"top_k": 3000}, {"top_p": 0.7}, {"top_k": 1}):
        ids, _ = steps.shortlist(logits, SamplingParams(temperature=1.0, **params))
        assert ids.tolist() == order[: len(ids)]
        assert len(ids) == params.get("top_k", len(ids))


# --- greedy and temperature -----------------------------------------------------------------------


def test_greedy_applies_penalties_and_bias_and_ignores_other_settings() -> None:
    logits = random_logits(1000)
    best, second = logits.topk(2).indices.tolist()
    random: dict[str, Any] = {"temperature": 5.0, "top_k": 500, "top_p": 0.9, "min_p": 0.01}
    for seed in range(20):
        assert sample_one(logits, "greedy", seed=seed, **random).token_id == best
    assert sample_one(logits, "greedy", logit_bias={best: -100.0}, **random).token_id == second
    assert sample_one(logits, "greedy", output=[best], presence_penalty=50.0).token_id == second
    assert sample_one(logits, "greedy", prompt=[best], repetition_penalty=50.0).token_id == second


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-6])
def test_a_temperature_near_zero_selects_the_likeliest_token(temperature: float) -> None:
    logits = random_logits(1000)
    for seed in range(10):
        token = sample_one(logits, temperature=temperature, seed=seed)
        assert token.token_id == logits.argmax()


def test_extreme_settings_give_a_valid_token() -> None:
    logits = torch.tensor([3e38, -3e38, 0.0, 1.0])
    extremes: list[dict[str, Any]] = [
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300},
        {"frequency_penalty": 1e308},
        {"frequency_penalty": -1e308, "logit_bias": {0: -INF}},
        {"logit_bias": {0: 1e308, 1: -1e308}},
        {"temperature": 1e300},
    ]
    for extreme in extremes:
        row = {"prompt": [0, 1, 2, 3], "output": [0, 1, 2], "temperature": 1.0, **extreme}
        token = sample_one(logits, **row)
        assert 0 <= token.token_id < 4


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The torch operations run within the context: the shapes of their inputs, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            shapes = self.shapes.setdefault(func.overloadpacket.__name__, [])
            shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8}, {"temperature": 0.8, "min_p": 0.1}, {"logprobs": 0}]
)
def test_logits_are_sorted_only_if_a_setting_needs_it(params: dict[str, Any]) -> None:
    with Operations() as operations:
        sample_one(random_logits(1000), **params)
    assert operations.shapes["sum"] == [(1, 1000)]
    assert not operations.shapes.keys() & {"sort", "topk"}


def test_top_p_sorts_only_the_likely_part_of_the_vocabulary() -> None:
    with Operations() as operations:
        sample_one(random_logits(100_000, scale=4.0), temperature=0.7, top_p=0.9)
    (sorted_,) = operations.shapes["sort"]
    assert 0 < sorted_[0] < 20_000


@pytest.mark.parametrize("name", ["greedy", "top-p"])
def test_rows_that_take_the_likeliest_token_share_one_pass(name: str) -> None:
    logits = random_logits(6, 1000)
    with Operations() as operations:
        tokens = make_sampler(name).sample(logits, [make_row(seed=i) for i in range(6)])
    assert operations.shapes["argmax"] == operations.shapes["sum"] == [(6, 1000)]
    assert not operations.shapes.keys() & {"index", "clone", "copy_", "isnan", "max"}
    assert [t.token_id for t in tokens] == logits.argmax(1).tolist()


def test_rows_with_other_settings_leave_the_shared_pass_to_the_plain_ones() -> None:
    logits = random_logits(6, 1000)
    best = logits.argmax(1).tolist()
    rows = [make_row(logprobs=0) for _ in range(6)]
    rows[1] = make_row(temperature=1e-6)
    rows[4] = make_row(logit_bias={best[4]: -100.0})
    with Operations() as operations:
        tokens = make_sampler().sample(logits, rows)
    assert operations.shapes["argmax"] == [(4, 1000), (1000,)]
    assert operations.shapes["sum"] == [(6, 1000)]
    second = int(logits[4].topk(2).indices[1])
    assert [t.token_id for t in tokens] == [*best[:4], second, best[5]]


def test_everything_is_created_on_the_device_of_the_logits() -> None:
    logits = random_logits(len(ROW_SETTINGS) + 1, 50)
    logits[-1, 3] = INF
    rows = [make_row(prompt=[1, 2], output=[3], **params) for params in ROW_SETTINGS]
    rows.append(make_row(temperature=1.0, seed=3, logprobs=3))
    with pytest.warns(RuntimeWarning):
        expected = make_sampler(on_nonfinite="sanitize").sample(logits, rows)
    # What is created without a device is then on another one, which the rest cannot be mixed with.
    with torch.device("meta"), pytest.warns(RuntimeWarning):
        found = make_sampler(on_nonfinite="sanitize").sample(logits, rows)
    assert found == expected


# --- logit bias -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token_id", [-1, 10, 10**9])
@pytest.mark.parametrize("name", ["greedy", "top-p"])
def test_a_logit_bias_of_an_unknown_token_id_is_refused(name: str, token_id: int) -> None:
    with pytest.raises(RequestError, match=rf"'r'.*token id {token_id}.*0 to 9"):
        sample_one(torch.zeros(10), name, logit_bias={3: 1.0, token_id: 1.0})


def test_a_logit_bias_that_is_not_a_number_or_forbids_all_tokens_is_refused() -> None:
    for value in (math.nan, INF):
        with pytest.raises(RequestError, match=r"logit_bias of token id 3 is (nan|inf)"):
            sample_one(torch.zeros(10), logit_bias={3: value})
    with pytest.raises(RequestError, match="forbids every token"):
        sample_one(torch.zeros(2), logit_bias={0: -INF, 1: -INF})


@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.999}, {"min_p": 0.01}])
def test_a_forbidden_token_is_never_drawn(params: dict[str, Any]) -> None:
    logits = torch.tensor([5.0, 0.0, 0.0, 5.0])
    for seed in range(200):
        token = sample_one(
            logits, temperature=100.0, seed=seed, logit_bias={0: -INF, 3: -INF}, **params
        )
        assert token.token_id in (1, 2)


# --- draws ----------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The chi-square statistic in standard deviations from its mean; near normal."""
    expected = probabilities * counts.sum()
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "pairs",
    [
        [(seed, 0) for seed in range(20_000)],
        [(7, position) for position in range(20_000)],
        [(seed, position) for seed in range(142) for position in range(142)],
        [(2**62 + seed, 3) for seed in range(20_000)],
    ],
    ids=["seeds", "positions", "both", "large seeds"],
)
def test_uniform_numbers_of_neighbouring_seeds_and_positions_are_independent(
    pairs: list[tuple[int, int]],
) -> None:
    u = torch.tensor([uniform(*pair) for pair in pairs], dtype=torch.float64)
    assert len(set(u.tolist())) == len(pairs)
    assert 0.0 <= u.min() < u.max() < 1.0
    flat = torch.full((100,), 0.01, dtype=torch.float64)
    assert abs(chi_square((u * 100).long().bincount(minlength=100), flat)) < 4
    for lag in (1, 142):
        joint = (u[:-lag] * 10).long() * 10 + (u[lag:] * 10).long()
        assert abs(chi_square(joint.bincount(minlength=100), flat)) < 4


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.9}]
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits = random_logits(60, scale=1.5)
    sampling = SamplingParams(temperature=0.8, **params)
    ids, weights = steps.shortlist(logits, sampling)
    drawn = torch.tensor([steps.draw(ids, weights, uniform(5, i)) for i in range(20_000)])
    probabilities = torch.zeros(60).index_put((ids,), weights / weights.sum()).double()
    counts = drawn.bincount(minlength=60)
    assert counts[probabilities == 0].sum() == 0
    some = probabilities > 0
    assert abs(chi_square(counts[some], probabilities[some])) < 4


def test_the_sampler_draws_with_the_numbers_of_its_seed_and_position() -> None:
    logits = random_logits(200)
    params: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    ids, weights = steps.shortlist(logits, SamplingParams(**params))
    for position in range(100):
        expected = steps.draw(ids, weights, uniform(11, position))
        # The output may be shorter, while its last tokens are not known yet.
        output = range(max(0, position - 3))
        row = {"output": output, "position": position, **params}
        assert sample_one(logits, **row).token_id == expected


@given(
    st.lists(st.sampled_from([0.0, 1e-45, 1e-30, 0.1, 1.0]), min_size=1, max_size=12).filter(any),
    st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, math.nextafter(1.0, 0.0), 1.0])),
)
@settings(max_examples=200, deadline=None)
def test_a_weight_of_zero_is_never_drawn(weights: list[float], u: float) -> None:
    position = steps.draw(torch.arange(len(weights)), torch.tensor(weights), u)
    assert torch.tensor(weights)[position] > 0


def test_draws_at_the_edges_of_the_distribution_stay_in_range() -> None:
    ids, weights = torch.tensor([9, 4, 7, 2]), torch.tensor([0.0, 0.25, 0.75, 0.0])
    at = [0.0, 0.25 - 2**-53, 0.25, 1.0 - 2**-53, 1.0]
    assert [steps.draw(ids, weights, u) for u in at] == [4, 4, 7, 7, 7]


ROW_SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.3, "top_k": 40, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "seed": 4, "logprobs": 2},
    {"temperature": 1.0, "min_p": 0.05, "seed": 2**63 - 1},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 5},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "logit_bias": {5: 3.0}, "seed": 6},
]


@pytest.mark.parametrize("vocab_size", [50, 32001])
def test_the_result_of_a_row_does_not_depend_on_the_batch(vocab_size: int) -> None:
    count = len(ROW_SETTINGS)
    logits = random_logits(count, vocab_size)
    rows = [
        make_row(prompt=range(i), output=range(2 * i), request_id=str(i), **kwargs)
        for i, kwargs in enumerate(ROW_SETTINGS)
    ]
    sampler = make_sampler()
    before = logits.clone()
    alone = [sampler.sample(logits[i : i + 1], [rows[i]])[0] for i in range(count)]
    for order in (range(count), reversed(range(count)), [3, 0, 6], [5, 5, 1]):
        chosen = list(order)
        together = sampler.sample(logits[chosen], [rows[i] for i in chosen])
        assert together == [alone[i] for i in chosen]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", ROW_SETTINGS[1:])
def test_draws_do_not_depend_on_vocabulary_padding(params: dict[str, Any]) -> None:
    logits = random_logits(1000)
    padded = torch.cat([logits, torch.full((24,), -1e9)])
    for position in range(20):
        row = {"output": list(range(position)), **params}
        assert sample_one(logits, **row).token_id == sample_one(padded, **row).token_id


def test_different_seeds_and_positions_give_different_tokens() -> None:
    logits = torch.zeros(1000)
    by_seed = {sample_one(logits, temperature=1.0, seed=s).token_id for s in range(50)}
    by_position = {
        sample_one(logits, temperature=1.0, position=n, seed=1).token_id for n in range(50)
    }
    assert len(by_seed) > 40
    assert len(by_position) > 40


# --- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_are_computed_from_the_raw_logits() -> None:
    logits = random_logits(500)
    expected = logits.double().log_softmax(0)
    best = int(logits.argmax())
    params: dict[str, Any] = {"temperature": 3.0, "top_k": 2, "repetition_penalty": 5.0}
    params["logit_bias"] = {best: -9.0}
    assert sample_one(logits, **params).logprobs is None
    for count in (0, 1, 4, 500, 600):
        token = sample_one(logits, prompt=[best], logprobs=count, **params)
        assert token.logprobs is not None
        assert token.logprobs.token_id == token.token_id
        assert token.logprobs.logprob == pytest.approx(expected[token.token_id].item(), abs=1e-5)
        top = expected.topk(min(count, 500))
        assert [i for i, _ in token.logprobs.top] == top.indices.tolist()
        assert [p for _, p in token.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-5)


# --- non-finite logits ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("name", ["greedy", "top-p"])
def test_non_finite_logits_are_an_error_that_names_request_and_tokens(
    name: str, value: float
) -> None:
    logits = random_logits(3, 40)
    logits[1, [7, 31]] = value
    logits[2, 0] = value
    rows = [
        make_row(request_id=f"req-{i}", output=[1], position=i + 3, temperature=1.0)
        for i in range(3)
    ]
    with pytest.raises(NonFiniteLogitsError) as caught:
        make_sampler(name).sample(logits, rows)
    error = caught.value
    assert (error.request_id, error.step, error.token_ids) == ("req-1", 4, (7, 31))
    assert "'req-1', step 4: 2 of 40 logits" in str(error)
    assert "7, 31" in str(error)


def test_a_bias_does_not_hide_non_finite_logits() -> None:
    with pytest.raises(NonFiniteLogitsError):
        sample_one([0.0, math.nan], logit_bias={1: -INF})


def test_large_finite_logits_are_accepted() -> None:
    assert sample_one(torch.full((100,), 3.4e38), temperature=1.0).token_id in range(100)


def test_sanitising_replaces_logits_warns_once_and_marks_the_tokens() -> None:
    sampler = make_sampler(on_nonfinite="sanitize")
    logits = torch.tensor([[1.0, 2.0, INF], [math.nan, 3.0, -INF], [0.0, 1.0, 2.0]])
    rows = [make_row(request_id=str(i), position=i + 2, logprobs=3) for i in range(3)]
    with pytest.warns(RuntimeWarning, match=r"'0', step 2: replaced 1 logits") as caught:
        tokens = sampler.sample(logits, rows)
    assert len(caught) == 1
    assert [t.sanitized for t in tokens] == [1, 2, 0]
    assert [t.token_id for t in tokens] == [1, 0, 2]
    assert all(math.isfinite(p) for t in tokens if t.logprobs for _, p in t.logprobs.top)
    assert logits.isnan().sum() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(logits, rows)


def test_sanitising_uses_the_smallest_and_largest_finite_values() -> None:
    row = torch.tensor([math.nan, -1.0, INF, 5.0, -INF])
    assert steps.sanitise(row).tolist() == [-1.0, -1.0, 5.0, 5.0, -1.0]
    assert steps.sanitise(torch.tensor([math.nan, INF, -INF])).tolist() == [0.0, 0.0, 0.0]


# --- plugins --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "top-p"])
def test_samplers_declare_and_validate_their_options(name: str) -> None:
    assert plugin(name).plugin_info().options is Options
    with pytest.raises(ValueError, match="on_nonfinite"):
        Options(on_nonfinite="ignore")  # type: ignore[arg-type]
    assert isinstance(make_sampler(name), LogitsSampler)


def test_an_empty_batch_gives_no_tokens() -> None:
    assert make_sampler().sample(torch.zeros(0, 10), []) == []


def test_draws_with_a_high_temperature_reach_all_tokens() -> None:
    tokens = Counter(
        sample_one(random_logits(5), temperature=1e6, seed=s).token_id for s in range(300)
    )
    assert set(tokens) == set(range(5))
