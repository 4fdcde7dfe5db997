"""Loader ``hf-hub``: a repository of the Hugging Face hub, by its id.

Cache, token and endpoint are set as for huggingface_hub, by its environment variables.
"""

import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from glob import escape
from math import ceil
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from attrs import define, evolve, field, frozen

from tilewright.directories import ADAPTER, layout_of_maker
from tilewright.errors import ConfigError, ModelError, listed, quoted
from tilewright.hookspecs import hookimpl
from tilewright.paths import cache_folder, expanded, home
from tilewright.types import LoadedModel, PluginInfo, Report, WeightFormats, described
from tilewright.weights import printable
from tilewright_hf import loader, pytorch_format, safetensors_format
from tilewright_hf.files import one_line
from tilewright_hf.shards import only_gguf, other_sets, shard_files

tilewright_api = 2

T = TypeVar("T")

_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]*[\w.-]))?/?", re.ASCII)

_ADDRESS = re.compile(r"hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?=[^/]+/[^/])")
"""How an address of the hub begins: before the id, in a browser and in huggingface_hub."""

_PAGE = re.compile(r"([^/]+/[^/]+)/(tree|blob|resolve)/([^/?#]+)(?:/([^?#]*))?.*")
"""A page of a repository after the address: its id, the kind, the revision, perhaps a path."""

_TAGGED = re.compile(r"([^/:]+/[^/:]+):([\w.-]+)", re.ASCII)
_QUANTIZED = re.compile(r"(UD-)?(I?Q\d|BF16|FP?16|FP?32|MXFP4)\w*", re.ASCII | re.IGNORECASE)
"""The tag that llama.cpp and ollama write after an id: a quantization, such as ``Q4_K_M``."""

_CONFIGURATION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)
"""Files that hf-local reads, besides the weights."""

_LAYOUTS = {
    "safetensors": (safetensors_format.SINGLE, safetensors_format.INDEX),
    "pytorch-bin": (pytorch_format.SINGLE, pytorch_format.INDEX),
}
"""Weights in one file or with an index, keyed by weight format. The first one found is used."""

_MB = 1_000_000


@frozen
class Options:
    revision: str | None = described("branch, tag or commit; default: the main branch")
    local_files_only: bool = described(
        "use only the cache and open no connection, as HF_HUB_OFFLINE=1 does", False
    )


@frozen
class _Wanted:
    """A repository as the user named it."""

    name: str
    revision: str | None
    weight_format: str | None


@frozen
class _Snapshot:
    """A folder of the cache."""

    folder: Path
    warnings: tuple[str, ...] = ()

    @property
    def commit(self) -> str:
        return self.folder.name


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="a repository of the Hugging Face hub: ORGANISATION/NAME, or with @REVISION",
        options=Options,
        limits={
            "files": "configuration, tokenizer and one set of weights: safetensors, else "
            "pytorch_model.bin",
            "models": "as hf-local",
        },
    )


@hookimpl
def can_load(source: str) -> bool:
    if os.path.lexists(source):
        return False
    if _address(source) or _TAGGED.fullmatch(source):
        return True
    file = source.endswith((".gguf", ".safetensors", ".bin", ".json", ".toml"))
    return _ID.fullmatch(source) is not None and not file


@hookimpl
def load_model(
    source: str,
    options: Options,
    weight_format: str | None,
    formats: WeightFormats,
    report: Report,
) -> LoadedModel:
    """Download files that are not cached yet, and load them as hf-local does.

    The result's source is ``ORGANISATION/NAME@COMMIT``.
    """
    _check_endpoint()
    from huggingface_hub.constants import HF_HUB_OFFLINE

    _check_cache()
    wanted = _wanted(source, options, weight_format)
    if HF_HUB_OFFLINE or options.local_files_only:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "local_files_only is set"
        snapshot = _cached(wanted, why)
    else:
        snapshot = _downloaded(wanted, report)
    try:
        loaded = loader.load_model(str(snapshot.folder), weight_format, formats)
    except ModelError as error:
        raise ModelError("; ".join((str(error), *snapshot.warnings))) from error
    return evolve(
        loaded,
        source=f"{wanted.name}@{snapshot.commit}",
        warnings=(*_unusual_cache(), *snapshot.warnings, *loaded.warnings),
    )


