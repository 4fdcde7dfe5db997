"""The suite of logits processors finds each of these broken ones, by the test meant for it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from attrs import define, evolve, field
from conformance import Fault, full_name, missed, run
from torch import Tensor

from tilewright import hookimpl
from tilewright.errors import RequestError
from tilewright.logits_processing import FORBIDDEN, Place, Processing, edited
from tilewright.types import LogitsEdits, LogitsProcessor, ModelConfig, PluginInfo
from tilewright_testing import LogitsProcessorSuite
from tilewright_testing.logits_processor import byte_text, check_edits, effects

EOS = 2
PATHS = [[40, 41, 40, 42], [40, 43, 263, 44, 45], [50] * 7, [60], [61, 62, 60, 64, 65, 66]]
"""Outputs that are allowed: tokens in a row, then the end of sequence."""


def packed(allowed: Tensor) -> Tensor:
    """Masks [rows, words] int32 of booleans [rows, vocab_size]."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32))
    bits = padded.view(len(allowed), -1, 32).long() << torch.arange(32)
    return bits.sum(-1).to(torch.int32)


@define(eq=False)
class State:
    request_id: str
    paths: list[list[int]]
    accepted: list[int] = field(factory=list)


class Right:
    """Allows the tokens of some paths, and makes tokens likelier each time they are accepted."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        try:
            paths = [[int(i) for i in path] for path in argument]
        except (TypeError, ValueError) as error:
            raise RequestError("expected lists of token ids") from error
        return State(request_id, paths)

    def allowed(self, state: State) -> list[int]:
        done = len(state.accepted)
        return [p[done] for p in state.paths if p[:done] == state.accepted and p[done:]] or [EOS]

    def added(self, state: State) -> Mapping[int, float]:
        return {i: 0.5 * count for i, count in Counter(state.accepted).items()}

    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        allowed = torch.zeros(len(rows), self.vocab_size, dtype=torch.bool)
        for mask, (_, state) in zip(allowed, rows, strict=True):
            mask[self.allowed(state)] = True
        added = [(row, i, x) for row, state in rows for i, x in self.added(state).items()]
        return LogitsEdits(
            mask_rows=torch.tensor([row for row, _ in rows]),
            masks=packed(allowed),
            added_rows=torch.tensor([row for row, _, _ in added], dtype=torch.int64),
            added_token_ids=torch.tensor([i for _, i, _ in added], dtype=torch.int64),
            added=torch.tensor([x for _, _, x in added], dtype=torch.float32),
        )

    def accept(self, state: Any, token_id: int) -> None:
        state.accepted.append(token_id)

    def snapshot(self, state: Any) -> Any:
        return list(state.accepted)

    def restore(self, state: Any, snapshot: Any) -> None:
        state.accepted[:] = snapshot

    def end(self, state: Any) -> None:
        state.accepted.clear()


class Processors:
    """A plugin that makes logits processors in some way."""

    tilewright_api = 2

    def __init__(self, make: Callable[[int], LogitsProcessor], argument: Any = PATHS):
        self.make = make
        self.argument = argument

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="changes logits")

    @hookimpl
    def create_logits_processor(self, model_config: ModelConfig) -> LogitsProcessor:
        return self.make(model_config.vocab_size)

    @hookimpl
    def sample_argument(self) -> Any:
        return self.argument


# --- edits ----------------------------------------------------------------------------------------


def changed(change: Callable[[LogitsEdits], Any]) -> type[Right]:
    """One with other edits."""

    class Changed(Right):
        def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
            edits = super().edits(rows)
            assert edits is not None
            result: LogitsEdits | None = change(edits)
            return result

    return Changed


def evolved(**changes: Callable[[LogitsEdits], Any]) -> type[Right]:
    """One with other fields of edits."""
    return changed(lambda e: evolve(e, **{name: make(e) for name, make in changes.items()}))


def unpacked(edits: LogitsEdits) -> Tensor:
    masks = edits.masks
    assert masks is not None
    return ((masks.unsqueeze(-1) >> torch.arange(32)) & 1).flatten(1)


def in_a_class_of_its_own(edits: LogitsEdits) -> LogitsEdits:
    class Own(LogitsEdits):
        pass

    return Own(mask_rows=edits.mask_rows, masks=edits.masks)


class MasksOnlyWholeWords(Right):
    """Rounds the number of words down."""

    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        edits = super().edits(rows)
        assert edits is not None
        assert edits.masks is not None
        return evolve(edits, masks=edits.masks[:, : self.vocab_size // 32])


class CountsRowsFromZero(Right):
    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        return super().edits([(i, state) for i, (_, state) in enumerate(rows)])


class EditsRowZero(Right):
    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        return super().edits([(0, rows[0][1]), *rows[1:]])


class EditsTheFirstRow(Right):
    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        return super().edits(rows[:1])


class SortsRows(Right):
    """Sorts the rows, but not the states."""

    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        numbers = sorted(row for row, _ in rows)
        return super().edits([(n, state) for n, (_, state) in zip(numbers, rows, strict=True)])


class ChangesNothing(Right):
    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        return None


class ForbidsAllAtTheEnd(Right):
    def allowed(self, state: State) -> list[int]:
        return [i for i in super().allowed(state) if i != EOS]


class ForbidsAllAfterAMistake(Right):
    def allowed(self, state: State) -> list[int]:
        accepted = [i for i in state.accepted if i != EOS]
        right = any(path[: len(accepted)] == accepted for path in state.paths)
        return super().allowed(state) if right else []


# --- states ---------------------------------------------------------------------------------------


class MovesOnInEdits(Right):
    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        found = super().edits(rows)
        for _, state in rows:
            state.paths.append(state.paths.pop(0))
            state.paths.pop()
            state.paths.append([70])
        return found


class OneStateForAll(Right):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.accepted: list[int] = []

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        return evolve(super().begin(request_id, argument, prompt_token_ids), accepted=self.accepted)


class OneStateForAllProcessors(Right):
    """Keeps states by request id in the class."""

    accepted: dict[str, list[int]] = {}  # noqa: RUF012

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        kept = self.accepted.setdefault("".join(filter(str.isalpha, request_id)), [])
        return evolve(super().begin(request_id, argument, prompt_token_ids), accepted=kept)


class GoesByTheRequestId(Right):
    def added(self, state: State) -> Mapping[int, float]:
        return {40: float(len(state.request_id))}


class NeedsEdits(Right):
    """Accepts only tokens for which it has made edits."""

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        state = super().begin(request_id, argument, prompt_token_ids)
        state.paths = [*state.paths, ["edited"]]
        return state

    def allowed(self, state: State) -> list[int]:
        state.paths[-1] = ["edited"]  # type: ignore[list-item]
        return super().allowed(evolve(state, paths=state.paths[:-1]))

    def accept(self, state: Any, token_id: int) -> None:
        if state.paths[-1]:
            super().accept(state, token_id)
        state.paths[-1] = []


class RemembersRequests(Right):
    """Begins where an earlier request of the same id ended."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.kept: dict[str, list[int]] = {}

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        state = super().begin(request_id, argument, prompt_token_ids)
        state.accepted[:] = self.kept.pop(request_id, [])
        return state

    def end(self, state: Any) -> None:
        self.kept[state.request_id] = list(state.accepted)


