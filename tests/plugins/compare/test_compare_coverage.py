"""A comparison says what it did not reach, and reaches everything where it chooses its own run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from attrs import evolve
from planted import Plant, installed

from tilewright import hookimpl
from tilewright.cli import main
from tilewright.kv_cache import KvCacheManager
from tilewright.request import Request
from tilewright.scheduler import Scheduler
from tilewright.types import ExecutorLimits, RuntimeConfig, SamplingParams, Tiles
from tilewright_compare import Choice, Comparison, compare
from tilewright_compare.coverage import Coverage, Item, missing, shortened
from tilewright_compare.default_run import Plan, default_run
from tilewright_compare.sides import scatter_pages
from tilewright_torch import plugin as torch_plugin

EMULATED = ["--candidate", "pypto-npu", "-o", "candidate.platform=emulated"]
FLOAT32 = ["-o", "candidate.runtime.weight_dtype=float32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where models are written; ``planted`` is installed meanwhile, and torch has one thread."""
    folder = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with installed(folder):
        yield folder
    torch.set_num_threads(threads)


# --- what a run reaches ---------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", [FLOAT32, EMULATED], ids=["torch", "pypto-npu"])
def test_the_default_run_reaches_every_path(capsys, candidate):
    code = main(["compare", *candidate, "--strict", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [item for item in report["coverage"] if not item["reached"]] == []
    assert len(report["coverage"]) > 20
    assert (code, report["verdict"]) == (0, "equal")
    assert report["sentence"] == f"equal over {report['over']}"
    assert "(crossed in prefill and decode)" in report["over"]


def test_one_token_reaches_hardly_anything_and_strict_says_so(capsys):
    argv = ["compare", *FLOAT32, "--prompt", "We", "--new-tokens", "1"]
    assert main([*argv, "--strict"]) == 3
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("equal, but never ran prefill, ")
    assert "in prefill" not in first
    assert second == (
        "next: to reach more: tilewright compare -o candidate.runtime.weight_dtype=float32 --strict"
    )
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    left = {item["name"] for item in report["coverage"] if not item["reached"]}
    assert {"ran prefill", "crossed a page in decode", "ran several sequences in decode"} <= left
    assert not {"ran decode", "mixed prompts and decoding in a step"} & left


@pytest.mark.parametrize(
    "setting", ["candidate.runtime.page_size=7", "reference.runtime.page_size=9"]
)
def test_the_command_that_reaches_more_keeps_a_page_size_that_alone_tells_the_sides_apart(
    capsys, setting
):
    main(["compare", "-o", setting, "--prompt", "We", "--new-tokens", "1"])
    hint = capsys.readouterr().out.splitlines()[1]
    assert hint == f"next: to reach more: tilewright compare -o {setting} --strict"


def test_the_command_that_has_just_run_is_not_told_again(capsys):
    setting = ["-o", "candidate.runtime.page_size=1024"]
    main(["compare", *setting])
    out = capsys.readouterr().out
    assert out.startswith("equal, but never ")
    assert "to reach more" not in out


def test_the_command_that_reaches_more_keeps_the_settings_of_both_sides(capsys, tmp_path):
    run = tmp_path / "run.toml"
    run.write_text('[prompts]\ntext = ["We"]\n[options.executor]\nstream_weights = true\n')
    argv = [str(run), "--new-tokens", "1", "-o", "reference.threads=1"]
    main(["compare", *argv, "-o", "candidate.runtime.page_size=64"])
    hint = capsys.readouterr().out.splitlines()[1]
    assert hint.endswith(
        "tilewright compare -o candidate.stream_weights=true -o reference.threads=1 --strict"
    )


TILES = [
    Tiles(),
    Tiles(page_size=1),
    Tiles(page_size=2),
    Tiles(page_size=48, prefill_rows=16, decode_rows=16, kv_rows=16),
    Tiles(page_size=48, prefill_rows=64, decode_rows=16, kv_rows=16),
    Tiles(page_size=16, prefill_rows=16, decode_rows=4, kv_rows=64),
    Tiles(page_size=128, prefill_rows=64, decode_rows=16, kv_rows=128),
    Tiles(page_size=5, decode_rows=8),
    Tiles(page_size=32, prefill_rows=128, kv_rows=32),
    Tiles(page_size=7, prefill_rows=1, decode_rows=1, kv_rows=1),
]


def scheduled(tiles: Tiles, positions: int) -> Coverage:
    """What the default run for these tiles reaches."""
    return planned(default_run(tiles, range(100), positions), tiles)


def planned(plan: Plan, tiles: Tiles | None) -> Coverage:
    """What a run reaches in an executor that runs no mixed steps."""
    page_size = plan.page_size or 16
    batch = len(plan.prompts)
    limits = ExecutorLimits(mixed=False, max_batch_size=batch, max_batch_tokens=plan.chunk)
    allocator = KvCacheManager(500, page_size)
    scatter_pages(allocator)
    scheduler = Scheduler(allocator, batch, plan.chunk, limits=limits, prefix_cache=False)
    for i, ids in enumerate(plan.prompts):
        scheduler.add(Request(f"prompt-{i}", tuple(ids), SamplingParams(), plan.new_tokens))
    coverage = Coverage(tiles=tiles, page_size=page_size, limits=limits, kv_heads=1, hidden_size=64)
    number = 0
    while scheduler.admit() or scheduler.num_running:
        step = scheduler.schedule()
        assert step is not None
        for request in step.sampled:
            request.output_token_ids.append(1)
        scheduler.done(step)
        phase = "decode" if step.batch.max_query_len == 1 else "prefill"
        coverage.add(number, step, phase)
        number += 1
        for request in step.sampled:
            if len(request.output_token_ids) == request.max_new_tokens:
                scheduler.remove(request)
    return coverage


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_the_default_run_is_made_for_the_tiles_at_hand(tiles: Tiles):
    assert list(map(str, missing(scheduled(tiles, 2048).items()))) == []


def test_an_executor_of_one_sequence_has_no_paths_of_several():
    limits = ExecutorLimits(max_batch_size=1)
    names = {
        str(i)
        for i in Coverage(
            tiles=None, page_size=5, limits=limits, kv_heads=1, hidden_size=64
        ).items()
    }
    several = {"mixed prompts and decoding in a step", "ran a single token in prefill"}
    several |= {name for name in names if "sequences of" in name or "several" in name}
    assert not several & names
    assert {"crossed a page in decode", "read pages out of order in prefill"} <= names


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("positions", [8, 64])
def test_a_model_of_few_positions_gets_shorter_prompts(tiles: Tiles, positions: int):
    plan = default_run(tiles, range(100), positions)
    assert all(0 < len(ids) <= positions - plan.new_tokens for ids in plan.prompts)
    left = {str(item) for item in missing(scheduled(tiles, positions).items())}
    assert "ran decode" not in left
    assert "ran prefill" not in left
    if (tiles.page_size or 16) > positions:
        assert "crossed a page" in left


@pytest.mark.parametrize(
    ("tokens", "chunk", "crossed"),
    [
        (8, 4, ["decode"]),
        (7, 8, ["prefill"]),
        (8, 8, ["prefill", "decode"]),
        (4, 4, ["decode"]),
        (3, 4, []),
    ],
)
def test_a_page_is_crossed_within_a_chunk_or_by_a_decoded_token(tokens, chunk, crossed):
    plan = Plan(prompts=[[1] * tokens], new_tokens=2, chunk=chunk, page_size=4)
    items = planned(plan, None).items()
    reached = [i.phase for i in items if i.name == "crossed a page" and i.reached]
    assert reached == crossed


@pytest.mark.parametrize("size", [0, -2, "16", 2.5])
def test_tiles_of_no_size_are_refused(capsys, monkeypatch, size):
    @hookimpl
    def tiles():
        return Tiles(kv_rows=size)

    monkeypatch.setattr(torch_plugin, "tiles", tiles)
    assert main(["compare", *FLOAT32]) == 2
    assert f"must return sizes of at least 1 or None, found kv_rows={size!r}" in (
        capsys.readouterr().err
    )


def test_a_model_as_wide_as_one_tile_of_columns_is_thin():
    for columns, wide in ((64, False), (32, True)):
        coverage = Coverage(
            tiles=Tiles(columns=columns),
            page_size=5,
            limits=ExecutorLimits(),
            kv_heads=1,
            hidden_size=64,
        )
        (item,) = (i for i in coverage.items() if i.name == "ran a second tile of columns")
        assert item.reached == wide
        assert item.detail == ("" if wide else "the model's 64 fit in one of 64")


# --- how it is said -------------------------------------------------------------------------------


def test_items_of_both_phases_are_said_once():
    items = [
        Item(name="crossed a page", phase="prefill"),
        Item(name="crossed a page", phase="decode"),
        Item(name="ran several sequences", phase="prefill", reached=True),
        Item(name="ran several sequences", phase="decode"),
        Item(name="ran a second chunk"),
    ]
    said = ["crossed a page", "ran several sequences in decode", "ran a second chunk"]
    assert list(map(str, missing(items))) == said
    assert shortened(missing(items)) == ", ".join(said)
    assert shortened([Item(name=f"{i}") for i in range(9)]) == "0, 1, 2, 3, 4 and 4 more"


def test_nothing_else_is_said_of_a_phase_that_did_not_run():
    names = ("ran decode", "filled a step with sequences", "padded a decode tile")
    items = [*(Item(name=name) for name in names), Item(name="crossed a page", phase="decode")]
    assert list(map(str, missing(items))) == ["ran decode"]


def test_a_kv_head_that_rounding_would_hide_is_named():
    coverage = Coverage(
        tiles=None, page_size=16, limits=ExecutorLimits(), kv_heads=2, hidden_size=64
    )
    attention, weight = torch.ones(3, 8), torch.eye(8)
    attention[:, 4:] = 1e-4
    assert coverage.wants_heads("prefill", 2)
    coverage.add_heads("prefill", 2, attention, weight, torch.ones(3, 8), 0.01)
    item = coverage.items()[-1]
    assert (item.reached, item.phase) == (False, "prefill")
    assert item.detail == "less than rounding hides: KV head 1 of layer 2"
    attention[:, 4:] = 1.0
    coverage.add_heads("prefill", 2, attention, weight, torch.ones(3, 8), 0.01)
    assert coverage.items()[-1].reached
    assert not coverage.wants_heads("prefill", 2)


def test_an_executor_without_the_hook_is_said_to_declare_nothing(models: Path):
    found = Plant(model="qwen3-tied", mistake="none", dtype="float32", phase="both", layer=1)
    assert found.compare(models).sentence.endswith("; planted declares no tiles")


def test_prompts_wait_where_an_executor_takes_fewer_at_a_time(models: Path, monkeypatch):
    limits = ExecutorLimits(max_batch_size=1, max_batch_tokens=4, mixed=False)
    monkeypatch.setattr(planted, "LIMITS", limits)
    found = planted_run(models)
    assert found.finished
    assert found.divergence is None
    assert found.over.endswith("up to 1 sequence a step")
    assert {row.request for row in found.logits} == {0, 1}


# --- slots that nobody wrote ----------------------------------------------------------------------


def planted_run(models: Path) -> Comparison:
    plant = Plant(model="qwen3-tied", mistake="none", dtype="float32", phase="both", layer=1)
    plant.compare(models)
    choice = Choice(executor="planted", runtime=RuntimeConfig(page_size=4))
    prompts = [[5, 6, 7, 8, 9, 10], [7, 8, 9]]
    return compare(models / "qwen3-tied", Choice(executor="torch"), choice, prompts, new_tokens=4)


def test_a_read_of_one_slot_too_many_is_found_and_explained(models: Path, monkeypatch):
    run_layer = planted.PlantedExecutor.run_layer

    def too_far(self: Any, step: Any, layer: int, hidden: Any, tap: Any = None) -> Any:
        if layer == 1 and step.phase == "decode":
            longer = evolve(step.batch, context_lens=step.batch.context_lens + 1)
            step = evolve(step, batch=longer)
        return run_layer(self, step, layer, hidden, tap)

    monkeypatch.setattr(planted.PlantedExecutor, "run_layer", too_far)
    found = planted_run(models)
    first = found.divergence
    assert first is not None
    assert (first.place.phase, first.place.tensor) == ("decode", "layers.1.attention")
    assert first.why.endswith(
        "are not finite, such as NaN, which slots of the cache hold until they are written"
    )


def test_a_slot_that_is_not_written_is_found_in_the_cache(models: Path, monkeypatch):
    run_layer = planted.PlantedExecutor.run_layer

    def unwritten(self: Any, step: Any, layer: int, hidden: Any, tap: Any = None) -> Any:
        output = run_layer(self, step, layer, hidden, tap)
        if layer == 1:
            slots = step.batch.slot_mapping.long()
            self._kv[1][1][slots[slots % 4 == 3]] = torch.nan
        return output

    monkeypatch.setattr(planted.PlantedExecutor, "run_layer", unwritten)
    first = planted_run(models).divergence
    assert first is not None
    assert first.place.tensor == "layers.1.v_cache"
    assert first.why.endswith("elements are not finite: slots hold NaN until they are written")


@pytest.mark.parametrize("marker", [-7.0, float("inf"), 0.0])
def test_what_an_executor_fills_its_cache_with_is_left_alone(models: Path, monkeypatch, marker):
    allocate_kv, begin = planted.PlantedExecutor.allocate_kv, planted.PlantedExecutor.begin
    held: list[torch.Tensor] = []

    def filled(self: Any, num_pages: int) -> None:
        allocate_kv(self, num_pages)
        for keys, values in self._kv:
            keys.fill_(marker), values.fill_(marker)

    def noted(self: Any, batch: Any) -> Any:
        held.append(self._kv[0][0].clone())
        return begin(self, batch)

    monkeypatch.setattr(planted.PlantedExecutor, "allocate_kv", filled)
    monkeypatch.setattr(planted.PlantedExecutor, "begin", noted)
    assert planted_run(models).divergence is None
    expected = torch.full_like(held[0], marker or torch.nan)
    assert torch.equal(held[0].nan_to_num(123.0), expected.nan_to_num(123.0))
