"""Batch files in OpenAI's form: a request in each line of one file, a result in each of another.

A line of the input is ``{"custom_id", "method", "url", "body"}``, and one of the output
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``
(https://platform.openai.com/docs/api-reference/batch). Results have the order in which requests
end. The number of the request's line is part of a result's ``id``, so that a run which goes on with
an earlier one knows which lines have a result, also those that have no valid ``custom_id``.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import Any

from attrs import define, field, frozen

from tilewright.cli.output import json_line
from tilewright.errors import ConfigError, ExecutorError, TilewrightError, on_one_line, quoted
from tilewright.settings import not_utf8
from tilewright.values import shown

Answer = Callable[[str, bytes], Awaitable[tuple[int, dict[str, Any]]]]
"""What a POST of a body to a path answers: the status and the JSON object.

An ExecutorError says that no request can be answered; another exception is about this request."""

URLS = ("/v1/chat/completions", "/v1/completions")
"""The paths of requests that a batch may have."""

_EXPECTED = (
    'expected lines such as {"custom_id": "a", "method": "POST", "url": "/v1/completions", '
    '"body": {"model": "...", "prompt": "..."}}'
)

MOST_BYTES = 64 * 2**20
"""Size limit of a line of the input."""

_SYNC_SECONDS = 5.0
"""Time between two fsyncs. What was written survives the end of the process without them. They are
for the end of the machine, after which the results of the last seconds may have to be made again;
one for each result would take longer than a short answer."""

UNAVAILABLE = (429, 503)
"""Statuses that say nothing about the request: the same one may succeed later."""


# --- the input ------------------------------------------------------------------------------------


class LineError(TilewrightError):
    """A line of the input cannot be answered.

    Attributes:
        code: a word for programs.
        custom_id: the line's, if it has one.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


