"""POST /v1/files and /v1/batches: batch files that clients send, kept in a folder.

Objects are those of OpenAI's API reference. A batch has one file of results, failures included. For
each file the folder has its object, ``file-<id>.json``, and its content, ``file-<id>.jsonl``; for
each batch its object, ``batch_<id>.json``.
"""

import asyncio
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import python_multipart  # noqa: F401  with which Starlette reads forms
from attrs import define, field
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tilewright.cli.output import opened
from tilewright.errors import ConfigError, ExecutorError, on_one_line
from tilewright.values import shown
from tilewright_serve import batch
from tilewright_serve.answering import posted
from tilewright_serve.batch_answers import answering
from tilewright_serve.errors import TIMEOUT, ApiError
from tilewright_serve.server import Server

log = logging.getLogger(__name__)

_MOST_BYTES = 2**30
"""Size limit of a file that a client sends."""

_RETRY_SECONDS = 5.0
"""Until a request is sent again that could not be answered: the server was full, or its model is
loaded again."""

_OPEN = ("validating", "in_progress")
"""States of a batch that is to be worked on."""


class _Limited(Request):
    """A request whose body has a limit. Starlette puts what a form uploads on the disk."""

    async def stream(self) -> AsyncGenerator[bytes, None]:
        made = 0
        async for part in super().stream():
            made += len(part)
            if made > _MOST_BYTES:
                raise ApiError(413, f"the file is larger than {_MOST_BYTES} bytes: send parts")
            yield part


