"""Serve models over HTTP, as OpenAI's API has it.

Flags and the environment override the run file.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import TYPE_CHECKING, Any

from attrs import fields

from tilewright import plugins
from tilewright.cli import flags
from tilewright.cli.output import note
from tilewright.cli.session import open_engine
from tilewright.config import Resolved, resolve
from tilewright.errors import ConfigError
from tilewright.settings import PATH, Given, Layer
from tilewright_serve.settings import ServeSettings

if TYPE_CHECKING:
    import uvicorn

    from tilewright.engine import LLMEngine

tilewright_api = 2

log = logging.getLogger(__name__)

SECTIONS: dict[str, type] = {"serve": ServeSettings}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright serve [options] [FILE]"
    parser.add_argument("config", metavar="FILE", nargs="?", help="a run file, in TOML")
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        metavar="[NAME=]MODEL",
        dest="named_models",
        help="registered name or directory of a model, and the name that clients call it by "
        "(repeatable; default: the run file's models, else the bundled demo model)",
    )
    group = parser.add_argument_group("server")
    settings = [a.name for a in fields(ServeSettings) if a.name != "models"]
    flags.add(group, "serve", settings, SECTIONS)
    flags.add_engine_flags(parser, model=False)


def run(args: argparse.Namespace) -> int:
    with needing_extra("serve"):
        import uvicorn

        from tilewright_serve.app import create_app
    runs = list(_runs(args))
    settings: ServeSettings = runs[0].own["serve"]
    if settings.host not in ("127.0.0.1", "::1", "localhost") and settings.api_key is None:
        note(
            f"warning: anyone who reaches {settings.host} can use this server: set --api-key, or "
            "listen at 127.0.0.1"
        )
    with ExitStack() as opened:
        listening = opened.enter_context(_bound(settings.host, settings.port))
        resolved: dict[LLMEngine, Resolved] = {}
        for one in runs:
            engine = opened.enter_context(open_engine(one, processors=processors()))
            resolved[engine] = one

        def reload(engine: "LLMEngine", name: str) -> None:
            config = resolved[engine].config
            if name in engine.model_ids:
                engine.unload(name)
            with redirect_stdout(sys.stderr):
                engine.init_model(name, config.model.path, config.runtime, config.model.format)

        app = create_app(*resolved, settings=settings, reload=reload)
        names = ", ".join(one.config.model.id for one in runs)
        config = uvicorn.Config(
            app,
            log_config=_LOGGING,
            access_log=False,
            server_header=False,
        )
        _serve(config, listening, settings.shutdown_timeout, list(resolved), names)
        return 0


def _bound(host: str, port: int) -> socket.socket:
    """A socket with the address, which does not listen yet. Raises ConfigError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, proto)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}: choose another --host or "
            "--port (0: a free one)"
        ) from error
    return made


def _serve(
    config: "uvicorn.Config",
    listening: socket.socket,
    shutdown_timeout: float,
    engines: "Sequence[LLMEngine]",
    names: str,
) -> None:
    """Serve until SIGTERM or Ctrl-C, and let what runs finish; a second one ends it at once.

    What has not finished in time ends with an error, which its client has a second to read.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            usual = {
                number: signal.signal(number, self.handle_exit)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                yield
            finally:  # uvicorn's own would raise the signal again, and the exit code be its number
                for number, handler in usual.items():
                    signal.signal(number, handler)

        def handle_exit(self, number: int, frame: FrameType | None) -> None:
            if self.should_exit:
                os._exit(128 + number)
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listening.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            note(f"serving {names} at http://{host}:{port}")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            ending = asyncio.create_task(self.end())
            await super().shutdown(sockets)
            ending.cancel()

        async def end(self) -> None:
            await asyncio.sleep(shutdown_timeout)
            log.warning("requests are ended that run after %g seconds", shutdown_timeout)
            closing = [asyncio.to_thread(engine.close) for engine in engines]
            await asyncio.wait([*map(asyncio.ensure_future, closing)], timeout=1.0)
            await asyncio.sleep(1.0)
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    Server(config).run([listening])


_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "tilewright_serve": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


def processors() -> list[str]:
    """Logits processors that requests may name: options for these are not a mistake."""
    return [p.name for p in plugins.installed("logits_processor")]


@contextmanager
def needing_extra(extra: str) -> Iterator[None]:
    """Make an ImportError in this block say which packages to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"this command needs packages that are not installed ({error.name}): "
            f"pip install 'tilewright[{extra}]'"
        ) from error


def _runs(args: argparse.Namespace) -> Iterator[Resolved]:
    """The settings of each model. Raises ConfigError for two of one name."""
    layer = flags.layer(args)
    first = resolve(args.config, layer, own=SECTIONS)
    further = first.own["serve"].models
    origin = first.origin("serve", "models")
    named = [(one, "--model") for one in args.named_models or ()]
    own = [] if named else [first]
    chosen = [
        _resolved(args, layer, one, at) for one, at in named or [(m, origin) for m in further]
    ]
    names = set[str]()
    for one in [*own, *chosen]:
        if one.config.model.id in names:
            raise ConfigError(
                f"two models are named {one.config.model.id!r}: name them, as in --model NAME=MODEL"
            )
        names.add(one.config.model.id)
        yield one


def _resolved(args: argparse.Namespace, layer: Layer, given: str, origin: str) -> Resolved:
    return resolve(args.config, {**layer, **named_model(given, origin)}, own=SECTIONS)


def named_model(given: str, origin: str) -> Layer:
    """The settings of ``[NAME=]MODEL``. Raises ConfigError."""
    name, equals, path = given.partition("=")
    if not equals or "/" in name:
        name, path = "", given
    if not path:
        raise ConfigError(f"{origin}: expected [NAME=]MODEL, found {given!r}")
    return {PATH: Given(path, origin), ("model", "id"): Given(name, origin)}
