"""The ASGI application: routes, keys, limits, and errors as OpenAI's API has them."""

import asyncio
import hmac
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilewright import AsyncLLMEngine, LLMEngine, __version__
from tilewright.errors import ConfigError
from tilewright.paths import path_of
from tilewright_serve import chat_completions
from tilewright_serve.answering import generate, posted, read
from tilewright_serve.errors import ApiError
from tilewright_serve.fields import Detokenize, Tokenize
from tilewright_serve.server import Model, Reload, Server
from tilewright_serve.settings import ServeSettings

if TYPE_CHECKING:
    from tilewright_serve.batch_files import BatchFiles

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"

PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # files of another version would not fit each other
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page itself says the rest
    "X-Content-Type-Options": "nosniff",
}

OPEN_PATHS = ("/", "/health", "/version", "/metrics", "/openapi.json")
"""Paths that need no key."""


def create_app(
    *engines: LLMEngine | AsyncLLMEngine,
    settings: ServeSettings | None = None,
    reload: Reload | None = None,
) -> Starlette:
    """An application that serves all models that are loaded in some engines.

    The caller closes the engines after the server. ``settings`` that concern the process, such as
    the port, have no effect here. reload: called in another thread with an engine and the name of
    a model whose executor has failed, ``settings.restarts`` times at most, to load it again.

    Raises ConfigError if two engines have a model of the same name, or none has a model, and for a
    ``batch_dir`` that cannot be made.
    """
    plain = [e.engine if isinstance(e, AsyncLLMEngine) else e for e in engines]
    server = Server(plain, settings or ServeSettings(), reload)
    batches = _batches(server)
    app = Starlette(
        routes=[
            Route("/v1/completions", posted(generate), methods=["POST"]),
            Route("/v1/chat/completions", posted(generate), methods=["POST"]),
            *(batches.routes if batches else []),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/tokenize", posted(_tokenize), methods=["POST"]),
            Route("/detokenize", posted(_detokenize), methods=["POST"]),
            Route("/health", _health),
            Route("/version", _version),
            Route("/metrics", _metrics),
            Route("/stats", _stats),
            Route("/openapi.json", _openapi),
            Route("/", _index),
            Mount("/page", _PageFiles(directory=PAGE)),
        ],
        lifespan=(lambda app: batches.running()) if batches else None,
        middleware=[Middleware(_Counting, server=server), Middleware(_Keyed, server=server)],
        exception_handlers={
            ApiError: _refuse,
            HTTPException: _refuse_route,
            ClientDisconnect: _nobody,
        },
    )
    app.state.server = server
    return app


def _batches(server: Server) -> "BatchFiles | None":
    if server.settings.batch_dir is None:
        return None
    folder = path_of(server.settings.batch_dir)
    try:
        from tilewright_serve.batch_files import BatchFiles

        folder.mkdir(exist_ok=True)
    except ImportError as error:
        raise ConfigError(
            f"--batch-dir needs a package that is not installed ({error.name}): "
            "pip install 'tilewright[serve]'"
        ) from error
    except OSError as error:
        raise ConfigError(f"--batch-dir {folder} cannot be made: {error.strerror}") from error
    return BatchFiles(server, folder)


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


# --- endpoints -----------------------------------------------------------------------------------


def _model_object(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tilewright",
        "max_model_len": model.loaded.runtime.max_seq_len,
    }


async def _models(request: Request) -> Response:
    models = [_model_object(model) for model in _server(request).working]
    return JSONResponse({"object": "list", "data": models})


async def _model(request: Request) -> Response:
    return JSONResponse(_model_object(_server(request).model(request.path_params["name"])))


async def _tokenize(server: Server, request: Request, body: bytes) -> Response:
    asked = read(Tokenize, body)
    model = server.model(asked.model)
    text = model.loaded.text
    if asked.prompt is None:
        ids = await asyncio.to_thread(chat_completions.prompt_ids, text, asked)
    else:
        special = asked.add_special_tokens is not False
        ids = await asyncio.to_thread(text.encode, asked.prompt, special)
    names = [text.token(i) or "" for i in ids] if asked.return_token_strs else None
    limit = model.loaded.runtime.max_seq_len
    return JSONResponse(
        {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}
    )