class KeepsEnded(Right):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.states: list[State] = []

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        self.states.append(super().begin(request_id, argument, prompt_token_ids))
        return self.states[-1]


class KeepsIds(Right):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.ended: set[str] = set()

    def end(self, state: Any) -> None:
        self.ended.add(state.request_id)


class EndsAll(KeepsEnded):
    def end(self, state: Any) -> None:
        for each in self.states:
            each.accepted.clear()
        self.states.clear()


# --- drafts ---------------------------------------------------------------------------------------


class ForgetsRestore(Right):
    def restore(self, state: Any, snapshot: Any) -> None: ...


class SnapshotsTheStateItself(Right):
    def snapshot(self, state: Any) -> Any:
        return state.accepted


class RestoresTheCountOnly(Right):
    def restore(self, state: Any, snapshot: Any) -> None:
        del state.accepted[: len(state.accepted) - len(snapshot)]


class OneSnapshot(Right):
    saved: Sequence[int] = ()

    def snapshot(self, state: Any) -> Any:
        self.saved = list(state.accepted)

    def restore(self, state: Any, snapshot: Any) -> None:
        state.accepted[:] = self.saved


class IgnoresDrafts(Right):
    """Does not accept tokens between snapshot and restore."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.drafting = 0

    def snapshot(self, state: Any) -> Any:
        self.drafting += 1

    def restore(self, state: Any, snapshot: Any) -> None:
        self.drafting -= 1

    def accept(self, state: Any, token_id: int) -> None:
        if not self.drafting:
            super().accept(state, token_id)


class RefusesMistakes(Right):
    def accept(self, state: Any, token_id: int) -> None:
        if token_id not in self.allowed(state):
            raise ValueError(f"token {token_id} is not allowed")
        super().accept(state, token_id)


class DropsMistakes(Right):
    """Takes back one accepted token too many for each mistake."""

    def accept(self, state: Any, token_id: int) -> None:
        if token_id in self.allowed(state):
            super().accept(state, token_id)
        else:
            state.paths = [[token_id]]


# --- arguments ------------------------------------------------------------------------------------


class Takes(Right):
    """Takes arguments in some way."""

    def paths(self, argument: Any) -> list[list[int]]:
        return [list(path) for path in argument]

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        return State(request_id, self.paths(argument))


class RefusesInTwoLines(Takes):
    def paths(self, argument: Any) -> list[list[int]]:
        if argument != PATHS:
            raise RequestError("expected paths\nfound others")
        return PATHS


class TakesAnything(Takes):
    def paths(self, argument: Any) -> list[list[int]]:
        return argument if argument in (PATHS, [[1, 2]]) else []


class ChangesItsArgument(Right):
    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        state = super().begin(request_id, argument, prompt_token_ids)
        argument.clear()
        return state


class AddsToThePrompt(Right):
    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        state = super().begin(request_id, argument, prompt_token_ids)
        state.request_id = prompt_token_ids
        return state

    def accept(self, state: Any, token_id: int) -> None:
        super().accept(state, token_id)
        state.request_id.append(token_id)


class SeedsTorch(Right):
    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        torch.manual_seed(len(prompt_token_ids))
        return super().begin(request_id, argument, prompt_token_ids)


# --- what only a random walk finds ----------------------------------------------------------------


class ReusesStates(Right):
    """Does not clear a state that is used again, once three have ended."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.free: list[State] = []

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        if len(self.free) < 3:
            return super().begin(request_id, argument, prompt_token_ids)
        return self.free.pop()

    def end(self, state: Any) -> None:
        self.free = [*self.free, state][-3:]


