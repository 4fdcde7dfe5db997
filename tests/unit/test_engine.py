"""LLMEngine, through the shipped plugins and the bundled model."""

import gc
import re
import time
import warnings
from math import inf

import numpy as np
import pytest
import torch
from other_threads import eventually, press_ctrl_c
from transformers import AutoModelForCausalLM

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.errors import (
    ConfigError,
    ExecutorError,
    ModelError,
    NonFiniteLogitsError,
    OutOfPagesError,
    PluginError,
    RequestError,
    TilewrightError,
)
from tilewright.hookspecs import ObserverEvents
from tilewright.request import Request
from tilewright.settings import DEMO_MODEL
from tilewright.types import ExecutorLimits, SampledToken, SamplingParams

TRUTHS = "We hold these truths to be self-evident,"
CONTINUED = " that all men are created equal, that they are endowed by their Creator"
WHEN = "When in the Course of human events,"
PEOPLE = "We the People of the United States,"
LAST = "And for the support of this Declaration,"


def config(max_new_tokens=12, **settings):
    return GenerateConfig(max_new_tokens=max_new_tokens, **settings)


def free_pages(engine):
    allocator = engine.model("demo").allocator
    return allocator.free_pages + allocator.evictable_pages


def test_generate_returns_only_the_new_text(engine):
    text = engine.generate("demo", TRUTHS, config(40))
    assert text.startswith(CONTINUED)


def test_a_result_records_tokens_text_and_finish_reason(engine):
    result = engine.generate_result("demo", TRUTHS, config(12))
    text = engine.model("demo").text
    assert CONTINUED.startswith(result.text)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 12
    assert text.decode(result.token_ids) == result.text
    assert result.prompt_token_ids == tuple(text.encode(TRUTHS))
    assert result.logprobs is None
    assert result.sanitized_steps == 0
    assert result.model_id == "demo"
    timings = result.timings
    assert (timings.prompt_tokens, timings.new_tokens) == (len(result.prompt_token_ids), 12)
    for seconds in (timings.load_seconds, timings.prefill_seconds, timings.decode_seconds):
        assert seconds > 0
    assert timings.decode_tokens_per_second == pytest.approx(11 / timings.decode_seconds)


def test_a_prompt_may_be_token_ids(engine):
    ids = engine.model("demo").text.encode(TRUTHS)
    assert engine.generate("demo", ids, config()) == engine.generate("demo", TRUTHS, config())


def test_chunked_prefill_gives_the_same_tokens(engine):
    prompt = engine.generate_result("demo", WHEN, config(40))
    ids = [*prompt.prompt_token_ids, *prompt.token_ids]  # longer than max_batch_tokens
    whole = LLMEngine.from_plugins()
    whole.init_model("demo", DEMO_MODEL, RuntimeConfig(weight_dtype="float32"))
    expected = whole.generate_result("demo", ids, config(8)).token_ids
    assert engine.generate_result("demo", ids, config(8)).token_ids == expected


def test_eos_ends_the_text_and_is_the_last_token(engine):
    first = engine.generate_result("demo", LAST, config(100))
    assert first.text.endswith("our sacred Honor.")
    assert first.finish_reason == "eos"
    assert first.token_ids[-1] in engine.model("demo").loaded.config.eos_token_ids
    assert "<|" not in first.text
    on = engine.generate_result("demo", LAST, config(100, ignore_eos=True))
    assert on.finish_reason == "length"
    assert on.token_ids[: len(first.token_ids)] == first.token_ids


def test_a_stop_string_is_cut_from_the_text_wherever_it_occurs(engine):
    whole = engine.generate("demo", TRUTHS, config(60))
    for stop in (" equal", "qual, th", "l", " that all men are created"):
        result = engine.generate_result("demo", TRUTHS, config(60, stop=(stop,)))
        assert result.text == whole[: whole.index(stop)]
        assert result.finish_reason == "stop"


def test_a_stop_string_may_be_included_in_the_text(engine):
    whole = engine.generate("demo", TRUTHS, config(60))
    for stop in (" equal", "qual, th", "l", " that all men are created"):
        settings = config(60, stop=(stop,), include_stop_str=True)
        expected = whole[: whole.index(stop) + len(stop)]
        assert engine.generate_result("demo", TRUTHS, settings).text == expected
        with engine.stream("demo", TRUTHS, settings) as stream:
            assert "".join(stream) == expected == stream.result.text


def test_a_result_says_what_ended_its_text(engine):
    by_eos = engine.generate_result("demo", LAST, config(100))
    assert (by_eos.finish_reason, by_eos.stop_reason) == ("eos", by_eos.token_ids[-1])
    token = by_eos.token_ids[4]
    by_id = engine.generate_result("demo", LAST, config(100, stop_token_ids=(token,)))
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", token)
    # Both begin at the same place.
    by_text = engine.generate_result("demo", TRUTHS, config(60, stop=("that all", "th", "l")))
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", "th")
    assert engine.generate_result("demo", TRUTHS, config(5)).stop_reason is None
    with engine.stream("demo", TRUTHS, config()) as stream:
        next(stream)
    assert (stream.result.finish_reason, stream.result.stop_reason) == ("aborted", None)


# --- min_new_tokens -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_transformers():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)

    def generate(ids, **settings):
        out = model.generate(torch.tensor([ids]), do_sample=False, **settings)
        return tuple(out[0, len(ids) :].tolist())

    return generate


def test_min_new_tokens_gives_the_greedy_tokens_of_transformers(engine, by_transformers):
    first = engine.generate_result("demo", LAST, config(100))
    length = len(first.token_ids)
    for least in (1, length - 1, length, length + 1, length + 20):
        settings = {"min_new_tokens": least, "max_new_tokens": length + 30}
        found = engine.generate_result("demo", LAST, GenerateConfig(**settings))
        assert found.token_ids == by_transformers(list(first.prompt_token_ids), **settings)
        assert (found.token_ids == first.token_ids) == (least < length)


@pytest.mark.parametrize("seed", range(6))
def test_no_token_that_ends_a_text_is_sampled_before_min_new_tokens(engine, seed):
    ids = range(100, 1900)  # nearly every token ends the text
    settings = {"temperature": 2.0, "seed": seed, "stop_token_ids": tuple(ids)}
    found = engine.generate_result("demo", TRUTHS, config(30, min_new_tokens=7, **settings))
    assert found.finish_reason == "stop"
    at = next(i for i, token in enumerate(found.token_ids) if token in ids)
    assert 7 <= at == len(found.token_ids) - 1