def _address(source: str) -> str:
    """What precedes the id in an address of the hub, or of HF_ENDPOINT; else an empty string."""
    found = _ADDRESS.match(source)
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if not found and endpoint and source.startswith(f"{endpoint}/"):
        return f"{endpoint}/"
    return found[0] if found else ""


def _of_gguf(source: str, name: str, files: str) -> str:
    return (
        f"{source[:200]!r}: hf-hub does not download GGUF files: run `hf download "
        f"{name}{files}`, then give the path of the file"
    )


def _wanted(source: str, options: Options, weight_format: str | None) -> _Wanted:
    id_ = source
    if address := _address(source):
        id_ = source[len(address) :].partition("?")[0]
        if page := _PAGE.fullmatch(source[len(address) :]):
            name, kind, revision, path = page.groups("")
            id_ = f"{name}@{unquote(revision)}"
            if path.endswith(".gguf"):
                raise ModelError(_of_gguf(source, name, f" {path}"))
            folder = path.strip("/") if kind == "tree" else path.rpartition("/")[0]
            if folder:
                raise ModelError(
                    f"{source[:200]!r} names a folder of a repository, and hf-hub reads the files "
                    f"at the top: run `hf download {name} --revision {unquote(revision)} --include "
                    f"'{folder}/*'`, then give the path of the folder"
                )
    if tagged := _TAGGED.fullmatch(id_):
        if _QUANTIZED.fullmatch(tagged[2]):
            raise ModelError(_of_gguf(source, tagged[1], f" --include '*{tagged[2]}*.gguf'"))
        raise ModelError(
            f"{source[:200]!r} is not a repository id: for the revision {tagged[2]!r} write "
            f"{tagged[1]}@{tagged[2]}"
        )
    named = _ID.fullmatch(id_)
    if named is None:
        raise ModelError(
            f"{source[:200]!r} is not a repository id: expected ORGANISATION/NAME or "
            "ORGANISATION/NAME@REVISION; hf-local loads a directory"
        )
    name, revision = named.groups()
    asked = options.revision
    if revision and asked and revision != asked:
        raise ConfigError(
            f"two revisions of {name} are given, {revision!r} in its id and {asked!r} as "
            "option 'revision': give only one"
        )
    return _Wanted(name, revision or asked, weight_format)


# --- the cache ------------------------------------------------------------------------------------


def _cached(wanted: _Wanted, why: str) -> _Snapshot:
    """The cached snapshot. why: the reason for not connecting, in words."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            wanted.name,
            revision=wanted.revision,
            cache_dir=cache(),
            local_files_only=True,
            # The index says which weights there must be.
            allow_patterns=["config.json"],
        )
    except LocalEntryNotFoundError as error:
        revision = f" at revision {wanted.revision!r}" if wanted.revision else ""
        raise ModelError(
            f"{wanted.name}{revision} is not in the cache, {cache()}, and {why}: load it once "
            "with a connection, or set HF_HUB_CACHE to a folder that has it"
        ) from error
    except ValueError as error:
        raise _refusal(wanted, error) from error
    return _Snapshot(Path(folder), (f"{wanted.name} is loaded from the cache: {why}",))


_HOME_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
"""What sets the cache's folder; the first one that is set wins."""


def cache() -> Path:
    """The cache's folder: huggingface_hub's, or a temporary one where that cannot be made."""
    return _placed()[0]


def _placed() -> tuple[Path, str]:
    """The cache's folder, and a note if it is a temporary one."""
    from huggingface_hub import constants

    usual, names = Path(constants.HF_HUB_CACHE), ("huggingface", "hub")
    # huggingface_hub takes "~" for the name of a folder where no home directory is known.
    if usual != Path(expanded("~"), ".cache", *names) or (home() and os.path.isdir(usual)):
        return usual, ""
    return cache_folder(*names)


