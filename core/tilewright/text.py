"""Text to token ids and back: tokenizer, chat template, incremental detokenisation."""

from collections.abc import Sequence
from functools import cache

from tilewright.chat import (
    BEGIN_THINKING,
    END_THINKING,
    Chat,
    Message,
    last_text,
    render,
)
from tilewright.errors import RequestError
from tilewright.types import TextAssets

_REPLACEMENT = "\ufffd"

_CONTEXT_TOKENS = 4
"""Tokens that a window keeps before new ones. A UTF-8 character has at most four bytes and a
token at least one, so these tokens show how the text before them ends."""


class Text:
    """A model's tokenizer and chat template. Truncation and padding of the tokenizer are off."""

    def __init__(self, assets: TextAssets):
        self.assets = assets
        self._tokenizer = tokenizer = assets.tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._special_ids = {
            i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        decoder = tokenizer.decoder
        self.is_byte_level = decoder is not None and decoder.decode(["Ã", "©"]) == "é"
        """Whether the tokenizer writes each byte of a token as one character, as GPT-2's does."""
        self._byte_ids: set[int] = set()
        if decoder is not None and decoder.decode(["<0x41>"]) == "A":
            names = [f"<0x{b:{case}}>" for b in range(256) for case in ("02X", "02x")]
            self._byte_ids = {i for n in names if (i := tokenizer.token_to_id(n)) is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; add_special_tokens: with those the tokenizer puts around a prompt.

        A rendered chat has its special tokens already: encode it with add_special_tokens=False.
        Raises RequestError for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"expected valid Unicode, found a lone surrogate ({text[error.start]!r}) at "
                f"character {error.start} of the text: decode its source with the right encoding"
            ) from error
        # Unlike ``encode``, this lets other threads run meanwhile.
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(found.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids. Special tokens and unknown ids are skipped; spaces are kept."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str | None:
        """The tokenizer's name of a token, or None for an id that it does not have."""
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def has_text(self, token_id: int) -> bool:
        """Whether decode uses the token: it is known and not special."""
        return token_id not in self._special_ids and (
            self._tokenizer.id_to_token(token_id) is not None
        )

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is a single byte, ``<0x41>``, that decodes only with its neighbours.

        All adjacent bytes together are one UTF-8 string; if they are not valid, each of them is
        a replacement character.
        """
        return token_id in self._byte_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, after another one; maybe a part of a character.

        A special token adds its name, and an id that the tokenizer does not know adds nothing.
        """
        name = self.token(token_id)
        if name is None:
            return b""
        if token_id in self._special_ids:
            return name.encode()
        if self.is_byte(token_id):
            return bytes([int(name[3:5], 16)])
        if self.is_byte_level:
            try:
                return bytes(_byte_of()[character] for character in name)
            except KeyError:  # an added token, which is written as it is
                return name.encode()
        return self.decode([token_id, token_id])[len(self.decode([token_id])) :].encode()

    def render_chat(
        self,
        chat: Chat | Sequence[Message],
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for a conversation, by the model's chat template.

        add_generation_prompt: end with the beginning of the assistant's answer; not for a chat
        whose last message is continued.

        Raises RequestError when the model has no template or the template does not accept the
        messages, ModelError when the template itself is wrong.
        """
        from tilewright.chat_template import compiled

        chat = chat if isinstance(chat, Chat) else Chat(chat)
        source = self.assets.chat_template
        if chat.tools is not None and self.assets.tool_chat_template is not None:
            source = self.assets.tool_chat_template
        if source is None:
            also = " for chats without tools" if self.assets.tool_chat_template else ""
            raise RequestError(
                f"this model has no chat template{also}: use generate with the whole prompt as "
                "text, or add a chat_template.jinja beside its tokenizer.json"
            )
        return render(chat, compiled(source), self.assets.special_tokens, add_generation_prompt)

    def encode_chat(self, chat: Chat, add_generation_prompt: bool = True) -> list[int]:
        """The token ids of a conversation. Takes and raises what ``render_chat`` does."""
        rendered = self.render_chat(chat, add_generation_prompt)
        # Templates write their own special tokens.
        return self.encode(rendered, add_special_tokens=False)

    def opens_thinking(self, chat: Chat) -> bool:
        """Whether the answer to a chat begins within the model's thinking.

        That is so where the prompt ends after ``<think>``. It is False for a tokenizer that has
        ``</think>`` as a special token, since no text shows then where the thinking ends.
        """
        visible = self.decode(self.encode(END_THINKING, add_special_tokens=False))
        if END_THINKING not in visible:
            return False
        if self.render_chat(chat).rstrip().endswith(BEGIN_THINKING):
            return True
        begun = last_text(chat) if chat.continue_last else ""
        return begun.rfind(BEGIN_THINKING) > begun.rfind(END_THINKING)


class TextStream:
    """Incremental text of one request, ended by the first stop string.

    The results of push and finish, joined, are the text of all tokens, cut where the leftmost stop
    string begins, or where it ends if it is included; of several that begin at the same place, the
    shortest counts. Text that may still change or become a stop string is held back. The cost of a
    token does not depend on the number of earlier tokens.

    A stop string that ends within the text of the first ``min_tokens`` tokens does not count. That
    text is what the decoded first tokens and the decoded whole have in common at their beginning:
    a character that a later token completes is not part of it.
    """

    def __init__(
        self,
        text: Text,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ):
        """Raises RequestError for an empty stop string."""
        if "" in stop:
            raise RequestError(
                "expected stop strings of at least one character, found an empty one"
            )
        self.stop_string: str | None = None
        """The stop string that was found; nothing follows what has been returned."""
        self._text = text
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that have left the window
        self._held = ""  # text that may be, or begin, a stop string
        self._include_stop = include_stop
        self._early = min_tokens  # tokens to come that complete no stop string
        self._plain = ""  # text of these tokens, from the beginning of _held

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop_string is not None

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that is now final, often one token late; may be empty."""
        if self.stopped:
            return ""
        new = self._decoded(token_id)
        if self._early:
            self._early -= 1
            self._plain = self._held + new + ("" if self._early else self._rest())
        return self._release(new)

    def finish(self) -> str:
        """The rest of the text, after the last token; nothing follows."""
        rest = self._rest()
        if self._early:
            self._plain = self._held + rest
        self._window, self._shown = [], 0
        return "" if self.stopped else self._release(rest, final=True)

    def _decoded(self, token_id: int) -> str:
        """The text that has become certain with a token."""
        if not self._text.has_text(token_id):
            return ""
        self._window.append(token_id)
        if self._text.is_byte(token_id):
            return ""
        new = self._certain()[self._shown :]
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._shown = len(self._certain())
        return new

    def _rest(self) -> str:
        """The text that the next token may still change."""
        return self._text.decode(self._window)[self._shown :]

    def _certain(self) -> str:
        # A replacement character at the end may be the beginning of a character.
        return self._text.decode(self._window).removesuffix(_REPLACEMENT)

    def _release(self, new: str, final: bool = False) -> str:
        held = self._held + new
        plain = _common(held, self._plain)
        if plain < len(held):
            self._plain = held[:plain]
        # The first place of each stop string at which it ends after the plain text.
        places = [(held.find(s, max(0, plain + 1 - len(s))), len(s), s) for s in self._stop]
        found, length, stop = min((p for p in places if p[0] >= 0), default=(None, 0, None))
        undecided = len(held)
        if not final:
            begins = range(max(0, len(held) - self._longest + 1), len(held))
            undecided = next((i for i in begins if self._begins_stop(held[i:])), undecided)
        if found is not None and found <= undecided:
            self.stop_string = stop
            self._held = ""
            return held[: found + length if self._include_stop else found]
        self._held = held[undecided:]
        self._plain = self._plain[undecided:]
        return held[:undecided]

    def _begins_stop(self, ending: str) -> bool:
        return any(len(ending) < len(s) and s.startswith(ending) for s in self._stop)


@cache
def _byte_of() -> dict[str, int]:
    """The byte of each character: printable Latin-1 is itself, the others follow from U+0100 on
    (bytes_to_unicode of GPT-2's encoder.py)."""
    from tokenizers import pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    values = sorted(range(256), key=lambda value: chr(value) not in characters)
    return dict(zip(characters, values, strict=True))


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(a), len(b)))
