"""Streamed text and rendered chats match transformers exactly."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    SAMPLE,
    SPECIAL,
    byte_level,
    gemma,
    llama_2,
    metaspace,
    no_decoder,
    word_piece,
)
from tokenizers import AddedToken, Tokenizer, processors
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from tilewright.errors import RequestError
from tilewright.text import Text, TextStream
from tilewright.types import TextAssets

PIECES = [
    *("é", "e\u0301", "数", "学", "👍🏽", "👩‍👩‍👧", "🇫🇷", "\u200d", "\ufffd", "\x00", "\U0010ffff"),
    *("a", " a", "  ", "\n", "▁", "Ġ", "<0x41>", "<s>", "</s>", "<think>", ".", " ,", "the", "# "),
]
TOKENIZERS: list[Callable[[], Tokenizer]] = [
    byte_level,
    llama_2,
    gemma,
    metaspace,
    word_piece,
    no_decoder,
]
every_tokenizer = pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)


@cache
def text_of(make: Callable[[], Tokenizer]) -> Text:
    return Text(TextAssets(tokenizer=make()))


@cache
def transformers_of(make: Callable[[], Tokenizer]) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=make())


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def stream(text: Text, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The text of each push, then that of finish; and whether a stop string was found."""
    running = TextStream(text, stop)
    parts = [running.push(i) for i in ids]
    parts.append(running.finish())
    assert running.finish() == ""
    return parts, running.stopped


def token_ids(make: Callable[[], Tokenizer]) -> st.SearchStrategy[list[int]]:
    """Random tokens, whole texts, and texts cut anywhere, one after another."""
    text = text_of(make)
    tokenizer = text.assets.tokenizer
    size = tokenizer.get_vocab_size()
    bytes_ = [i for i in range(size) if text.is_byte(i) or len(text.decode([i])) == 1]
    one = st.one_of(
        st.integers(0, size + 3),
        st.sampled_from(bytes_ or [0]),
        st.sampled_from([id_of(tokenizer, token) for token in SPECIAL]),
    )
    written = st.lists(st.sampled_from(PIECES)).map(lambda p: text.encode("".join(p)))
    cut = st.tuples(written, st.integers(0, 5)).map(lambda t: t[0][t[1] :])
    parts = st.lists(st.one_of(st.lists(one, max_size=8), written, cut), max_size=6)
    return parts.map(lambda p: [i for part in p for i in part])


relaxed = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


# --- incremental detokenisation -------------------------------------------------------------------


@every_tokenizer
def test_decode_matches_transformers(make: Callable[[], Tokenizer]) -> None:
    expected = transformers_of(make)

    @relaxed
    @given(token_ids(make))
    def check(ids: list[int]) -> None:
        assert text_of(make).decode(ids) == expected.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    check()


@every_tokenizer
def test_a_stream_joins_to_the_decoded_text(make: Callable[[], Tokenizer]) -> None:
    text = text_of(make)

    @relaxed
    @given(token_ids(make))
    def check(ids: list[int]) -> None:
        parts, stopped = stream(text, ids)
        assert "".join(parts) == text.decode(ids)
        assert not stopped

    check()


@settings(max_examples=100, deadline=None, database=None)
@given(st.binary(min_size=20, max_size=120))
@example(b"\xff" * 100)
@example(b"\xf0" * 100)
@example(b"\x80" * 100)
@example(b"\xf0\x90\x80\x80\x80\x80\x80" * 10)
@example("👩‍👩‍👧".encode() * 8)
def test_long_runs_of_arbitrary_bytes_stream_to_the_decoded_text(data: bytes) -> None:
    for make in (byte_level, llama_2):
        text, ids = text_of(make), byte_ids(make, data)
        parts, _ = stream(text, ids)
        assert "".join(parts) == text.decode(ids)
    ids = byte_ids(byte_level, data)
    assert "".join(stream(text_of(byte_level), ids)[0]) == data.decode(errors="replace")


def byte_ids(make: Callable[[], Tokenizer], data: bytes) -> list[int]:
    """One token per byte."""
    tokenizer = text_of(make).assets.tokenizer
    if make is byte_level:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        names = [letters[b] for b in data]
    else:
        names = [f"<0x{b:02X}>" for b in data]
    return [id_of(tokenizer, name) for name in names]


