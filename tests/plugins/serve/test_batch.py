"""Batch files: which lines get which results, once each, whatever ends a run."""

import asyncio
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tilewright.errors import ConfigError, ExecutorError
from tilewright_serve import batch

ASKED = {"model": "m", "executor": "torch", "options": {"executor": {"threads": 2}}}


def line(custom_id: Any, prompt: str = "abc", **changes: Any) -> bytes:
    body = {"model": "m", "prompt": prompt}
    value = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps({**value, **changes}).encode()


async def echo(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Answers a prompt with itself reversed, and refuses an empty one."""
    prompt = json.loads(body)["prompt"]
    if not prompt:
        return 400, {"error": {"message": "the prompt is empty"}}
    return 200, {"path": path, "text": prompt[::-1], "usage": {"completion_tokens": len(prompt)}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def run(source, output, answer=echo, max_in_flight=4, asked=ASKED, **more) -> batch.Tally:
    """A whole run, as the command makes it."""
    found = batch.survey(source)
    with batch.locked(output, source) as file:
        tally = batch.begin(file, found, asked)
        asyncio.run(batch.run(answer, found, file, tally, max_in_flight, **more))
    return tally


def records(output: Path) -> list[dict[str, Any]]:
    data = output.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def by_id(output: Path) -> dict[str, dict[str, Any]]:
    found = records(output)
    assert len({r["id"] for r in found}) == len(found)
    return {r["id"]: r for r in found}


# --- lines and their results ----------------------------------------------------------------------


def test_each_request_has_one_result_in_openais_form(source, output):
    chat = {"url": "/v1/chat/completions"}
    source.write_bytes(b"\n".join([line("a", "xyz"), line("b", ""), line("ü\ud800", "ß", **chat)]))
    tally = run(source, output)
    assert (tally.completed, tally.failed, tally.skipped, tally.new_tokens) == (2, 1, 0, 4)
    found = {r["custom_id"]: r for r in records(output)}
    assert set(found) == {"a", "b", "ü\ud800"}
    for record in found.values():
        assert list(record) == ["id", "custom_id", "response", "error"]
        assert record["id"].startswith("batch_req_")
        assert list(record["response"]) == ["status_code", "request_id", "body"]
        assert record["error"] is None
    assert found["a"]["response"]["status_code"] == 200
    assert found["a"]["response"]["body"]["text"] == "zyx"
    assert found["b"]["response"]["status_code"] == 400
    assert found["b"]["response"]["body"] == {"error": {"message": "the prompt is empty"}}
    assert found["ü\ud800"]["response"]["body"]["path"] == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("bad", "code", "custom_id", "words"),
    [
        (b'{"custom_id": "x"', "invalid_json_line", None, "expected JSON"),
        (b"[" * 100_000, "invalid_json_line", None, "expected JSON"),
        (b'{"n": %s}' % (b"9" * 5000), "invalid_json_line", None, "expected JSON"),
        (b'"\xff"', "invalid_json_line", None, "expected UTF-8, found byte 0xff"),
        (b"[1]", "invalid_json_line", None, "expected a JSON object, found [1]"),
        (line(None), "missing_custom_id", None, "custom_id: expected text, found none"),
        (line(7), "missing_custom_id", None, "custom_id: expected text, found 7"),
        (line("ok"), "duplicate_custom_id", "ok", "found 'ok' again"),
        (line("x", method="GET"), "invalid_method", "x", "method: expected 'POST', found 'GET'"),
        (line("x", url="/v1/embeddings"), "invalid_url", "x", "found '/v1/embeddings'"),
        (line("x", url=["/v1/completions"]), "invalid_url", "x", "found ['/v1/completions']"),
        (line("x", body=[]), "invalid_body", "x", "body: expected a JSON object, found []"),
        (line("x", body={"stream": True}), "invalid_stream", "x", "body.stream: expected false"),
    ],
)
def test_a_wrong_line_has_a_result_with_an_error(source, output, bad, code, custom_id, words):
    source.write_bytes(b"\n".join([line("ok"), bad, line("last")]))
    tally = run(source, output)
    assert (tally.completed, tally.failed) == (2, 1)
    assert Counter(r["custom_id"] for r in records(output)) == Counter(["ok", custom_id, "last"])
    (wrong,) = [r for r in records(output) if r["error"]]
    assert (wrong["custom_id"], wrong["response"]) == (custom_id, None)
    assert wrong["error"]["code"] == code
    assert wrong["error"]["message"].startswith("line 2: ")
    assert words in wrong["error"]["message"]
    again = run(source, output)
    assert (again.completed, again.failed, again.skipped, again.skipped_failed) == (0, 0, 3, 1)
    assert len(records(output)) == 3


def test_a_line_that_is_too_long_is_an_error_and_is_not_kept_in_memory(source, output, monkeypatch):
    monkeypatch.setattr(batch, "MOST_BYTES", 2000)
    long = line("long", "x" * 3_000_000)
    exact = line("exact", "x" * (2000 - len(line("exact", ""))))
    source.write_bytes(b"\n".join([long, exact, long]))
    assert {len(data) for _, data in batch._lines(source, batch.hashlib.sha256())} == {2000, 2001}
    run(source, output)
    codes = [(r["custom_id"], r["error"] and r["error"]["code"]) for r in records(output)]
    assert sorted(codes, key=str) == [
        ("exact", None),
        (None, "line_too_long"),
        (None, "line_too_long"),
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b" \r\n\t\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n\r\n"])
def test_line_ends_blank_lines_and_a_byte_order_mark_are_accepted(source, output, end, last):
    source.write_bytes(b"\xef\xbb\xbf" + end.join([line("a"), line("b"), line("c")]) + last)
    tally = run(source, output)
    assert (tally.total, tally.completed, tally.failed) == (3, 3, 0)


def test_a_result_is_one_line_also_for_readers_that_know_unicodes_line_ends(source, output):
    source.write_bytes(line("a", "\u2028\u0085\n\r"))
    run(source, output)
    (text,) = output.read_text().splitlines()
    assert json.loads(text)["response"]["body"]["text"] == "\r\n\u0085\u2028"


def test_an_exception_is_the_result_of_its_request_alone(source, output):
    async def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if json.loads(body)["prompt"] == "bad":
            raise OSError("no such thing")
        return await echo(path, body)

    source.write_bytes(b"\n".join([line("a"), line("b", "bad"), line("c")]))
    tally = run(source, output, answer)
    assert (tally.completed, tally.failed) == (2, 1)
    (wrong,) = [r for r in records(output) if r["error"]]
    assert wrong["custom_id"] == "b"
    assert wrong["error"] == {"code": "server_error", "message": "OSError: no such thing"}


@pytest.mark.parametrize("how", ["429", "503", "raise"])
def test_what_is_about_no_request_ends_the_run_and_is_no_result(source, output, how):
    asked = []

    async def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        asked.append(body)
        if len(asked) < 3:
            return await echo(path, body)
        if how == "raise":
            raise ExecutorError("the device is lost")
        return int(how), {"error": {"message": "the device is lost"}}

    source.write_bytes(b"\n".join(line(str(i)) for i in range(9)))
    with pytest.raises(ExecutorError, match="the device is lost"):
        run(source, output, answer, max_in_flight=1)
    assert len(records(output)) == 2
    tally = run(source, output)
    assert (tally.completed, tally.failed, tally.skipped) == (7, 0, 2)


# --- many at once ---------------------------------------------------------------------------------


def test_a_slow_request_holds_up_no_other(source, output):
    others = asyncio.Event()

    async def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if json.loads(body)["prompt"] == "slow":
            await others.wait()
        return await echo(path, body)

    def report(tally: batch.Tally) -> None:
        if tally.completed == 49:
            others.set()

    source.write_bytes(b"\n".join([line("slow", "slow"), *(line(str(i)) for i in range(49))]))
    run(source, output, answer, max_in_flight=2, report=report)
    assert records(output)[-1]["custom_id"] == "slow"


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_more_requests_are_in_memory_than_in_flight(source, output, count):
    flying = most = read = ended = 0

    async def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        nonlocal flying, most, read, ended
        flying, read = flying + 1, read + 1
        most = max(most, flying)
        assert read - ended <= 16
        await asyncio.sleep(0)
        flying, ended = flying - 1, ended + 1
        return await echo(path, body)

    with source.open("wb") as file:
        file.writelines(line(str(i)) + b"\n" for i in range(count))
    tally = run(source, output, answer, max_in_flight=16)
    assert (tally.completed, tally.failed, most) == (count, 0, 16)
    assert len(by_id(output)) == count


# --- runs that are continued ----------------------------------------------------------------------

CHILD = """
import asyncio, json, random, sys
from pathlib import Path
from test_batch import ASKED, batch, echo

source, output, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)