_FORMAT = "edits_fit_any_vocabulary"
_ARGUMENT = "an_argument_is_taken_or_refused"
_ALONE = "edits_depend_on_the_prompt_and_the_accepted"

# name, class of its processors, test that fails, words of the failure
_FAULTS: list[tuple[str, Any, str, str]] = [
    ("gives a dict", changed(lambda e: {"masks": e.masks}), _FORMAT, "LogitsEdits or None"),
    ("masks in int64", evolved(masks=lambda e: e.masks.long()), _FORMAT, "masks must .* int32"),
    ("masks in bool", evolved(masks=lambda e: unpacked(e).bool()), _FORMAT, r"\[1, 9\] for 264"),
    ("masks one word short", MasksOnlyWholeWords, _FORMAT, r"\[1, 9\] for 264 .* found \[1, 8\]"),
    ("rows in int32", evolved(mask_rows=lambda e: e.mask_rows.int()), _FORMAT, "mask_rows must"),
    ("one mask for all rows", evolved(masks=lambda e: e.masks[0]), _FORMAT, r"found \[9\]"),
    ("masks without rows", evolved(mask_rows=lambda e: None), _FORMAT, "or none, found masks"),
    (
        "masks a row twice",
        evolved(mask_rows=lambda e: e.mask_rows.repeat(2), masks=lambda e: e.masks.repeat(2, 1)),
        _FORMAT,
        "name a row once",
    ),
    ("adds in float64", evolved(added=lambda e: e.added.double()), _FORMAT, "added must .*float32"),
    ("adds infinity", evolved(added=lambda e: e.added * 1e39), _FORMAT, "must be finite"),
    (
        "adds to tokens that are none",
        evolved(added_token_ids=lambda e: e.added_token_ids + 260),
        _FORMAT,
        "must be 0 to 263",
    ),
    (
        "adds too few numbers",
        evolved(added=lambda e: e.added[1:]),
        _FORMAT,
        r"added must be \[1\]",
    ),
    ("cannot be pickled", changed(in_a_class_of_its_own), "edits_can_be_pickled", "picklable"),
    ("changes nothing", ChangesNothing, "it_changes_logits", "give the suite an argument"),
    ("forbids all at the end", ForbidsAllAtTheEnd, "a_token_is_allowed_in", "forbids all after"),
    ("numbers rows from 0", CountsRowsFromZero, "edits_are_for_the_rows", r"found \[0\]"),
    ("edits row 0", EditsRowZero, "edits_are_for_the_rows", r"\[11\], found \[0\]"),
    (
        "edits the first row only",
        EditsTheFirstRow,
        "one_call_for_several_rows",
        "each row must get the edits",
    ),
    ("sorts rows without states", SortsRows, "one_call_for_several_rows", "each row must"),
    ("sorts rows without states", SortsRows, "the_order_of_rows_does", "at any place"),
    ("changes states in edits", MovesOnInEdits, "edits_do_not_change_states", "called again"),
    ("has one state for all", OneStateForAll, "requests_do_not_affect", "affected by others"),
    (
        "has one state for all processors",
        OneStateForAllProcessors,
        "processors_do_not_affect",
        "affected by others",
    ),
    ("goes by the request id", GoesByTheRequestId, _ALONE, "not on the request's id"),
    ("needs edits before it accepts", NeedsEdits, _ALONE, "or on earlier edits"),
    ("remembers requests", RemembersRequests, _ALONE, "on earlier requests"),
    ("keeps ended states", KeepsEnded, "requests_that_have_ended", "ended left .* bytes"),
    ("keeps ids of ended requests", KeepsIds, "requests_that_have_ended", "ended left .* bytes"),
    ("ends all requests", EndsAll, "the_end_of_a_request_leaves", "leave other requests alone"),
    ("forgets restore", ForgetsRestore, "restore_makes_a_state", "must make a state what"),
    ("gives the state as snapshot", SnapshotsTheStateItself, "restore_makes_a_state", "must make"),
    ("restores the count only", RestoresTheCountOnly, "restore_makes_a_state", "must make"),
    ("has one snapshot", OneSnapshot, "restore_undoes_drafts_of_several", "each of several"),
    ("ignores drafts", IgnoresDrafts, "restore_undoes_drafts_of_several", "after an accepted"),
    ("refuses mistakes", RefusesMistakes, "a_draft_may_be_any_token", "must take any token"),
    (
        "forbids all after a mistake",
        ForbidsAllAfterAMistake,
        "a_draft_may_be_any_token",
        "forbids all after the drafts",
    ),
    ("does not restore mistakes", DropsMistakes, "a_draft_may_be_any_token", "undo any draft"),
    ("fails for a wrong argument", Takes, _ARGUMENT, "for None it raised TypeError"),
    ("refuses in two lines", RefusesInTwoLines, _ARGUMENT, "a message of one line"),
    ("takes anything", TakesAnything, _ARGUMENT, r"RequestError for \[\[1, 2\]\], but took it"),
    ("changes its argument", ChangesItsArgument, "prompts_and_arguments", "change its argument"),
    ("adds to the prompt", AddsToThePrompt, "prompts_and_arguments", "change prompt_token_ids"),
    ("seeds torch", SeedsTorch, "the_process_is_left_unchanged", "torch's random state"),
    ("reuses states", ReusesStates, "random_calls_agree", "among other requests"),
]

