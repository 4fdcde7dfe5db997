"""Requests and what they get alone, which is what they must get whatever runs beside them."""

from contract_executors import make_runner, requests, run

from tilewright.logits_processing import Processing

RESULT = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs", "prompt_logprobs")


def result_of(request):
    """What a request's caller sees, apart from times and counts; log-probabilities in full."""
    assert request.result is not None, request.error
    return {name: getattr(request.result, name) for name in RESULT}


def alone(model, executor, prompt, processors=None, **settings):
    """The result of a request that has a large, empty cache to itself and runs in whole prompts.

    prompt: text or token ids, or a pair of these and settings. executor: gets a new cache.
    processors: see ``make_runner``.
    """
    (request,) = requests(model, [prompt], **settings)
    knobs = {"admission": "reserve", "prefix_cache": False, "max_batch_tokens": 512}
    run(make_runner(model, executor, processors=processors, **knobs), [request])
    return result_of(request)


def processors_of(**of):
    """Finds logits processors by name, as a runner asks for them."""
    return lambda name: Processing(f"logits_processor {name!r}", of[name], None)