def test_text_is_emitted_as_soon_as_its_characters_are_complete() -> None:
    text = text_of(byte_level)
    ids = byte_ids(byte_level, "a👍b".encode())
    assert stream(text, ids)[0] == ["a", "", "", "", "👍", "b", ""]


def test_an_incomplete_character_is_emitted_at_the_end() -> None:
    parts, _ = stream(text_of(byte_level), byte_ids(byte_level, b"a\xf0\x9f"))
    assert parts == ["a", "", "", "\ufffd"]


def test_special_tokens_within_a_character_do_not_break_it() -> None:
    for make in (byte_level, llama_2):
        text = text_of(make)
        end = id_of(text.assets.tokenizer, "<|im_end|>")
        ids = [i for b in byte_ids(make, "👍".encode()) for i in (b, end)]
        assert "".join(stream(text, ids)[0]) == "👍"


def test_byte_fallback_tokens_are_held_back_until_their_run_ends() -> None:
    """One invalid byte turns a whole run into replacement characters, even complete ones."""
    text = text_of(llama_2)
    good = byte_ids(llama_2, "👍".encode())
    a = id_of(text.assets.tokenizer, "a")
    assert stream(text, [*good, a])[0] == ["", "", "", "", "👍a", ""]
    assert stream(text, [*good, good[0], a])[0] == [""] * 5 + ["\ufffd" * 5 + "a", ""]


def test_decode_stream_of_tokenizers_loses_incomplete_characters() -> None:
    """Shows why DecodeStream is not used; when this fails, it may be good enough."""
    a = id_of(text_of(llama_2).assets.tokenizer, "a")
    good = byte_ids(llama_2, "👍".encode())
    running = DecodeStream(skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):
        [running.step(text_of(llama_2).assets.tokenizer, i) for i in [*good, good[0], a]]
    running = DecodeStream(skip_special_tokens=True)
    ids = byte_ids(byte_level, b"a\xf0\x9f")
    parts = [running.step(text_of(byte_level).assets.tokenizer, i) for i in ids]
    assert parts == ["a", None, None]  # and no call returns the rest


