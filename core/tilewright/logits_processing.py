"""Logits processors of requests: their states, and their edits of a step's logits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from tilewright.errors import PluginError, TilewrightError
from tilewright.plugins import cause
from tilewright.types import LogitsEdits, LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor

FORBIDDEN = torch.finfo(torch.float32).min
"""Logit of a token that may not be chosen: finite, and of no probability at any temperature."""


class LogitsProcessorError(PluginError):
    """A logits processor failed, which concerns only the requests that use one."""

    processing: "Sequence[Processing] | None" = None
    """The processors of the only request that is concerned; None: all of them are."""


class NoTokenLeftError(LogitsProcessorError):
    """A request's logits processors and settings contradict each other."""


@frozen(eq=False)
class Processing:
    """One processor at work on one request."""

    name: str
    """The plugin's name, for errors."""
    processor: LogitsProcessor
    state: Any

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises LogitsProcessorError for an unexpected exception."""
        with _blaming(self.name, method):
            return getattr(self.processor, method)(*arguments)


@frozen
class Place:
    """A row of logits whose token follows some drafts of a request's."""

    row: int
    processing: Sequence[Processing]
    drafts: Sequence[int]
    forbidden: Sequence[int] = ()
    """Ids of tokens that the request's logit_bias and min_new_tokens forbid."""


@contextmanager
def _blaming(name: str, method: str) -> Iterator[None]:
    """An unexpected exception becomes an error that names the processor and its method."""
    try:
        yield
    except (TilewrightError, MemoryError):
        raise
    except Exception as error:
        raise LogitsProcessorError(f"{name}: {method}() failed: {cause(error)}") from error


def edited(logits: "Tensor", places: Sequence[Place]) -> "Tensor":
    """A copy of logits [rows, vocab_size] with the edits of all processors.

    The states are afterwards what they were before. Raises LogitsProcessorError for edits that do
    not fit the logits, or that leave no token of a row which the request's settings allow.
    """
    found = [edits for depth in _by_drafts(places) for edits in _edits(depth)]
    logits = logits.clone()
    for change in (_add, _mask):
        for name, edits in found:
            with _blaming(name, "edits"):
                change(name, logits, edits)
    _check_some_left(logits, places)
    return logits


def _by_drafts(places: Sequence[Place]) -> "list[list[Place]]":
    depths: dict[int, list[Place]] = {}
    for place in places:
        depths.setdefault(len(place.drafts), []).append(place)
    return [depths[depth] for depth in sorted(depths)]


def _edits(places: Sequence[Place]) -> "list[tuple[str, LogitsEdits]]":
    """One call for each processor, with the states moved past the drafts for the time of it."""
    rows: dict[int, tuple[Processing, list[tuple[int, Any]]]] = {}
    moved = []
    try:
        for place in places:
            for one in place.processing:
                if place.drafts:
                    moved.append((one, one.call("snapshot", one.state)))
                    for token_id in place.drafts:
                        one.call("accept", one.state, token_id)
                own = rows.setdefault(id(one.processor), (one, []))[1]
                own.append((place.row, one.state))
        made = [(one.name, one.call("edits", own)) for one, own in rows.values()]
    finally:
        for one, snapshot in moved:
            one.call("restore", one.state, snapshot)
    for name, edits in made:
        if not isinstance(edits, LogitsEdits | None):
            raise LogitsProcessorError(
                f"{name}: edits() must return LogitsEdits or None, found {edits!r:.60}"
            )
    return [(name, edits) for name, edits in made if edits is not None]


def _add(name: str, logits: "Tensor", edits: LogitsEdits) -> None:
    if edits.added_rows is None:
        return
    rows, ids, added = edits.added_rows, edits.added_token_ids, edits.added
    if ids is None or added is None or not len(rows) == len(ids) == len(added):
        raise LogitsProcessorError(
            f"{name}: edits() must give added_rows, added_token_ids and added of one length"
        )
    _check(name, "added_rows", rows, len(logits))
    _check(name, "added_token_ids", ids, logits.shape[1])
    if not added.isfinite().all():
        raise LogitsProcessorError(f"{name}: edits() must add finite values; masks forbid tokens")
    at = rows.to(logits.device), ids.to(logits.device)
    logits.index_put_(at, added.to(logits), accumulate=True)


def _mask(name: str, logits: "Tensor", edits: LogitsEdits) -> None:
    if edits.mask_rows is None:
        return
    rows, masks, vocab_size = edits.mask_rows, edits.masks, logits.shape[1]
    shape = (len(rows), -(-vocab_size // 32))
    if masks is None or tuple(masks.shape) != shape or masks.dtype != torch.int32:
        found = None if masks is None else f"{list(masks.shape)} {masks.dtype}"
        raise LogitsProcessorError(
            f"{name}: edits() must give masks {list(shape)} torch.int32, found {found}"
        )
    _check(name, "mask_rows", rows, len(logits))
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    words = masks.to(logits.device)
    allowed = ((words.unsqueeze(-1) >> bits) & 1).bool().flatten(1)[:, :vocab_size]
    if not allowed.any(1).all():
        raise LogitsProcessorError(
            f"{name}: edits() forbids every token of a row: allow at least one"
        )
    at = rows.to(logits.device)
    now = logits[at]
    logits[at] = torch.where(allowed | ~now.isfinite(), now, FORBIDDEN)


def _check_some_left(logits: "Tensor", places: Sequence[Place]) -> None:
    """Raise NoTokenLeftError if the masks of a request and its settings leave no token, unless
    a draft before it was forbidden: then the row is not used."""
    allowed = logits[[place.row for place in places]] != FORBIDDEN
    masked = allowed.any(1).logical_not().tolist()
    for number, place in enumerate(places):
        if place.forbidden:
            allowed[number, list(place.forbidden)] = False
    numbers = {(id(place.processing), len(place.drafts)): i for i, place in enumerate(places)}
    left = allowed.any(1).tolist()
    for number in [number for number, some in enumerate(left) if not some]:
        place = places[number]
        before = [numbers[id(place.processing), i] for i in range(len(place.drafts))]
        if allowed[before, list(place.drafts)].all():
            names = " and ".join(one.name for one in place.processing)
            error = NoTokenLeftError(
                f"{names} together forbid every token: use one of them, or give them arguments "
                "that agree"
                if masked[number]
                else f"{names} allows only tokens that logit_bias or min_new_tokens forbids: "
                "change these settings or its argument, so that they agree"
            )
            error.processing = place.processing
            raise error


def _check(name: str, what: str, indices: "Tensor", stop: int) -> None:
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < stop:
        raise LogitsProcessorError(
            f"{name}: edits() must give {what} from 0 to {stop - 1}, found {indices.tolist()!r:.60}"
        )
