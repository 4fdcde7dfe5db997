"""Plugin ``top-p``: draws from the likely tokens; takes the likeliest at temperature 0."""

from tilewright import hookimpl
from tilewright.types import PluginInfo, SamplerRequest
from tilewright_sampling.sampler import LogitsSampler, Options

tilewright_api = 1


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="draws with temperature, top_k, top_p and min_p; at temperature 0 the likeliest",
        options=Options,
    )


@hookimpl
def create_sampler(request: SamplerRequest) -> LogitsSampler:
    return LogitsSampler(request.options, greedy=False)
