"""Texts that are hard for tokenizers: white space, contractions, digits, scripts, marks, emoji."""

import random

CHOSEN = (
    "",
    "Hello, world!",
    " leading and  double   spaces ",
    "tabs\tand\nnew\r\nlines\n\n\n  indented\n",
    "I'm you've WE'LL it's 'S'd",
    "1 12 123 1234 12345 3.14159 ٣٤٥ ²³",
    "naïve café e\u0301 Å ÅNGSTRÖM",
    "日本語のテキスト 中文测试 한국어",
    "🙂👩‍👩‍👧 emoji 🇫🇷",
    "def f(x):\n    return x**2  # comment\n",
    "!!!???...---===>>><<<|||~~~^^^$$$+++",
    "\u00a0nbsp\u2003em\u200bzero",
    "a" * 50 + " " * 37 + "b\n" * 9,
    "<|im_start|>user\nHi<|im_end|>\n",
    "a <think>b</think> <s>c</s>",
    "CamelCase snake_case kebab-case XMLHttpRequest",
    "مرحبا بالعالم שלום עולם",
    "\x01\x7f control",
    "Ⅷ ½ ① x̄ ǅ ªº",
)

_CHARACTERS = "ab Z9'\n\r\t.,!-éß日🙂\u0301\u00a0٣²_$<|>"


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of up to 60 characters of many kinds."""
    chance = random.Random(seed)
    return [
        "".join(chance.choice(_CHARACTERS) for _ in range(chance.randint(1, 60)))
        for _ in range(count)
    ]
