"""Measures which paths of an executor's code the steps of a comparison reached.

A mistake in a path that no step takes shows nowhere. Each item is a path that a known kind of
mistake hides in, such as the softmax that is not rescaled from one tile of keys to the next.
"""

from collections.abc import Iterator, Sequence

from attrs import asdict, define, evolve, field, frozen
from torch import Tensor

from tilewright import plugins
from tilewright.errors import PluginError
from tilewright.scheduler import Part, Step
from tilewright.types import ExecutorLimits, ModelConfig, RuntimeConfig, Tiles
from tilewright_compare.judge import Phase
from tilewright_compare.sides import Choice

PHASES: tuple[Phase, ...] = ("prefill", "decode")

SUBMIT = "compared the tokens that the candidate samples itself"
SCORED = "scored the prompts"
MIXED = "mixed prompts and decoding in a step"

_MOST_NAMES = 5
"""Largest number of items that the first line of a report names."""


@frozen(kw_only=True)
class Item:
    """A path of the candidate's code, and whether a step took it."""

    name: str
    """What a step did, as in ``never crossed a page``; without the phase."""
    phase: Phase | None = None
    """The phase that it belongs to; None: to none, or to one only."""
    reached: bool = False
    detail: str = ""
    """The first step that took the path, or what is missing."""

    def __str__(self) -> str:
        return f"{self.name} in {self.phase}" if self.phase else self.name


def missing(items: Sequence[Item]) -> list[Item]:
    """The items that were not reached: those of both phases as one, and nothing else of a phase
    that did not run."""
    left = [item for item in items if not item.reached]
    absent = {phase for phase in PHASES if any(item.name == f"ran {phase}" for item in left)}
    left = [i for i in left if (i.phase or ONE_PHASE.get(i.name)) not in absent]
    found: dict[str, Item] = {}
    for item in left:
        twin = found.get(item.name)
        found[item.name] = (
            evolve(twin, phase=None, detail="; ".join(filter(None, (twin.detail, item.detail))))
            if twin
            else item
        )
    return list(found.values())


def shortened(items: Sequence[Item]) -> str:
    """The first items as a list in a sentence, and how many are left."""
    names = list(map(str, items))
    if len(names) <= _MOST_NAMES + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"


def declared_tiles(choice: Choice, config: ModelConfig, runtime: RuntimeConfig) -> Tiles | None:
    """What the executor's plugin says of its tiles; None if it has no hook ``tiles``.

    Raises what the hook raises, and PluginError for other exceptions and another result.
    """
    selected = plugins.select(plugins.new_manager(), "executor", choice.executor)
    options = selected.read_options({"executor": choice.options})
    tiles = selected.call("tiles", model_config=config, runtime_config=runtime, options=options)
    if tiles is not None and not isinstance(tiles, Tiles):
        raise PluginError(f"{selected.plugin}: tiles() must return a Tiles, found {tiles!r:.80}")
    for name, size in asdict(tiles).items() if tiles else ():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise PluginError(
                f"{selected.plugin}: tiles() must return sizes of at least 1 or None, found "
                f"{name}={size!r:.80}"
            )
    return tiles