def test_min_new_tokens_leaves_an_ignored_eos_token_alone(engine):
    settings = {"ignore_eos": True, "stop_token_ids": (5,)}
    free = engine.generate_result("demo", LAST, config(60, **settings))
    eos = engine.model("demo").loaded.config.eos_token_ids
    assert set(eos) & set(free.token_ids)
    found = engine.generate_result("demo", LAST, config(60, min_new_tokens=60, **settings))
    assert found.token_ids == free.token_ids


@pytest.mark.parametrize("stop", [(" all",), ("e",), ("created", "ed"), (" men are", "t"), ("qq",)])
def test_a_stop_string_counts_only_if_a_token_after_min_new_tokens_completes_it(engine, stop):
    whole = engine.generate_result("demo", TRUTHS, config(40))
    decode = engine.model("demo").text.decode
    for least in (0, 1, 2, 3, 5, 8, 40):
        plain = len(decode(whole.token_ids[:least]))
        at, found = min(
            ((i, s) for s in stop for i in range(40 * 12) if whole.text.startswith(s, i)
             and i + len(s) > plain),
            default=(len(whole.text), None),
        )  # fmt: skip
        result = engine.generate_result("demo", TRUTHS, config(40, stop=stop, min_new_tokens=least))
        assert (result.text, result.stop_reason) == (whole.text[:at], found)


def test_min_new_tokens_beyond_the_context_lasts_until_the_context_is_full(engine):
    result = engine.generate_result("demo", [3] * 250, config(99, min_new_tokens=99))
    assert (len(result.token_ids), result.finish_reason) == (6, "length")


def test_a_request_that_can_sample_no_token_is_refused_before_it_runs(engine):
    loaded = engine.model("demo").loaded.config
    eos = loaded.eos_token_ids[0]
    bias = {i: -inf for i in range(loaded.vocab_size) if i not in (eos, 7)}
    settings = {"logit_bias": bias, "stop_token_ids": (7,)}
    assert engine.generate_result("demo", TRUTHS, config(**settings)).stop_reason in (eos, 7)
    with pytest.raises(RequestError, match="min_new_tokens = 3 forbids these at first"):
        engine.generate("demo", TRUTHS, config(min_new_tokens=3, **settings))
    less = config(min_new_tokens=3, ignore_eos=True, **settings)
    assert engine.generate_result("demo", TRUTHS, less).token_ids[:3] == (eos,) * 3


def test_min_new_tokens_above_max_new_tokens_is_an_error(engine):
    with pytest.raises(ConfigError, match="'min_new_tokens' must be <= max_new_tokens = 8: 9"):
        config(8, min_new_tokens=9)
    with pytest.raises(ConfigError, match="<= max_new_tokens = 128: 200; lower it, or raise"):
        engine.generate("demo", TRUTHS, GenerateConfig(min_new_tokens=200))