async def answer(path, body):
    await asyncio.sleep(chance.random() / 200)
    return await echo(path, body)

found = batch.survey(source)
with batch.locked(output, source) as file:
    tally = batch.begin(file, found, ASKED)
    print(tally.skipped, flush=True)
    asyncio.run(batch.run(answer, found, file, tally, 8))
"""


def mixed_lines(count: int, chance: random.Random) -> list[bytes]:
    """Requests of all kinds, with long answers that no single write may tear unnoticed."""
    found = []
    for i in range(count):
        kind = chance.randrange(12)
        if kind == 0:
            found.append(b"{ not JSON")
        elif kind == 1:
            found.append(line(None))
        elif kind == 2:
            found.append(line(f"id {i // 2}"))
        elif kind == 3:
            found.append(b"")
        else:
            found.append(line(f"id {i}", "" if kind == 4 else f"{i} " * chance.randrange(1, 400)))
    return found


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_gives_what_one_run_gives(source, output, kills):
    chance = random.Random(kills)
    source.write_bytes(b"\n".join(mixed_lines(kills * 250, chance)))
    whole = output.with_name("whole.jsonl")
    run(source, whole)
    before = killed = 0
    for seed in range(10 * kills):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(source), str(output), str(seed)],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
        )
        assert child.stdout
        assert int(child.stdout.readline()) >= before
        if killed < kills:
            time.sleep(chance.random() / 8)  # it writes at any point of that time
            child.send_signal(signal.SIGKILL)
        child.stdout.close()
        if child.wait() == 0:
            break
        killed += 1
        kept = output.read_bytes()
        if kept and killed % 2:  # as if a write had been cut short
            torn = chance.randrange(1, len(kept.splitlines()[-1]) + 1)
            os.truncate(output, len(kept) - torn)
            kept = kept[:-torn]
        before = kept.count(b"\n")
    assert killed > 1
    assert by_id(output) == by_id(whole)
    assert sorted(os.listdir(output.parent)) == sorted(
        [source.name, *(f"{o.name}{end}" for o in (output, whole) for end in ("", ".batch.json"))]
    )


@pytest.mark.parametrize("torn", [b"", b"{", b'{"id": "batch_req_', b"\0" * 5000, None])
def test_a_torn_last_line_is_cut_off_and_answered_again(source, output, torn):
    source.write_bytes(b"\n".join([line("a"), line("b"), line("c")]))
    run(source, output)
    whole = by_id(output)
    lines = output.read_bytes().splitlines(keepends=True)
    lines[-1] = lines[-1].rstrip(b"\n") if torn is None else torn
    output.write_bytes(b"".join(lines))
    tally = run(source, output)
    assert (tally.skipped, tally.completed) == (2, 1)
    assert by_id(output) == whole


def test_failures_stay_until_their_lines_are_deleted(source, output):
    source.write_bytes(b"\n".join([line("a"), line("b", "")]))
    run(source, output)

    async def better(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        return 200, {"text": "better"}

    tally = run(source, output, better)
    assert (tally.completed, tally.failed, tally.skipped, tally.skipped_failed) == (0, 0, 2, 1)
    kept = [r for r in output.read_text().splitlines(keepends=True) if '"status_code": 200' in r]
    output.write_text("".join(kept))
    tally = run(source, output, better)
    assert (tally.completed, tally.failed, tally.skipped, tally.skipped_failed) == (1, 0, 1, 0)
    assert {r["custom_id"]: r["response"]["status_code"] for r in records(output)} == {
        "a": 200,
        "b": 200,
    }


def test_a_run_that_is_cancelled_keeps_what_has_ended_and_drops_the_rest(source, output):
    aborted = []

    async def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        prompt = json.loads(body)["prompt"]
        if prompt == "slow":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                aborted.append(body)
                raise
        return await echo(path, body)

    def interrupt(tally: batch.Tally) -> None:
        if tally.completed == 3:
            os.kill(os.getpid(), signal.SIGINT)

    lines = [line("slow", "slow"), *(line(str(i)) for i in range(200))]
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(KeyboardInterrupt):
        run(source, output, answer, max_in_flight=2, report=interrupt)
    assert len(aborted) == 1
    done = len(records(output))
    assert 3 <= done < 10
    tally = run(source, output)
    assert (tally.skipped, tally.completed) == (done, 201 - done)
    assert Counter(r["custom_id"] for r in records(output)) == Counter(
        ["slow", *map(str, range(200))]
    )


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(source, output):
    source.write_bytes(b"\n".join(line(str(i), "x" * 100) for i in range(50)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=os.strerror(errno.EFBIG)) as raised:
            run(source, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = len(records(output))  # the line that did not fit is not there in part
    assert 0 < done < 50
    assert f"its {done} results are whole" in str(raised.value)
    tally = run(source, output)
    assert (tally.skipped, tally.completed) == (done, 50 - done)
    assert len(by_id(output)) == 50


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def begun(source, output):
    source.write_bytes(b"\n".join([line("a"), line("b")]))
    run(source, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0])
    return lines


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({**ASKED, "model": "n"}, "its model was 'm', and now it is 'n'"),
        (
            {**ASKED, "options": {}},
            "its options was {'executor': {'threads': 2}}, and now it is {}",
        ),
        ({"model": "m"}, "its executor was 'torch', and now it is None"),
        ({**ASKED, "more": 1}, "its more was None, and now it is 1"),
    ],
)
def test_an_output_that_was_made_with_other_settings_is_refused(
    source, output, begun, asked, words
):
    with pytest.raises(ConfigError) as raised:
        run(source, output, asked=asked)
    assert words in str(raised.value)
    assert output.read_bytes() == begun[0]
    assert run(source, output).completed == 1


def test_an_output_of_another_input_is_refused(source, output, begun):
    source.write_bytes(source.read_bytes() + b"\n" + line("c"))
    with pytest.raises(ConfigError, match="its input was"):
        run(source, output)
    assert output.read_bytes() == begun[0]


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_file_that_no_batch_has_begun_is_refused_and_kept(source, output, begun, text):
    beside = output.with_name("out.jsonl.batch.json")
    beside.unlink() if text is None else beside.write_text(text)
    with pytest.raises(ConfigError, match=r"is not empty, and out.jsonl.batch.json"):
        run(source, output)
    assert output.read_bytes() == begun[0]
    output.unlink()  # begins again
    assert run(source, output).completed == 2


@pytest.mark.parametrize(
    "other",
    [b"{}\n", b"not JSON\n", b"[1]\n", b'{"id": "batch_req_000000000000_1", "response": null}\n'],
)
def test_a_line_that_is_no_result_of_the_batch_is_refused(source, output, begun, other):
    for data in (other + begun[0], begun[0] + other + begun[1]):
        output.write_bytes(data)
        with pytest.raises(ConfigError, match="expected a result of this batch"):
            run(source, output)
        assert output.read_bytes() == data


def test_two_results_of_one_request_are_refused(source, output, begun):
    output.write_bytes(begun[0] * 2)
    with pytest.raises(
        ConfigError, match=r"line 2: the request of line \d has a result in an earl"
    ):
        run(source, output)


def test_an_input_that_changes_during_the_run_is_noticed(source, output):
    def change(tally: batch.Tally) -> None:
        if tally.completed == 1:
            with source.open("ab") as file:
                file.write(b"\n" + line("new"))

    source.write_bytes(b"\n".join(line(str(i)) for i in range(9)))
    with pytest.raises(ConfigError, match="has changed while it was read"):
        run(source, output, report=change)
    assert "new" not in {r["custom_id"] for r in records(output)}


def test_two_runs_never_write_one_file(source, output, begun):
    with batch.locked(output, source):
        with pytest.raises(ConfigError, match="another run is writing it"):
            run(source, output)
        assert output.read_bytes() == begun[0]
    assert run(source, output).completed == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"\n\r\n \n", "it is empty"),
        (b"a,b\n1,2\n", "line 1: expected JSON"),
        (b"\x89PNG\r\n\x1a\n\0\0", "line 1: expected UTF-8, found byte 0x89"),
        ("ab".encode("utf-16"), "found UTF-16, as PowerShell writes it"),
        (b"\n" + line("a", url="/v1/images"), "line 2: url: expected one of"),
        (
            line("a", body={"model": "gpt"}),
            "line 1: model 'gpt' is asked for, and this run has m: give",
        ),
    ],
)
def test_a_file_without_a_request_is_refused(source, data, words):
    source.write_bytes(data)
    with pytest.raises(ConfigError) as raised:
        batch.survey(source, ["m"])
    assert words in str(raised.value)


def test_paths_that_cannot_be_continued_are_refused(source, output, tmp_path):
    source.write_bytes(line("a"))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match="expected a regular file"):
            batch.survey(path)
        with pytest.raises(ConfigError, match="expected a regular file"):
            run(source, path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        batch.survey(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        run(source, tmp_path / "no" / "folder")
    os.link(source, output)
    with pytest.raises(ConfigError, match="this is the batch file itself"):
        run(source, output)
    assert source.read_bytes() == line("a")
