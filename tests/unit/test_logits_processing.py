"""Logits processors: their states, and what their edits do to logits and texts."""

import pickle
from math import inf

import pytest
import torch
from attrs import evolve
from contract_executors import outcome, outcomes, requests, run
from hypothesis import given
from hypothesis import strategies as st

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import PluginError, PluginWarning, RequestError
from tilewright.logits_processing import FORBIDDEN, LogitsProcessorError, Place, Processing, edited
from tilewright.settings import DEMO_MODEL
from tilewright.types import LogitsEdits

TRUTHS = "We hold these truths to be self-evident,"
PROMPTS = [TRUTHS, "When in the Course of human events", "Congress shall make no law"]


def packed(allowed):
    """Masks [rows, words] int32 of booleans [rows, vocab_size]."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32))
    bits = padded.view(len(allowed), -1, 32).long() << torch.arange(32)
    return bits.sum(-1).to(torch.int32)


class Scripted:
    """A processor whose states count accepted tokens, and which records its calls."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.calls = []
        self.states = []

    def begin(self, request_id, argument, prompt_token_ids):
        state = {"id": request_id, "argument": argument, "accepted": [], "ended": False}
        self.states.append(state)
        return state

    def edits(self, rows):
        self.calls.append([row for row, _ in rows])
        return LogitsEdits(**self.of(rows))

    def accept(self, state, token_id):
        state["accepted"].append(token_id)

    def snapshot(self, state):
        return list(state["accepted"])

    def restore(self, state, snapshot):
        state["accepted"][:] = snapshot

    def end(self, state):
        assert not state["ended"]
        state["ended"] = True


class Masking(Scripted):
    """Allows the tokens of the argument: one set, or one for each place in the output."""

    def of(self, rows):
        allowed = torch.zeros(len(rows), self.vocab_size, dtype=torch.bool)
        for i, (_, state) in enumerate(rows):
            sets = state["argument"]
            at = min(len(state["accepted"]), len(sets) - 1)
            allowed[i, list(sets[at])] = True
        numbers = torch.tensor([row for row, _ in rows])
        return {"mask_rows": numbers, "masks": packed(allowed)}


class Adding(Scripted):
    """Adds the values of the argument, by token id."""

    def of(self, rows):
        every = [(row, i, x) for row, state in rows for i, x in state["argument"].items()]
        columns = [torch.tensor(column) for column in zip(*every, strict=True)]
        return dict(zip(("added_rows", "added_token_ids", "added"), columns, strict=True))


@pytest.fixture
def engine():
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(max_batch_size=4))
        runner, vocab = engine._thread("demo").runner, engine.model("demo").loaded.config.vocab_size
        made = {"mask": Masking(vocab), "add": Adding(vocab)}
        engine.made = made
        runner._processors = lambda name: Processing(f"logits_processor {name!r}", made[name], None)
        yield engine


def config(**settings):
    return GenerateConfig(**{"max_new_tokens": 12, **settings})


# --- through an engine ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 4}])
def test_a_mask_is_a_bias_of_minus_infinity_on_all_other_tokens(engine, settings):
    some = range(200, 900, 3)
    vocab = engine.model("demo").loaded.config.vocab_size
    bias = {i: -inf for i in range(vocab) if i not in some}
    for prompt in PROMPTS:
        expected = engine.generate_result("demo", prompt, config(logit_bias=bias, **settings))
        found = engine.generate_result(
            "demo", prompt, config(logits_processors={"mask": [some]}, **settings)
        )
        assert found.token_ids == expected.token_ids
        assert set(found.token_ids) <= set(some)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 4}])
def test_what_is_added_to_logits_is_a_bias(engine, settings):
    bias = {11: 5.0, 300: -2.5, 668: 3.25}
    expected = engine.generate_batch("demo", PROMPTS, config(logit_bias=bias, **settings))
    found = engine.generate_batch(
        "demo", PROMPTS, config(logits_processors={"add": bias}, **settings)
    )
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_a_processor_is_called_once_a_step_for_the_rows_of_its_requests(engine):
    (plain,) = outcomes(engine.model("demo"), engine.model("demo").executor, PROMPTS[:1])
    runner, seven = engine.runner("demo"), {"logits_processors": {"mask": [[7]]}}
    masked = [(prompt, seven) for prompt in PROMPTS[:2]]
    made = requests(runner.model, [*masked, PROMPTS[0]])
    run(runner, made)
    for request in made[:2]:
        assert request.result.token_ids == (7,) * 12
    assert outcome(made[2]) == plain
    calls = engine.made["mask"].calls
    assert calls == [[0, 1]] * 12
    for state in engine.made["mask"].states:
        assert (state["accepted"], state["ended"]) == ([7] * 12, True)


