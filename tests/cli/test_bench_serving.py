"""tilewright bench with requests that arrive over time."""

import json
import statistics
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from terminal import Terminal

from tilewright import LLMEngine
from tilewright_tools import bench
from tilewright_tools.bench_serving import latency, poisson_arrivals
from tilewright_torch.model import TorchExecutor

SMALL = ["bench", "--num-requests", "6", "--prompt-tokens", "40", "--new-tokens", "5"]
PAGES = ["--page-size", "16"]
ROUNDING = 1e-6


@pytest.fixture
def report(tilewright):
    """Runs the benchmark with --json; returns what it printed."""

    def call(*argv: str) -> dict[str, Any]:
        code, out, err = tilewright(*SMALL, *argv, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=pytest.fail)

    return call


@pytest.mark.parametrize("load", [["--concurrency", "3"], ["--request-rate", "200"]])
def test_every_request_gets_all_its_tokens(report, load):
    (figure,) = report(*load, "--shared-prefix-tokens", "32")["results"]
    assert [len(request["between_tokens_seconds"]) for request in figure["requests"]] == [4] * 6
    for request in figure["requests"]:
        assert request["first_token_seconds"] > 0
        assert min(request["between_tokens_seconds"]) >= 0
    sent = [request["sent_seconds"] for request in figure["requests"]]
    assert sent == sorted(sent)


def test_the_report_says_what_was_measured(report):
    figures = report("--concurrency", "1", "2", "--prompt-tokens", "8", "20")["results"]
    for figure, load in zip(figures, [(1, 8), (1, 20), (2, 8), (2, 20)], strict=True):
        assert (figure["concurrency"], figure["prompt_tokens"]) == load
        assert {
            name: figure[name]
            for name in ("request_rate", "num_requests", "shared_prefix_tokens", "new_tokens")
        } == {
            "request_rate": None,
            "num_requests": 6,
            "shared_prefix_tokens": 0,
            "new_tokens": 5,
        }
        requests = figure["requests"]
        gaps = [gap for request in requests for gap in request["between_tokens_seconds"]]
        first = [request["first_token_seconds"] for request in requests]
        for name, values in {"first_token_seconds": first, "between_tokens_seconds": gaps}.items():
            assert figure[name] == pytest.approx(
                {
                    "median": statistics.median(values),
                    "p99": statistics.quantiles(values, n=100, method="inclusive")[98],
                }
            )
        ends = [
            request["sent_seconds"]
            + request["first_token_seconds"]
            + sum(request["between_tokens_seconds"])
            for request in requests
        ]
        assert figure["seconds"] == pytest.approx(max(ends))
        assert figure["new_tokens_per_second"] == pytest.approx(6 * 5 / figure["seconds"])
        assert figure["requests_per_second"] == pytest.approx(6 / figure["seconds"])
        assert (figure["prefix_hit_rate"], figure["preemptions"]) == (0, 0)


def test_a_single_new_token_has_no_time_between_tokens(report, tilewright):
    argv = ["--concurrency", "2", "--new-tokens", "1"]
    (figure,) = report(*argv)["results"]
    assert figure["between_tokens_seconds"] is None
    code, out, _ = tilewright(*SMALL, *argv)
    assert code == 0
    assert "between tokens, ms           -         -\n" in out


# --- when requests are sent -----------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_caller_sends_its_next_request_when_its_last_one_has_ended(report, concurrency):
    (figure,) = report("--concurrency", str(concurrency))["results"]
    events = []
    for request in figure["requests"]:
        sent = request["sent_seconds"]
        took = request["first_token_seconds"] + sum(request["between_tokens_seconds"])
        events += [(sent + ROUNDING, 1), (sent + took, -1)]
    running = most = 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    assert most == concurrency


def test_with_an_infinite_rate_all_requests_are_sent_at_once(report):
    (figure,) = report("--request-rate", "inf")["results"]
    assert figure["request_rate"] == "inf"
    requests = figure["requests"]
    first_token = min(r["sent_seconds"] + r["first_token_seconds"] for r in requests)
    assert max(request["sent_seconds"] for request in requests) < first_token


def test_requests_arrive_as_a_poisson_process():
    arrivals = poisson_arrivals(4.0, 20_000, seed=0)
    assert arrivals[0] == 0
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.03)
    # Of an exponential distribution, the standard deviation is the mean.
    assert statistics.stdev(gaps) == pytest.approx(mean, rel=0.03)
    assert arrivals == poisson_arrivals(4.0, 20_000, seed=0)
    assert arrivals != poisson_arrivals(4.0, 20_000, seed=1)
    assert poisson_arrivals(float("inf"), 3, seed=0) == [0, 0, 0]


def test_percentiles_are_interpolated_linearly():
    values = [Random(0).uniform(0, 10) for _ in range(77)]
    found = latency(values)
    assert found is not None
    assert found.median == pytest.approx(statistics.median(values))
    assert found.p99 == pytest.approx(statistics.quantiles(values, n=100, method="inclusive")[98])
    assert latency([]) is None


# --- the KV cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "shared", "cached"),
    [
        (40, 0, 0),
        (40, 15, 0),
        (40, 32, 32),
        (40, 39, 32),
        (32, 32, 16),  # the last token of a prompt is always computed
    ],
)
def test_prompts_hit_the_full_pages_of_their_shared_prefix(report, length, shared, cached):
    argv = [*PAGES, "--prompt-tokens", str(length), "--shared-prefix-tokens", str(shared)]
    (figure,) = report("--concurrency", "1", *argv)["results"]
    # The first request computes the prefix, whatever ran before it.
    assert [request["cached_tokens"] for request in figure["requests"]] == [0, *[cached] * 5]
    assert figure["prefix_hit_rate"] == pytest.approx(5 * cached / (6 * length))


