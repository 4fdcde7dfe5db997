"""Plugin ``structured-output``: a text by a JSON schema, a regular expression or a grammar.

Grammars are llguidance's (https://github.com/guidance-ai/llguidance), whose vocabulary is made here
of the bytes that tokens add to a text, so that what it allows is what the text will be. The model
chooses among all tokens that are allowed, by its own probabilities. Only where nothing but the text
of an added token, such as ``<tool_call>``, can follow is that token the only one, since the
tokenizer never spells it in any other way.

White space in JSON, wherever JSON has it, is nothing, one space, or a line break and at most 32
spaces or tabs: what models write, compact or indented, without the endless blank lines that small
models fall into where any white space is allowed.
"""

import json
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define, field, frozen

from tilewright import hookimpl
from tilewright.errors import RequestError, listed, on_one_line, shortened
from tilewright.text import Text
from tilewright.types import LogitsEdits, LogitsProcessor, ModelConfig, PluginInfo, TextAssets
from tilewright_guidance.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray

tilewright_api = 2

JSON_OPTIONS: Mapping[str, Any] = {"whitespace_pattern": r" |\n[ \t]{0,32}"}
"""The white space of JSON, unless a schema has its own ``x-guidance``
(https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md)."""

_STRICT = {"lenient": False, "coerce_one_of": False}
"""No schema may ask for its keywords to be ignored."""

_NO_WORD = b"\xff<no text>"
"""What tokens add that are never allowed: for llguidance a special token (TokTrie's marker), since
a grammar that names one fails with a clear error only where there is any."""

_CACHED = 32
"""How many grammars are kept compiled."""

_MOST_CHARACTERS = 2**17
"""Size limit of a grammar: the time to compile one grows with the square of its length."""

_STACK_BYTES = 2**29
"""Stack size of the thread that compiles: llguidance follows references by recursion, with up to
8 KiB for each one, and ends the process where the stack ends. Only what is used takes memory."""

_MOST_SECONDS = 10.0
"""Time limit for compiling a grammar: for some, such as the texts that match each of many patterns,
it takes exponentially long."""

_threads = threading.Lock()


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="a text by a JSON schema, a regular expression, a list of choices or a grammar",
        limits={
            "argument": f"a mapping with one of the keys {', '.join(_GRAMMARS)}; a flag gives it "
            "in JSON",
            "needs": "llguidance: pip install 'tilewright[guidance]'",
        },
    )


@hookimpl
def create_logits_processor(model_config: ModelConfig, text: TextAssets) -> LogitsProcessor:
    return StructuredOutputProcessor(Text(text), model_config)


@hookimpl
def sample_argument() -> dict[str, Any]:
    return {"regex": "(yes|no|[0-9]{2,4}), (hello|world)"}


@define(eq=False)
class State:
    start: "LLMatcher"
    """The matcher before the text, shared by all requests of its grammar."""
    matcher: "LLMatcher"
    words: list[int] = field(factory=list)
    """What the matcher has consumed."""
    begun: bool = False
    """Whether the text has a token."""
    ended: bool = False
    lost: bool = False
    """Whether a draft was not allowed; the matcher has not consumed it."""


@frozen
class Snapshot:
    consumed: int
    begun: bool
    ended: bool
    lost: bool