def test_two_processors_of_one_request_both_count(engine):
    both = {"mask": [range(100, 200)], "add": {150: 1000.0, 250: 2000.0}}
    assert set(
        engine.generate_result("demo", TRUTHS, config(logits_processors=both)).token_ids
    ) == {150}


def test_processors_that_together_forbid_every_token_fail_the_request(engine):
    engine.made["other"] = Masking(engine.made["mask"].vocab_size)
    both = {"mask": [range(100, 200)], "other": [range(199, 300)]}
    result = engine.generate_result("demo", TRUTHS, config(logits_processors=both))
    assert set(result.token_ids) == {199}
    bystander = engine.stream("demo", PROMPTS[1], config(logits_processors={"mask": [[7]]}))
    with pytest.raises(PluginError, match=r"'mask' and .* 'other' together forbid every token"):
        engine.generate(
            "demo", TRUTHS, config(logits_processors={**both, "other": [range(200, 300)]})
        )
    assert set(bystander) == {engine.model("demo").text.decode([7])}


@pytest.mark.parametrize("how", ["min_new_tokens", "logit_bias"])
def test_a_mask_that_leaves_only_what_the_settings_forbid_fails_its_request(engine, how):
    eos = engine.model("demo").loaded.config.eos_token_ids[0]
    mask = {"logits_processors": {"mask": [[7], [eos]]}}
    assert engine.generate_result("demo", TRUTHS, config(**mask)).token_ids == (7, eos)
    assert engine.generate("demo", TRUTHS, config(min_new_tokens=1, **mask))
    settings = {"min_new_tokens": 2} if how == "min_new_tokens" else {"logit_bias": {eos: -inf}}
    other = engine.stream("demo", TRUTHS, config())
    with pytest.raises(PluginError, match="'mask' allows only tokens that logit_bias or min_new"):
        engine.generate("demo", TRUTHS, config(**settings, **mask))
    assert "".join(other) == engine.generate("demo", TRUTHS, config())


def test_what_follows_a_forbidden_draft_may_have_no_token_left(engine):
    class Strays(Masking):
        def of(self, rows):
            strayed = [200 in state["accepted"] for _, state in rows]
            self.strayed = self.strayed or any(strayed)
            sets = [[range(70, 80) if wrong else range(300)] for wrong in strayed]
            return super().of(
                [
                    (row, {**state, "argument": s})
                    for (row, state), s in zip(rows, sets, strict=True)
                ]
            )

    engine.made["other"] = Strays(engine.made["mask"].vocab_size)
    engine.made["other"].strayed = False
    engine._thread("demo").runner._scheduler._draft = lambda request, most: [200][:most]
    both = {"mask": [range(60, 70)], "other": None}
    result = engine.generate_result("demo", TRUTHS, config(logits_processors=both))
    assert engine.made["other"].strayed
    assert set(result.token_ids) <= set(range(60, 70))


def test_two_processors_of_one_plugin_get_their_own_states(engine):
    vocab, runner = engine.made["mask"].vocab_size, engine._thread("demo").runner
    made = {"mask": Masking(vocab), "acme:mask": Masking(vocab)}
    runner._processors = lambda name: Processing("logits_processor 'mask'", made[name], None)
    both = {"mask": [range(100, 200)], "acme:mask": [range(199, 300)]}
    result = engine.generate_result("demo", TRUTHS, config(logits_processors=both))
    assert set(result.token_ids) == {199}
    assert [len(each.calls) for each in made.values()] == [12, 12]


def test_a_mask_follows_the_tokens_that_were_accepted(engine):
    sets = [[i] for i in range(50, 62)]
    result = engine.generate_result("demo", TRUTHS, config(logits_processors={"mask": sets}))
    assert result.token_ids == tuple(range(50, 62))


