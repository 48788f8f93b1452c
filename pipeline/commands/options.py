"""What the options of several commands share."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError


def engine_section(**values: Any) -> Any:
    """The engine section of a configuration from command-line options.

    Raises:
        ConfigError: a value that it cannot have, by the option's name.
    """
    from pydantic import ValidationError

    from pipeline.config import EngineConfig, first_problem

    try:
        return EngineConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"--{first_problem(error).replace('runtime', 'engine', 1)}") from None
