"""Small third-party distributions, built as wheels and installed with real ``*.dist-info``."""

import base64
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path
from textwrap import dedent as dedent

from attrs import frozen

from tilewright.plugins import KINDS, normalized


@frozen
class Distribution:
    """What a plugin author publishes."""

    name: str
    files: Mapping[str, str]
    """Path in the wheel -> source."""
    plugins: Mapping[str, Mapping[str, str]]
    """Kind of plugin -> name -> target."""
    version: str = "1.0"


def build_wheel(distribution: Distribution, folder: Path) -> Path:
    """Write the distribution's wheel into a folder (PyPA "Binary distribution format")."""
    escaped = distribution.name.replace("-", "_")
    info = f"{escaped}-{distribution.version}.dist-info"
    entry_points = "\n".join(
        line
        for kind, targets in distribution.plugins.items()
        for line in (f"[{KINDS[kind].group}]", *(f"{n} = {t}" for n, t in targets.items()), "")
    )
    files = dict(distribution.files) | {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {distribution.name}\nVersion: {distribution.version}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{info}/entry_points.txt": entry_points,
    }
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
    wheel = folder / f"{escaped}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return wheel


def install(site: Path, *distributions: Distribution) -> Path:
    """Unpack the distributions' wheels into a site folder, as installers do; returns the folder."""
    site.mkdir(parents=True, exist_ok=True)
    for distribution in distributions:
        wheel = build_wheel(distribution, site)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        wheel.unlink()
    return site


Install = Callable[..., Path]


@contextmanager
def on_path(site: Path) -> Iterator[Install]:
    """Put a site folder first on sys.path; yields a function that installs distributions into it.

    Restores the path afterwards, and forgets modules imported from the folder.
    """
    site.mkdir()
    before = set(sys.modules)
    path = sys.path[:]
    sys.path.insert(0, str(site))
    invalidate_caches()
    try:
        yield lambda *distributions: install(site, *distributions)
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if str(site) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]