@frozen(kw_only=True)
class BatchRequest:
    """A valid line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


@frozen(kw_only=True)
class Survey:
    """What a first pass over the input has found."""

    path: Path
    sha256: str
    num_lines: int
    num_requests: int
    """Lines that are not blank, whether their requests are valid or not."""

    @property
    def name(self) -> str:
        """What the ``id`` of each result of this input begins with."""
        return f"batch_req_{self.sha256[:12]}_"


def survey(path: Path, models: Collection[str] | None = None) -> Survey:
    """Read the input once, which finds its digest and its length and holds one line at a time.

    models: the names that requests may ask for; None: any.

    Raises ConfigError for a file that cannot be read twice, and for one in which no line is a
    valid request for one of the models, with what is wrong with the first one.
    """
    name = f"batch file {quoted(str(path), 300)}"
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{name}: expected a regular file, since a run reads it more than once")
    digest = hashlib.sha256()
    number = requests = 0
    wrong = "it is empty"
    valid = False
    for number, line in _lines(path, digest):
        requests += bool(line)
        if valid or not line:
            continue
        try:
            asked = request_of(line).body.get("model")
            valid = models is None or asked is None or asked in models
            found = (
                f"model {shown(asked)} is asked for, and this run has {', '.join(models or ())}: "
                "give the model the name that requests call it by, --model NAME=MODEL"
            )
        except LineError as error:
            found = f"{error}: {_EXPECTED}"
        if requests == 1:
            wrong = f"line {number}: {found}"
    if not valid:
        raise ConfigError(f"{name} has no request that can be answered; {wrong}")
    return Survey(path=path, sha256=digest.hexdigest(), num_lines=number, num_requests=requests)


def _lines(path: Path, digest: "hashlib._Hash") -> Iterator[tuple[int, bytes]]:
    """The number and the content of each line; the content is empty for a blank line.

    A line above the limit is yielded without its rest, so it does not fill the memory.
    digest: is updated with all bytes of the file. Raises ConfigError if it cannot be read.
    """
    number = 0
    with _reading(path, "batch file"), path.open("rb") as file:
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            digest.update(line)
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(2**20)):
                digest.update(rest)
            yield number, (line.removeprefix(BOM_UTF8) if number == 1 else line).strip()


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{what} {quoted(str(path), 300)} cannot be read: {why}") from error


def request_of(line: bytes) -> BatchRequest:
    """A line of the input. Raises LineError, which says what was expected and what was found."""
    if len(line) > MOST_BYTES:
        raise LineError(
            "line_too_long", f"expected at most {MOST_BYTES >> 20} MiB in a line, found more"
        )
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise LineError("invalid_json_line", not_utf8(error)) from error
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", f"expected JSON: {on_one_line(str(error))}") from error
    if not isinstance(value, dict):
        raise LineError("invalid_json_line", f"expected a JSON object, found {shown(value)}")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str):
        found = "none" if custom_id is None else shown(custom_id)
        raise LineError("missing_custom_id", f"custom_id: expected text, found {found}")

    def wrong(code: str, key: str, expected: str, found: Any) -> LineError:
        return LineError(code, f"{key}: expected {expected}, found {shown(found)}", custom_id)

    method, url, body = (value.get(key) for key in ("method", "url", "body"))
    if method != "POST":
        raise wrong("invalid_method", "method", "'POST'", method)
    if url not in URLS:
        raise wrong("invalid_url", "url", f"one of {', '.join(URLS)}", url)
    if not isinstance(body, dict):
        raise wrong("invalid_body", "body", "a JSON object", body)
    if body.get("stream"):
        raise wrong("invalid_stream", "body.stream", "false, or nothing", body["stream"])
    return BatchRequest(custom_id=custom_id, url=url, body=body)


# --- the output -----------------------------------------------------------------------------------


@define(kw_only=True)
class Tally:
    """How far a run is. Counts are of this run, unless they say otherwise."""

    total: int
    """Requests of the input."""
    done: bytearray = field(repr=False)
    """For each line of the input, by its number, whether an earlier run has written its result."""
    skipped: int = 0
    """Results of earlier runs."""
    skipped_failed: int = 0
    """How many of these are failures."""
    completed: int = 0
    failed: int = 0
    new_tokens: int = 0

    @property
    def results(self) -> int:
        """Results in the output file."""
        return self.skipped + self.completed + self.failed

    @property
    def left(self) -> int:
        """Requests without a result."""
        return self.total - self.results


@contextmanager
def locked(path: Path, source: Path) -> Iterator[FileIO]:
    """The output file, open for appending, which no other run can open at the same time.

    source: the input. Raises ConfigError for a path at which no such file can be, and while another
    process has it.
    """
    name = f"output file {quoted(str(path), 300)}"
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError(f"{name}: expected a regular file, which a later run can continue")
        if os.path.exists(path) and os.path.samefile(path, source):
            raise ConfigError(f"{name}: this is the batch file itself: name another file")
        file = FileIO(str(path), "ab")
    except OSError as error:
        raise ConfigError(f"{name} cannot be written: {error.strerror or error}") from error
    with file:
        try:
            # The kernel gives it back when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{name}: another run is writing it: wait until that has ended, or name another "
                "output file"
            ) from error
        except OSError as error:
            raise ConfigError(f"{name} cannot be locked: {error.strerror or error}") from error
        yield file


def begin(file: FileIO, found: Survey, asked: Mapping[str, Any]) -> Tally:
    """Find out what earlier runs have written to the output, and make it ready for more.

    file: from ``locked``. asked: what the results depend on, beside the input; JSON. It is kept in
    a file beside the output, whose name ends in ``.batch.json``, and must be the same for each run
    that adds to the output. A last line without its end, which a run that was killed has left, is
    cut off.

    Raises ConfigError if an earlier run had another input or was asked something else, and for an
    output that is not of such a run.
    """
    path = Path(file.name)
    beside = path.with_name(f"{path.name}.batch.json")
    now = json.loads(json.dumps({"input": found.sha256, **asked}))
    if os.fstat(file.fileno()).st_size:
        _check_same(path, beside, now)
    tally = Tally(total=found.num_requests, done=bytearray(found.num_lines + 1))
    end = 0
    with _reading(path, "output file"), path.open("rb") as earlier:
        for number, line in enumerate(earlier, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            at, failed = _result_of(line, found, f"{path}, line {number}")
            if tally.done[at]:
                raise ConfigError(
                    f"{path}, line {number}: the request of line {at} has a result in an earlier "
                    "line, too: delete one of the two"
                )
            tally.done[at] = True
            tally.skipped += 1
            tally.skipped_failed += failed
    with _writing(file, tally):
        os.ftruncate(file.fileno(), end)
        if not end:
            _replace(beside, json.dumps(now, indent=2) + "\n")
    return tally


def _check_same(path: Path, beside: Path, now: Mapping[str, Any]) -> None:
    otherwise = "name a new output file, or delete this one to begin again"
    try:
        then = json.loads(beside.read_bytes())
        if not isinstance(then, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"output file {quoted(str(path), 300)} is not empty, and {beside.name}, which would "
            f"say of which batch, cannot be read: {why}: {otherwise}"
        ) from error
    for key in [*now, *(key for key in then if key not in now)]:
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"output file {quoted(str(path), 300)} has results of another batch: its {key} was "
                f"{shown(then.get(key))}, and now it is {shown(now.get(key))}: run with what it "
                f"was, {otherwise}"
            )


def _result_of(line: bytes, found: Survey, where: str) -> tuple[int, bool]:
    """The number of a result's line of the input, and whether the request has failed."""
    try:
        record = json.loads(line)
        number = re.fullmatch(rf"{found.name}(\d{{1,18}})", record["id"])
        if number and 0 < int(number[1]) <= found.num_lines:
            response = record["response"]
            return int(number[1]), response is None or response["status_code"] != 200
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ConfigError(
        f"{where}: expected a result of this batch, found {shown(line[:200])}: delete the line, "
        "and its request is answered again"
    )


