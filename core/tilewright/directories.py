"""What a directory holds in place of a model that can be loaded, for messages."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from tilewright.errors import shortened

ADAPTER = "adapter_config.json"


def adapter(directory: Path) -> str | None:
    """What adapter of which model a directory holds, in words; None if it holds none."""
    try:
        values = json.loads((directory / ADAPTER).read_bytes())
        kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = base = None
    known = "LoRA " if kind == "LORA" else ""
    named = f" {shortened(base, 200)!a}" if isinstance(base, str) and base else ""
    return f"a {known}adapter of the base model{named}"


def other_layout(directory: Path, names: Collection[str]) -> str | None:
    """What a directory with these names holds, and what to do; None if this is not known."""
    if found := adapter(directory):
        return (
            f"{found}, not a whole model: merge it into the base model (merge_and_unload of peft) "
            "and save that, or give the base model"
        )
    return layout_of_maker(names)


def without_configuration(names: Collection[str]) -> str | None:
    """What a directory with these names holds and lacks, and what to do; None for no weights."""
    weights = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
    if not weights or "config.json" in names:
        return None
    return (
        f"weights ({weights[0]}) but no config.json: download the model's other files into it, or "
        "give the directory of the whole model"
    )


def layout_of_maker(names: Collection[str]) -> str | None:
    """The maker whose own layout files with these names have, and what converts them; else None."""
    for maker, pattern, script in (
        ("Meta", r"consolidated\.\d+\.pth", "convert_llama_weights_to_hf.py"),
        ("Mistral", r"consolidated.*\.safetensors", "convert_mistral_weights_to_hf.py"),
    ):
        files = sorted(name for name in names if re.fullmatch(pattern, name))
        if files:
            return (
                f"weights in {maker}'s own layout ({files[0]}): convert them with {script} of "
                "transformers' repository, or take the model's checkpoint with config.json"
            )
    return None
