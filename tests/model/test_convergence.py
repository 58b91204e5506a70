"""Whatever goes wrong, the rows end up as the stream and its decisions say: the shipped settle loop in a bad world.

Seeded histories in virtual time (history.py) of a database that loses, splits, delays and repeats writes cell by cell
(cluster.py), judged by a fold that shares no code with sidecar (oracle.py). And the model itself is judged: it must
meet every kind of trouble often, and notice each mutant of the shipped code (mutants.py).

MODEL_SEED is the first history (default: drawn from the run's seed, printed), MODEL_HISTORIES how many there are.
`MODEL_SEED=4711 MODEL_HISTORIES=1 scripts/test tests/model -k every_history` tells one history again.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.model.history import THEMES, in_the_model, run_history, theme_of
from tests.model.mutants import MUTANTS, Mutant

HISTORIES = 2_000  # less than a minute
HISTORIES_LONG = 20_000
MUTANT_HISTORIES_MAX = 2_000  # each is noticed within a few; the rarest within some hundreds
CANARY_FROM = 400  # histories; fewer prove nothing about shares

# What a share of all histories must have met, or the model tests nothing.
MET_AT_LEAST = {
    "two settlers": 0.5,
    "hosts that joined later": 0.05,
    "skips": 0.6,
    "start-overs": 0.5,
    "crashes": 0.4,
    "stops": 0.1,
    "unknown outcomes": 0.3,
    "partial batches": 0.15,
    "late writes": 0.2,
    "repeated writes": 0.2,
    "hanging batches": 0.08,
    "outages": 0.25,
    "losses": 0.15,
    "evictions": 0.04,
    "decisions": 0.3,
    "decisions: gap": 0.1,
    "decisions: reject": 0.1,
    "decisions: stamp": 0.05,
    "frames that turned up": 0.08,
    "conflicts reported": 0.01,
    "corruptions": 0.05,
    "repairs": 0.05,
}


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    """Hundreds of thousands of warnings would be the slowest part."""
    logger = logging.getLogger("sidecar")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


@pytest.fixture
def first_history(seed: int) -> int:
    """The first history's seed; the others follow it."""
    return int(os.environ.get("MODEL_SEED", seed))


def converge(first: int, histories: int) -> None:
    met: Counter[str] = Counter()
    began = time.perf_counter()
    with in_the_model():
        for seed in range(first, first + histories):
            outcome = run_history(seed)
            for what, times in outcome.met.items():
                met[what] += times > 0
            assert outcome.is_good, f"{outcome}\nthe same again: MODEL_SEED={seed} MODEL_HISTORIES=1"
            if seed % 64 == 0:
                gc.collect()  # tasks and frames are cycles; in time, so that there are never many
    took_s = time.perf_counter() - began
    print(f"{histories} histories from MODEL_SEED={first} converge, {histories / took_s:.0f} a second; they met:")
    for what, count in sorted(met.items(), key=lambda item: -item[1]):
        print(f"  {count:6} {what}")
    if histories >= CANARY_FROM:
        too_few = {what: met[what] for what, share in MET_AT_LEAST.items() if met[what] < share * histories}
        assert not too_few, f"of {histories} histories only so many met these, so the model tests little: {too_few}"


@pytest.mark.timeout(900)
def test_every_history_converges(first_history: int, capsys: pytest.CaptureFixture[str]) -> None:
    histories = int(os.environ.get("MODEL_HISTORIES", HISTORIES))
    with capsys.disabled():
        print()
        converge(first_history, histories)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_one_of_many_thousand_histories_converges(first_history: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        converge(first_history, int(os.environ.get("MODEL_HISTORIES", HISTORIES_LONG)))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=mutant.name.replace(" ", "-")) for mutant in MUTANTS])
def test_a_mutant_is_noticed(mutant: Mutant, first_history: int, capsys: pytest.CaptureFixture[str]) -> None:
    tried = 0
    with in_the_model() as patch:
        mutant.spoil(patch)
        for seed in range(first_history, first_history + MUTANT_HISTORIES_MAX * len(THEMES)):
            if theme_of(seed) not in mutant.themes:
                continue
            if tried == MUTANT_HISTORIES_MAX:
                break
            tried += 1
            outcome = run_history(seed, mutant.ways)
            if outcome.diverged:
                with capsys.disabled():
                    print(f"\n{mutant.name}: noticed in history {tried} of {', '.join(mutant.themes)}, seed {seed}")
                return
    pytest.fail(f"{mutant.name}: {tried} histories from MODEL_SEED={first_history} converge in spite of it")


def test_a_history_is_the_same_twice(first_history: int) -> None:
    with in_the_model():
        for seed in range(first_history, first_history + 2 * len(THEMES)):
            one, other = run_history(seed), run_history(seed)
            assert (one.met, one.diverged, one.failed) == (other.met, other.diverged, other.failed)
