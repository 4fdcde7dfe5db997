"""The conformance suite of logits processors."""

import copy
import gc
import itertools
import pickle
import tracemalloc
from collections.abc import Iterable, Sequence
from math import inf
from random import Random
from typing import Any, ClassVar, Protocol

import pytest
import torch
from attrs import evolve, frozen
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)
from torch import Tensor

from tilewright.errors import RequestError
from tilewright.types import LogitsEdits, LogitsProcessor, PreparingProcessor, TextAssets
from tilewright_testing.random_calls import run_random_calls
from tilewright_testing.state import left_alone
from tilewright_testing.suite import Implementation, PluginSuite


class Make(Protocol):
    """Makes a processor for a model; by default, one with as many tokens as its tokenizer."""

    def __call__(self, vocab_size: int | None = None) -> LogitsProcessor: ...


@frozen(eq=False)
class Walk:
    """A request that was alone with a processor, and always chose one of the allowed tokens."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    effects: Sequence[Tensor]
    """What the edits did before each of the tokens, and after the last: see ``effects``."""


_STEPS = 8
_WALKS = 5
_ROWS = [11, 3, 8, 40, 5]
"""Rows of logits of the walks' requests, when all are in one step."""

_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1.5, 10**30, inf),
    *("", " ", "\n", "{", "a,b", b"\0"),
    *([], [None], [""], [[[]]], {}, {"": None}, {3: [object]}),
    object(),
)
"""Arguments that users may give by mistake: values of run files and flags, and of Python."""

_REQUESTS = 250
_KEPT_BYTES = 16
"""How much memory may be kept for each request that has ended: less than one entry of a dict."""