WRONG_SETTINGS = [
    ({"top_k": 1.5}, "'top_k' must be an integer or none, found 1.5"),
    ({"logprobs": True}, "'logprobs' must be an integer or none, found True"),
    ({"seed": 1.5}, "'seed' must be an integer or none, found 1.5"),
    ({"stop": ("a", "")}, "'stop' must be a list of strings of at least one character"),
    ({"seed": 2**63}, "'seed' must be < 9223372036854775808"),
    ({"max_new_tokens": 2.5}, "'max_new_tokens' must be an integer or none, found 2.5"),
    ({"max_new_tokens": "5"}, "'max_new_tokens' must be an integer or none, found '5'"),
    ({"max_new_tokens": 0}, "'max_new_tokens' must be >= 1: 0"),
    ({"temperature": "hot"}, "'temperature' must be a number or none, found 'hot'"),
    ({"temperature": float("nan")}, "'temperature' must be >= 0.0: nan"),
    ({"logit_bias": {"5": 100}}, "'logit_bias' must be a table from integers to numbers or none"),
    ({"stop_token_ids": 5}, "'stop_token_ids' must be a list of integers or none, found 5"),
    ({"stop": "END"}, "'stop' must be a list of strings or none, found 'END'"),
    ({"stop": ["a", 5]}, "'stop' must be a list of strings or none"),
    ({"min_new_tokens": -1}, "'min_new_tokens' must be >= 0: -1"),
    ({"n": 0}, "'n' must be >= 1: 0"),
    ({"ignore_eos": 1}, "'ignore_eos' must be true, false or none, found 1"),
]
WRONG_RUNTIMES = [
    ({"weight_dtype": torch.float32}, "'weight_dtype' must be .*, found torch.float32"),
    ({"page_size": "16"}, "'page_size' must be an integer or none, found '16'"),
    ({"max_batch_size": 0}, "'max_batch_size' must be >= 1: 0"),
    ({"max_seq_len": True}, "'max_seq_len' must be an integer or none, found True"),
    ({"device": 1.5}, "'device' must be a string, an integer or none, found 1.5"),
]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        *((GenerateConfig, *case) for case in WRONG_SETTINGS),
        *((RuntimeConfig, *case) for case in WRONG_RUNTIMES),
    ],
)
def test_a_wrong_setting_is_an_error_when_the_config_is_made(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        cls(**settings)


def test_integers_of_numpy_and_torch_are_taken(engine):
    settings = GenerateConfig(
        max_new_tokens=torch.tensor(3), seed=np.int64(4), temperature=np.float32(0.5), stop=["x"]
    )
    assert settings == GenerateConfig(max_new_tokens=3, seed=4, temperature=0.5, stop=("x",))
    assert type(settings.seed) is int
    ids = engine.model("demo").text.encode(TRUTHS)
    expected = engine.generate("demo", ids, config(5))
    assert engine.generate("demo", [np.int32(i) for i in ids], config(5)) == expected
    assert engine.generate("demo", list(torch.tensor(ids)), config(5)) == expected
    assert engine.generate("demo", np.array(ids), config(5)) == expected
    assert engine.generate("demo", torch.tensor(ids), config(5)) == expected


@pytest.mark.parametrize(
    "prompt", [None, b"text", bytearray(b"text"), 5, [1.0, 2.0], ["a"], [True]]
)
def test_what_is_neither_text_nor_token_ids_is_not_a_prompt(engine, prompt):
    with pytest.raises(RequestError, match="must be text or a list of token ids, found"):
        engine.generate("demo", prompt)


def test_a_config_of_another_type_is_an_error(engine):
    with pytest.raises(ConfigError, match="config must be a GenerateConfig or None, found"):
        engine.generate("demo", TRUTHS, {"max_new_tokens": 5})
    with pytest.raises(ConfigError, match="runtime_config must be a RuntimeConfig or None"):
        engine.init_model("other", DEMO_MODEL, {"page_size": 5})


def test_a_stop_token_ends_the_text(engine):
    ids = engine.generate_result("demo", TRUTHS, config(6)).token_ids
    result = engine.generate_result("demo", TRUTHS, config(60, stop_token_ids=(ids[4],)))
    first = ids.index(ids[4])
    assert result.token_ids == ids[: first + 1]
    assert result.text == engine.model("demo").text.decode(ids[:first])
    assert result.finish_reason == "stop"


def test_the_pieces_of_a_stream_join_to_the_text(engine):
    with engine.generate("demo", TRUTHS, config(60, stream=True, stop=("Happiness",))) as stream:
        pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == stream.result.text
    assert stream.result.text == engine.generate("demo", TRUTHS, config(60, stop=("Happiness",)))
    assert next(stream, None) is None


def test_interleaved_streams_do_not_mix(engine):
    one = engine.generate("demo", TRUTHS, config(20, stream=True))
    two = engine.generate("demo", WHEN, config(20, stream=True))
    read = ["", ""]
    for _ in range(5):
        read[0] += next(one)
        read[1] += next(two)
    third = engine.generate("demo", PEOPLE, config(20))
    read[1] += "".join(two)
    read[0] += "".join(one)
    assert read == [engine.generate("demo", p, config(20)) for p in (TRUTHS, WHEN)]
    assert third == engine.generate("demo", PEOPLE, config(20))


@pytest.mark.parametrize("how", ["close", "with", "delete"])
def test_an_abandoned_stream_frees_its_pages(engine, how):
    before = free_pages(engine)
    stream = engine.generate("demo", TRUTHS, config(50, stream=True))
    next(stream)
    assert free_pages(engine) < before
    if how == "close":
        stream.close()
        assert stream.result.finish_reason == "aborted"
        read = stream.result.text[: len(CONTINUED)]
        assert read
        assert CONTINUED.startswith(read)
        assert list(stream) == []
    elif how == "with":
        with stream:
            pass
    else:
        del stream
        gc.collect()
        eventually(lambda: free_pages(engine) == before)
    assert free_pages(engine) == before


class Interrupting:
    """An executor that fails once, after so many steps; None: Ctrl-C is pressed then."""

    def __init__(self, executor, steps, error=None):
        self.executor, self.steps, self.error = executor, steps, error

    def _run(self, run, batch, tap):
        self.steps -= 1
        logits = run(batch, tap)
        if self.steps == 0 and self.error:
            raise self.error
        if self.steps == 0:
            press_ctrl_c()
        return logits

    def forward(self, batch, tap=None):
        return self._run(self.executor.forward, batch, tap)

    def close(self):
        self.executor.close()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ctrl_c_in_a_stream_frees_its_pages_and_leaves_other_streams_intact(engine, steps):
    expected = [engine.generate("demo", p, config(20)) for p in (TRUTHS, WHEN)]
    model = engine.model("demo")
    other = engine.generate("demo", WHEN, config(20, stream=True))

    def read():
        model.executor = Interrupting(model.executor, steps)
        with engine.stream("demo", TRUTHS, config(20)) as stream:
            list(stream)
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        read()
    assert "".join(other) == expected[1]
    eventually(lambda: not engine.stats("demo").num_running)
    assert engine.generate("demo", TRUTHS, config(20)) == expected[0]


def test_ctrl_c_in_a_batch_frees_all_of_its_pages(engine):
    model = engine.model("demo")
    model.executor = Interrupting(model.executor, 3)
    with pytest.raises(KeyboardInterrupt):
        engine.generate_batch("demo", [TRUTHS, WHEN, PEOPLE], config(20))
    eventually(lambda: free_pages(engine) == model.allocator.total_pages)


def test_a_failing_executor_fails_the_requests_of_its_step(engine):
    model = engine.model("demo")
    other = engine.generate("demo", WHEN, config(20, stream=True))
    next(other)
    model.executor = Interrupting(model.executor, 3, ExecutorError("the card is gone"))
    with pytest.raises(ExecutorError, match="the card is gone"):
        engine.generate("demo", TRUTHS, config(20))
    with pytest.raises(ExecutorError, match="the card is gone"):
        list(other)
    assert engine.generate("demo", TRUTHS, config(12)) in CONTINUED


class Poisoning(Interrupting):
    """An executor that makes a logit NaN: in rows of a context of so many tokens, or in all."""

    def __init__(self, executor, tokens=None):
        self.executor, self.tokens = executor, tokens

    def _run(self, run, batch, tap):
        logits = run(batch, tap).clone()
        for row, token in enumerate(batch.logits_rows):
            if self.tokens in (None, batch.positions[token] + 1):
                logits[row, 17] = float("nan")
        return logits


def test_non_finite_logits_fail_only_their_own_request(engine):
    expected = engine.generate("demo", WHEN, config(20))
    model = engine.model("demo")
    prompt = f"{TRUTHS}{CONTINUED}{CONTINUED}"
    model.executor = Poisoning(model.executor, len(model.text.encode(prompt)))
    other = engine.generate("demo", WHEN, config(20, stream=True))
    long = engine.generate("demo", prompt, config(20, stream=True))
    with pytest.raises(
        NonFiniteLogitsError, match=r"step 0: 1 of \d+ logits .* ids 17\)"
    ) as caught:
        list(long)
    assert caught.value.token_ids == (17,)
    assert "".join(other) == expected


@pytest.mark.parametrize("others", [0, 2])
def test_the_first_non_finite_tensor_is_named(engine, others):
    streams = [engine.generate("demo", WHEN, config(20, stream=True)) for _ in range(others)]
    for stream in streams:
        next(stream)
    weights = engine.model("demo").executor.weight("model.layers.1.mlp.up_proj.weight")
    weights[3, 5] = float("nan")
    with pytest.raises(
        NonFiniteLogitsError, match=r"first non-finite tensor is layers\.1\.up_proj;"
    ):
        engine.generate("demo", TRUTHS, config(5))
    for stream in streams:
        stream.close()


def test_logits_that_are_finite_only_with_taps_are_said_to_be(engine):
    class Fused(Poisoning):
        def _run(self, run, batch, tap):
            return run(batch, tap) if tap else super()._run(run, batch, tap)

    model = engine.model("demo")
    model.executor = Fused(model.executor)
    with pytest.raises(
        NonFiniteLogitsError, match=r"with taps, .* only finite tensors: the path without taps is"
    ) as caught:
        engine.generate("demo", TRUTHS, config(5))
    assert caught.value.first_tensor == ""


def test_sanitising_marks_the_result():
    with LLMEngine.from_plugins(options={"sampler": {"on_nonfinite": "sanitize"}}) as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(total_pages=64))
        model = engine.model("demo")
        model.executor = Poisoning(model.executor)
        with pytest.warns(RuntimeWarning, match="not finite"):
            result = engine.generate_result("demo", TRUTHS, config(5))
        assert result.sanitized_steps == 5
        assert len(result.token_ids) == 5


