"""Small tokenizers of every kind, with special and other added tokens."""

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

SAMPLE = (
    "The quick brown fox jumps over the lazy dog. naïve café, “quotes” — dashes… "
    "数学は美しい。 안녕하세요 세계 Привет, мир! 👍🏽 👩‍👩‍👧 🇫🇷 e\u0301 a\u0308 "
    "def f(x):\n    return x\n\n"
)
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def add_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken(" two words "), AddedToken("数学")])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    return add_tokens(tokenizer)


def byte_fallback(decoder: decoders.Decoder, normalizer: normalizers.Normalizer) -> Tokenizer:
    """A vocabulary as sentencepiece makes it: a few words, and 256 byte tokens for the rest."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.,\n数é\ufffd", "▁t", "he", "▁the", "▁▁", "fo", "fox"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("f", "o"), ("fo", "x")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder
    return add_tokens(tokenizer)


def llama_2() -> Tokenizer:
    return byte_fallback(
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )


def gemma() -> Tokenizer:
    return byte_fallback(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        normalizers.Replace(" ", "▁"),
    )


def metaspace() -> Tokenizer:
    tokenizer = byte_fallback(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        normalizers.NFC(),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", "the", "fox", "##es", "##y", "a", ".", "don", "'", "t", "数", "##学"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return add_tokens(tokenizer)


def no_decoder() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return add_tokens(tokenizer)
