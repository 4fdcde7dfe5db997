"""Plugin ``top-p``: samples from the likely tokens; at temperature 0, takes the most likely one."""

from tilewright import hookimpl
from tilewright.types import PluginInfo
from tilewright_sampling.sampler import LogitsSampler, Options

tilewright_api = 2


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="sampling with temperature, top_k, top_p and min_p; greedy at temperature 0",
        options=Options,
    )


@hookimpl
def create_sampler(options: Options) -> LogitsSampler:
    return LogitsSampler(options, greedy=False)