def test_a_sampler_is_made_for_each_model_when_it_is_ready(monkeypatch):
    made = []

    @hookimpl
    def create_sampler(model_config, options):
        made.append((model_config, options))
        return Answering(len(made))

    monkeypatch.setattr("tilewright_sampling.top_p.create_sampler", create_sampler)
    with LLMEngine.from_plugins() as engine:
        assert made == []
        configs = [engine.init_model(name, DEMO_MODEL).config for name in ("one", "two")]
        assert [config for config, _ in made] == configs
        assert made[0][1].on_nonfinite == "error"
        for token_id, name in enumerate(("one", "two"), start=1):
            assert engine.generate_result(name, TRUTHS, config(1)).token_ids == (token_id,)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(ValueError("a bug"), PluginError), (KeyboardInterrupt("a bug"), KeyboardInterrupt)],
)
def test_a_model_whose_sampler_cannot_be_made_is_closed(engine, monkeypatch, error, raised):
    closed = []

    @hookimpl
    def create_sampler():
        raise error

    executor = type(engine.model("demo").executor)
    with monkeypatch.context() as patch:
        patch.setattr("tilewright_sampling.top_p.create_sampler", create_sampler)
        patch.setattr(executor, "close", lambda self: closed.append(self))
        with pytest.raises(raised, match="a bug"):
            engine.init_model("other", DEMO_MODEL)
    (found,) = closed
    assert found is not engine.model("demo").executor
    with pytest.raises(RequestError, match="no model is named 'other'"):
        engine.model("other")
    engine.init_model("other", DEMO_MODEL)


@pytest.mark.parametrize(
    ("module", "hook", "plugin", "missing"),
    [
        ("tilewright_torch.plugin", "create_executor", "executor 'torch'", "device, limits, "),
        ("tilewright.kv_cache", "create_kv_allocator", "kv allocator 'paged'", "page_size, "),
        ("tilewright_sampling.top_p", "create_sampler", "sampler 'top-p'", "sample "),
        ("tilewright_hf.safetensors_format", "open_weights", "'safetensors'", "names, info, get "),
    ],
)
def test_an_object_that_lacks_methods_is_refused_when_the_model_is_loaded(
    engine, monkeypatch, module, hook, plugin, missing
):
    class Unfinished:
        def close(self):
            pass

    def create():
        return Unfinished()

    create.__name__ = hook
    monkeypatch.setattr(f"{module}.{hook}", hookimpl(create))
    with pytest.raises(PluginError) as caught:
        engine.init_model("other", DEMO_MODEL)
    said = str(caught.value)
    assert plugin in said
    assert f"{hook}() must return an object with all of " in said
    assert f"a Unfinished object lacks {missing}" in said


class Answering:
    """A sampler that ignores what it is asked."""

    def __init__(self, *token_ids):
        self.tokens = [SampledToken(token_id=i) for i in token_ids]

    def sample(self, logits, rows):
        return self.tokens


@pytest.mark.parametrize("token_ids", [(), (1, 2), (-1,), (10**6,)])
def test_a_sampler_that_breaks_its_contract_is_named(engine, monkeypatch, token_ids):
    with monkeypatch.context() as patch:
        patch.setattr(engine._thread("demo").runner, "_sampler", Answering(*token_ids))
        with pytest.raises(PluginError, match=r"'top-p' of tilewright .* one token from 0 to \d+"):
            engine.generate("demo", TRUTHS, config(5))
    assert engine.generate("demo", TRUTHS, config(5))


def test_a_sampler_that_returns_integers_breaks_its_contract(engine, monkeypatch):
    class Integers:
        def sample(self, logits, rows):
            return [int(row.argmax()) for row in logits]

    monkeypatch.setattr(engine._thread("demo").runner, "_sampler", Integers())
    with pytest.raises(PluginError, match=r"'top-p' .* as a SampledToken, .* found \[\d+\]"):
        engine.generate("demo", TRUTHS, config(5))


@pytest.mark.parametrize("part", ["executor", "sampler"])
def test_a_bug_in_a_plugin_is_an_error_that_names_the_plugin_and_the_line(
    engine, monkeypatch, part
):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    if part == "executor":
        monkeypatch.setattr(engine.model("demo").executor, "forward", broken)
    else:
        monkeypatch.setattr(engine._thread("demo").runner._sampler, "sample", broken)
    name = {"executor": "executor 'torch'", "sampler": "sampler 'top-p'"}[part]
    with pytest.raises(PluginError, match=name) as caught:
        engine.generate("demo", TRUTHS, config(5))
    assert "failed in a step: ZeroDivisionError: a bug" in str(caught.value)
    assert "test_engine.py, line" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_batch_keeps_its_order_and_agrees_with_single_prompts(engine):
    prompts = [TRUTHS, "He", WHEN, PEOPLE, TRUTHS + CONTINUED, "Congress shall make no law"]
    results = engine.generate_batch("demo", prompts, config(15))  # more prompts than max_batch_size
    assert [r.text for r in results] == [engine.generate("demo", p, config(15)) for p in prompts]
    assert len({r.request_id for r in results}) == len(prompts)
    assert engine.generate_batch("demo", [], config()) == []
    drawn = engine.generate_batch("demo", (prompt for prompt in prompts), config(15))
    assert [result.text for result in drawn] == [result.text for result in results]


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(engine):
    hot = {"temperature": 3.0, "seed": 5}
    alone = engine.generate_result("demo", TRUTHS, config(10, **hot))
    assert alone.seed == 5
    batch = engine.generate_batch("demo", [TRUTHS, WHEN, TRUTHS], config(10, **hot))
    assert batch[0].token_ids == alone.token_ids
    assert batch[2].token_ids != alone.token_ids
    other = engine.generate("demo", WHEN, config(40, temperature=3.0, stream=True))
    next(other)
    assert engine.generate_result("demo", TRUTHS, config(10, **hot)).token_ids == alone.token_ids
    other.close()