def test_each_measurement_has_a_prefix_of_its_own(report):
    argv = [*PAGES, "--shared-prefix-tokens", "32", "--concurrency", "1", "1"]
    for figure in report(*argv)["results"]:
        assert [request["cached_tokens"] for request in figure["requests"]] == [0, *[32] * 5]


def test_no_prompt_hits_without_a_prefix_cache(report):
    argv = [*PAGES, "--shared-prefix-tokens", "32", "--no-prefix-cache"]
    (figure,) = report("--concurrency", "1", *argv)["results"]
    assert figure["prefix_hit_rate"] == 0


@pytest.mark.parametrize(("admission", "preempts"), [("preempt", True), ("reserve", False)])
def test_preemptions_are_counted(report, admission, preempts):
    # A request needs 8 of 12 pages in the end, and 2 to start.
    cache = ["--page-size", "4", "--total-pages", "12", "--admission", admission]
    sizes = ["--prompt-tokens", "8", "--new-tokens", "24"]
    (figure,) = report("--concurrency", "4", *sizes, *cache)["results"]
    assert (figure["preemptions"] > 0) == preempts
    assert figure["preemptions"] == sum(request["preemptions"] for request in figure["requests"])
    assert {len(request["between_tokens_seconds"]) for request in figure["requests"]} == {23}


def test_batches_are_computed_even_if_their_prompts_are_equal(tilewright, monkeypatch):
    results = []
    generate_batch = LLMEngine.generate_batch

    def recorded(*arguments: Any) -> Any:
        results.extend(found := generate_batch(*arguments))
        return found

    monkeypatch.setattr(LLMEngine, "generate_batch", recorded)
    monkeypatch.setattr(bench, "random_tokens", lambda chance, vocab_size, count: [7] * count)
    code, out, err = tilewright("bench", *PAGES, "--batch", "2", "--new-tokens", "2", "--json")
    assert code == 0, err
    assert [result.cached_tokens for result in results] == [0] * 12
    assert json.loads(out)["runtime"]["prefix_cache"] is False


# --- text, errors and interruptions ---------------------------------------------------------------


def test_the_table_fits_a_narrow_terminal(tilewright):
    code, out, err = tilewright(*SMALL, "--request-rate", "123.456789", "inf")
    assert code == 0, err
    titles = ["first token, ms", "between tokens, ms", "new tokens/s", "requests/s"]
    titles += ["prefix hit rate", "preemptions"]
    lines = out.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0] == "request rate 123.457, prompt 40"
    assert lines[8] == "request rate inf, prompt 40"
    for block in (lines[:8], lines[8:]):
        assert block[1].split() == ["median", "p99"]
        assert [line[:20].rstrip() for line in block[2:]] == titles


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--request-rate", "0"], "--request-rate: expected a number above 0, or inf, found '0'"),
        (["--request-rate", "nan"], "expected a number above 0, or inf, found 'nan'"),
        (["--request-rate", "fast"], "expected a number above 0, or inf, found 'fast'"),
        (["--request-rate=-1"], "expected a number above 0, or inf, found '-1'"),
        (["--concurrency", "0"], "--concurrency: expected an integer of at least 1, found '0'"),
        (
            ["--concurrency", "1", "--request-rate", "1"],
            "expected either --request-rate or --concurrency, found both",
        ),
        (["--concurrency", "1", "--batch", "1"], "--batch is for batches"),
        (["--request-rate", "1", "--repeat", "1"], "--repeat is for batches"),
        (["--num-requests", "1"], "--num-requests is for requests that arrive over time"),
        (["--shared-prefix-tokens", "0"], "--shared-prefix-tokens is for requests that arrive"),
        (["--prefix-cache"], "--prefix-cache: batches are measured without reuse of the KV cache"),
        (
            ["--concurrency", "4", "9", "--num-requests", "8"],
            "--concurrency 9 is above --num-requests 8",
        ),
        (
            ["--concurrency", "1", "--prompt-tokens", "9", "7", "--shared-prefix-tokens", "8"],
            "--shared-prefix-tokens 8 is above --prompt-tokens 7",
        ),
    ],
)
def test_wrong_flags_are_refused_before_the_model_is_loaded(tilewright, monkeypatch, argv, message):
    monkeypatch.setattr(bench, "open_engine", pytest.fail)
    code, out, err = tilewright("bench", *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--new-tokens", "99999999"], "above max_seq_len"),
        (["--total-pages", "2", *PAGES], "the cache has 2"),
    ],
)
def test_requests_that_cannot_be_served_are_an_error(tilewright, argv, message):
    code, out, err = tilewright(*SMALL, "--concurrency", "2", *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_step_that_fails_is_a_one_line_error(tilewright, monkeypatch):
    forward, steps = TorchExecutor.forward, iter(range(100))

    def failing(*arguments: Any) -> Any:
        if next(steps) == 8:
            raise ZeroDivisionError("a bug")
        return forward(*arguments)

    monkeypatch.setattr(TorchExecutor, "forward", failing)
    code, out, err = tilewright(*SMALL, "--concurrency", "3")
    assert (code, out) == (2, "")
    assert "failed in a step: ZeroDivisionError: a bug" in err
    assert err.count("\n") == 1


def test_ctrl_c_ends_a_measurement_without_a_traceback():
    # The second request of the second measurement arrives in many minutes.
    rates = ["--request-rate", "inf", "0.001", "--num-requests", "2", "--warmup", "0"]
    terminal = Terminal("bench", *rates, "--prompt-tokens", "4", "--new-tokens", "1000")
    terminal.wait_for(b"preemptions")
    terminal.interrupt()
    assert terminal.end() == 130
    assert b"Traceback" not in terminal.screen