def test_drafts_are_checked_against_the_mask_of_their_place_and_states_are_restored(engine):
    sets = [[i % 3 + 60] for i in range(12)]
    runner = engine._thread("demo").runner
    runner._scheduler._draft = lambda request, most: [
        (len(request.output_token_ids) + i) % 3 + 60 for i in range(min(most, 4))
    ]
    steps = runner.num_steps
    result = engine.generate_result("demo", TRUTHS, config(logits_processors={"mask": sets}))
    assert result.token_ids == tuple(i % 3 + 60 for i in range(12))
    assert runner.num_steps - steps == 4  # the prompt, two times five tokens, and the last
    assert engine.made["mask"].states[0]["accepted"] == list(result.token_ids)


@pytest.mark.parametrize("how", ["abort", "unload", "finish"])
def test_a_state_is_ended_once(engine, how):
    stream = engine.stream("demo", TRUTHS, config(logits_processors={"mask": [[7]]}))
    next(stream)
    if how == "abort":
        stream.close()
    elif how == "unload":
        engine.unload("demo")
    else:
        list(stream)
    assert engine.made["mask"].states[0]["ended"]


def test_an_unknown_processor_is_refused_when_the_request_is_made():
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL)
        with pytest.raises(PluginError, match="'grammer'"):
            engine.generate("demo", TRUTHS, config(logits_processors={"grammer": 1}))
        assert not engine._thread("demo").runner.requests
        assert engine.generate("demo", TRUTHS, config(max_new_tokens=1))


def test_a_processor_that_refuses_its_argument_ends_what_was_begun(engine, monkeypatch):
    def refuse(request_id, argument, prompt_token_ids):
        raise RequestError("expected a grammar")

    monkeypatch.setattr(engine.made["add"], "begin", refuse)
    with pytest.raises(RequestError, match="expected a grammar"):
        engine.generate("demo", TRUTHS, config(logits_processors={"mask": [[7]], "add": {}}))
    assert engine.made["mask"].states[0]["ended"]
    assert not engine._thread("demo").runner.requests


def test_a_processor_that_cannot_end_is_told_of_once_and_ends_no_generation(engine, monkeypatch):
    def broken(state):
        raise ZeroDivisionError(f"a bug in {state['id']}")

    monkeypatch.setattr(engine.made["mask"], "end", broken)
    asked = config(logits_processors={"mask": [[7]]})
    with pytest.warns(PluginWarning) as caught:
        results = engine.generate_batch("demo", PROMPTS, asked)
    assert [result.token_ids for result in results] == [(7,) * 12] * len(PROMPTS)
    (warning,) = caught
    assert "end() failed: ZeroDivisionError: a bug in demo-" in str(warning.message)


@pytest.mark.parametrize("method", ["edits", "accept"])
def test_a_bug_in_a_processor_fails_its_requests_only(engine, monkeypatch, method):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine.made["mask"], method, broken)
    plain = engine.generate("demo", TRUTHS, config())
    other = engine.stream("demo", TRUTHS, config())
    stream = engine.stream("demo", TRUTHS, config(logits_processors={"mask": [[7]]}))
    with pytest.raises(PluginError, match=r"logits_processor 'mask': \w+\(\) failed: ZeroDiv"):
        list(stream)
    assert "".join(other) == plain
    allocator = engine.model("demo").allocator
    assert allocator.free_pages + allocator.evictable_pages == allocator.total_pages


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (5, r"edits\(\) must return LogitsEdits or None, found 5"),
        (LogitsEdits(mask_rows=[0]), r"edits\(\) "),
        (LogitsEdits(mask_rows=torch.tensor([0.0]), masks=torch.ones(1, 63).int()), r"edits\(\) "),
        (LogitsEdits(added_rows=[0], added_token_ids=[1], added=[1.0]), r"edits\(\) failed"),
        (None, r"edits\(\) failed: AttributeError"),
    ],
    ids=["integer", "list of rows", "rows of floats", "lists", "no method"],
)
def test_edits_of_wrong_types_are_blamed_on_the_processor_and_fail_its_requests_only(
    engine, monkeypatch, edits, said
):
    if edits is None:
        monkeypatch.delattr(Scripted, "edits")
    else:
        monkeypatch.setattr(engine.made["mask"], "edits", lambda rows: edits)
    plain = engine.generate("demo", TRUTHS, config())
    other = engine.stream("demo", TRUTHS, config())
    stream = engine.stream("demo", TRUTHS, config(logits_processors={"mask": [[7]]}))
    with pytest.raises(LogitsProcessorError, match=f"logits_processor 'mask': {said}"):
        list(stream)
    assert "".join(other) == plain