def test_a_batch_has_n_results_for_each_prompt_with_seeds_in_a_row(engine):
    hot = {"temperature": 3.0}
    results = engine.generate_batch("demo", [TRUTHS, WHEN], config(8, n=3, seed=2**63 - 2, **hot))
    seeds = [2**63 - 2, 2**63 - 1, 0, 1, 2, 3]
    assert [result.seed for result in results] == seeds
    assert [result.token_ids for result in results] == [
        engine.generate_result("demo", prompt, config(8, seed=seed, **hot)).token_ids
        for prompt, seed in zip([TRUTHS] * 3 + [WHEN] * 3, seeds, strict=True)
    ]
    assert len({result.token_ids for result in results}) == 6
    unseeded = engine.generate_batch("demo", [TRUTHS], config(8, n=4, **hot))
    assert len({result.seed for result in unseeded}) == 4
    refused = engine.generate_batch("demo", [TRUTHS, ""], config(2, n=2))
    assert [result.finish_reason for result in refused] == ["length", "length", "error", "error"]


@pytest.mark.parametrize("how", ["generate", "generate_result", "stream", "chat"])
def test_a_call_with_one_result_refuses_n_above_1(engine, how):
    prompt = [{"role": "user", "content": "Hi"}] if how == "chat" else TRUTHS
    with pytest.raises(RequestError, match="found n = 2: use generate_batch"):
        getattr(engine, how)("demo", prompt, config(n=2))
    assert getattr(engine, how)("demo", prompt, config(2, n=1))


def test_a_batch_may_have_a_configuration_for_each_prompt(engine):
    asked = [
        (TRUTHS, config(8, n=2, seed=2**63 - 1, temperature=3.0)),
        (WHEN, config(3)),
        (WHEN, config(3, logit_bias={10**6: 1.0}, n=2)),
        (WHEN, config(3, min_new_tokens=2, seed=4)),
    ]
    prompts, configs = zip(*asked, strict=True)
    *good, bad, worse, last = engine.generate_batch("demo", prompts, configs)
    alone = [
        (TRUTHS, config(8, seed=2**63 - 1, temperature=3.0)),
        (TRUTHS, config(8, seed=0, temperature=3.0)),
        (WHEN, config(3)),
        asked[-1],
    ]
    for result, (prompt, settings) in zip([*good, last], alone, strict=True):
        assert result.token_ids == engine.generate_result("demo", prompt, settings).token_ids
    for result in (bad, worse):
        assert isinstance(result.error, RequestError)
        assert "logit_bias is outside the vocabulary" in str(result.error)
    with pytest.raises(RequestError, match="a configuration for each of 4 prompts, found 3"):
        engine.generate_batch("demo", prompts, configs[:3])
    with pytest.raises(ConfigError, match="config must be a GenerateConfig or None, found 'x'"):
        engine.generate_batch("demo", ["a"], "x")
    with pytest.raises(ConfigError, match=r"config\[1\] must be a GenerateConfig or None, found 5"):
        engine.generate_batch("demo", ["a", "b"], [config(1), 5])


def test_a_randomly_drawn_seed_reproduces_the_result(engine):
    first = engine.generate_result("demo", TRUTHS, config(10, temperature=3.0))
    again = engine.generate_result("demo", TRUTHS, config(10, temperature=3.0, seed=first.seed))
    assert again.token_ids == first.token_ids


def test_logprobs_come_with_each_token(engine):
    result = engine.generate_result("demo", TRUTHS, config(5, logprobs=3))
    assert [e.token_id for e in result.logprobs] == list(result.token_ids)
    for entry in result.logprobs:
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert len(entry.top) == 3
        assert entry.logprob <= 0


@pytest.mark.parametrize(
    ("name", "quantised"), [("weight_dtype", " or 'int8' or 'int4'"), ("kv_dtype", "")]
)
def test_a_dtype_that_the_executor_does_not_support_is_refused_before_weights_are_read(
    engine, name, quantised
):
    with pytest.raises(ConfigError) as caught:
        engine.init_model("second", DEMO_MODEL, RuntimeConfig(**{name: "int3"}))
    assert str(caught.value) == (
        f"{name} = 'int3' is not supported by executor 'torch': set {name} to 'float32' or "
        f"'bfloat16' or 'float16'{quantised}, or choose another executor"
    )


def test_log_probabilities_of_the_prompt_are_those_of_one_prefill(engine):
    ids = engine.model("demo").text.encode(TRUTHS)
    engine.init_model("whole", DEMO_MODEL, RuntimeConfig(weight_dtype="float32"))
    whole = engine.generate_result("whole", TRUTHS, config(3, prompt_logprobs=2))
    three = RuntimeConfig(weight_dtype="float32", max_batch_tokens=3)
    engine.init_model("chunked", DEMO_MODEL, three)
    chunked = engine.generate_result("chunked", TRUTHS, config(3, prompt_logprobs=2))
    for result in (whole, chunked):
        first, *rest = result.prompt_logprobs
        assert first is None
        assert [entry.token_id for entry in rest] == ids[1:]
        for position, entry in enumerate(rest, start=1):
            (after,) = engine.generate_result(
                "whole", ids[:position], config(1, logprobs=2, logit_bias={ids[position]: 1e4})
            ).logprobs
            assert after.token_id == entry.token_id
            assert entry.logprob == pytest.approx(after.logprob, abs=1e-4)
            assert [i for i, _ in entry.top] == [i for i, _ in after.top]
    assert whole.token_ids == chunked.token_ids
    assert engine.generate_result("demo", TRUTHS, config(3)).prompt_logprobs is None


def test_a_sampler_gets_the_output_without_a_copy_for_each_token(engine, monkeypatch):
    seen = set()
    sampler = engine._thread("demo").runner._sampler
    sample = sampler.sample

    def watched(logits, rows):
        seen.update(id(row.output_token_ids) for row in rows)
        return sample(logits, rows)

    monkeypatch.setattr(sampler, "sample", watched)
    stream = engine.stream("demo", TRUTHS, config(9))
    (request,) = engine._thread("demo").runner.requests.values()
    list(stream)
    assert seen == {id(request.output_token_ids)}