SUITE = LogitsProcessorSuite
WRONG = {"wrong_arguments": [[[1, 2]]]}


FAULTS = [
    Fault(
        name,
        Processors(make),
        full_name(SUITE, test),
        fixtures=WRONG if test == _ARGUMENT else {},
        why=why,
    )
    for name, make, test, why in _FAULTS
]


def test_each_broken_processor_is_found() -> None:
    assert missed(SUITE, FAULTS) == []


class RefusesSome(Right):
    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        state = super().begin(request_id, argument, prompt_token_ids)
        if state.paths == [[1, 2]]:
            raise RequestError("expected other paths")
        return state


class RefusesSomeAndAddsOnly(RefusesSome):
    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        edits = super().edits(rows)
        assert edits is not None
        if not any(state.accepted for _, state in rows):
            return None
        return evolve(edits, mask_rows=None, masks=None)


def test_a_right_processor_passes() -> None:
    outcome = run(SUITE, Processors(RefusesSomeAndAddsOnly), **WRONG)
    assert outcome.failed == [], outcome.why


def test_without_an_argument_the_tests_are_not_run_and_say_why() -> None:
    class Silent(Processors):
        sample_argument = None  # type: ignore[assignment]

    outcome = run(SUITE, Silent(Right))
    assert outcome.failed == []
    assert outcome.found[full_name(SUITE, "random_calls")] == "skipped"
    assert outcome.found[full_name(SUITE, "it_describes_itself")] == "passed"