def test_a_generation_of_a_batch_that_fails_keeps_its_id_and_the_others_their_results(
    engine, monkeypatch
):
    ids = []
    add = type(engine._thread("demo").runner).add
    monkeypatch.setattr(
        type(engine._thread("demo").runner),
        "add",
        lambda self, request: (ids.append(request.request_id), add(self, request))[1],
    )
    accept = engine.made["mask"].accept

    def failing(state, token_id):
        if state["id"] == ids[1]:
            raise ValueError("a bug")
        accept(state, token_id)

    monkeypatch.setattr(engine.made["mask"], "accept", failing)
    settings = config(logits_processors={"mask": [[7]]})
    results = engine.generate_batch("demo", PROMPTS, settings)
    assert [result.request_id for result in results] == ids
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert isinstance(results[1].error, LogitsProcessorError)


def test_logits_that_are_not_finite_are_not_hidden_by_a_mask(engine):
    weights = engine.model("demo").executor.weight("model.norm.weight")
    weights.fill_(float("nan"))
    with pytest.raises(Exception, match="are not finite"):
        engine.generate("demo", TRUTHS, config(logits_processors={"mask": [[7]]}))


# --- edits ----------------------------------------------------------------------------------------


class Fixed(Scripted):
    def __init__(self, **edits):
        super().__init__(0)
        self.fixed = edits

    def of(self, rows):
        return self.fixed


def apply(logits, **edits):
    one = Processing("logits_processor 'acme'", Fixed(**edits), {"accepted": []})
    return edited(logits, [Place(0, [one], ())])


@given(st.data())
def test_a_packed_mask_forbids_exactly_the_tokens_whose_bit_is_not_set(data):
    vocab = data.draw(st.integers(1, 100))
    allowed = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab).filter(any))
    )
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
    found = apply(logits, mask_rows=torch.tensor([1]), masks=packed(allowed[None]))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert torch.equal(found[1][allowed], logits[1][allowed])
    assert (found[1][~allowed] == FORBIDDEN).all()


def test_additions_to_one_token_add_up_and_the_logits_given_stay_as_they_are():
    logits = torch.zeros(2, 5)
    found = apply(
        logits,
        added_rows=torch.tensor([1, 1, 0]),
        added_token_ids=torch.tensor([3, 3, 4]),
        added=torch.tensor([1.5, 2.0, -1.0]),
    )
    assert found.tolist() == [[0, 0, 0, 0, -1], [0, 0, 0, 3.5, 0]]
    assert not logits.any()


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"mask_rows": [0], "masks": [[0, 0]]}, r"masks \[1, 1\] torch.int32, found \[1, 2\]"),
        ({"mask_rows": [0]}, r"masks \[1, 1\] torch.int32, found None"),
        ({"mask_rows": [2], "masks": [[1]]}, r"mask_rows from 0 to 1, found \[2\]"),
        ({"mask_rows": [-1], "masks": [[1]]}, r"mask_rows from 0 to 1, found \[-1\]"),
        ({"mask_rows": [0], "masks": [[0]]}, "forbids every token of a row"),
        ({"mask_rows": [0], "masks": [[-32]]}, "forbids every token of a row"),
        ({"added_rows": [0], "added_token_ids": [5], "added": [1.0]}, "token_ids from 0 to 4"),
        ({"added_rows": [0], "added_token_ids": [1], "added": [inf]}, "must add finite values"),
        ({"added_rows": [0], "added": [1.0]}, "of one length"),
    ],
)
def test_edits_that_do_not_fit_the_logits_are_an_error_that_names_the_processor(edits, said):
    tensors = {name: torch.tensor(values) for name, values in edits.items()}
    if "masks" in tensors:
        tensors["masks"] = tensors["masks"].int()
    with pytest.raises(LogitsProcessorError, match=said) as caught:
        apply(torch.zeros(2, 5), **tensors)
    assert str(caught.value).startswith("logits_processor 'acme': edits() ")


def test_edits_can_be_pickled():
    edits = LogitsEdits(mask_rows=torch.tensor([1]), masks=torch.tensor([[5]], dtype=torch.int32))
    again = pickle.loads(pickle.dumps(edits))
    assert torch.equal(again.masks, edits.masks)
    assert evolve(again, masks=None).added is None