class StructuredOutputProcessor:
    """A ``PreparingProcessor`` (see tilewright.types)."""

    def __init__(self, text: Text, config: ModelConfig):
        """Raises RequestError if llguidance is not installed, and as ``read_vocabulary`` does."""
        try:
            import llguidance
            from llguidance.numpy import fill_next_token_bitmask
        except ImportError as error:
            raise RequestError(
                f"structured-output needs llguidance, which cannot be imported ({error}): "
                "pip install 'tilewright[guidance]'"
            ) from error
        self._llguidance, self._fill = llguidance, fill_next_token_bitmask
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        size = self._vocab_size = config.vocab_size
        ends = dict.fromkeys((*config.eos_token_ids, *text.assets.turn_end_ids))
        self._ends = [i for i in ends if i < size]
        # Only a chat's answer ends with one of turn_end_ids: elsewhere another end must follow.
        self._last = [i for i in self._ends if i in config.eos_token_ids] or self._ends
        self._words = _read_words(text, size, self._ends)
        if self._ends:
            wrapper = llguidance.TokenizerWrapper(_Tokens(self._words.texts, self._ends[0]))
            self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=self._ends)
        # Many requests give the same schema.
        self._compiled = lru_cache(_CACHED)(self._compile)

    def prepare(self, argument: Any) -> None:
        """Compile a grammar, which can take seconds."""
        if self._ends:  # else begin says why there can be no grammar
            self._compiled(grammar_of(argument))

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> State:
        if not self._ends:
            raise RequestError(
                "structured-output: the model's files name no token that ends a text, so a text "
                "would not end where its grammar does: set eos_token_id there"
            )
        start = self._compiled(grammar_of(argument))
        return State(start, start.deep_copy())

    def edits(self, rows: Sequence[tuple[int, State]]) -> LogitsEdits:
        masks = np.zeros((len(rows), -(-self._vocab_size // 32)), dtype=np.int32)
        for mask, (_, state) in zip(masks, rows, strict=True):
            self._allow(mask, state)
        numbers = torch.tensor([row for row, _ in rows], dtype=torch.int64)
        return LogitsEdits(mask_rows=numbers, masks=torch.from_numpy(masks))

    def accept(self, state: State, token_id: int) -> None:
        """Raises RequestError for an end that had to be allowed, since llguidance gave up."""
        if state.ended or state.lost:
            return
        if token_id in self._ends:
            state.ended = state.matcher.is_accepting()
            state.lost = not state.ended
            if state.lost and self._mask(state.matcher, state.begun) is None:
                # All matchers of a grammar share what has reached its limit.
                self._compiled.cache_clear()
                raise _refused(f"no token can go on with the text ({_reason(state.matcher)})")
            return
        word = self._words.of_token(token_id, state.begun)
        if word is not None:
            allowed = state.matcher.validate_tokens([word]) == 1
            if not allowed or not state.matcher.consume_token(word):
                state.lost = True
                return
            state.words.append(word)
        state.begun = True

    def snapshot(self, state: State) -> Snapshot:
        return Snapshot(len(state.words), state.begun, state.ended, state.lost)

    def restore(self, state: State, snapshot: Snapshot) -> None:
        drafts = len(state.words) - snapshot.consumed
        del state.words[snapshot.consumed :]
        if state.matcher.is_error() or not state.matcher.rollback(drafts):
            state.matcher = state.start.deep_copy()
            state.matcher.consume_tokens(state.words)
        state.begun, state.ended, state.lost = snapshot.begun, snapshot.ended, snapshot.lost

    def end(self, state: State) -> None:
        """A state is freed with its request."""

    def _compile(self, grammar: str) -> "LLMatcher":
        """A matcher before a text. Raises RequestError for a grammar that cannot be served."""
        if len(grammar) > _MOST_CHARACTERS:
            raise _refused(
                f"expected a grammar of at most {_MOST_CHARACTERS} characters, found "
                f"{len(grammar)}: ask for less"
            )
        return _compiled_apart(lambda: self._matcher(grammar))

    def _matcher(self, grammar: str) -> "LLMatcher":
        # Forced bytes would be tokenized again in each step, of which a grammar can have millions.
        text = grammar + '\n%llguidance {"no_forcing": true}'
        try:
            text = self._llguidance.LLMatcher.grammar_from_lark(text)
        except UnicodeError as error:
            raise _refused(f"expected valid Unicode, found a lone surrogate ({error})") from error
        matcher = self._llguidance.LLMatcher(
            self._tokenizer, text, log_level=0, limits=self._limits
        )
        if matcher.is_error():
            raise _refused(_reason(matcher))
        if self._mask(matcher, begun=False) is None:
            raise _refused(
                f"no text of the model's tokens is what it describes ({_reason(matcher)})"
            )
        return matcher

    def _mask(self, matcher: "LLMatcher", begun: bool) -> "NDArray[np.int32] | None":
        """Which words may be next, 32 in a number; None if none may or a limit was reached."""
        mask = np.zeros((1, -(-len(self._words.texts) // 32)), dtype=np.int32)
        self._fill(matcher, mask, 0)
        # A grammar can name any token's id, and not every word is a token's in every place.
        words = mask[0] & (self._words.later_words if begun else self._words.first_words)
        return words if words.any() and not matcher.is_error() else None

    def _allow(self, mask: "NDArray[np.int32]", state: State) -> None:
        """Set which tokens may be next. Where none may, an end may, which ``accept`` refuses."""
        words = None
        if not state.ended and not state.lost:
            words = self._mask(state.matcher, state.begun)
        if words is None:
            mask[:] = _packed(self._last if state.ended else self._ends, self._vocab_size)
        elif (forced := self._forced(words, state)) is not None:
            mask[:] = _packed([forced], self._vocab_size)
        elif state.begun and self._words.tokens_are_words:
            mask[:] = words[: len(mask)]
        else:
            bits = _unpacked(words)
            allowed = bits[self._words.later if state.begun else self._words.first]
            if not state.begun:
                bits[self._ends] = False
                allowed[self._words.silent] = bits[self._words.later].any()
            mask[:] = _packed(np.flatnonzero(allowed).tolist(), self._vocab_size)

    def _forced(self, words: "NDArray[np.int32]", state: State) -> int | None:
        """The added token whose text has to follow, if there is one."""
        texts = self._words.texts
        of = [(i, int(self._words.later[i])) for i in self._words.added]
        tokens = [i for i, word in of if words[word // 32] >> (word % 32) & 1]
        if not tokens:
            return None
        token = max(tokens, key=lambda i: len(self._words.text(i)))
        # What could follow in its place shows if its text is written in the smallest steps.
        rest, ahead, possible = self._words.text(token), None, words
        while True:
            allowed = np.flatnonzero(_unpacked(possible)).tolist()
            if not all(_agree(texts[i], rest) for i in allowed):
                return None
            step = min(allowed, key=lambda i: len(texts[i]))
            rest = rest[len(texts[step]) :]
            if not rest:
                return token
            ahead = ahead or state.matcher.deep_copy()
            ahead.consume_token(step)
            following = self._mask(ahead, begun=True)
            if following is None:
                return None
            possible = following


def _compiled_apart(make: "Callable[[], LLMatcher]") -> "LLMatcher":
    """What a function returns or raises, in a thread with a stack of ``_STACK_BYTES``.

    Raises RequestError after ``_MOST_SECONDS``. Then the thread goes on, as nothing can end it.
    """
    made: Future[LLMatcher] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    with _threads:  # the size is a setting of the process
        usual = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=work, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(usual)
    try:
        return made.result(_MOST_SECONDS)
    except TimeoutError as error:
        raise _refused(
            f"its grammar is not compiled after {_MOST_SECONDS:g} seconds: ask for less, such as "
            "fewer patterns for one text"
        ) from error


def _agree(one: bytes, other: bytes) -> bool:
    """Whether one of them, which is not empty, begins with the other."""
    return bool(one) and (one.startswith(other) or other.startswith(one))


# --- a vocabulary as llguidance reads it ----------------------------------------------------------


@frozen(eq=False)
class Words:
    """The different strings of bytes that tokens add to a text: llguidance allows only one token
    for each. Word i is what token i adds after another token, unless an earlier token adds it."""

    texts: Sequence[bytes]
    """The bytes of each word; empty for a token that is not one."""
    later: "NDArray[np.int64]"
    """[vocab_size] the word of each token after another one"""
    first: "NDArray[np.int64]"
    """[vocab_size] the word of each token at the beginning of a text"""
    later_words: "NDArray[np.int32]"
    """[ceil(words / 32)] bit i of number w: whether a token adds word 32 * w + i, or is it and ends
    a text, after another token"""
    first_words: "NDArray[np.int32]"
    """The same at the beginning, where a token may add nothing and another one follow."""
    tokens_are_words: bool
    """Whether each token that adds something after another one is the only one that adds it."""
    silent: Sequence[int]
    """Tokens that add nothing at the beginning."""
    added: Sequence[int]
    """Tokens that the tokenizer takes wherever their text occurs."""

    def text(self, token_id: int) -> bytes:
        """What a token adds after another one."""
        return self.texts[int(self.later[token_id])]

    def of_token(self, token_id: int, begun: bool) -> int | None:
        """The word of a token, or None for one that adds nothing here."""
        if not begun and token_id in self.silent:
            return None
        return int((self.later if begun else self.first)[token_id])


def _read_words(text: Text, size: int, ends: Sequence[int]) -> Words:
    """Raises RequestError as ``read_vocabulary`` does."""
    vocabulary = read_vocabulary(text, size, ends)
    words = [b""] * size + [_NO_WORD]
    number: dict[bytes, int] = {}
    for i, of in vocabulary.later.bytes_of.items():
        if number.setdefault(of, i) == i:
            words[i] = of
    later = np.full(size, words.index(_NO_WORD))
    later[list(ends)] = list(ends)
    first = later.copy()
    later[list(vocabulary.later.bytes_of)] = [number[b] for b in vocabulary.later.bytes_of.values()]
    for i, of in vocabulary.first.bytes_of.items():
        if of:
            if of not in number:
                number[of] = len(words)
                words.append(of)
            first[i] = number[of]
    silent = [i for i, of in vocabulary.first.bytes_of.items() if not of]
    known = text.assets.tokenizer.get_added_tokens_decoder()
    added = [i for i in known if i in vocabulary.later.bytes_of]
    none = words.index(_NO_WORD)
    after, at_first = (set(map(int, of)) - {none} for of in (later, first))
    return Words(
        texts=words,
        later=later,
        first=first,
        later_words=_packed(after, len(words)),
        first_words=_packed(at_first | after if silent else at_first, len(words)),
        tokens_are_words=len(after) == int((later != none).sum()),
        silent=silent,
        added=added,
    )


def _packed(numbers: Collection[int], count: int) -> "NDArray[np.int32]":
    """[ceil(count / 32)] bit i of element w is set for number 32 * w + i."""
    bits = np.zeros(-(-count // 32) * 32, dtype=bool)
    bits[np.fromiter(numbers, np.int64, len(numbers))] = True
    return np.packbits(bits, bitorder="little").view("<i4")


def _unpacked(words: "NDArray[np.int32]") -> "NDArray[np.bool_]":
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(bool)


@frozen(eq=False)
class _Tokens:
    """What llguidance's TokenizerWrapper wraps."""

    tokens: Sequence[bytes]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        """llguidance tokenizes only what it forces, which is never asked for."""
        raise NotImplementedError


# --- arguments as grammars ------------------------------------------------------------------------


def grammar_of(argument: Any) -> str:
    """The grammar of a request's argument, in llguidance's dialect of Lark.

    Raises RequestError for an argument of another form.
    """
    if isinstance(argument, str):
        try:
            argument = json.loads(argument)
        except (ValueError, RecursionError):
            argument = None
    keys = list(argument) if isinstance(argument, Mapping) else []
    if len(keys) != 1 or keys[0] not in _GRAMMARS:
        found = listed([shortened(repr(key)) for key in keys]) or "none"
        raise _refused(f"expected a mapping with one of the keys {_KEYS}, found {found}")
    return _GRAMMARS[keys[0]](argument[keys[0]])


def of_json(schema: Any) -> str:
    """A text in JSON that is valid against a schema: a mapping, or its JSON text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _refused(f"json: expected a schema in JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise _refused(f"json: expected a schema, a mapping, found {shortened(repr(schema))}")
    return f"start: {json_rule(schema)}"


def json_rule(schema: Mapping[str, Any]) -> str:
    """``%json {...}``, what stands in a grammar for a text that is valid against a schema.

    Raises RequestError for a schema that is not JSON.
    """
    options = schema.get("x-guidance", JSON_OPTIONS)
    if isinstance(options, Mapping):
        options = {**options, **_STRICT}
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': options}, allow_nan=False)}"
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(f"json: expected a schema of JSON values: {error}") from error


def _of_json_object(wanted: Any) -> str:
    if wanted is not True:
        raise _refused(f"json_object: expected true, found {shortened(repr(wanted))}")
    return of_json({"type": "object"})


def _of_regex(regex: Any) -> str:
    from llguidance import regex_to_lark

    if not isinstance(regex, str):
        raise _refused(f"regex: expected text, found {shortened(repr(regex))}")
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise _refused("regex: expected a character after the backslash at its end")
    try:
        return f"start: /{regex_to_lark(regex, 'd')}/"  # d: as in JSON schemas, \\d is 0 to 9
    except UnicodeError as error:
        raise _refused(f"regex: expected valid Unicode ({error})") from error


def _of_choice(choices: Any) -> str:
    if (
        not isinstance(choices, list | tuple)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise _refused(
            "choice: expected a list of strings of at least one character each, found "
            f"{shortened(repr(choices))}"
        )
    return f"start: {' | '.join(map(json.dumps, choices))}"


def _of_grammar(grammar: Any) -> str:
    if not isinstance(grammar, str):
        raise _refused(f"grammar: expected text, found {shortened(repr(grammar))}")
    return grammar


_GRAMMARS: Mapping[str, Callable[[Any], str]] = {
    "json": of_json,
    "json_object": _of_json_object,
    "regex": _of_regex,
    "choice": _of_choice,
    "grammar": _of_grammar,
}
_KEYS = ", ".join(_GRAMMARS)


# --- errors ---------------------------------------------------------------------------------------


def _refused(why: str) -> RequestError:
    return RequestError(f"structured-output: {on_one_line(why)}")


def _reason(matcher: "LLMatcher") -> str:
    """Why a matcher is in error, without the lines of the grammar that its message shows."""
    lines = matcher.get_error().split("\n<", 1)[0].splitlines()
    kept = [line.strip() for line in lines if not re.match(r"\s*(\d+ \||\^)", line)]
    # "at 1(8): " is where each grammar begins that is made here.
    reason = re.sub(r"^at 1\(8\): |^.*failed to compile JSON schema: ", "", " ".join(kept))
    reason = re.sub(r"invalid regex .* error: ", "invalid regular expression: ", reason)
    return shortened(reason, 300) or "only token ids without a text are allowed"
