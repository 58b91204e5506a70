"""What the tests of proofs share: a loaded machine must not decide whether a repair was made in time."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _always_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.proof.fix.IN_TIME", 10_000.0)
