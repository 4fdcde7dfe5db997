"""What a logits processor makes of requests and logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor


@frozen(kw_only=True, eq=False)
class LogitsEdits:
    """What a logits processor changes in the logits of a step. CPU tensors; it can be pickled.

    Additions come first, then masks; both of all processors of a row. Logits that are not finite
    stay as they are, so that the sampler reports them.
    """

    mask_rows: "Tensor | None" = None
    """[M] int64: rows of the logits that have a mask"""
    masks: "Tensor | None" = None
    """[M, ceil(vocab_size / 32)] int32: bit i of word w is set if token 32 * w + i may be chosen"""
    added_rows: "Tensor | None" = None
    """[N] int64: rows of the logits that something is added to"""
    added_token_ids: "Tensor | None" = None
    """[N] int64"""
    added: "Tensor | None" = None
    """[N] float32, finite"""


class LogitsProcessor(Protocol):
    """Changes the logits of the requests that name it, for example so that a text follows a
    grammar. Made once for a model; keeps a state for each request.

    States stay on the engine's side, whatever the executor; only edits go to the logits. A request
    that is computed again keeps its state.
    """

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> Any:
        """The state of a new request. argument: what the request gave for this processor.

        All requests of the model wait meanwhile, so what takes long belongs in the factory, or in
        ``PreparingProcessor.prepare``.

        Raises RequestError for an argument that it cannot take.
        """
        ...

    def edits(self, rows: Sequence[tuple[int, Any]]) -> LogitsEdits | None:
        """The edits of a step, for all of its requests at once.

        rows: the row of the logits and the state of each request; None: no change.
        """
        ...

    def accept(self, state: Any, token_id: int) -> None:
        """A token was added to a request's output.

        The token is one that was allowed, or a draft: after one that was not allowed, the state is
        used for edits that are not needed, and then restored.
        """
        ...

    def snapshot(self, state: Any) -> Any:
        """What ``restore`` needs to make a state again what it is now; taken before drafts."""
        ...

    def restore(self, state: Any, snapshot: Any) -> None:
        """Make a state again what it was when the snapshot was taken."""
        ...

    def end(self, state: Any) -> None:
        """A request has ended; its state is not used again."""
        ...


@runtime_checkable
class PreparingProcessor(LogitsProcessor, Protocol):
    """A logits processor that has work to do for an argument which would hold up a step.

    Optional: without ``prepare``, all that there is to do for an argument is done in ``begin``.
    """

    def prepare(self, argument: Any) -> None:
        """Do for an argument what takes long, and keep it for the ``begin`` that follows.

        Any thread may call this, also several at once, while steps run.

        Raises RequestError as ``begin`` does.
        """
        ...