def _unusual_cache() -> tuple[str, ...]:
    note = _placed()[1]
    advice = "for downloads; set HF_HOME to a folder that is kept"
    return (f"{note} {advice}",) if note else ()


def _check_endpoint() -> None:
    """Raise ConfigError for an HF_ENDPOINT with which huggingface_hub cannot be imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint)
    except ValueError as error:
        raise ConfigError(
            f"HF_ENDPOINT is {endpoint!r}: expected an address, https://HOST ({error})"
        ) from error


def _check_cache() -> None:
    """Raise ConfigError for a cache that lies below a file, with the variable that says so."""
    folder = cache()
    for place in (folder, *folder.absolute().parents):
        if os.path.exists(place) and not os.path.isdir(place):
            named = next((name for name in _HOME_VARIABLES if os.environ.get(name)), "HOME")
            raise ConfigError(
                f"{named}: the cache of the hub is {folder}, but {place} is a file: set {named} to "
                "a folder"
            )


# --- downloads ------------------------------------------------------------------------------------


def _downloaded(wanted: _Wanted, report: Report) -> _Snapshot:
    """The repository's files, fetching those that are not cached.

    If the hub cannot be reached, the cached snapshot.
    """
    from huggingface_hub import HfApi, constants

    def repository() -> Any:
        return HfApi().model_info(
            wanted.name,
            revision=wanted.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )

    meter = _Meter()
    try:
        info = _watched(repository, meter, lambda: None)
    except Exception as error:
        if not _unreachable(error):
            raise _refusal(wanted, error) from error
        try:
            return _cached(wanted, f"the hub cannot be reached ({_reason(error)})")
        except ModelError:
            raise _refusal(wanted, error) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    what = f"downloading {wanted.name} (MB)"

    def progress() -> None:
        if meter.total:
            total = ceil(meter.total / _MB)
            report(what, min(meter.received // _MB, total - 1), total)

    try:
        folder = _watched(lambda: _fetched(wanted, info.sha, sizes, meter), meter, progress)
    except ModelError:
        raise
    except Exception as error:
        raise _refusal(wanted, error) from error
    if meter.total:
        total = ceil(meter.total / _MB)
        report(f"downloaded {wanted.name}@{folder.name[:12]}: {total} MB", total, total)
    return _Snapshot(folder)


def _fetched(wanted: _Wanted, commit: str, sizes: dict[str, int], meter: "_Meter") -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    bar = _bar_class(meter)

    def fetch(files: Collection[str]) -> Path:
        # By the revision's name, so that the cache records its commit for later use offline.
        folder = snapshot_download(
            wanted.name,
            revision=wanted.revision,
            cache_dir=cache(),
            allow_patterns=[escape(file) for file in files],
            tqdm_class=bar,
        )
        return Path(folder)

    files = [*_configuration(wanted, sizes), *_weights(wanted, sizes)]
    for _, index in _LAYOUTS.values():
        if index in files:
            shards = set(shard_files(fetch([index]) / index).values())
            files += sorted(shards & sizes.keys())
    absent = [
        file
        for file in files
        if not isinstance(
            try_to_load_from_cache(wanted.name, file, cache_dir=cache(), revision=commit), str
        )
    ]
    total = sum(sizes[file] for file in absent)
    _check_room(wanted, total)
    meter.begin(total)
    return fetch(files)


def _configuration(wanted: _Wanted, names: Collection[str]) -> list[str]:
    if "config.json" not in names:
        gguf = [name for name in names if name.endswith(".gguf")]
        cure = (
            f"; it has GGUF files: `hf download {wanted.name} {printable(gguf[0])}`, then load it"
            if gguf
            else ""
        )
        if ADAPTER in names:
            cure = "; it is an adapter: give the base model that its adapter_config.json names"
        elif made := layout_of_maker(names):
            cure = f"; it has {made}"
        raise ModelError(
            f"{wanted.name} has no config.json: expected a transformers model, found "
            f"{listed(sorted(map(printable, names))) or 'no files'}{cure}"
        )
    return [name for name in _CONFIGURATION if name in names]


def _weights(wanted: _Wanted, names: Collection[str]) -> list[str]:
    """The file with all weights, the index, or the only set of shards or variant; all top-level
    files for a format of a plugin."""
    format_ = (wanted.weight_format or "").rpartition(":")[2]
    if format_ and format_ not in _LAYOUTS:  # a plugin's format, which knows its files
        return [name for name in names if "/" not in name and name not in _CONFIGURATION]
    for layout in [_LAYOUTS[format_]] if format_ else _LAYOUTS.values():
        for name in layout:
            if name in names:
                return [name]
        sets = list(other_sets(names, layout[0]).values())
        if len(sets) == 1:
            return sorted(set(sets[0]) & set(names))
    if only_gguf(names):
        raise ModelError(_of_gguf(wanted.name, wanted.name, " --include '*.gguf'"))
    expected = [file for layout in _LAYOUTS.values() for file in layout]
    raise ModelError(
        f"{wanted.name} has no weights that can be loaded: expected one of {', '.join(expected)}, "
        f"found {listed(sorted(map(printable, names)))}; select another format with --format"
    )


def _check_room(wanted: _Wanted, needed: int) -> None:
    """Raise ModelError if the cache's disk is too small for the download."""
    folder = cache()
    blobs = folder / f"models--{wanted.name.replace('/', '--')}" / "blobs"
    begun = 0
    for file in blobs.glob("*.incomplete"):
        with suppress(FileNotFoundError):  # another process may complete it just now
            begun += file.stat().st_size
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    free = shutil.disk_usage(existing).free
    if needed - begun > free:
        raise ModelError(
            f"{wanted.name} needs {needed / 1e9:.2f} GB more in {folder}, where "
            f"{free / 1e9:.2f} GB are free: free space, or set HF_HUB_CACHE to a folder on another "
            "disk"
        )


