"""YAML in which no key is said twice: the plain loader keeps the last of two, and a whole section is gone unseen."""

from __future__ import annotations

from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class KeyTwice(yaml.YAMLError):
    """Which key a mapping says twice, and in which line for the second time."""


class StrictLoader(yaml.SafeLoader):
    # When it is composed, and not when its values are made: by then, what it merges by `<<` is among its own keys.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if (key.tag, key.value) in seen:
                    raise KeyTwice(f"line {key.start_mark.line + 1}: the key {key.value} is there twice: keep one")
                seen.add((key.tag, key.value))
        return node


def load_yaml(text: str) -> Any:
    """What a YAML text says, in plain values.

    Raises:
        KeyTwice: a mapping has two values for one key.
        YAMLError, ValueError, RecursionError: it is no YAML, has a date that is none, or is nested too deeply.
    """
    return yaml.load(text, Loader=StrictLoader)