def test_models_are_loaded_side_by_side_under_distinct_names(engine):
    engine.init_model("second", DEMO_MODEL, RuntimeConfig(weight_dtype="bfloat16", total_pages=9))
    assert engine.model("second").runtime.kv_dtype == "bfloat16"
    assert engine.generate("second", TRUTHS, config()) == engine.generate("demo", TRUTHS, config())
    with pytest.raises(ConfigError, match="'demo' is already loaded"):
        engine.init_model("demo", DEMO_MODEL)
    with pytest.raises(RequestError, match=r"'dmeo'; did you mean 'demo'\? .*'demo', 'second'"):
        engine.generate("dmeo", TRUTHS)


def test_the_effective_runtime_settings_have_no_unset_value(engine):
    engine.init_model("plain", DEMO_MODEL)
    runtime, loaded = engine.model("plain").runtime, engine.model("plain").loaded
    assert runtime.weight_dtype == runtime.kv_dtype == loaded.config.dtype == "bfloat16"
    assert runtime.max_seq_len == loaded.config.max_position_embeddings
    assert runtime.total_pages == 16 * runtime.max_seq_len // 16


def test_invalid_requests_are_refused_before_anything_runs(engine):
    size = engine.model("demo").loaded.config.vocab_size
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.generate("demo", "")
    with pytest.raises(RequestError, match=rf"token id {size} .* \(0 to {size - 1}\)"):
        engine.generate("demo", [3, size])
    with pytest.raises(RequestError, match=r"has 256 tokens.*max_seq_len = 256"):
        engine.generate("demo", [3] * 256)
    with pytest.raises(RequestError, match=rf"token id {size} in logit_bias"):
        engine.generate("demo", TRUTHS, config(logit_bias={size: 1.0}))
    with pytest.raises(RequestError, match=rf"token id {size} in stop_token_ids"):
        engine.generate("demo", TRUTHS, config(stop_token_ids=(size,)))
    with pytest.raises(RequestError, match="forbids every token"):
        engine.generate("demo", TRUTHS, config(logit_bias=dict.fromkeys(range(size), -inf)))
    with pytest.raises(RequestError, match="expected a list of prompts"):
        engine.generate_batch("demo", TRUTHS)
    assert not engine._thread("demo").runner.requests
    assert (
        len(engine.generate_result("demo", [3] * 250, config(99, ignore_eos=True)).token_ids) == 6
    )


def test_a_refused_request_leaves_nothing_behind(engine):
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate("demo", "", config())
    assert CONTINUED.startswith(engine.generate("demo", TRUTHS, config()))


def test_a_request_that_needs_too_many_pages_is_refused_before_any_work():
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(total_pages=3, page_size=8))
        with pytest.raises(OutOfPagesError, match=r"needs \d+ KV cache pages .* has 3 \(3 free\)"):
            engine.generate("demo", TRUTHS, config(100))
        assert engine.generate("demo", "We hold", config(4))


def test_the_models_recommended_settings_apply_unless_the_user_sets_them(engine):
    defaults = engine.default_config("demo")
    assert defaults.temperature == 0.0
    assert defaults.max_new_tokens == 128
    model = engine.model("demo")
    object.__setattr__(
        model.loaded, "generation_defaults", GenerateConfig(temperature=0.7, max_new_tokens=3)
    )
    assert engine.default_config("demo").temperature == 0.7
    assert len(engine.generate_result("demo", TRUTHS).token_ids) == 3
    assert len(engine.generate_result("demo", TRUTHS, config(5)).token_ids) == 5


def test_chat_applies_the_chat_template(engine):
    messages = [{"role": "user", "content": "How does the Declaration begin?"}]
    ids = engine.chat_tokens("demo", messages)
    answer = engine.chat("demo", messages, config(20))
    assert answer == engine.generate("demo", ids, config(20))
    assert "When in the Course of human events" in answer


class Recorder:
    def __init__(self):
        self.events = []

    @hookimpl
    def on_load_progress(self, model_id, tensor, bytes_read, bytes_total):
        self.events.append(("load", bytes_read, bytes_total))

    @hookimpl
    def on_prepare(self, what, done, total):
        self.events.append((what, done, total))

    @hookimpl
    def on_model_loaded(self, model_id, seconds):
        self.events.append(("loaded", model_id))

    @hookimpl
    def on_step(self, event):
        self.events.append((event.phase, event.step, event.num_tokens, event.request_ids))

    @hookimpl
    def on_tensor(self, name, tensor):
        self.events.append(("tensor", name, tuple(tensor.shape)))

    @hookimpl
    def on_request_submitted(self, request_id, num_prompt_tokens, max_new_tokens):
        self.events.append(("submitted", request_id, num_prompt_tokens, max_new_tokens))

    @hookimpl
    def on_request_admitted(self, request_id, cached_tokens):
        self.events.append(("admitted", request_id, cached_tokens))

    @hookimpl
    def on_request_finished(self, result):
        self.events.append(("finished", result.text))

    @hookimpl
    def on_request_aborted(self, result):
        self.events.append(("aborted", result.finish_reason))

    @hookimpl
    def on_request_failed(self, request_id, error):
        self.events.append(("failed", request_id, str(error)))

    @hookimpl
    def on_close(self):
        self.events.append(("close",))


def test_observers_receive_every_event():
    recorder = Recorder()
    with LLMEngine.from_plugins(observers=[recorder]) as engine:
        engine.init_model("demo", DEMO_MODEL)
        size = (DEMO_MODEL / "model.safetensors").stat().st_size
        loads = [e for e in recorder.events if e[0] == "load"]
        assert [done for _, done, _ in loads] == sorted(done for _, done, _ in loads)
        assert loads[-1][1] == loads[-1][2] <= size
        assert recorder.events[-1] == ("loaded", "demo")
        recorder.events.clear()
        result = engine.generate_result("demo", TRUTHS, config(3))
    n, name = len(result.prompt_token_ids), result.request_id
    steps = [e for e in recorder.events if e[0] in ("prefill", "decode")]
    assert steps == [
        ("prefill", 0, n, (name,)),
        ("decode", 1, 1, (name,)),
        ("decode", 2, 1, (name,)),
    ]
    tensors = [e for e in recorder.events if e[0] == "tensor"]
    vocab, hidden = 0, 0
    vocab = next(e[2] for e in tensors if e[1] == "logits")[-1]
    hidden = next(e[2] for e in tensors if e[1] == "embed")[-1]
    assert ("tensor", "embed", (n, hidden)) in tensors
    assert ("tensor", "logits", (1, vocab)) in tensors
    assert recorder.events[-2:] == [("finished", result.text), ("close",)]


