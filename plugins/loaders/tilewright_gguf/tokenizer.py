"""The tokenizer in a GGUF header -> TextAssets, and the tokens that end a text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tilewright.errors import ModelError, listed
from tilewright.types import TextAssets
from tilewright_hf.files import JsonObject, shown
from tilewright_hf.tokenizer import QWEN2_WORDS, refusing

_PREFIX = "tokenizer.ggml."

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Values of ``token_type``; 1 is a normal token."""

_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # GGUF's spelling
    "mask_token": "mask",
}

_SENTENCE_PIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""Ids of a SentencePiece vocabulary whose header has none, or wrong ones. As in llama.cpp."""

_MOST = 2**64 - 1

ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<fim_pad>",
        "<reponame>",
    }
)
"""Tokens that end a text by name, and are control tokens whatever the header says. A header can
name three ids, most name one, and some converters give such tokens no type. As in llama.cpp."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@frozen(kw_only=True)
class Splitting:
    """How text is split before BPE merges, selected by ``tokenizer.ggml.pre``.

    patterns: each splits the pieces of the previous one, at and between its matches.
    nfc: whether text is normalised, which only the models' own tokenizers define.
    whole_words: whether a piece that is a token becomes that token, without applying merges.
    add_bos: whether a text begins with the BOS token if the header does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = Splitting(
    patterns=(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), whole_words=True, add_bos=True
)
_DIGITS = Splitting(patterns=(r"\p{N}", _GPT2))

SPLITTINGS = {
    "default": Splitting(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Splitting(patterns=(_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "qwen2": Splitting(patterns=(QWEN2_WORDS,), nfc=True),
    "deepseek-r1-qwen": Splitting(patterns=(QWEN2_WORDS,)),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "tekken": Splitting(
        patterns=(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        whole_words=True,
        add_bos=True,
    ),
}


@frozen(kw_only=True)
class Vocabulary:
    """Tokens and kinds, indexed by id; checked for equal length and for duplicates.

    special: ids by the names that the header's keys have, such as ``eos``.
    """

    header: JsonObject
    tokens: tuple[str, ...]
    kinds: Sequence[int]
    special: Mapping[str, int]

    def of_kind(self, *kinds: int) -> list[str]:
        return [t for t, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]


def special_ids(header: JsonObject) -> dict[str, int]:
    """The ids in keys such as ``tokenizer.ggml.eos_token_id``, by ``eos`` and so on. Those that are
    not ids of the vocabulary are left out with a note."""
    count = len(header.strings(f"{_PREFIX}tokens") or ())
    is_sentence_piece = header.values.get(f"{_PREFIX}model") == "llama"
    usual = _SENTENCE_PIECE_IDS if is_sentence_piece else {}
    ids = {}
    for name in (*_NAMED.values(), "eot", "eom"):
        key = f"{_PREFIX}{name}_token_id"
        found = header.integer(key, None, minimum=-1, maximum=_MOST)
        in_vocabulary = found is not None and 0 <= found < count
        token_id = found if in_vocabulary else usual.get(name)
        if token_id is not None and token_id < count:
            ids[name] = token_id
        if found is not None and not in_vocabulary:
            instead = f"{token_id} is used" if name in ids else "it is ignored"
            header.note(key, f"the vocabulary has ids 0 to {count - 1}, and {instead}")
    return ids


def load_text(
    header: JsonObject, vocab_size: int, special: Mapping[str, int]
) -> tuple[TextAssets, tuple[int, ...], tuple[str, ...]]:
    """Tokenizer, chat template and special tokens, the ids that end a text, and warnings.

    special: see ``special_ids``. Raises ModelError for missing, damaged or unsupported values.
    """
    vocabulary = _vocabulary(header, vocab_size, special)
    kind = header.string(f"{_PREFIX}model", None)
    warnings: tuple[str, ...] = ()
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
        warnings = _byte_level_warnings(vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(vocabulary)
    else:
        found = "is missing" if kind is None else f"{shown(kind)} is not supported"
        raise ModelError(
            f"{header.where}: {_PREFIX}model {found}; gguf supports gpt2 (byte-level BPE) and "
            "llama (SentencePiece)"
        )
    control, plain = vocabulary.of_kind(CONTROL, UNKNOWN), vocabulary.of_kind(USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    named = {key: special[name] for key, name in _NAMED.items() if name in special}
    assets = TextAssets(
        tokenizer=tokenizer,
        chat_template=header.string("tokenizer.chat_template", None),
        tool_chat_template=header.string("tokenizer.chat_template.tool_use", None),
        special_tokens={key: vocabulary.tokens[i] for key, i in named.items()},
    )
    return assets, _end_ids(vocabulary), warnings


def _vocabulary(header: JsonObject, vocab_size: int, special: Mapping[str, int]) -> Vocabulary:
    tokens = header.strings(f"{_PREFIX}tokens") or ()
    if not 0 < len(tokens) <= vocab_size:
        raise ModelError(
            f"{header.where}: {_PREFIX}tokens has {len(tokens)} tokens, expected 1 to {vocab_size}"
        )
    if len(set(tokens)) < len(tokens):
        twice = max(tokens, key=Counter(tokens).__getitem__)
        raise ModelError(f"{header.where}: {_PREFIX}tokens has {shown(twice)} more than once")
    kinds = header.values.get(f"{_PREFIX}token_type")
    if kinds is None:
        kinds = [1] * len(tokens)
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(tokens)
        or not all(isinstance(kind, int) and 0 <= kind <= BYTE for kind in kinds)
    ):
        header.fail(f"{_PREFIX}token_type", f"a list of {len(tokens)} numbers from 0 to {BYTE}")
    kinds = [CONTROL if t in ENDS else kind for t, kind in zip(tokens, kinds, strict=True)]
    return Vocabulary(header=header, tokens=tokens, kinds=kinds, special=special)


def _end_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """The ids that the header names, then those of tokens that end a text by name."""
    ids = [vocabulary.special.get(name) for name in ("eos", "eot", "eom")]
    ids += [i for i, token in enumerate(vocabulary.tokens) if token in ENDS]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    header = vocabulary.header
    name = header.string(f"{_PREFIX}pre", "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise ModelError(
            f"{header.where}: {_PREFIX}pre {shown(name)} is not supported: gguf supports "
            f"{', '.join(SPLITTINGS)}"
        )
    merges = header.strings(f"{_PREFIX}merges")
    if merges is None:
        raise ModelError(f"{header.where}: {_PREFIX}merges is missing; convert the model again")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise ModelError(
                f"{header.where}: each of {_PREFIX}merges must be two tokens separated by a space, "
                f"found {shown(merge)}"
            )
        pairs.append((left, right))
    with refusing(f"{header.where}: the tokenizers library cannot use its merges"):
        tokenizer = Tokenizer(
            models.BPE(vocab=_ids(vocabulary), merges=pairs, ignore_merges=splitting.whole_words)
        )
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_ends(tokenizer, vocabulary, splitting.add_bos)
    return tokenizer


def _byte_level_warnings(vocabulary: Vocabulary) -> tuple[str, ...]:
    header, warnings = vocabulary.header, []
    if f"{_PREFIX}pre" not in header.values:
        warnings.append(
            f"{header.where}: {_PREFIX}pre is missing, so llama.cpp's default pre-tokenizer is "
            "used, which may not be the model's; convert it again with a converter that "
            "writes the key"
        )
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary.tokens)
    if missing:
        warnings.append(
            f"{header.where}: {_PREFIX}tokens has no tokens for {len(missing)} of 256 bytes; these "
            "bytes of a text are dropped"
        )
    return tuple(warnings)


def _sentence_piece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: among neighbours that form a token, those with the best score merge.

    Expressed as merges of pairs: one for each way to split a token in two, best score first.
    """
    header, tokens = vocabulary.header, vocabulary.tokens
    scores = header.values.get(f"{_PREFIX}scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, float) and score == score for score in scores)
    ):
        header.fail(f"{_PREFIX}scores", f"a list of {len(tokens)} numbers, one for each token")
    ids = _ids(vocabulary)
    mergeable = {t: i for t, i in ids.items() if vocabulary.kinds[i] in (0, 1, USER_DEFINED)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, i in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[i], i, -cut, left, right))
    ranked.sort()
    missing = [name for b in range(256) if (name := f"<0x{b:02X}>") not in ids]
    if missing:
        raise ModelError(
            f"{header.where}: {_PREFIX}tokens has no tokens for bytes that gguf requires: "
            f"{listed(missing)}"
        )
    with refusing(f"{header.where}: the tokenizers library cannot use its vocabulary"):
        tokenizer = Tokenizer(
            models.BPE(
                vocab=ids,
                merges=[(left, right) for *_, left, right in ranked],
                byte_fallback=True,
                fuse_unk=True,
            )
        )
    prefix = header.boolean(f"{_PREFIX}add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add_ends(tokenizer, vocabulary, True)
    return tokenizer


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Ids by token, without the unused tokens that only fill up the vocabulary."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind != UNUSED
    }


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool) -> None:
    """Begin a text with BOS and end it with EOS where the header, or add_bos, says so."""
    header = vocabulary.header
    tokens = []
    for name, default in (("bos", add_bos), ("eos", False)):
        key, token_id = f"{_PREFIX}add_{name}_token", vocabulary.special.get(name)
        if not header.boolean(key, default and token_id is not None):
            continue
        if token_id is None:
            header.fail(f"{_PREFIX}{name}_token_id", f"a token id, because {key} is true")
        tokens.append({"id": name, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]})
    if tokens:
        names = [token["id"] for token in tokens]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(n for n in names if n == "bos"), "$A", *(n for n in names if n == "eos")],
            special_tokens=tokens,
        )