async def _detokenize(server: Server, request: Request, body: bytes) -> Response:
    asked = read(Detokenize, body)
    text = server.model(asked.model).loaded.text

    def decoded() -> str:
        unknown = next((i for i in asked.tokens if text.token(i) is None), None)
        if unknown is not None:
            raise ApiError(
                400, f"'tokens' has {unknown}, which the model's tokenizer does not know", "tokens"
            )
        # Special tokens stay, so that it is the other way round of /tokenize.
        return str(text.assets.tokenizer.decode(asked.tokens, skip_special_tokens=False))

    return JSONResponse({"prompt": await asyncio.to_thread(decoded)})


async def _health(request: Request) -> Response:
    models = {
        model.name: "loading again" if model.restarting else model.failure or "ok"
        for model in _server(request).models.values()
    }
    well = all(found == "ok" for found in models.values())
    body = {"status": "ok" if well else "failed", "models": models}
    return JSONResponse(body, status_code=200 if well else 503)


async def _version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _metrics(request: Request) -> Response:
    from prometheus_client.exposition import choose_encoder

    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(_server(request).metrics.registry), headers={"content-type": kind})


async def _stats(request: Request) -> Response:
    found = {}
    for model in _server(request).working:
        stats = asdict(model.engine.stats(model.name))
        del stats["model_id"]
        loaded = model.loaded
        found[model.name] = {
            **stats,
            "executor": model.engine.engine.selection["executor"],
            "device": loaded.runtime.device,
            "max_model_len": loaded.runtime.max_seq_len,
        }
    return JSONResponse({"models": found})


async def _openapi(request: Request) -> Response:
    from tilewright_serve.openapi import document

    settings = _server(request).settings
    keyed, batches = settings.api_key is not None, settings.batch_dir is not None
    return JSONResponse(document(keyed, batches))


async def _index(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


# --- errors --------------------------------------------------------------------------------------


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """For a path or a method that does not exist, and a form that cannot be read."""
    assert isinstance(error, HTTPException)
    status, message, headers = 400, error.detail, dict(error.headers or {})
    if error.status_code in (404, 405):
        status = error.status_code
        message = f"{request.method} {request.url.path} is not served: see /openapi.json"
    if status == 405:  # Starlette names the methods of one route, and a path may have several
        routes = (r for r in request.app.routes if r.matches(request.scope)[0] is not Match.NONE)
        methods = {method for r in routes if isinstance(r, Route) for method in r.methods or ()}
        headers["Allow"] = ", ".join(sorted(methods))
    made = ApiError(status, message)
    return JSONResponse(made.body, status_code=status, headers=headers)


async def _nobody(request: Request, error: Exception) -> Response:
    """For a client that went away; nobody reads this. 499 is nginx's number for it."""
    return PlainTextResponse("", status_code=499)


# --- around all endpoints ------------------------------------------------------------------------


class _Keyed:
    """Refuses requests without the key."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app = app
        self._key = (server.settings.api_key or "").strip() or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._key is not None and not self._open(scope["path"]):
            given = Request(scope).headers.get("authorization", "")
            kind, _, key = given.partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self._key.encode())
            if kind.lower() != "bearer" or not right:
                found = "no key" if not given else "another one"
                message = f"expected Authorization: Bearer KEY with the server's key, found {found}"
                error = ApiError(401, message, code="invalid_api_key")
                response = JSONResponse(error.body, status_code=401, headers=error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _open(self, path: str) -> bool:
        return path in OPEN_PATHS or path.startswith("/page/")


class _Counting:
    """Counts what was answered, by route and status; what nobody has caught is answered here."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        def count(status: int) -> None:
            nonlocal begun
            begun = True
            routes = scope["app"].routes
            found = (r.path for r in routes if r.matches(scope)[0] is not Match.NONE)
            path = next(found, "none")
            self._server.metrics.requests.labels(scope["method"], path, str(status)).inc()

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            if begun:
                raise
            log.exception("%s %s failed", scope["method"], scope["path"])
            made = ApiError(500, f"the server failed: {type(error).__name__}")
            await JSONResponse(made.body, status_code=500)(scope, receive, note)