EVENTS = [
    name
    for name in vars(ObserverEvents)
    if name.startswith("on_") and name != "on_request_preempted"  # which ``watched`` does not make
]


def breaking(event, error):
    """A recorder that raises in one event instead of recording it."""

    @hookimpl
    def raising(self):
        self.events.append(event)
        raise error

    return type("Breaking", (Recorder,), {event: raising})()


def watched(*observers):
    """The text of a generation, of an engine that makes every event."""
    with LLMEngine.from_plugins(observers=observers) as engine:
        engine.init_model("demo", DEMO_MODEL)
        engine._observers.reporter("demo")("kernels", 1, 3)
        engine.stream("demo", TRUTHS, config(100)).close()
        text = engine.generate("demo", TRUTHS, config(3))
        stream = engine.stream("demo", TRUTHS, config(100))
        engine.unload("demo")
        with pytest.raises(RequestError, match="unloaded"):
            list(stream)
        return text


@pytest.mark.parametrize("event", EVENTS)
def test_an_observer_that_raises_is_told_of_once_and_detached(event):
    alone = Recorder()
    text = watched(alone)
    before, broken, after = Recorder(), breaking(event, ValueError("its\nmistake")), Recorder()
    with pytest.warns(RuntimeWarning) as caught:
        assert watched(after, broken, before) == text
    (warning,) = [str(w.message) for w in caught]
    assert re.fullmatch(
        rf"observer Breaking failed in {event}: ValueError: its mistake \(.*test_engine.py, "
        r"line \d+\); it gets no further events",
        warning,
    )
    assert before.events == after.events
    assert broken.events.count(event) == 1
    assert broken.events[-1] == event
    assert broken.events[:-1] == before.events[: len(broken.events) - 1]
    # How far a stream is when it is closed is a matter of chance.
    assert {e[0] for e in before.events} == {e[0] for e in alone.events}


@pytest.mark.parametrize("action", ["default", "error"])
def test_each_engine_tells_of_its_observer_whatever_happens_to_warnings(monkeypatch, action):
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        monkeypatch.setattr(warnings, "showwarning", lambda said, *_: shown.append(str(said)))
        texts = [watched(breaking("on_step", ValueError("same"))) for _ in range(2)]
    assert texts == [watched()] * 2
    first, second = shown
    assert first == second
    assert first.startswith("observer Breaking failed in on_step: ValueError: same (")


