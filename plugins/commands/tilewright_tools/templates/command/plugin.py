"""Count the tokens of a text.

This first line is what ``tilewright --help`` prints, without importing this module.
"""

import argparse

from tilewright.cli import flags
from tilewright.config import resolve

tilewright_api = 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="text whose tokens are counted")
    parser.add_argument("--ids", action="store_true", help="print the token ids as well")
    flags.add(parser.add_argument_group("model"), "model", {"path", "format"})
    flags.add(parser.add_argument_group("plugins"), "plugins", {"loader"})


def run(args: argparse.Namespace) -> int:
    from tilewright import LLMEngine  # imports torch, which --help does not need

    config = resolve(flags=flags.layer(args)).config
    with LLMEngine.from_plugins(loader=config.plugins.loader) as engine:
        loaded = engine.load(config.model.path, config.model.format)
        loaded.weights.close()
    ids = loaded.text.tokenizer.encode(args.text, add_special_tokens=False).ids
    print(len(ids), *(ids if args.ids else ()))
    return 0