@define(kw_only=True)
class Coverage:
    """What the steps so far reached."""

    tiles: Tiles | None
    """None: the executor declares none."""
    page_size: int
    limits: ExecutorLimits
    kv_heads: int
    hidden_size: int
    unmixed: str = ""
    """Why there is no mixed step; else empty."""
    samples: bool = False
    """Whether the candidate can sample, which no comparison runs."""
    _reached: dict[tuple[str, Phase | None], str] = field(factory=dict, init=False)
    """The first step of each path, in words."""
    _filled: dict[str, set[Phase]] = field(factory=dict, init=False)
    """The phases in which a request wrote the last slot of a page, by request id."""
    _heads: dict[tuple[Phase, int], list[bool]] = field(factory=dict, init=False)
    """Whether each KV head shows, by phase and layer."""
    _chunks: dict[str, int] = field(factory=dict, init=False)
    """Chunks of each prompt, by request id."""
    _contexts: tuple[int, int] = field(default=(0, 0), init=False)
    """The smallest and the largest context of a step, in tokens."""
    _sequences: int = field(default=0, init=False)
    """The most sequences of a step."""

    def add(self, number: int, step: Step, phase: Phase) -> None:
        """Count step ``number``, which has run."""
        where = f"step {number}"
        lengths = step.batch.context_lens.tolist()
        low, high = self._contexts
        self._contexts = (min(lengths + [low] * (low > 0)), max(high, *lengths))
        self._sequences = max(self._sequences, len(lengths))
        for part in step.parts:
            name = part.request.request_id
            for written in self._filled.get(name, ()):
                self._reach(LAST_SLOT, written, where)
            if part.stop // self.page_size > part.start // self.page_size:
                self._filled.setdefault(name, set()).add(phase)
            if not part.decoding and phase != "mixed":
                self._chunks[name] = self._chunks.get(name, 0) + 1
        if phase == "mixed":
            self._reach(MIXED, None, where)
            return
        self._reach(f"ran {phase}", None, where)
        for reached in self._of_step(step, phase):
            self._reach(reached, phase, where)
        for part in step.parts:
            for reached in self._of_part(part, phase):
                self._reach(reached, phase, f"{where}, {part.request.request_id}")

    def add_heads(
        self,
        phase: Phase,
        layer: int,
        attention: Tensor,
        weight: Tensor,
        output: Tensor,
        limit: float,
    ) -> None:
        """Find the KV heads whose part of the layer's output is larger than its error may be.

        attention [T, num_heads * head_dim] and output [T, hidden_size] are the truth's, weight
        [hidden_size, num_heads * head_dim] that of o_proj; limit: of the output's relative error.
        """
        seen = self._heads.setdefault((phase, layer), [False] * self.kv_heads)
        parts = zip(attention.chunk(self.kv_heads, 1), weight.chunk(self.kv_heads, 1), strict=True)
        for head, (attended, columns) in enumerate(parts):
            if not seen[head]:
                part = attended.float() @ columns.float().T
                seen[head] = float(part.norm()) > limit * float(output.float().norm())

    def wants_heads(self, phase: Phase, layer: int) -> bool:
        return phase in PHASES and not all(self._heads.get((phase, layer), [False]))

    def _reach(self, name: str, phase: Phase | None, where: str) -> None:
        key = (name, None if name in ONE_PHASE else phase)
        self._reached.setdefault(key, where)

    def _of_step(self, step: Step, phase: Phase) -> Iterator[str]:
        batch, parts = step.batch, step.parts
        if len(parts) > 1:
            yield SEVERAL
        if len({part.stop for part in parts}) > 1:
            yield RAGGED
        held = (batch.block_table >= 0).sum(1).tolist()
        if len(set(held)) > 1:
            yield UNEVEN
        table = batch.block_table
        follows = table[:, 1:] == table[:, :-1] + 1
        if bool((~follows & (table[:, 1:] >= 0)).any()):
            yield SCATTERED
        if phase == "prefill" and len(batch.token_ids) == self.limits.max_batch_tokens:
            yield FULL_TOKENS
        if phase == "decode":
            if len(parts) == self.limits.max_batch_size:
                yield FULL_BATCH
            if self.tiles and (rows := self.tiles.decode_rows):
                yield from _filling(len(parts), rows, "decode")

    def _of_part(self, part: Part, phase: Phase) -> Iterator[str]:
        size, start, stop = self.page_size, part.start, part.stop
        begins_a_page = start > 0 and start % size == 0
        if start // size != (stop - 1) // size or (phase == "decode" and begins_a_page):
            yield CROSSED
        if stop > 2 * size:
            yield THIRD_PAGE
        tiles = self.tiles or Tiles()
        rows = tiles.prefill_rows or stop - start
        if phase == "prefill":
            if start:
                yield SECOND_CHUNK
            if start % size:
                yield INSIDE_PAGE
            if tiles.kv_rows and start % tiles.kv_rows:
                yield INSIDE_TILE
            if stop % size == 0:
                yield PAGE_END
            if stop - start == 1:
                yield ONE_TOKEN
            if tiles.prefill_rows:
                yield from _filling(stop - start, rows, "prefill")
        if keys := tiles.kv_rows:
            for first in range(start, stop, rows):
                context = min(first + rows, stop)
                if context > keys:
                    yield SECOND_TILE
                if context > 2 * keys:
                    yield THIRD_TILE
                yield PARTIAL_TILE if context % keys else WHOLE_TILE

    def items(self) -> list[Item]:
        """All paths that the candidate has, as far as it declares them, the plainest first."""
        items = [self._item(name, phase) for name, phase in self._paths()]
        for phase in PHASES:
            heads = {layer: seen for (p, layer), seen in self._heads.items() if p == phase}
            hidden = [
                f"KV head {head} of layer {layer}"
                for layer, seen in sorted(heads.items())
                for head, shows in enumerate(seen)
                if not shows
            ]
            if heads:
                detail = f"less than rounding hides: {', '.join(hidden[:5])}" if hidden else ""
                if len(hidden) > 5:
                    detail += f" and {len(hidden) - 5} more"
                items.append(Item(name=HEADS, phase=phase, reached=not hidden, detail=detail))
        if self.tiles and self.tiles.columns:
            wide = self.hidden_size > self.tiles.columns
            why = f"the model's {self.hidden_size} fit in one of {self.tiles.columns}"
            items.append(Item(name=SECOND_COLUMNS, reached=wide, detail="" if wide else why))
        if self.samples:
            items.append(Item(name=SUBMIT, detail="submit is not run"))
        return items

    def _item(self, name: str, phase: Phase | None) -> Item:
        where = self._reached.get((name, phase))
        why = {
            MIXED: self.unmixed,
            FULL_TOKENS: f"at most {self.limits.max_batch_tokens}",
            FULL_BATCH: f"at most {self.limits.max_batch_size}",
        }
        detail = where or why.get(name, "")
        return Item(name=name, phase=phase, reached=where is not None, detail=detail)

    def _paths(self) -> Iterator[tuple[str, Phase | None]]:
        tiles, limits = self.tiles or Tiles(), self.limits
        for phase in PHASES:
            yield f"ran {phase}", None
        names = [CROSSED, THIRD_PAGE, LAST_SLOT]
        if tiles.kv_rows:
            names += [SECOND_TILE, THIRD_TILE, WHOLE_TILE]
            names += [PARTIAL_TILE] * (tiles.kv_rows > 1)
        several = limits.max_batch_size != 1
        names += [SEVERAL, RAGGED, UNEVEN] * several + [SCATTERED]
        chunks = [SECOND_CHUNK, INSIDE_PAGE] if self.page_size > 1 else [SECOND_CHUNK]
        if tiles.kv_rows and tiles.kv_rows not in (1, self.page_size):
            chunks.append(INSIDE_TILE)
        yield from ((name, None) for name in chunks)
        if limits.mixed and several:
            yield MIXED, None
        yield from ((name, phase) for name in names for phase in PHASES)
        for kind, rows in (("prefill", tiles.prefill_rows), ("decode", tiles.decode_rows)):
            if rows:
                fillings = (what for what in _FILLINGS if rows > 1 or what != "padded a")
                yield from ((f"{what} {kind} tile", None) for what in fillings)
        yield PAGE_END, None
        if several:  # alone, a single token is decode
            yield ONE_TOKEN, None
        if limits.max_batch_tokens is not None:
            yield FULL_TOKENS, None
        if limits.max_batch_size is not None:
            yield FULL_BATCH, None

    @property
    def over(self) -> str:
        """What was run, in words."""
        crossed = [p for p in PHASES if (CROSSED, p) in self._reached]
        chunks, prompts = max(self._chunks.values(), default=0), len(self._chunks)
        low, high = self._contexts
        told = [
            f"{prompts} prompt{'s' * (prompts != 1)}",
            f"{chunks} chunk{'s' * (chunks != 1)}",
            f"contexts of {low} to {high} tokens",
            f"pages of {self.page_size}"
            + (f" (crossed in {' and '.join(crossed)})" if crossed else ""),
        ]
        tiles = self.tiles or Tiles()
        sizes = {
            "prefill": tiles.prefill_rows,
            "decode": tiles.decode_rows,
            "attention": tiles.kv_rows,
        }
        if named := [f"{size} ({what})" for what, size in sizes.items() if size]:
            told.append(f"tiles of {', '.join(named)}")
        told.append(f"up to {self._sequences} sequence{'s' * (self._sequences != 1)} a step")
        return ", ".join(told)