@pytest.mark.parametrize("event", [name for name in EVENTS if name != "on_request_finished"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_an_observer_interrupts(event, error):
    with pytest.raises(error):
        watched(breaking(event, error()))


def test_a_lack_of_memory_in_an_observer_ends_the_generation():
    with pytest.raises(MemoryError):
        watched(breaking("on_step", MemoryError()))


def test_observers_of_one_class_are_told_apart():
    with pytest.warns(RuntimeWarning) as caught:
        watched(Recorder(), *(breaking("on_step", ValueError()) for _ in range(2)))
    names = [str(warning.message).partition(" failed in ")[0] for warning in caught]
    assert sorted(names) == ["observer Breaking", "observer Breaking (2)"]


def test_an_observer_that_failed_in_a_step_run_by_another_misses_the_event_of_that_other():
    class Stepping(Recorder):
        text = None

        @hookimpl
        def on_step(self, event):
            if self.text is None:
                self.text = ""
                self.text = self.engine.generate("demo", WHEN, config(1))

    broken, stepping = breaking("on_step", ValueError()), Stepping()
    with LLMEngine.from_plugins(observers=[broken, stepping]) as engine:
        engine.init_model("demo", DEMO_MODEL)
        stepping.engine = engine
        with pytest.warns(RuntimeWarning):
            engine.generate("demo", TRUTHS, config(1))
    assert stepping.text
    assert broken.events.count("on_step") == 1


def test_a_wrapper_of_events_is_refused():
    class Wrapping:
        @hookimpl(wrapper=True)
        def on_step(self):
            return (yield)

    with pytest.raises(PluginError, match=r"on_step\(\) is marked as a wrapper"):
        LLMEngine.from_plugins(observers=[Wrapping()])


def test_requests_that_ended_in_an_interrupted_step_are_finished_and_not_run_again():
    runtime = RuntimeConfig(page_size=8, total_pages=3)
    with LLMEngine.from_plugins(observers=[breaking("on_step", KeyboardInterrupt())]) as engine:
        engine.init_model("demo", DEMO_MODEL, runtime)
        runner = engine.runner("demo")
        prompts = [(token,) * 8 for token in (10, 20, 30)]  # with one new token, a page each
        requests = [
            Request(f"r{i}", prompt, SamplingParams(), 1) for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            runner.add(request)
        with pytest.raises(KeyboardInterrupt):
            runner.step()
        runner.step()
        for request in requests:
            assert request.result.finish_reason == "length"
        assert runner.num_steps == 0  # none ran after the interrupted one
        assert free_pages(engine) == 3


def test_an_observer_with_a_misspelt_hook_is_refused():
    class Typo:
        @hookimpl
        def on_stepp(self, event):
            pass

    with pytest.raises(PluginError, match=r"'on_stepp'.*did you mean 'on_step'"):
        LLMEngine.from_plugins(observers=[Typo()])


def test_a_model_that_fails_to_load_leaves_its_name_free(engine, tmp_path):
    with pytest.raises(ModelError):
        engine.init_model("new", tmp_path)
    with pytest.raises(ConfigError, match="max_seq_len = 99999"):
        engine.init_model("new", DEMO_MODEL, RuntimeConfig(max_seq_len=99999))
    engine.init_model("new", DEMO_MODEL)


def test_unknown_options_and_kinds_are_errors():
    with pytest.raises(TilewrightError, match=r"'thread'.*did you mean 'threads'"):
        LLMEngine.from_plugins(options={"executor": {"thread": 2}})
    with pytest.raises(ConfigError, match=r"'executors'.*did you mean 'executor'"):
        LLMEngine.from_plugins(options={"executors": {}})


def test_an_engine_can_be_recreated_from_its_selection(engine):
    with LLMEngine.from_plugins(**engine.selection) as again:
        assert again.selection == engine.selection
        again.init_model("demo", DEMO_MODEL)


def test_a_closed_engine_refuses_calls(engine):
    engine.close()
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.generate("demo", TRUTHS)


def test_a_run_file_makes_an_engine_with_its_model(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        f'[model]\nid = "m"\npath = "{DEMO_MODEL}"\n[runtime]\nweight_dtype = "float32"\n'
        "total_pages = 32\n[options.executor]\nthreads = 2\n"
    )
    with LLMEngine.from_config(path) as engine:
        assert engine.model("m").runtime.weight_dtype == "float32"
        assert engine.generate("m", TRUTHS, config(12)) in CONTINUED


def test_generation_keeps_no_gradients(engine):
    assert torch.is_grad_enabled()
    engine.generate("demo", TRUTHS, config(2))
    assert torch.is_grad_enabled()
    assert not engine.model("demo").executor.read_kv(0, [0]).key.requires_grad


def test_closing_an_engine_ends_its_streams_with_an_error():
    engine = LLMEngine.from_plugins()
    engine.init_model("demo", DEMO_MODEL)
    stream = engine.stream("demo", TRUTHS, config(20))
    read = [next(stream)]
    engine.close()
    with pytest.raises(RequestError, match="engine was closed before this request had finished"):
        read.extend(stream)
    assert stream.result is None
    assert CONTINUED.startswith("".join(read))


class Closing:
    """Closes the engine in one of its events."""

    def __init__(self, event):
        self.event, self.engine, self.executors = event, None, []

    def close(self):
        executor = self.engine._models and self.engine.model("demo").executor
        if executor:
            self.executors.append(executor)
        self.engine.close()

    @hookimpl
    def on_tensor(self, name):
        if (self.event, name) == ("on_tensor", "layers.1.attention"):
            self.close()

    @hookimpl
    def on_step(self):
        if self.event == "on_step":
            self.close()


@pytest.mark.parametrize("event", ["on_tensor", "on_step"])
@pytest.mark.parametrize("way", ["stream", "batch"])
def test_an_observer_may_close_the_engine(event, way):
    observer = Closing(event)
    engine = observer.engine = LLMEngine.from_plugins(observers=[observer])
    engine.init_model("demo", DEMO_MODEL)
    ways = {
        "stream": lambda: list(engine.stream("demo", TRUTHS, config(20))),
        "batch": lambda: engine.generate_batch("demo", [TRUTHS, WHEN], config(20)),
    }
    with pytest.raises(RequestError, match="engine was closed"):
        ways[way]()
    (executor,) = observer.executors
    with pytest.raises(ExecutorError, match="is closed"):
        executor.embed(None)


def test_unloading_a_model_removes_it_and_frees_its_name(engine):
    expected = engine.generate("demo", TRUTHS, config(5))
    stream = engine.stream("demo", TRUTHS, config(20))
    next(stream)
    engine.init_model("other", DEMO_MODEL, RuntimeConfig(total_pages=8))
    engine.unload("demo")
    with pytest.raises(RequestError, match="model 'demo' was unloaded"):
        list(stream)
    with pytest.raises(RequestError, match="no model is named 'demo'"):
        engine.generate("demo", TRUTHS)
    assert engine.generate("other", TRUTHS, config(5)) == expected
    engine.init_model("demo", DEMO_MODEL, RuntimeConfig(page_size=8, total_pages=64))
    assert engine.generate("demo", TRUTHS, config(5)) == expected


def test_a_randomly_drawn_seed_is_exact_as_a_json_number(engine):
    seeds = [engine.generate_result("demo", [5], config(1)).seed for _ in range(20)]
    assert len(set(seeds)) == 20
    assert all(0 <= seed == int(float(seed)) < 2**53 for seed in seeds)


def test_a_refused_prompt_of_a_batch_fails_alone(engine):
    size = engine.model("demo").loaded.config.vocab_size
    prompts = [TRUTHS, "", [3] * 256, WHEN, [size], None]
    results = engine.generate_batch("demo", prompts, config(9))
    assert [result.finish_reason for result in results] == [
        "length", "error", "error", "length", "error", "error"
    ]  # fmt: skip
    assert [results[i].text for i in (0, 3)] == [
        engine.generate("demo", prompts[i], config(9)) for i in (0, 3)
    ]
    assert all(results[i].error is None for i in (0, 3))
    words = {1: "is empty", 2: "has 256 tokens", 4: f"token id {size}", 5: "must be text or"}
    for i, message in words.items():
        assert isinstance(results[i].error, RequestError)
        assert message in str(results[i].error)
        assert (results[i].text, results[i].token_ids) == ("", ())
    assert len({result.request_id for result in results}) == len(prompts)
    assert engine.generate_batch("demo", [""])[0].error


@pytest.mark.parametrize(
    ("of_executor", "advice"),
    [
        (None, "shorten it, or raise max_seq_len, to at most 2048"),
        (32, "shorten it, or raise max_seq_len, to at most 32"),
        (16, "shorten it"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_to_raise_max_seq_len_only_where_that_is_possible(
    monkeypatch, of_executor, advice
):
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(max_seq_len=16))
        executor = engine.model("demo").executor
        monkeypatch.setattr(executor, "limits", ExecutorLimits(max_seq_len=of_executor))
        with pytest.raises(RequestError) as caught:
            engine.generate("demo", [3] * 16)
    assert str(caught.value).endswith(f"max_seq_len = 16 of model 'demo': {advice}")


def test_a_prompt_that_the_cache_cannot_hold_fails_alone():
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(page_size=8, total_pages=4))
        results = engine.generate_batch("demo", [[3] * 5, [3] * 40], config(4))
        assert isinstance(results[1].error, OutOfPagesError)
        assert results[0].token_ids == engine.generate_result("demo", [3] * 5, config(4)).token_ids


def test_non_finite_logits_of_a_request_that_has_ended_leave_its_error(engine, monkeypatch):
    def sample(logits, rows):
        engine.close()
        raise NonFiniteLogitsError(rows[0].request_id, 0, [1], logits.shape[1])

    monkeypatch.setattr(engine._thread("demo").runner._sampler, "sample", sample)
    with pytest.raises(RequestError, match="engine was closed"):
        engine.generate("demo", TRUTHS, config(5))
