"""Plugin ``greedy``: always the most likely token."""

from tilewright import hookimpl
from tilewright.types import PluginInfo
from tilewright_sampling.sampler import LogitsSampler, Options

tilewright_api = 2


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="the most likely token after penalties and bias",
        options=Options,
        ignores=("temperature", "top_k", "top_p", "min_p", "seed"),
    )


@hookimpl
def create_sampler(options: Options) -> LogitsSampler:
    return LogitsSampler(options, greedy=True)