# --- the suite's own reading of edits -------------------------------------------------------------


def test_the_effect_of_edits_is_that_on_an_engines_logits() -> None:
    processor = Right(264)
    states = [processor.begin(f"r{i}", PATHS, []) for i in range(3)]
    for i, state in enumerate(states):
        for token in PATHS[i][:i]:
            processor.accept(state, token)
    found = effects(processor, list(zip((4, 0, 2), states, strict=True)), 264)
    logits = torch.randn(5, 264, generator=torch.Generator().manual_seed(0))
    places = [
        Place(row, [Processing("p", processor, state)], ())
        for row, state in zip((4, 0, 2), states, strict=True)
    ]
    changed = edited(logits, places)
    for row, effect in zip((4, 0, 2), found, strict=True):
        allowed = effect.isfinite()
        assert torch.equal(changed[row] == FORBIDDEN, ~allowed)
        torch.testing.assert_close(
            changed[row][allowed].double(), logits[row][allowed] + effect[allowed]
        )


def test_any_text_can_be_encoded_with_the_suites_tokenizer() -> None:
    tokenizer = byte_text().tokenizer
    assert tokenizer.get_vocab_size() == 264
    for text in ("hello world", "日本 \n\t{}", "yes"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id("<|im_end|>") == EOS


def test_edits_of_other_devices_are_refused() -> None:
    edits = LogitsEdits(
        mask_rows=torch.zeros(1, dtype=torch.int64),
        masks=torch.zeros(1, 9, dtype=torch.int32, device="meta"),
    )
    with pytest.raises(AssertionError, match=r"masks must be .* on the CPU, found .* on meta"):
        check_edits(edits, [0], 264)