def byte_text() -> TextAssets:
    """A tokenizer with three special tokens, every byte, and a few longer tokens: 264 in all.

    Token 2, ``<|im_end|>``, ends a text. Any text can be encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("h", "e"), ("l", "l"), ("e", "s"), ("Ġ", "w"), ("n", "o")]
    longer = [left + right for left, right in merges]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *longer]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return TextAssets(tokenizer=tokenizer, special_tokens={"eos_token": special[2]})


# --- edits ----------------------------------------------------------------------------------------


def check_edits(edits: LogitsEdits | None, rows: Iterable[int], vocab_size: int) -> None:
    """Fail unless edits have the documented types and concern only the given rows."""
    if edits is None:
        return
    assert isinstance(edits, LogitsEdits), (
        f"edits() must return a LogitsEdits or None, found {edits!r:.100}"
    )
    if _complete(edits, "mask_rows", "masks"):
        mask_rows, masks = edits.mask_rows, edits.masks
        assert mask_rows is not None
        shape = (len(mask_rows), -(-vocab_size // 32))
        _check_tensor(edits, "mask_rows", (len(mask_rows),), "int64")
        assert masks is not None
        assert tuple(masks.shape) == shape, (
            f"masks must have the shape [M, ceil(vocab_size / 32)] = {list(shape)} for "
            f"{vocab_size} tokens, found {list(masks.shape)}"
        )
        _check_tensor(edits, "masks", shape, "int32")
        named = mask_rows.tolist()
        assert len(set(named)) == len(named), f"mask_rows must name a row once, found {named}"
        _check_rows("mask_rows", named, rows)
    if _complete(edits, "added_rows", "added_token_ids", "added"):
        added_rows, ids, added = edits.added_rows, edits.added_token_ids, edits.added
        assert added_rows is not None
        assert ids is not None
        assert added is not None
        for name, dtype in (
            ("added_rows", "int64"),
            ("added_token_ids", "int64"),
            ("added", "float32"),
        ):
            _check_tensor(edits, name, (len(added_rows),), dtype)
        _check_rows("added_rows", added_rows.tolist(), rows)
        outside = [i for i in ids.tolist() if not 0 <= i < vocab_size]
        assert not outside, f"added_token_ids must be 0 to {vocab_size - 1}, found {outside[:5]}"
        assert added.isfinite().all(), "added must be finite: a mask forbids a token"


def _complete(edits: LogitsEdits, *names: str) -> bool:
    """Whether the fields are given; fail if only some of them are."""
    given = [name for name in names if getattr(edits, name) is not None]
    assert not given or len(given) == len(names), (
        f"LogitsEdits must have all of {', '.join(names)} or none, found {', '.join(given)}"
    )
    return bool(given)


def _check_tensor(edits: LogitsEdits, name: str, shape: tuple[int, ...], dtype: str) -> None:
    tensor = getattr(edits, name)
    found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
    assert found == (shape, getattr(torch, dtype), "cpu"), (
        f"{name} must be {list(shape)} {dtype} on the CPU, found {list(found[0])} {found[1]} on "
        f"{found[2]}"
    )


def _check_rows(name: str, found: Iterable[int], rows: Iterable[int]) -> None:
    given = list(rows)
    strange = sorted(set(found) - set(given))
    assert not strange, (
        f"{name} must hold only rows that edits() was called with, {given}, found {strange}"
    )


def effects(
    processor: LogitsProcessor, rows: Sequence[tuple[int, Any]], vocab_size: int
) -> list[Tensor]:
    """What a processor does to each of the rows, in their order: [vocab_size] float64.

    The number that is added to each token's logit; -inf for a token that a mask forbids. Fails
    where the edits do not have the documented types.
    """
    numbers = [row for row, _ in rows]
    edits = processor.edits(list(rows))
    check_edits(edits, numbers, vocab_size)
    found = {row: torch.zeros(vocab_size, dtype=torch.float64) for row in numbers}
    if edits is not None and edits.added_rows is not None:
        assert edits.added_token_ids is not None
        assert edits.added is not None
        columns = (edits.added_rows, edits.added_token_ids, edits.added)
        for row, token, number in zip(*(c.tolist() for c in columns), strict=True):
            found[row][token] += number
    if edits is not None and edits.mask_rows is not None:
        assert edits.masks is not None
        bits = torch.arange(32, dtype=torch.int32)
        allowed = ((edits.masks.unsqueeze(-1) >> bits) & 1).bool().flatten(1)[:, :vocab_size]
        for row, mask in zip(edits.mask_rows.tolist(), allowed, strict=True):
            found[row][~mask] = -inf
    return [found[row] for row in numbers]


def allowed_tokens(effect: Tensor) -> list[int]:
    found: list[int] = effect.isfinite().nonzero().flatten().tolist()
    return found


def _expect(found: Tensor, expected: Tensor, must: str) -> None:
    """Fail unless two effects are equal, up to the rounding of sums."""
    close = torch.isclose(found, expected, rtol=1e-5, atol=1e-6)  # -inf is close to -inf
    if close.all():
        return
    token = int((~close).nonzero()[0])
    words = [
        "forbids it" if value == -inf else f"adds {value:g} to its logit"
        for value in (found[token].item(), expected[token].item())
    ]
    pytest.fail(
        f"{must}; token {token} is the first of {int((~close).sum())} that differ: the processor "
        f"{words[0]}, expected that it {words[1]}",
        pytrace=False,
    )


def _check_allowed(effect: Tensor, when: str) -> None:
    assert allowed_tokens(effect), (
        f"edits() must allow at least one token in each row, but forbids all {when}: where no "
        "token is right, give the row no mask, or allow an end of sequence"
    )


# --- requests -------------------------------------------------------------------------------------


def walk(processor: LogitsProcessor, argument: Any, vocab_size: int, seed: int) -> Walk:
    """A request that is alone with a processor. Half of its tokens have been seen before, if such
    are allowed."""
    random = Random(seed)
    prompt, tokens, seen = _prompt(seed), list[int](), list[Tensor]()
    state = _begin(processor, f"walk-{seed}", argument, prompt)
    for _ in range(_STEPS):
        (effect,) = effects(processor, [(0, state)], vocab_size)
        seen.append(effect)
        allowed = allowed_tokens(effect) or [0]
        again = [i for i in (*prompt, *tokens) if i in allowed]
        tokens.append(random.choice(again if again and random.random() < 0.5 else allowed))
        processor.accept(state, tokens[-1])
    seen += effects(processor, [(0, state)], vocab_size)
    processor.end(state)
    return Walk(prompt, tokens, seen)


def _prompt(seed: int) -> list[int]:
    return [Random(seed).randrange(3, 60) for _ in range(4)]


def _begin(
    processor: LogitsProcessor, request_id: str, argument: Any, prompt: Sequence[int]
) -> Any:
    """The state of a new request, whose argument and prompt are its own."""
    if isinstance(processor, PreparingProcessor):
        processor.prepare(copy.deepcopy(argument))
    return processor.begin(request_id, copy.deepcopy(argument), list(prompt))


class RequestsMachine(RuleBasedStateMachine):
    """Random begin, edits, accept, drafts and end; a second processor has one request at a time."""

    def __init__(self, make: Make, argument: Any, sizes: Sequence[int]):
        super().__init__()
        self.make = make
        self.argument = argument
        self.sizes = sizes
        self.states: dict[str, Any] = {}
        self.prompts: dict[str, Sequence[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.counter = 0

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.vocab_size = data.draw(st.sampled_from(self.sizes))
        self.processor, self.other = self.make(self.vocab_size), self.make(self.vocab_size)
        self.begin(seed=0)

    @precondition(lambda self: len(self.states) < 5)
    @rule(seed=st.integers(0, 3))
    def begin(self, seed: int) -> None:
        self.counter += 1
        name = f"request-{self.counter}"
        self.prompts[name], self.tokens[name] = _prompt(seed), []
        self.states[name] = _begin(self.processor, name, self.argument, _prompt(seed))

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        names = self._some(data)
        for name, effect in zip(names, self._edits(data, names), strict=True):
            _expect(
                effect,
                self._alone(name),
                "among other requests edits must be those of a request that is alone",
            )
            _check_allowed(effect, f"after {self.tokens[name]}")
            allowed = allowed_tokens(effect)
            token = allowed[data.draw(st.integers(0, 2**16)) % len(allowed)]
            self.processor.accept(self.states[name], token)
            self.tokens[name].append(token)

    @precondition(lambda self: self.states)
    @rule(data=st.data(), length=st.integers(1, 4))
    def drafts(self, data: st.DataObject, length: int) -> None:
        names = self._some(data)
        snapshots = {name: self.processor.snapshot(self.states[name]) for name in names}
        ids = st.integers(0, self.vocab_size - 1)
        for name in names:
            for token in data.draw(st.lists(ids, min_size=length, max_size=length)):
                self.processor.accept(self.states[name], token)
        for effect in self._edits(data, names):
            _check_allowed(effect, "after drafts")
        for name in names:
            self.processor.restore(self.states[name], snapshots[name])

    @precondition(lambda self: len(self.states) > 1)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        self.processor.end(self.states.pop(name))

    def _some(self, data: st.DataObject) -> list[str]:
        names = st.lists(st.sampled_from(sorted(self.states)), min_size=1, unique=True)
        return data.draw(names)

    def _edits(self, data: st.DataObject, names: Sequence[str]) -> list[Tensor]:
        rows = data.draw(st.permutations(range(len(names) + 2)))[: len(names)]
        places = [(row, self.states[n]) for row, n in zip(rows, names, strict=True)]
        return effects(self.processor, places, self.vocab_size)

    def _alone(self, name: str) -> Tensor:
        state = _begin(self.other, name, self.argument, self.prompts[name])
        for token in self.tokens[name]:
            self.other.accept(state, token)
        (found,) = effects(self.other, [(0, state)], self.vocab_size)
        self.other.end(state)
        return found


# --- the suite ------------------------------------------------------------------------------------


class LogitsProcessorSuite(PluginSuite):
    """Checks one logits processor against ``create_logits_processor`` and
    ``tilewright.types.LogitsProcessor``.

    Fixtures to give: ``plugin``; ``argument``, unless the plugin implements the hook
    sample_argument; ``wrong_arguments``, to check that they are refused; ``text``, if the processor
    needs a tokenizer of a certain kind; and ``options`` where needed.
    """

    kind: ClassVar[str] = "logits_processor"

    @pytest.fixture
    def argument(self, implementation: Implementation) -> Any:
        """An argument with which the processor changes logits, as a request gives it."""
        if not implementation.implements("sample_argument"):
            pytest.skip(
                "no argument to begin a request with: give the suite a fixture 'argument', or "
                "implement sample_argument"
            )
        return implementation.call("sample_argument")

    @pytest.fixture
    def wrong_arguments(self) -> Sequence[Any]:
        """Arguments that the processor must refuse. Without any, what it refuses is up to it."""
        return ()

    @pytest.fixture
    def text(self) -> TextAssets:
        """The tokenizer of the model: see ``byte_text``. Token 2 ends a text."""
        return byte_text()

    @pytest.fixture
    def sizes(self, text: TextAssets) -> Sequence[int]:
        """Vocabulary sizes: the tokenizer's, a multiple of 32, and one more than that."""
        size = text.tokenizer.get_vocab_size()
        padded = -(-size // 32) * 32
        return (size, padded, padded + 1)

    @pytest.fixture
    def make(self, implementation: Implementation, text: TextAssets, sizes: Sequence[int]) -> Make:
        """Makes a processor as an engine does."""
        from tilewright_testing.models import CONFIGS

        def make(vocab_size: int | None = None) -> LogitsProcessor:
            made: LogitsProcessor = implementation.call(
                "create_logits_processor",
                model_config=evolve(CONFIGS["plain"], vocab_size=vocab_size or sizes[0]),
                text=text,
                options=implementation.options,
            )
            return made

        return make

    @pytest.fixture
    def walks(self, make: Make, argument: Any, sizes: Sequence[int]) -> Sequence[Walk]:
        """Requests, each alone with a processor of its own."""
        return [walk(make(), argument, sizes[0], seed) for seed in range(_WALKS)]

    # --- edits -----------------------------------------------------------------------------------

    def test_it_changes_logits(self, walks: Sequence[Walk]) -> None:
        assert any(effect.any() for each in walks for effect in each.effects), (
            f"the processor changed nothing in {_WALKS} requests of {_STEPS} tokens, so that its "
            "mistakes cannot show: give the suite an argument with which it does"
        )

    def test_edits_fit_any_vocabulary(
        self, make: Make, argument: Any, sizes: Sequence[int]
    ) -> None:
        for size in sizes:
            for seed in range(_WALKS):
                walk(make(size), argument, size, seed)

    def test_edits_can_be_pickled(self, make: Make, argument: Any, sizes: Sequence[int]) -> None:
        processor = make()
        state = _begin(processor, "a", argument, _prompt(0))
        edits = processor.edits([(3, state)])
        try:
            again = pickle.loads(pickle.dumps(edits))
        except Exception as error:
            pytest.fail(
                f"edits must be picklable, since they may go to another process: {error}",
                pytrace=False,
            )
        check_edits(again, [3], sizes[0])

    def test_a_token_is_allowed_in_each_row(self, walks: Sequence[Walk]) -> None:
        for each in walks:
            for number, effect in enumerate(each.effects):
                _check_allowed(effect, f"after {each.tokens[:number]}")

    def test_edits_are_for_the_rows_that_were_given(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        for number, each in enumerate(walks):
            processor = make()
            state = _begin(processor, "a", argument, each.prompt)
            (found,) = effects(processor, [(_ROWS[number], state)], sizes[0])
            _expect(
                found, each.effects[0], f"row {_ROWS[number]} must get the edits that row 0 got"
            )

    def test_edits_do_not_change_states(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor = make()
        for each in walks:
            state = _begin(processor, "a", argument, each.prompt)
            for number, expected in enumerate(each.effects):
                for _ in range(3):
                    (found,) = effects(processor, [(number, state)], sizes[0])
                    _expect(found, expected, "edits() must not change a state: it is called again")
                if number < _STEPS:
                    processor.accept(state, each.tokens[number])
            processor.end(state)

    def test_edits_depend_on_the_prompt_and_the_accepted_tokens_only(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor = make()
        for each in walks:
            for number in (0, 1, _STEPS // 2, _STEPS):
                for name in ("same", f"other-{number}"):
                    state = _begin(processor, name, argument, each.prompt)
                    for token in each.tokens[:number]:
                        processor.accept(state, token)
                    (found,) = effects(processor, [(0, state)], sizes[0])
                    processor.end(state)
                    _expect(
                        found,
                        each.effects[number],
                        "edits must depend on the argument, the prompt and the accepted tokens "
                        "alone, not on the request's id, on earlier requests or on earlier edits",
                    )

    # --- several requests ------------------------------------------------------------------------

    def test_requests_do_not_affect_each_other(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor = make()
        _interleave([processor] * len(walks), argument, walks, sizes[0], "a request")

    def test_processors_do_not_affect_each_other(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processors = [make() for _ in walks]
        _interleave(processors, argument, walks, sizes[0], "a processor")

    def test_one_call_for_several_rows_is_one_call_for_each(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor = make()
        states = _begun(processor, argument, walks)
        for number in range(_STEPS + 1):
            found = effects(processor, list(zip(_ROWS, states, strict=True)), sizes[0])
            for effect, each in zip(found, walks, strict=True):
                _expect(
                    effect,
                    each.effects[number],
                    f"in one call for rows {_ROWS} each row must get the edits that it gets alone",
                )
            _accept_each(processor, states, walks, number)

    def test_the_order_of_rows_does_not_matter(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor, random = make(), Random(1)
        states = _begun(processor, argument, walks)
        for number in range(_STEPS + 1):
            rows, order = random.sample(range(50), _WALKS), random.sample(range(_WALKS), _WALKS)
            chosen = order[: random.randint(1, _WALKS)]
            found = effects(processor, [(rows[i], states[i]) for i in chosen], sizes[0])
            for i, effect in zip(chosen, found, strict=True):
                _expect(
                    effect,
                    walks[i].effects[number],
                    "a row must get the same edits at any place among the others",
                )
            _accept_each(processor, states, walks, number)

    # --- drafts ----------------------------------------------------------------------------------

    def test_restore_makes_a_state_what_it_was(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor, random = make(), Random(2)
        for each in walks:
            state = _begin(processor, "a", argument, each.prompt)
            for number, expected in enumerate(each.effects):
                wrong = [random.randrange(sizes[0]) for _ in range(3)]
                for drafts in (each.tokens[number:], wrong, wrong[:1]):
                    snapshot = processor.snapshot(state)
                    for token in drafts:
                        processor.accept(state, token)
                    processor.edits([(0, state)])
                    processor.restore(state, snapshot)
                    (found,) = effects(processor, [(0, state)], sizes[0])
                    _expect(
                        found,
                        expected,
                        "restore() must make a state what it was when the snapshot was taken",
                    )
                if number < _STEPS:
                    processor.accept(state, each.tokens[number])
            processor.end(state)

    def test_restore_undoes_drafts_of_several_requests(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor = make()
        states = _begun(processor, argument, walks)
        for number in range(_STEPS):
            for order in (1, -1):
                snapshots = [processor.snapshot(state) for state in states]
                _accept_each(processor, states, walks, number)
                found = effects(processor, list(zip(_ROWS, states, strict=True)), sizes[0])
                for effect, each in zip(found, walks, strict=True):
                    _expect(
                        effect,
                        each.effects[number + 1],
                        "edits after a draft must be those after an accepted token",
                    )
                for state, snapshot in list(zip(states, snapshots, strict=True))[::order]:
                    processor.restore(state, snapshot)
                found = effects(processor, list(zip(_ROWS, states, strict=True)), sizes[0])
                for effect, each in zip(found, walks, strict=True):
                    _expect(
                        effect,
                        each.effects[number],
                        "restore() must undo the drafts of each of several requests",
                    )
            _accept_each(processor, states, walks, number)

    def test_a_draft_may_be_any_token(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor = make(sizes[-1])
        state = _begin(processor, "a", argument, walks[0].prompt)
        for number in range(_STEPS):
            (expected,) = effects(processor, [(0, state)], sizes[-1])
            for token in (*range(0, sizes[-1], 7), *walks[0].tokens, sizes[-1] - 1):
                snapshot = processor.snapshot(state)
                for _ in range(2):
                    try:
                        processor.accept(state, token)
                    except Exception as error:
                        pytest.fail(
                            f"accept() must take any token, since drafts are not chosen by the "
                            f"masks, but raised {error!r} for token {token}",
                            pytrace=False,
                        )
                (found,) = effects(processor, [(0, state)], sizes[-1])
                _check_allowed(found, f"after the drafts {[token, token]}")
                processor.restore(state, snapshot)
            (found,) = effects(processor, [(0, state)], sizes[-1])
            _expect(found, expected, "restore() must undo any draft, also one that a mask forbids")
            processor.accept(state, walks[0].tokens[number])

    # --- begin and end ---------------------------------------------------------------------------

    def test_the_end_of_a_request_leaves_the_others(
        self, make: Make, argument: Any, walks: Sequence[Walk], sizes: Sequence[int]
    ) -> None:
        processor = make()
        states = dict(enumerate(_begun(processor, argument, walks)))
        for number in range(_STEPS):
            for i, state in states.items():
                (found,) = effects(processor, [(i, state)], sizes[0])
                _expect(found, walks[i].effects[number], "end() must leave other requests alone")
                processor.accept(state, walks[i].tokens[number])
            if number in states and len(states) > 1:
                processor.end(states.pop(number))

    def test_requests_that_have_ended_are_forgotten(
        self, make: Make, argument: Any, walks: Sequence[Walk]
    ) -> None:
        processor, each = make(), walks[0]

        def memory_after(name: str) -> int:
            """Bytes that Python holds after some requests; torch's and others' are not counted."""
            for number in range(_REQUESTS):
                state = _begin(processor, f"{name}-{number}", argument, each.prompt)
                for token in each.tokens[:2]:
                    processor.edits([(0, state)])
                    processor.restore(state, processor.snapshot(state))
                    processor.accept(state, token)
                processor.end(state)
                del state
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        traced = tracemalloc.is_tracing()
        tracemalloc.start()
        try:
            held = [memory_after(name) for name in "abcde"]
        finally:
            if not traced:
                tracemalloc.stop()
        # What is kept for requests is kept each time, unlike what others of the process keep.
        kept = min(after - before for before, after in itertools.pairwise(held))
        assert kept < _KEPT_BYTES * _REQUESTS, (
            f"end() must free what was kept for a request, but {_REQUESTS} requests that ended "
            f"left {kept} bytes, expected below {_KEPT_BYTES * _REQUESTS}"
        )

    def test_an_argument_is_taken_or_refused(
        self, make: Make, argument: Any, wrong_arguments: Sequence[Any], sizes: Sequence[int]
    ) -> None:
        processor, messages = make(), []
        for value in (*_ODD, *wrong_arguments):
            wrong = any(value is one for one in wrong_arguments)
            try:
                if isinstance(processor, PreparingProcessor):
                    processor.prepare(value)
                state = processor.begin("odd", value, _prompt(0))
            except RequestError as error:
                messages.append(str(error))
                continue
            except Exception as error:
                pytest.fail(
                    "prepare() and begin() must take an argument or raise RequestError, but for "
                    f"{value!r:.100} it raised {error!r:.200}",
                    pytrace=False,
                )
            assert not wrong, f"begin() must raise RequestError for {value!r:.100}, but took it"
            _check_allowed(
                effects(processor, [(0, state)], sizes[0])[0], f"with the argument {value!r:.100}"
            )
            processor.end(state)
        for message in messages:
            assert len(message.splitlines()) == 1, (
                f"a RequestError must have a message of one line, found {message!r}"
            )
        processor.end(_begin(processor, "right", argument, _prompt(0)))

    def test_prompts_and_arguments_are_not_changed(
        self, make: Make, argument: Any, walks: Sequence[Walk]
    ) -> None:
        processor, each = make(), walks[0]
        prompt, given = list(each.prompt), copy.deepcopy(argument)
        state = processor.begin("a", given, prompt)
        for token in each.tokens:
            processor.edits([(0, state)])
            processor.accept(state, token)
        processor.end(state)
        assert prompt == each.prompt, "the processor must not change prompt_token_ids"
        assert given == argument or argument != copy.deepcopy(argument), (
            f"the processor must not change its argument, {argument!r:.100}, found {given!r:.100}"
        )

    def test_the_process_is_left_unchanged(
        self, make: Make, argument: Any, sizes: Sequence[int]
    ) -> None:
        with left_alone("a logits processor"):
            walk(make(), argument, sizes[0], 0)

    # --- all together ----------------------------------------------------------------------------

    def test_random_calls_agree_with_requests_alone(
        self, make: Make, argument: Any, sizes: Sequence[int]
    ) -> None:
        run_random_calls(lambda: RequestsMachine(make, argument, sizes), max_examples=40, calls=25)


def _begun(processor: LogitsProcessor, argument: Any, walks: Sequence[Walk]) -> list[Any]:
    """The state of a new request for each walk."""
    return [_begin(processor, f"r{i}", argument, each.prompt) for i, each in enumerate(walks)]


def _accept_each(
    processor: LogitsProcessor, states: Sequence[Any], walks: Sequence[Walk], number: int
) -> None:
    """Each request accepts the token of this number of its walk; none after the last."""
    for state, each in zip(states, walks, strict=True):
        for token in each.tokens[number : number + 1]:
            processor.accept(state, token)


def _interleave(
    processors: Sequence[LogitsProcessor],
    argument: Any,
    walks: Sequence[Walk],
    vocab_size: int,
    what: str,
) -> None:
    """Take the walks at the same time, each with its processor, and one call for each row."""
    states = [
        _begin(processor, f"request-{i}", argument, each.prompt)
        for i, (processor, each) in enumerate(zip(processors, walks, strict=True))
    ]
    order = list(enumerate(walks))
    for number in range(_STEPS + 1):
        for i, each in order:
            (found,) = effects(processors[i], [(0, states[i])], vocab_size)
            _expect(found, each.effects[number], f"{what} must not be affected by others")
            for token in each.tokens[number : number + 1]:
                processors[i].accept(states[i], token)
        order.reverse()
