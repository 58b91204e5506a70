"""The stores that end-to-end tests run over: a parametrized fixture's values, the real Cassandra among them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench.world import World
    from tests.cassandra_node import Node

STORES = ["sqlite", pytest.param("cassandra", marks=pytest.mark.cassandra)]
# For what does not depend on the store: Cassandra with --long.
MOSTLY_SQLITE = ["sqlite", pytest.param("cassandra", marks=[pytest.mark.cassandra, pytest.mark.long])]
# For what a quicker test of SQLite shows as well (kills: tests/fault/test_kills.py): SQLite with --long.
MOSTLY_CASSANDRA = [
    pytest.param("sqlite", marks=pytest.mark.long),
    pytest.param("cassandra", marks=pytest.mark.cassandra),
]


class StoreUnderTest:
    """How a sidecar and the judge reach an empty store: a file of the world's, or a keyspace of its own."""

    def __init__(self, node: Node | None) -> None:
        self.node = node
        self.settings: list[str] = []
        self.judged: str | None = None
        if node is not None:
            keyspace = f"t_{secrets.token_hex(6)}"
            self.settings = [
                "store.backend=cassandra",
                f"store.cassandra.port={node.port}",
                f"store.cassandra.keyspace={keyspace}",
            ]
            self.judged = f"cassandra:{node.host}:{node.port}/{keyspace}"

    def prepare(self, world: World) -> Any:
        """Make the tables."""
        return world.verb("schema", "apply", status=0)


def store_under_test(name: str, get_node: Callable[[], Node]) -> StoreUnderTest:
    """Give the store that a parametrized test asks for."""
    return StoreUnderTest(get_node() if name == "cassandra" else None)