CROSSED = "crossed a page"
"""A chunk that has tokens in two pages, or a decoded token that is the first of its page."""
THIRD_PAGE = "reached a third page"
LAST_SLOT = "read back the last slot of a page"
"""The phase itself has written that slot."""
SECOND_CHUNK = "ran a second chunk"
INSIDE_PAGE = "began a chunk inside a page"
INSIDE_TILE = "began a chunk inside an attention tile"
PAGE_END = "ended a chunk at the end of a page"
ONE_TOKEN = "ran a single token in prefill"
SECOND_TILE = "reached a second attention tile"
THIRD_TILE = "reached a third attention tile"
PARTIAL_TILE = "padded the last attention tile"
WHOLE_TILE = "filled the last attention tile"
SECOND_COLUMNS = "ran a second tile of columns"
SEVERAL = "ran several sequences"
RAGGED = "ran sequences of different lengths"
UNEVEN = "ran sequences with different numbers of pages"
SCATTERED = "read pages out of order"
FULL_TOKENS = "filled a step with tokens"
FULL_BATCH = "filled a step with sequences"
HEADS = "saw every KV head above rounding"

_FILLINGS = ("filled a", "padded a", "ran a second")

ONE_PHASE: dict[str, Phase] = {
    **dict.fromkeys(
        (SECOND_CHUNK, INSIDE_PAGE, INSIDE_TILE, PAGE_END, ONE_TOKEN, FULL_TOKENS), "prefill"
    ),
    FULL_BATCH: "decode",
    **{f"{what} {kind} tile": kind for what in _FILLINGS for kind in PHASES},
}
"""The phase of the items that only one phase can reach."""


def _filling(count: int, rows: int, kind: str) -> Iterator[str]:
    full, partial, second = (f"{what} {kind} tile" for what in _FILLINGS)
    if count >= rows:
        yield full
    if count % rows:
        yield partial
    if count > rows:
        yield second
