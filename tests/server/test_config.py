"""Ranges of the server's settings."""

from typing import Any

import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.server.config import ServerConfig


def test_defaults() -> None:
    config = ServerConfig()
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.max_body_bytes == 32 * 2**20
    assert config.engine == EngineConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": -1}, "port must be at least 0 and at most 65535, got -1"),
        ({"port": 65536}, "port must be at least 0 and at most 65535, got 65536"),
        ({"shutdown_timeout": -1}, "shutdown_timeout must be at least 0, got -1"),
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1, got 0"),
        ({"timeout_keep_alive": 0}, "timeout_keep_alive must be at least 1, got 0"),
        ({"sse_keep_alive_interval": 0}, "sse_keep_alive_interval must be at least 1, got 0"),
        ({"health_timeout": 0}, "health_timeout must be at least 1, got 0"),
        ({"api_key": ("a", "")}, "api_key must not be empty"),
        ({"served_model_name": ("",)}, "served_model_name must not be empty"),
    ],
    ids=str,
)
def test_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServerConfig(**settings)
    assert error.value.message == message


def test_ends_of_the_ranges() -> None:
    ServerConfig(port=0, shutdown_timeout=0, max_body_bytes=1)
    ServerConfig(port=65535)