def _replace(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, also if the machine ends."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _writing(file: FileIO, tally: Tally) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output file {quoted(file.name, 300)} cannot be written: {error.strerror or error}; "
            f"its {tally.results} results are whole: make it writable (is there room on the "
            "disk?), and run the same command again to continue"
        ) from error


def _append(file: FileIO, line: bytes) -> None:
    """Write a whole line, or raise OSError and leave none of it."""
    end = os.fstat(file.fileno()).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


def _as_line(record: Mapping[str, Any]) -> bytes:
    try:
        return json_line(record).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair
        return json_line(record, unicode=False).encode() + b"\n"


# --- the run --------------------------------------------------------------------------------------


async def run(
    answer: Answer,
    found: Survey,
    file: FileIO,
    tally: Tally,
    max_in_flight: int,
    report: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Answer the requests of the input that have no result yet, and append their results.

    found: the survey of the input. file, tally: the output, from ``locked`` and ``begin``.
    max_in_flight: how many requests run at once; only these are in memory, and the custom_id of
    each line that was read. report: called after each result.

    A line that is not a valid request has a result with an ``error``. When the run is cancelled,
    requests in flight are dropped, and what has ended is in the file.

    Raises ConfigError if the output cannot be written or the input has changed since its survey,
    and ExecutorError as ``answer`` does, and for a status of 429 or 503. A later run can go on in
    all cases but the changed input.
    """
    synced = monotonic()
    digest, seen = hashlib.sha256(), set[str]()
    lines = _known(_lines(found.path, digest), found)

    def write(number: int, custom_id: str | None, response: Any, error: Any) -> None:
        nonlocal synced
        record = {"id": f"{found.name}{number}", "custom_id": custom_id}
        line = _as_line({**record, "response": response, "error": error})
        with _writing(file, tally):
            _append(file, line)
            if response and response["status_code"] == 200:
                tally.completed += 1
                usage = response["body"].get("usage") or {}
                tally.new_tokens += usage.get("completion_tokens") or 0
            else:
                tally.failed += 1
            if monotonic() - synced > _SYNC_SECONDS:
                os.fsync(file.fileno())
                synced = monotonic()
        report(tally)

    async def work() -> None:
        for number, line in lines:
            await asyncio.sleep(0)  # lines that need no answer let the others go on, too
            if not line:
                continue
            try:
                request = request_of(line)
                if request.custom_id in seen:
                    raise LineError(
                        "duplicate_custom_id",
                        f"custom_id: expected one that no line above has, found "
                        f"{shown(request.custom_id)} again",
                        request.custom_id,
                    )
                seen.add(request.custom_id)
            except LineError as error:
                if not tally.done[number]:
                    message = f"line {number}: {error}"
                    write(number, error.custom_id, None, {"code": error.code, "message": message})
                continue
            if tally.done[number]:
                continue
            try:
                status, body = await answer(request.url, json.dumps(request.body).encode())
            except ExecutorError:
                raise
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                write(number, request.custom_id, None, {"code": "server_error", "message": message})
                continue
            if status in UNAVAILABLE:
                raise ExecutorError(
                    f"{found.path}, line {number}: no request can be answered now: status "
                    f"{status}, {on_one_line(str(body.get('error') or body))}; the same command "
                    "continues with the requests that have no result"
                )
            response = {
                "status_code": status,
                "request_id": f"{found.name.removeprefix('batch_')}{number}",
                "body": body,
            }
            write(number, request.custom_id, response, None)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(max_in_flight):
                workers.create_task(work())
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    finally:
        with _writing(file, tally):
            os.fsync(file.fileno())
    if digest.hexdigest() != found.sha256:
        raise ConfigError(
            f"batch file {quoted(str(found.path), 300)} has changed while it was read, so results "
            "may be of other requests than its lines now have: run it with a new output file"
        )


def _known(lines: Iterator[tuple[int, bytes]], found: Survey) -> Iterator[tuple[int, bytes]]:
    """The lines that the survey has seen."""
    for number, line in lines:
        if number > found.num_lines:
            return
        yield number, line
