"""Measure what the callers of requests that arrive over time see.

Times are taken where the tokens are received, not in the engine.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from attrs import frozen

from tilewright.types import GenerateConfig

if TYPE_CHECKING:
    from tilewright.async_engine import AsyncLLMEngine
    from tilewright.engine import LLMEngine


@frozen(kw_only=True)
class Latency:
    """Seconds."""

    median: float
    p99: float


@frozen(kw_only=True)
class Answer:
    """What the caller of one request saw."""

    sent_seconds: float
    """Since the start of the measurement."""
    first_token_seconds: float
    """Since it was sent."""
    between_tokens_seconds: list[float]
    """Between each token and the one before it; 0 for tokens that came together."""
    cached_tokens: int
    preemptions: int

    @property
    def ended_seconds(self) -> float:
        """When the last token came, since the start of the measurement."""
        return self.sent_seconds + self.first_token_seconds + sum(self.between_tokens_seconds)


@frozen(kw_only=True)
class ServingFigure:
    """One measurement."""

    request_rate: float | str | None
    """Requests per second, or ``inf``; None with ``concurrency``."""
    concurrency: int | None
    num_requests: int
    prompt_tokens: int
    """Tokens of each request's prompt."""
    shared_prefix_tokens: int
    """How many of them, from the first, all prompts have in common."""
    new_tokens: int
    """New tokens of each request."""
    seconds: float
    """From the start of the measurement to the last token."""
    new_tokens_per_second: float
    requests_per_second: float
    first_token_seconds: Latency
    between_tokens_seconds: Latency | None
    """Over the gaps of all requests; None if each has one new token."""
    prefix_hit_rate: float
    """Tokens of prompts that were in the KV cache, as a part of all tokens of prompts."""
    preemptions: int
    requests: list[Answer]


def measure(
    engine: "LLMEngine",
    model_id: str,
    config: GenerateConfig,
    *,
    request_rates: Sequence[float],
    concurrencies: Sequence[int],
    num_requests: int,
    prompt_tokens: Sequence[int],
    shared_prefix_tokens: int,
    warmup: int,
) -> Iterator[ServingFigure]:
    """A figure for each rate or concurrency and each length of prompts.

    config: how each request generates; must fix the seed and the number of new tokens.
    """
    assert config.seed is not None
    assert config.max_new_tokens is not None
    chance = random.Random(config.seed)
    vocab_size = engine.model(model_id).loaded.config.vocab_size
    loads: list[tuple[float | None, int | None]] = [
        *((rate, None) for rate in request_rates),
        *((None, concurrency) for concurrency in concurrencies),
    ]
    for rate, concurrency in loads:
        for length in prompt_tokens:
            shared = random_tokens(chance, vocab_size, shared_prefix_tokens)
            prompts = [
                shared + random_tokens(chance, vocab_size, length - len(shared))
                for _ in range(num_requests)
            ]
            # These do not have the prefix, so that it is not in the cache yet.
            before = [random_tokens(chance, vocab_size, length) for _ in range(warmup)]
            arrivals = [0.0] * num_requests
            if rate is not None:
                arrivals = poisson_arrivals(rate, num_requests, config.seed)
            answers = asyncio.run(
                _serve(engine, model_id, config, before, prompts, arrivals, concurrency)
            )
            seconds = max(answer.ended_seconds for answer in answers)
            first_token = latency([answer.first_token_seconds for answer in answers])
            assert first_token is not None
            cached_tokens = sum(answer.cached_tokens for answer in answers)
            yield ServingFigure(
                request_rate="inf" if rate == float("inf") else rate,
                concurrency=concurrency,
                num_requests=num_requests,
                prompt_tokens=length,
                shared_prefix_tokens=shared_prefix_tokens,
                new_tokens=config.max_new_tokens,
                seconds=seconds,
                new_tokens_per_second=num_requests * config.max_new_tokens / seconds,
                requests_per_second=num_requests / seconds,
                first_token_seconds=first_token,
                between_tokens_seconds=latency(
                    [gap for answer in answers for gap in answer.between_tokens_seconds]
                ),
                prefix_hit_rate=cached_tokens / (num_requests * length),
                preemptions=sum(answer.preemptions for answer in answers),
                requests=answers,
            )


def random_tokens(chance: random.Random, vocab_size: int, count: int) -> list[int]:
    return [chance.randrange(vocab_size) for _ in range(count)]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which requests arrive, the first at 0; intervals are exponentially distributed.

    rate: requests per second; ``inf``: all arrive at 0.
    """
    chance = random.Random(seed)
    return list(accumulate((chance.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def latency(seconds: Sequence[float]) -> Latency | None:
    """Percentiles, interpolated linearly between values; None if there are no values."""
    import numpy as np

    if not seconds:
        return None
    median, p99 = np.percentile(seconds, [50, 99]).tolist()
    return Latency(median=median, p99=p99)


async def _serve(
    engine: "LLMEngine",
    model_id: str,
    config: GenerateConfig,
    warmup: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    arrivals: Sequence[float],
    concurrency: int | None,
) -> list[Answer]:
    """Answers in the order of prompts; each is sent at its arrival, or when a caller is free."""
    from tilewright.async_engine import AsyncLLMEngine

    served = AsyncLLMEngine(engine)
    await asyncio.gather(*(_ask(served, model_id, prompt, config) for prompt in warmup))
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    left = iter(enumerate(zip(arrivals, prompts, strict=True)))

    async def caller() -> None:
        for number, (arrival, prompt) in left:
            await asyncio.sleep(start + arrival - time.perf_counter())
            answers[number] = await _ask(served, model_id, prompt, config, start)

    # With a caller per request, none waits for the answer to another.
    await asyncio.gather(*(caller() for _ in range(concurrency or len(prompts))))
    return [answers[number] for number in range(len(prompts))]


async def _ask(
    engine: "AsyncLLMEngine",
    model_id: str,
    prompt: Sequence[int],
    config: GenerateConfig,
    start: float = 0.0,
) -> Answer:
    sent = time.perf_counter()
    times: list[float] = []
    async for delta in engine.generate(model_id, prompt, config):
        times += [time.perf_counter()] * len(delta.token_ids)
        result = delta.result
    assert result is not None
    return Answer(
        sent_seconds=sent - start,
        first_token_seconds=times[0] - sent,
        between_tokens_seconds=[later - earlier for earlier, later in pairwise(times)],
        cached_tokens=result.cached_tokens,
        preemptions=result.preemptions,
    )


_LINE = "{:<20}{:>10}{:>10}"


def table(figure: ServingFigure) -> str:
    """A figure as lines of at most 40 characters."""
    load = f"concurrency {figure.concurrency}"
    if figure.request_rate is not None:
        load = f"request rate {float(figure.request_rate):g}"
    lines = [
        f"{load}, prompt {figure.prompt_tokens}",
        _LINE.format("", "median", "p99"),
        _latency_line("first token, ms", figure.first_token_seconds),
        _latency_line("between tokens, ms", figure.between_tokens_seconds),
        _LINE.format("new tokens/s", f"{figure.new_tokens_per_second:.1f}", ""),
        _LINE.format("requests/s", f"{figure.requests_per_second:.2f}", ""),
        _LINE.format("prefix hit rate", f"{figure.prefix_hit_rate:.1%}", ""),
        _LINE.format("preemptions", figure.preemptions, ""),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _latency_line(title: str, seconds: Latency | None) -> str:
    if seconds is None:
        return _LINE.format(title, "-", "-")
    return _LINE.format(title, f"{seconds.median * 1e3:.2f}", f"{seconds.p99 * 1e3:.2f}")
