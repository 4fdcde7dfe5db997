"""A server in a thread of the test, requests in bytes, and the events of streams."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import uvicorn
from starlette.applications import Starlette


@contextmanager
def serving(app: Starlette, port: int = 0) -> Iterator[str]:
    """The URL of an application that is served in this block; port 0: a free one."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def request(path: str, body: bytes, length: int | None = None, headers: str = "") -> bytes:
    """POST of a body. length: what its header says; headers: more lines of the head."""
    length = len(body) if length is None else length
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}"
        f"content-length: {length}\r\n\r\n"
    ).encode() + body


def events(text: str) -> list[Any]:
    """The data of a stream's events; the last one is the text ``[DONE]``."""
    *blocks, end = text.split("\n\n")
    assert end == ""
    assert all(block.startswith("data: ") for block in blocks)
    found = [block.removeprefix("data: ") for block in blocks]
    return [one if one == "[DONE]" else json.loads(one) for one in found]
