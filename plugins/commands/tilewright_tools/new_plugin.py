"""``tilewright plugins new``: writes a distribution of one new plugin.

``templates/`` holds a folder per kind, with the plugin and its tests, and a common one. The files
are written as they are, except for the words that ``write`` replaces. A kernel set starts as a copy
of the shipped one, which is read where it is installed.
"""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from tilewright import __version__, plugins
from tilewright.errors import ConfigError
from tilewright.paths import path_of

_TEMPLATES = Path(__file__).with_name("templates")

_FILES: dict[str, tuple[str, ...]] = {
    "pyproject.toml": ("common/pyproject.toml",),
    "README.md": ("common/README.md",),
    "src/tilewright_{module}/__init__.py": ("common/__init__.py",),
    "src/tilewright_{module}/py.typed": (),
    "src/tilewright_{module}/{kind}.py": ("{kind}/plugin.py",),
    "tests/test_{kind}.py": ("{kind}/test_plugin.py",),
}
"""The templates that each file is made of, one after another."""

_KERNEL_SET_FILES = _FILES | {
    "pyproject.toml": ("common/pyproject.toml", "kernels/mypy.toml"),
    "README.md": ("kernels/README.md",),
    "src/tilewright_{module}/{kind}.py": (),
}
"""The same for a kernel set, whose plugin module is copied with its sources."""

_SHIPPED_KERNELS = "tilewright_kernels.qwen3_14b"
"""The package that a new kernel set is a copy of."""

_TEMPLATE_WORDS = {
    "loader": (
        "Models in directories with a layout of their own",
        "generate --model DIR --loader my-plugin",
    ),
    "weight_format": (
        "Weights in one file of a simple layout",
        "generate --model DIR --format my-plugin",
    ),
    "executor": ("A forward pass in float32, written out", "generate --executor my-plugin"),
    "kv_allocator": (
        "A paged KV cache that hands out the lowest free page first",
        "generate --kv-allocator my-plugin",
    ),
    "sampler": ("Epsilon sampling", "generate --temperature 1 --sampler my-plugin"),
    "logits_processor": (
        "Texts that are one of a request's choices",
        "generate --logits-processor my-plugin=yes,no",
    ),
    "observer": (
        "Steps, tokens and seconds, counted by model and phase",
        "generate --observer my-plugin",
    ),
    "command": ("The number of tokens in a text", "my-plugin"),
    "kernels": (
        "Layers of dense Qwen3 models in PyPTO",
        "generate --executor pypto-npu -o platform=emulated -o kernels=my-plugin",
    ),
}
"""The summary of each kind's template, and the command that uses it, without the prompt."""


def write(kind: str, name: str, out: Path | None = None) -> Path:
    """Write a distribution of a plugin to a folder that does not exist yet; returns the folder.

    out: by default ``tilewright-NAME`` in the working folder. Raises ConfigError for a name
    that is invalid or already installed, and for a folder that exists.
    """
    _check_name(kind, name)
    folder = Path(f"tilewright-{name}") if out is None else path_of(out)
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} already exists: choose another folder with --out")
    if not folder.parent.is_dir():
        raise ConfigError(
            f"--out {str(folder)!r}: folder {str(folder.parent)!r} does not exist: create it first"
        )
    module = name.replace("-", "_")
    summary, use = _TEMPLATE_WORDS[kind]
    words = {
        "MY_SUMMARY": summary,
        "MY_USE": f"tilewright {use} PROMPT",
        "MY_NOUN": plugins.noun(kind),
        "MY_GROUP": plugins.KINDS[kind].group,
        "MY_KIND": kind,
        "0.0.0": __version__,
    }
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        copies = kind == plugins.KERNELS.name
        texts = {}
        for path, templates in (_KERNEL_SET_FILES if copies else _FILES).items():
            parts = (_TEMPLATES / template.format(kind=kind) for template in templates)
            text = "".join(part.read_text(encoding="utf-8") for part in parts)
            for word, meant in (words | {"my-plugin": name, "my_plugin": module}).items():
                text = text.replace(word, meant)
            texts[path.format(kind=kind, module=module)] = text
        if copies:
            texts |= _shipped_kernels(name, module)
        for path, text in texts.items():
            file = beside / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        beside.rename(folder)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"folder {str(folder)!r} cannot be written: {error.strerror}"
            ) from error
        raise
    return folder


def _shipped_kernels(name: str, module: str) -> dict[str, str]:
    """The shipped kernel set under another name: path -> text.

    Raises ConfigError if it is not installed, and OSError if a file cannot be read.
    """
    found = find_spec(_SHIPPED_KERNELS)
    if found is None or found.origin is None:
        raise ConfigError(
            f"package {_SHIPPED_KERNELS}, which a new kernel set is a copy of, is not installed: "
            "install tilewright again"
        )
    package = f"tilewright_{module}"
    texts = {}
    for file in sorted(Path(found.origin).parent.glob("*.py")):
        if file.name == "__init__.py":
            continue
        text = file.read_text(encoding="utf-8").replace(_SHIPPED_KERNELS, package)
        if file.name == "plugin.py":
            text = text.replace("``qwen3``", f"``{name}``")
        copied = "kernels.py" if file.name == "plugin.py" else file.name
        texts[f"src/{package}/{copied}"] = text
    return texts


def _check_name(kind: str, name: str) -> None:
    """Raise ConfigError for an invalid name, and for that of an installed plugin or package."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 60:
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:60].rstrip("-")
        hint = f"; {near!r} would be valid" if near and near != name else ""
        raise ConfigError(
            f"expected a plugin name of at most 60 lower-case letters, digits and single hyphens, "
            f"starting with a letter, found {name[:100]!r}{hint}"
        )
    rivals = plugins.matching(name, plugins.installed(kind))
    if rivals:
        raise ConfigError(
            f"{rivals[0]} is already installed in {rivals[0].where}: choose another name, since "
            f"{name!r} would be ambiguous"
        )
    module = f"tilewright_{name.replace('-', '_')}"
    found = find_spec(module)
    if found is not None:
        where = found.origin or next(iter(found.submodule_search_locations or ()), "")
        raise ConfigError(f"package {module} is already installed in {where}: choose another name")
