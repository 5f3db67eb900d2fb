"""Settings: one pydantic tree read from TOML."""

from mgrpo.config.agent_view import AgentView, view_of
from mgrpo.config.load import check_same_run, config_digest, dump_config, load_config
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.run import AgentConfig, RunConfig

__all__ = [
    "AgentConfig",
    "AgentView",
    "GrpoLossConfig",
    "RunConfig",
    "check_same_run",
    "config_digest",
    "dump_config",
    "load_config",
    "view_of",
]