def run(*arguments: str, site: Path | None = None, **environment: str) -> "Completed":
    """Run Python in a child process with the site folder on its path, outside the checkout."""
    paths = [str(site)] if site else []
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COLUMNS"))}
    child = subprocess.run(
        [sys.executable, *arguments],
        env=kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    return Completed(child.returncode, child.stdout, child.stderr)


@frozen
class Completed:
    code: int
    out: str
    err: str


def sampler(distribution: str, name: str, source: str, version: str = "1.0") -> Distribution:
    """A distribution of one sampler in one module, which is named after the distribution."""
    module = normalized(distribution).replace("-", "_")
    return Distribution(
        name=distribution,
        version=version,
        files={f"{module}.py": dedent(source)},
        plugins={"sampler": {name: module}},
    )


def documented(page: str) -> Distribution:
    """The distribution whose module and pyproject.toml a documentation page shows."""
    blocks = re.findall(r"```(?:python|toml)\n# (\S+\.(?:py|toml))\n(.*?)```", page, re.DOTALL)
    files = dict(blocks)
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    kinds = {kind.group: name for name, kind in KINDS.items()}
    named = {kinds[group]: names for group, names in project["entry-points"].items()}
    modules = {path: text for path, text in files.items() if path.startswith("acme")}
    return Distribution(project["name"], modules, named, project["version"])


def _digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return f"sha256={base64.urlsafe_b64encode(raw).rstrip(b'=').decode()}"


LIKELIEST = """
    from tilewright import hookimpl
    from tilewright.types import SampledToken

    tilewright_api = 2

    class Likeliest:
        def sample(self, logits, rows):
            return [SampledToken(token_id=int(row.argmax())) for row in logits]

    @hookimpl
    def create_sampler(options):
        return Likeliest()
"""
"""The least that a sampler can be."""

BROKEN_IMPORT = sampler("acme-broken", "broken", "import a_library_that_is_not_installed")
EXITS = sampler("acme-exits", "exits", "raise SystemExit(3)")
SYNTAX = sampler("acme-syntax", "syntax", "def f(:")
MISSPELT_HOOK = sampler(
    "acme-misspelt", "misspelt", LIKELIEST.replace("create_sampler", "create_samplr")
)
WRONG_ARGUMENT = sampler("acme-argument", "argument", LIKELIEST.replace("(options)", "(optons)"))
OTHER_API = sampler("acme-api", "future", LIKELIEST.replace("api = 2", "api = 999"))
OLD_API = sampler("acme-old", "past", LIKELIEST.replace("api = 2", "api = 1"))
UNMARKED = sampler("acme-unmarked", "unmarked", LIKELIEST.replace("@hookimpl", ""))
RIVALS = (
    sampler("acme-one", "rival", LIKELIEST, version="1.5"),
    sampler("Acme.Two", "rival", LIKELIEST.replace("argmax", "argmin"), version="2.0"),
)
STALE = Distribution("acme-stale", {}, {"sampler": {"stale": "acme_stale_package.plugin"}})

GOOD = Distribution(
    name="acme-bag",
    version="0.3",
    plugins={
        "loader": {"bag-random": "acme_bag.loader"},
        "executor": {"bag": "acme_bag.executor:plugin"},
        "kv_allocator": {"slab": "acme_bag.slab"},
        "sampler": {"likeliest": "acme_bag.likeliest"},
        "observer": {"tally": "acme_bag.tally"},
    },
    files={
        "acme_bag/__init__.py": "",
        "acme_bag/likeliest.py": dedent(LIKELIEST),
        "acme_bag/loader.py": dedent('''
            """Random weights and a tokenizer of one word a token, made in memory."""

            import attrs
            import torch
            from tokenizers import Tokenizer, models, pre_tokenizers

            from tilewright import hookimpl
            from tilewright.types import (
                GenerateConfig,
                LoadedModel,
                ModelConfig,
                PluginInfo,
                RopeConfig,
                TensorInfo,
                TextAssets,
            )
            from tilewright.weights import expected_tensors

            tilewright_api = 2

            @attrs.frozen
            class Options:
                seed: int = attrs.field(default=0, metadata={"help": "seed of the weights"})
                words: int = attrs.field(
                    default=32,
                    validator=attrs.validators.ge(2),
                    metadata={"help": "words in the vocabulary"},
                )

            class RandomTensors:
                def __init__(self, shapes, seed):
                    self.shapes = shapes
                    self.seed = seed

                def names(self):
                    return self.shapes.keys()

                def info(self, name):
                    shape = self.shapes[name]
                    size = 4 * torch.Size(shape).numel()
                    return TensorInfo(shape=shape, dtype="float32", nbytes=size, location="memory")

                def get(self, name):
                    seed = self.seed + list(self.shapes).index(name)
                    made = torch.Generator().manual_seed(seed)
                    return torch.randn(self.shapes[name], generator=made)

                def close(self):
                    pass

            @hookimpl
            def plugin_info():
                return PluginInfo(summary="random weights", options=Options)

            @hookimpl
            def can_load(source):
                return source.startswith("random:")

            @hookimpl
            def load_model(source, options):
                words = options.words
                config = ModelConfig(
                    architecture="Bag",
                    vocab_size=words,
                    hidden_size=8,
                    intermediate_size=8,
                    num_layers=1,
                    num_heads=1,
                    num_kv_heads=1,
                    head_dim=8,
                    norm_eps=1e-6,
                    rope=RopeConfig(),
                    max_position_embeddings=64,
                    dtype="float32",
                )
                vocabulary = {f"w{i}": i for i in range(words)}
                tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
                tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
                return LoadedModel(
                    config=config,
                    weights=RandomTensors(expected_tensors(config), options.seed),
                    text=TextAssets(tokenizer=tokenizer),
                    generation_defaults=GenerateConfig(max_new_tokens=4),
                    source=source,
                )
        '''),
        "acme_bag/executor.py": dedent('''
            """A bag of words: logits are the mean embedding of the context, times the head.

            It keeps the embeddings as keys, and reads them back through the block table.
            """

            import torch

            from tilewright import hookimpl, kv_storage
            from tilewright.types import Check, ExecutorLimits, KvCacheSpec, KvLayer, PluginInfo

            class Bag:
                device = "cpu"
                limits = ExecutorLimits(max_batch_size=4)

                def __init__(self, config, runtime, weights):
                    self.embed = weights.get("model.embed_tokens.weight")
                    self.head = weights.get("lm_head.weight")
                    self.kv_cache_spec = KvCacheSpec(
                        num_layers=1,
                        num_kv_heads=1,
                        head_dim=config.head_dim,
                        page_size=runtime.page_size or 4,
                        dtype="float32",
                    )

                def allocate_kv(self, num_pages):
                    (self.layer,) = kv_storage.allocate(self.kv_cache_spec, num_pages)

                def forward(self, batch, tap=None):
                    rows = self.layer.key.view(-1, self.kv_cache_spec.head_dim)
                    rows[batch.slot_mapping.long()] = self.embed[batch.token_ids]
                    size = self.kv_cache_spec.page_size
                    means = []
                    for i, table in enumerate(batch.block_table.tolist()):
                        start, stop = batch.query_starts[i : i + 2].tolist()
                        for row in range(start, stop):
                            seen = range(int(batch.positions[row]) + 1)
                            slots = [table[p // size] * size + p % size for p in seen]
                            means.append(rows[slots].mean(0))
                    return torch.stack(means)[batch.logits_rows] @ self.head.T

                def read_kv(self, layer, pages):
                    pages = list(pages)
                    return KvLayer(self.layer.key[pages], self.layer.value[pages])

                def write_kv(self, layer, pages, cache):
                    pages = list(pages)
                    self.layer.key[pages], self.layer.value[pages] = cache.key, cache.value

                def close(self):
                    pass

            class Plugin:
                tilewright_api = 2

                @hookimpl
                def plugin_info(self):
                    return PluginInfo(
                        summary="bag of words",
                        weight_dtypes=("float32",),
                        kv_dtypes=("float32",),
                        limits={"batch": "up to 4"},
                    )

                @hookimpl
                def doctor_checks(self):
                    return [Check(name="bags", status="warning", found="1", advice="buy more")]

                @hookimpl
                def create_executor(self, model_config, runtime_config, weights):
                    return Bag(model_config, runtime_config, weights)

            plugin = Plugin()
        '''),
        "acme_bag/slab.py": dedent('''
            """Each request's pages lie as close together as they can; no page is shared."""

            from bisect import insort

            from tilewright import hookimpl
            from tilewright.errors import OutOfPagesError
            from tilewright.types import PluginInfo

            tilewright_api = 2

            @hookimpl
            def plugin_info():
                return PluginInfo(summary="pages that are not shared", limits={"sharing": "none"})

            @hookimpl
            def create_kv_allocator(num_pages, page_size):
                return Slabs(num_pages, page_size)

            class Slabs:
                evictable_pages = 0

                def __init__(self, num_pages, page_size):
                    self.total_pages = num_pages
                    self.page_size = page_size
                    self.unheld = list(range(num_pages))  # ascending
                    self.held = {}

                @property
                def free_pages(self):
                    return len(self.unheld)

                def allocate(self, request_id, token_ids, *, max_cached, salt=b""):
                    if request_id in self.held or not len(token_ids):
                        raise ValueError(request_id)
                    self.held[request_id] = []
                    return 0

                def extend(self, request_id, to_tokens):
                    held = self.held[request_id]
                    missing = max(0, -(-to_tokens // self.page_size) - len(held))
                    if missing > len(self.unheld):
                        raise OutOfPagesError(f"{missing} pages needed, {len(self.unheld)} free")
                    held += self.unheld[:missing]
                    del self.unheld[:missing]

                def truncate(self, request_id, to_tokens):
                    held = self.held[request_id]
                    while len(held) > -(-to_tokens // self.page_size):
                        insort(self.unheld, held.pop())

                def commit(self, request_id, token_ids):
                    if len(token_ids) > len(self.held[request_id]) * self.page_size:
                        raise ValueError(request_id)

                def pages(self, request_id):
                    return self.held[request_id]

                def free(self, request_id):
                    self.truncate(request_id, 0)
                    del self.held[request_id]

                def check_integrity(self):
                    pages = [*self.unheld, *(page for held in self.held.values() for page in held)]
                    assert sorted(pages) == list(range(self.total_pages))
        '''),
        "acme_bag/tally.py": dedent('''
            """Writes what it was told of, one line an event, when the engine closes."""

            from pathlib import Path

            import attrs

            from tilewright import hookimpl
            from tilewright.types import PluginInfo

            tilewright_api = 2

            @attrs.frozen
            class Options:
                path: Path = attrs.field(metadata={"help": "file to write"})

            @hookimpl
            def plugin_info():
                return PluginInfo(summary="a line an event", options=Options)

            @hookimpl
            def create_observer(options):
                return Tally(options.path)

            class Tally:
                def __init__(self, path):
                    self.path = path
                    self.lines = []

                @hookimpl
                def on_model_loaded(self, model_id, model_config):
                    self.lines.append(f"loaded {model_id} {model_config.architecture}")

                @hookimpl
                def on_step(self, event):
                    self.lines.append(f"{event.phase} {event.num_tokens}")

                @hookimpl
                def on_request_finished(self, result):
                    self.lines.append(f"finished {result.finish_reason}")

                @hookimpl
                def on_close(self):
                    self.path.write_text("".join(f"{line}\\n" for line in self.lines))
        '''),
    },
)
"""One good plugin of each kind that an engine selects by name."""
