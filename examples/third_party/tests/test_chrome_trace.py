import json
from pathlib import Path
from typing import Any

import pytest

from acme_tilewright.chrome_trace import ChromeTrace
from tilewright import GenerateConfig, LLMEngine
from tilewright.settings import DEMO_MODEL
from tilewright.types import StepEvent
from tilewright_testing import ObserverSuite


class TestConformance(ObserverSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "acme-tilewright:chrome-trace"


def test_an_event_ends_when_it_is_told_of(tmp_path: Path) -> None:
    times = iter([100.0, 102.5])
    trace = ChromeTrace(tmp_path / "trace.json", clock=lambda: next(times))
    trace.on_step(
        StepEvent(
            model_id="m",
            step=4,
            request_ids=("m-1", "m-2"),
            num_prompt_tokens=0,
            num_decode_tokens=2,
            seconds=0.5,
        )
    )
    trace.on_close()
    (event,) = events(tmp_path / "trace.json")
    about = {"step": 4, "tokens": 2, "requests": ["m-1", "m-2"]}
    assert (event["name"], event["args"]) == ("decode", about)
    assert (event["ts"], event["dur"]) == (2e6, 0.5e6)


def test_the_trace_has_the_load_the_steps_and_the_requests(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("an older trace")
    with LLMEngine.from_plugins(observers=[ChromeTrace(path)]) as engine:
        engine.init_model("m", DEMO_MODEL)
        engine.generate_batch("m", ["We the People", "Congress"], GenerateConfig(max_new_tokens=3))
        assert path.read_text() == "an older trace"
    found = events(path)
    assert [e["name"] for e in found if e["cat"] == "load"] == ["load"]
    assert [e["name"] for e in found if e["cat"] == "steps"] == ["prefill", "decode", "decode"]
    assert sum(e["args"]["new tokens"] for e in found if e["cat"] == "requests") == 6
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        ChromeTrace(tmp_path / "folder").on_close()
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def events(path: Path) -> list[dict[str, Any]]:
    """The trace's events but for names."""
    found = json.loads(path.read_text())["traceEvents"]
    return [e for e in found if e["ph"] != "M"]
