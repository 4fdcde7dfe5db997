"""Reference of hooks and types, from their source: ``python -m tilewright_tools.hook_reference``.

Reads the source rather than the imported classes, since only the source has field docstrings.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator

from tilewright import hookspecs, plugins
from tilewright.types import executor, kernels, kv_cache, model, plugin, results, sampling

SUBJECTS = (model, executor, kernels, kv_cache, sampling, results, plugin)
"""The modules of tilewright.types, in the order of a run."""

_HEAD = """\
# Hooks and types

<!-- Made by `python -m tilewright_tools.hook_reference > docs/hooks.md`; do not edit. -->

The hooks that a plugin implements, and the types that it exchanges with the engine: API version
{version}, generated from `tilewright/hookspecs.py` and `tilewright/types`.
[Writing plugins](writing-plugins.md) explains how to use them.

An implementation is marked with `@hookimpl`. It takes the arguments of the hook that it needs, by
their names and without defaults.
"""

_COMMAND = """\
A command has no hooks: the entry point names the `Command` itself (see [Protocols](#protocols)).
"""


def reference() -> str:
    """Markdown."""
    specs = _classes(hookspecs)
    lines = [_HEAD.format(version=plugins.API_VERSION)]
    for kind in plugins.WITH_HOOKS.values():
        title = _capital(plugins.noun(kind.name)).replace("Kv", "KV")
        lines += [f"## {title}\n", f"Entry-point group `{kind.group}`.\n"]
        lines += _hooks(specs[kind.specs], kind.required)
        if kind.name == "observer":
            lines += ["### Events\n", _documentation(specs["ObserverEvents"])]
            lines += _hooks(specs["ObserverEvents"], None)
    lines += ["## Command\n", f"Entry-point group `{plugins.COMMAND.group}`.\n", _COMMAND]
    lines += ["## Any kind\n", *_hooks(specs["AnyPlugin"], ())]
    protocols: list[tuple[str, ast.ClassDef]] = []
    data: list[tuple[str, ast.ClassDef]] = []
    for name, node in (item for subject in SUBJECTS for item in _classes(subject).items()):
        is_protocol = any(ast.unparse(base) == "Protocol" for base in node.bases)
        (protocols if is_protocol else data).append((name, node))
    lines += ["## Protocols\n", "The objects that hooks create and receive.\n"]
    for name, node in protocols:
        bases = [b for b in map(ast.unparse, node.bases) if b != "Protocol"]
        also = f"Extends `{bases[0]}`.\n\n" if bases else ""
        lines += [f"### {name}\n", also + _documentation(node), *_methods(node), ""]
    lines += ["## Data\n", "Frozen attrs classes, and the values that some fields have.\n"]
    for name, text in _aliases():
        lines.append(f"- `{name}`: {text}")
    lines.append("")
    for name, node in data:
        lines += [f"### {name}\n"]
        if documentation := _documentation(node):
            lines.append(documentation)
        lines += [*_fields(node), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _classes(module: object) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]  # a module
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _aliases() -> Iterator[tuple[str, str]]:
    """The type aliases of tilewright.types, and what they stand for."""
    for node in (n for subject in SUBJECTS for n in ast.parse(inspect.getsource(subject)).body):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and value is not None:
            text = _type(value)
            if text.startswith(("Literal[", "Callable[")):
                yield target.id, f"`{text}`"


def _hooks(node: ast.ClassDef, required: tuple[str, ...] | None) -> Iterator[str]:
    """required: the hooks that must be implemented; None where they do not belong to a plugin."""
    for hook in node.body:
        if isinstance(hook, ast.FunctionDef):
            yield f"### `{_signature(hook)}`\n"
            said = _documentation(hook).removeprefix("Optional: ")
            if required is not None:
                said = f"{'Required' if hook.name in required else 'Optional'}. {_capital(said)}"
            yield said


def _methods(node: ast.ClassDef) -> Iterator[str]:
    for method in node.body:
        if isinstance(method, ast.FunctionDef):
            decorated = [ast.unparse(d) for d in method.decorator_list]
            shown = _signature(method)
            if "property" in decorated:
                shown = f"{method.name}: {_annotation(method.returns)}"
            yield _item(shown, _documentation(method))


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            default, said = _default(statement.value)
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                said = ". ".join(filter(None, [said, _clean(str(after.value.value))]))
            yield _item(
                f"{statement.target.id}: {_annotation(statement.annotation)}{default}", said
            )
        elif isinstance(statement, ast.FunctionDef) and not statement.name.startswith("_"):
            shown = _signature(statement)
            if any(ast.unparse(d) == "property" for d in statement.decorator_list):
                shown = f"{statement.name}: {_annotation(statement.returns)}"
            yield _item(shown, _documentation(statement))


def _default(value: ast.expr | None) -> tuple[str, str]:
    """A field's default as shown, and its line of help."""
    if value is None:
        return "", ""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name)):
        return " = ..." if isinstance(value, ast.Lambda) else f" = {ast.unparse(value)}", ""
    named = {k.arg: k.value for k in value.keywords}
    if "factory" in named:
        return f" = {ast.unparse(named['factory'])}()", ""
    default = value.args[1] if len(value.args) > 1 else named.get("default")
    shown = "None" if default is None else ast.unparse(default)
    help = ast.literal_eval(value.args[0]) if value.func.id == "described" else ""
    return f" = {shown}", help


def _signature(function: ast.FunctionDef) -> str:
    arguments = [
        f"{a.arg}: {_annotation(a.annotation)}" for a in function.args.args if a.arg != "self"
    ]
    for index, default in enumerate(reversed(function.args.defaults), 1):
        arguments[-index] += f" = {ast.unparse(default)}"
    shown = ", ".join(arguments)
    return f"{function.name}({shown}) -> {_annotation(function.returns)}"


def _annotation(node: ast.expr | None) -> str:
    return "" if node is None else _type(node)


def _type(node: ast.expr) -> str:
    """A type without the quotes of forward references."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(_Unquoted().visit(ast.parse(ast.unparse(node), mode="eval"))).strip()


class _Unquoted(ast.NodeTransformer):
    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node if ast.unparse(node.value) == "Literal" else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Name(node.value) if isinstance(node.value, str) else node


def _documentation(node: ast.ClassDef | ast.FunctionDef) -> str:
    text = _clean(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):  # its fields become a list
        text = re.sub(r"^(\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return f"{text}\n" if text else ""


def _clean(text: str) -> str:
    return inspect.cleandoc(text).replace("``", "`")


def _item(shown: str, said: str) -> str:
    text = said.strip().replace("\n\n", "\n").replace("\n", "\n  ")
    return f"- `{shown}`" + (f": {text}" if text else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    sys.stdout.write(reference())