@define(eq=False)
class BatchFiles:
    """The files and batches of a server."""

    server: Server
    folder: Path
    _tasks: dict[str, asyncio.Task[None]] = field(init=False, factory=dict)
    _tallies: dict[str, batch.Tally] = field(init=False, factory=dict)
    _turn: asyncio.Lock = field(init=False, factory=asyncio.Lock)
    """One batch runs at a time."""

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files/{id}", self._file),
            Route("/v1/files/{id}/content", self._content),
            Route("/v1/batches", posted(self._create), methods=["POST"]),
            Route("/v1/batches", self._list),
            Route("/v1/batches/{id}", self._batch),
            Route("/v1/batches/{id}/cancel", self._cancel, methods=["POST"]),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """In this block, batches are worked on, those that an earlier server has left included.

        Raises ConfigError if another server has the folder.
        """
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"--batch-dir {self.folder}: another server has it: name another folder"
                ) from error
            async with self._working():
                yield

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        for path in sorted(self.folder.glob("batch_*.json")):
            made = json.loads(path.read_text())
            if made["status"] in _OPEN:
                self._start(made["id"])
            elif made["status"] == "cancelling":
                self._change(made["id"], "cancelled")
        try:
            yield
        finally:
            for task in (tasks := list(self._tasks.values())):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- files ------------------------------------------------------------------------------------

    async def _upload(self, request: Request) -> Response:
        # Browsers send forms of any page without asking, and say where the page is from.
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(400, "files are not taken from web pages of other origins")
        async with _Limited(request.scope, request.receive).form(max_files=1) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "'file' is missing: expected a form with a file", "file")
            if purpose != "batch":
                raise ApiError(400, f"'purpose' must be 'batch', found {shown(purpose)}", "purpose")
            name = f"file-{secrets.token_hex(12)}"
            await asyncio.to_thread(self._keep, name, file.file)
        return JSONResponse(self._made_file(name, file.filename or name, "batch"))

    def _keep(self, name: str, content: BinaryIO) -> None:
        path = self._content_of(name)
        try:
            with path.open("xb") as file:
                shutil.copyfileobj(content, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _made_file(self, name: str, filename: str, purpose: str) -> dict[str, Any]:
        made = {
            "id": name,
            "object": "file",
            "bytes": self._content_of(name).stat().st_size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self._write(made)
        return made

    async def _file(self, request: Request) -> Response:
        return JSONResponse(self._read("file-", request.path_params["id"]))

    async def _content(self, request: Request) -> Response:
        found = self._read("file-", request.path_params["id"])
        return FileResponse(self._content_of(found["id"]), media_type="application/jsonl")

    def _content_of(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    # --- batches ----------------------------------------------------------------------------------

    async def _create(self, server: Server, request: Request, content: bytes) -> Response:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {on_one_line(str(error))}") from error
        if not isinstance(body, dict):
            raise ApiError(400, f"expected a JSON object, found {shown(body)}")
        if body.get("endpoint") not in batch.URLS:
            expected = f"'endpoint' must be one of {', '.join(batch.URLS)}"
            raise ApiError(400, f"{expected}, found {shown(body.get('endpoint'))}", "endpoint")
        source = self._read("file-", body.get("input_file_id"))
        times = ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled")
        made = {
            "id": f"batch_{secrets.token_hex(12)}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "errors": None,
            "input_file_id": source["id"],
            "completion_window": body.get("completion_window") or "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            **{f"{one}_at": None for one in times},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.get("metadata"),
        }
        self._write(made)
        self._start(made["id"])
        return JSONResponse(made)

    async def _batch(self, request: Request) -> Response:
        return JSONResponse(self._now(request.path_params["id"]))

    async def _list(self, request: Request) -> Response:
        try:
            limit = min(max(int(request.query_params.get("limit", 20)), 1), 100)
        except ValueError as error:
            raise ApiError(400, "'limit' must be an integer", "limit") from error
        found = [self._now(path.stem) for path in self.folder.glob("batch_*.json")]
        found.sort(key=lambda made: (made["created_at"], made["id"]), reverse=True)
        if after := request.query_params.get("after"):
            names = [made["id"] for made in found]
            found = found[names.index(after) + 1 :] if after in names else []
        page = found[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(found) > limit,
            }
        )

    async def _cancel(self, request: Request) -> Response:
        made = self._now(request.path_params["id"])
        if made["status"] not in (*_OPEN, "cancelling"):
            raise ApiError(400, f"the batch cannot be cancelled: it is {made['status']}")
        made = self._change(made["id"], "cancelling")
        if task := self._tasks.get(made["id"]):
            task.cancel()
        else:
            made = self._change(made["id"], "cancelled")
        return JSONResponse(made)

    def _now(self, name: str) -> dict[str, Any]:
        """A batch, with its counts of this moment."""
        made = self._read("batch_", name)
        if tally := self._tallies.get(name):
            made["request_counts"] = _counts(tally)
        return made

    def _change(self, name: str, status: str, **more: Any) -> dict[str, Any]:
        made = self._now(name) | {"status": status, f"{status}_at": int(time.time())} | more
        self._write(made)
        return made

    def _start(self, name: str) -> None:
        self._tasks[name] = task = asyncio.create_task(self._work(name))
        task.add_done_callback(lambda _: self._tasks.pop(name))

    async def _work(self, name: str) -> None:
        made = self._read("batch_", name)
        output = f"file-{name.removeprefix('batch_')}"
        path = self._content_of(output)
        try:
            async with self._turn:
                source = self._content_of(made["input_file_id"])
                found = await asyncio.to_thread(batch.survey, source, list(self.server.models))
                with batch.locked(path, source) as file:
                    tally = await asyncio.to_thread(batch.begin, file, found, {})
                    self._tallies[name] = tally
                    if made["status"] == "validating":
                        self._change(name, "in_progress")
                    await self._run(found, file, tally)
            self._end(name, "completed", output)
        except asyncio.CancelledError:
            if self._read("batch_", name)["status"] == "cancelling":
                self._end(name, "cancelled", output)
            raise  # or the server ends, and the next one continues
        except ConfigError as error:
            log.error("batch %s failed: %s", name, error)
            data = [{"code": "invalid_batch", "message": str(error), "param": None, "line": None}]
            self._change(name, "failed", errors={"object": "list", "data": data})
        finally:
            self._tallies.pop(name, None)

    def _end(self, name: str, status: str, output: str) -> None:
        written = self._content_of(output).exists()
        if written:
            self._made_file(output, f"{name}_output.jsonl", "batch_output")
        self._change(name, status, output_file_id=output if written else None)

    async def _run(self, found: batch.Survey, file: FileIO, tally: batch.Tally) -> None:
        answered = answering(self.server)

        async def patient(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
            while True:
                with suppress(ExecutorError):
                    status, value = await answered(path, body)
                    if value.get("error", {}).get("code") == TIMEOUT:
                        return 504, value  # the request's own fault
                    if status not in batch.UNAVAILABLE:
                        return status, value
                await asyncio.sleep(_RETRY_SECONDS)

        models = self.server.working
        in_flight = max((m.loaded.runtime.max_batch_size for m in models), default=1)
        await batch.run(patient, found, file, tally, in_flight)

    # --- objects ----------------------------------------------------------------------------------

    def _read(self, kind: str, name: Any) -> dict[str, Any]:
        """The object of a file or a batch. Raises ApiError if there is none."""
        with suppress(FileNotFoundError):
            if isinstance(name, str) and re.fullmatch(kind + "[0-9a-f]{24}", name):
                made: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
                return made
        what = "file" if kind == "file-" else "batch"
        raise ApiError(404, f"no {what} has the id {shown(name)}", "id")

    def _write(self, made: dict[str, Any]) -> None:
        with opened(str(self.folder / f"{made['id']}.json")) as file:
            json.dump(made, file)


def _counts(tally: batch.Tally) -> dict[str, int]:
    failed = tally.failed + tally.skipped_failed
    return {"total": tally.total, "completed": tally.results - failed, "failed": failed}