class CountingTokenizer:
    """A tokenizer that records how many tokens each decode is given."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        self.lengths.append(len(ids))
        return self.tokenizer.decode(ids, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("min_tokens", [0, 1000, 3000])
@pytest.mark.parametrize("data", [b"plain text ", b"\xff", b"\xf0", b"\x80", "👍".encode()])
def test_the_work_per_token_is_constant(data: bytes, min_tokens: int) -> None:
    counting = CountingTokenizer(byte_level())
    text = Text(TextAssets(tokenizer=counting))  # type: ignore[arg-type]
    running = TextStream(text, ["\n\nQ:"], min_tokens)
    for token_id in byte_ids(byte_level, data * (2000 // len(data))):
        running.push(token_id)
    assert len(counting.lengths) <= 2 * 2000 + 1
    assert max(counting.lengths) <= 8


# --- stop strings ---------------------------------------------------------------------------------


def stop_strings(whole: str) -> st.SearchStrategy[list[str]]:
    """Parts of a text, and other strings of its characters."""
    positions = st.integers(0, max(len(whole) - 1, 0))
    within = st.tuples(positions, st.integers(1, 9)).map(lambda p: whole[p[0] : sum(p)])
    any_text = st.text(st.sampled_from(whole or "a"), min_size=1, max_size=4)
    return st.lists(st.one_of(within, any_text).filter(bool), max_size=4)


def cut(whole: str, stop: Sequence[str]) -> str:
    """The expected text: cut before the leftmost stop string."""
    return whole[: min((whole.find(s) for s in stop if s in whole), default=len(whole))]


@every_tokenizer
def test_the_text_is_cut_before_the_leftmost_stop_string(make: Callable[[], Tokenizer]) -> None:
    text = text_of(make)

    @relaxed
    @given(st.data())
    def check(data: st.DataObject) -> None:
        ids = data.draw(token_ids(make))
        whole = text.decode(ids)
        stop = data.draw(stop_strings(whole))
        parts, stopped = stream(text, ids, stop)
        assert "".join(parts) == cut(whole, stop)
        assert stopped == any(s in whole for s in stop)

    check()


@relaxed
@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.randoms(use_true_random=False),
)
def test_repetitive_text_is_cut_before_overlapping_stop_strings(
    whole: str, stop: list[str], random: Any
) -> None:
    text = text_of(byte_level)
    at = sorted(random.sample(range(len(whole) + 1), k=min(len(whole), 5)))
    pieces = [whole[i:j] for i, j in zip([0, *at], [*at, None], strict=True)]
    ids = [i for piece in pieces for i in text.encode(piece)]
    parts, stopped = stream(text, ids, stop)
    assert "".join(parts) == cut(whole, stop)
    assert stopped == any(s in whole for s in stop)


def ended(
    text: Text, ids: Sequence[int], stop: Sequence[str], min_tokens: int, include: bool
) -> tuple[str, str | None]:
    """The expected text and stop string, by trying every place of the whole text."""
    whole = text.decode(ids)
    pairs = zip(whole, text.decode(ids[:min_tokens]), strict=False)
    plain = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    places = [(i, len(s), s) for s in stop for i in range(len(whole)) if whole.startswith(s, i)]
    counted = [place for place in places if sum(place[:2]) > plain]
    if not counted:
        return whole, None
    at, length, found = min(counted)
    return whole[: at + length * include], found


def check_ended(
    text: Text, ids: Sequence[int], stop: Sequence[str], min_tokens: int, include: bool
) -> None:
    running = TextStream(text, stop, min_tokens, include)
    pieces = [running.push(i) for i in ids]
    pieces.append(running.finish())
    expected = ended(text, ids, stop, min_tokens, include)
    assert ("".join(pieces), running.stop_string) == expected


@every_tokenizer
def test_stop_strings_that_the_first_tokens_complete_are_plain_text(
    make: Callable[[], Tokenizer],
) -> None:
    text = text_of(make)

    @relaxed
    @given(st.data())
    def check(data: st.DataObject) -> None:
        ids = data.draw(token_ids(make))
        whole = text.decode(ids)
        stop = data.draw(stop_strings(whole))
        min_tokens = data.draw(st.integers(0, len(ids) + 2))
        check_ended(text, ids, stop, min_tokens, data.draw(st.booleans()))

    check()


@settings(max_examples=400, deadline=None, database=None)
@given(
    st.lists(st.text("ab👍", min_size=1, max_size=3), max_size=15),
    st.lists(st.text("ab👍", min_size=1, max_size=5), max_size=4),
    st.integers(0, 20),
    st.booleans(),
)
def test_first_tokens_may_end_anywhere_in_overlapping_stop_strings(
    pieces: list[str], stop: list[str], min_tokens: int, include: bool
) -> None:
    text = text_of(byte_level)
    ids = [i for piece in pieces for i in text.encode(piece)]
    check_ended(text, ids, stop, min_tokens, include)
    for make in (byte_level, llama_2):
        each = byte_ids(make, "".join(pieces).encode())
        check_ended(text_of(make), each, stop, min_tokens, include)


@pytest.mark.parametrize("make", [byte_level, llama_2])
@pytest.mark.parametrize(
    ("min_tokens", "stop", "expected"),
    [
        (0, "a", ("", "a")),
        (1, "a", ("a👍b", "a")),  # the first one is plain text, the second one counts
        (5, "👍", ("a👍ba", None)),
        (4, "👍", ("a", "👍")),  # the fifth token completes the character
        (5, "👍b", ("a", "👍b")),
        (6, "👍b", ("a👍ba", None)),
        (7, "a", ("a👍ba", None)),
        (9, "a", ("a👍ba", None)),
    ],
)
def test_a_stop_string_counts_from_the_token_on_that_completes_it(
    make: Callable[[], Tokenizer], min_tokens: int, stop: str, expected: tuple[str, str | None]
) -> None:
    running = TextStream(text_of(make), [stop], min_tokens)
    pieces = [running.push(i) for i in byte_ids(make, "a👍ba".encode())]
    assert ("".join([*pieces, running.finish()]), running.stop_string) == expected


def test_tokens_without_text_count_as_first_tokens() -> None:
    text = text_of(byte_level)
    ids = [id_of(text.assets.tokenizer, "<|im_end|>"), *byte_ids(byte_level, b"aa")]
    found = []
    for min_tokens in range(4):
        running = TextStream(text, ["a"], min_tokens)
        found.append("".join([*map(running.push, ids), running.finish()]))
    assert found == ["", "", "a", "aa"]


@pytest.mark.parametrize("order", [("ab", "abc"), ("abc", "ab")])
def test_of_stop_strings_that_begin_at_one_place_the_shortest_ends_the_text(
    order: tuple[str, str],
) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("xabc")])
    text = Text(TextAssets(tokenizer=tokenizer))
    for ids in ([id_of(tokenizer, "xabc")], byte_ids(byte_level, b"xabc")):
        running = TextStream(text, order, include_stop=True)
        assert "".join([*map(running.push, ids), running.finish()]) == "xab"
        assert running.stop_string == "ab"


def test_only_a_possible_prefix_of_a_stop_string_is_held_back() -> None:
    text = text_of(byte_level)

    def parts(whole: str, *stop: str) -> list[str]:
        return stream(text, byte_ids(byte_level, whole.encode()), stop)[0]

    # A prefix of a stop string is held back until it completes or cannot complete.
    assert parts("abxabc", "abc") == ["", "", "abx", "", "", "", ""]
    assert parts("abx", "abc") == ["", "", "abx", ""]
    assert parts("ab", "abc") == ["", "", "ab"]
    # If two begin at the same place, the shorter one ends the text at once.
    assert parts("xabc", "abc", "ab") == ["x", "", "", "", ""]
    # One inside another waits for the outer one, which begins before it.
    assert parts("xabcd.", "abcd", "c") == ["x", "", "", "", "", "", ""]
    assert parts("xabce.", "abcd", "c") == ["x", "", "", "", "ab", "", ""]
    assert parts("xabc", "abcd", "c") == ["x", "", "", "", "ab"]
    # A stop string that overlaps with itself.
    assert parts("aaab", "aab") == ["", "", "a", "", ""]


@pytest.mark.parametrize("stop", [["bc"], ["bcx", "bc"]])
def test_a_stream_is_stopped_as_soon_as_a_stop_string_completes(stop: list[str]) -> None:
    running = TextStream(text_of(byte_level), stop)
    said = []
    for token_id in byte_ids(byte_level, b"abcd"):
        running.push(token_id)
        said.append(running.stopped)
    assert said == [False, False, True, True]


def test_a_stop_string_is_found_in_the_text_of_finish() -> None:
    parts, stopped = stream(text_of(byte_level), byte_ids(byte_level, b"a\xf0"), ["\ufffd"])
    assert (parts, stopped) == (["a", "", ""], True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        TextStream(text_of(byte_level), ["a", ""])


# --- encode ---------------------------------------------------------------------------------------


@every_tokenizer
def test_encode_matches_transformers(make: Callable[[], Tokenizer]) -> None:
    for text in (SAMPLE, "", " <s> the fox", "数学<think>"):
        assert text_of(make).encode(text) == transformers_of(make).encode(text)


def test_special_tokens_around_a_prompt_can_be_left_out() -> None:
    tokenizer = byte_level()
    bos = id_of(tokenizer, "<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    text = Text(TextAssets(tokenizer=tokenizer))
    plain = text.encode("the fox", add_special_tokens=False)
    assert text.encode("the fox") == [bos, *plain]
    assert text.decode([bos, *plain]) == "the fox"


def test_truncation_and_padding_of_the_tokenizer_file_do_not_apply_to_prompts() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    text = Text(TextAssets(tokenizer=tokenizer))
    assert text.decode(text.encode(SAMPLE)) == SAMPLE


@pytest.mark.parametrize("bad", ["\ud800", "ok \udfff", "\ud83d \udc4d"])
def test_a_prompt_with_a_lone_surrogate_is_refused(bad: str) -> None:
    with pytest.raises(RequestError, match="lone surrogate") as caught:
        text_of(byte_level).encode(bad)
    str(caught.value).encode()
