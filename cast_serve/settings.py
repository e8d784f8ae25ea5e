"""Environment variables and flags -> the gateway's settings, each default written once here."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class GatewaySettings(BaseSettings):
    """Everything the gateway can be told; ``CAST_HOST`` and so on in the environment."""

    model_config = SettingsConfigDict(env_prefix="CAST_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    max_body_bytes: int = Field(default=4 << 20, gt=0, description="larger requests get 413")
    request_timeout_s: float = Field(default=600, gt=0, description="then 504")
    startup_timeout_s: float = Field(default=900, gt=0, description="for a local worker to load")
    shutdown_grace_s: float = Field(default=30, gt=0, description="for running requests to finish")
    health_interval_s: float = Field(default=1, gt=0, description="between looks at a worker")
    comparison_window: int = Field(default=512, gt=1, description="latest requests per variant")