# --- progress -------------------------------------------------------------------------------------


@define(eq=False)
class _Meter:
    """Progress of a download. After a stop, the download ends at its next bytes."""

    total: int = 0
    stopped: bool = False
    bars: list[Any] = field(factory=list)

    def begin(self, total: int) -> None:
        self.bars.clear()
        self.total = total

    @property
    def received(self) -> int:
        # There may be one bar for received bytes and one for bytes on disk.
        return max((int(bar.n) for bar in list(self.bars) if bar.unit == "B"), default=0)


class _StoppedError(Exception):
    pass


def _bar_class(meter: _Meter) -> type:
    """A class of progress bars that draw nothing and register with the meter."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread
        _lock = threading.RLock()  # no semaphore of the system

        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": False, "leave": False})
            meter.bars.append(self)

        def display(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            if meter.stopped:
                raise _StoppedError
            shown: bool | None = super().update(n)
            return shown

        def close(self) -> None:
            self.disable = True

    return Bar


@contextmanager
def _retries_unlogged() -> Iterator[None]:
    """Keep huggingface_hub's log of retries, two lines for each, off standard error."""

    def failure(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    handlers = list(logging.getLogger("huggingface_hub").handlers)
    for handler in handlers:
        handler.addFilter(failure)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(failure)


def _watched(work: Callable[[], T], meter: _Meter, progress: Callable[[], None]) -> T:
    """Do work in another thread, calling progress from this one; Ctrl-C stops it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            with _retries_unlogged():
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hf-hub", daemon=True).start()
    try:
        while not wait([future], timeout=0.2).done:
            progress()
    except BaseException:
        meter.stopped = True
        wait([future], timeout=1)
        raise
    return future.result()


# --- errors ---------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int:
    """The status code of the hub's response; 0 if there is none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _unreachable(error: Exception) -> bool:
    """Whether there was no connection, or no working hub at the other end."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):
            return _status(cause) >= 500
        library = type(cause).__module__.partition(".")[0]
        if isinstance(cause, (ConnectionError, TimeoutError)) or library in _HTTP_LIBRARIES:
            return True
    return False


_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Libraries that huggingface_hub has used over time."""


def _reason(error: Exception) -> str:
    """The environment variable that is wrong, or else the innermost cause with a message."""
    if wrong := _wrong_variable(error):
        return wrong
    said = [cause for cause in _chain(error) if str(cause)]
    return one_line(said[-1] if said else error)


_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def _wrong_variable(error: Exception) -> str:
    """Which environment variable caused an error that does not name it; empty if none did."""
    from huggingface_hub import constants

    for cause in _chain(error):
        kind, said = type(cause).__name__, str(cause).lower()
        if isinstance(cause, ImportError) and "socks" in said:
            return f"{_set(_PROXIES, 'socks')} names a SOCKS proxy: `pip install socksio` for it"
        if "proxy" in said and ("scheme" in said or kind == "InvalidURL"):
            return f"{_set(_PROXIES)} is not the address of a proxy: expected http://HOST:PORT"
        odd = [name for name in _given(_TOKENS) if not os.environ[name].isascii()]
        if (isinstance(cause, UnicodeEncodeError) and odd) or "header value" in said:
            named = (odd or _given(_TOKENS) or [str(constants.HF_TOKEN_PATH)])[0]
            return f"{named} holds characters that no token has: copy the token again"
        if isinstance(cause, FileNotFoundError) or "certificate" in said:
            for name in _given(_CERTIFICATES):
                if not os.path.exists(os.environ[name]):
                    return f"{name} names {os.environ[name]!r}, which does not exist: correct it"
        if kind in ("UnsupportedProtocol", "MissingSchema", "InvalidSchema", "InvalidURL"):
            return f"HF_ENDPOINT is {constants.ENDPOINT!r}: expected an address, https://HOST"
    return ""


def _given(names: Collection[str]) -> list[str]:
    return [name for name in names if os.environ.get(name)]


def _set(names: Collection[str], begins: str = "") -> str:
    """The variables of these that are set, to a value that begins so."""
    named = [name for name in _given(names) if os.environ[name].lower().startswith(begins)]
    return " or ".join(named or names)


def _refusal(wanted: _Wanted, error: Exception) -> ModelError:
    """An error with the cause (hub, network or disk) and advice."""
    from huggingface_hub import constants, errors

    name, page = wanted.name, f"{constants.ENDPOINT}/{wanted.name}"
    for cause in _chain(error):
        if isinstance(cause, errors.HFValidationError):
            return ModelError(f"{quoted(name)} is not a repository id: {one_line(cause)}")
        if isinstance(cause, errors.GatedRepoError):
            return ModelError(
                f"{name} is gated: accept its conditions on {page}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return ModelError(
                f"{name} has no revision {quoted(wanted.revision)}: {page}/refs lists its "
                "branches and tags"
            )
        if isinstance(cause, errors.RepositoryNotFoundError):
            return ModelError(
                f"no directory is named {quoted(name, 200)}, and {constants.ENDPOINT} has no "
                "such repository that you can access: check the name; for a private one log in "
                "with `hf auth login` or set HF_TOKEN"
            )
        if _status(cause) in (401, 403):
            return ModelError(
                f"{name}: the hub refuses the token ({one_line(cause)}): log in again with "
                "`hf auth login`, or correct HF_TOKEN"
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return ModelError(
                f"{name}: the disk that holds {cache()} is full; complete files are kept: free "
                "space, or set HF_HUB_CACHE to a folder on another disk, and load it again"
            )
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return ModelError(
                f"{name}: the cache cannot be written ({one_line(cause)}): make {cache()} "
                "writable, or set HF_HUB_CACHE to another folder"
            )
    if wrong := _wrong_variable(error):
        return ModelError(f"{name}: the hub cannot be reached: {wrong}")
    if _unreachable(error):
        proxies = _given(_PROXIES)
        check = ", ".join(["the connection", *proxies]) if proxies else "the connection"
        return ModelError(
            f"{name}: no directory has this name, and the hub at {constants.ENDPOINT} cannot be "
            f"reached ({_reason(error)}): check {check} and HF_ENDPOINT, and load it again; "
            "complete files are kept"
        )
    return ModelError(
        f"{name} cannot be downloaded ({_reason(error)}): load it again; complete files are kept"
    )
