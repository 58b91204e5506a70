"""What frames can be wrong in, each sent by a real engine process and seen as an operator sees it: `status --json`."""

from pathlib import Path
from typing import Any

from bench.world import World, until


def _status(world: World, **wanted: Any) -> Any:
    """Wait until status says what is wanted."""

    def says() -> Any:
        said = world.status()
        return said if all(said[key] == value for key, value in wanted.items()) else None

    return until(says, f"{wanted} in {world.status()}", 30)


def test_repeated_wrong_and_malformed_frames(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        faults = ["--duplicate", "300", "--wrong-field", "500:quantity=abc", "--corrupt", "700"]
        world.engine("--count", "1000", *faults).result()
        said = _status(world, acked=699, state="halted")
        assert said["halted"]["code"] == "GAP"
        assert said["halted"]["sequence"] == 700
        assert "gap accept 700 700" in said["halted"]["next_step"]
        assert (said["malformed"], said["rejected"], said["holes"], said["taped"]) == (1, 1, [[700, 700]], 1000)
        shown = world.verb("rejected", "show", "500")
        assert shown["code"] == "BAD_FIELD"
        assert "quantity='abc'" in shown["reason"]
        assert shown["decoded"]["quantity"] == "abc"
        assert world.verb("gap", "list")["holes"] == [[700, 700]]
        world.verb("gap", "accept", "700", "700", "--reason", "the frame was garbage", status=0)
        said = _status(world, acked=1000, state="running", halted=None)
        assert said["holes"] == []
        assert world.verb("gap", "list")["accepted"][0]["first"] == 700
        assert run.term() == 0
        verdict = world.judge("--accepted-gaps", "700-700")
        assert verdict["ok"], verdict


def test_a_hole_that_is_filled_late_settles_by_itself(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        engine = world.engine("--count", "3000", "--withhold-until", "400:2900", rate=600)
        said = _status(world, acked=399, state="halted", holes=[[400, 400]])
        assert said["halted"]["code"] == "GAP"
        assert said["taped"] > 400
        engine.result()
        said = _status(world, acked=3000, state="running", halted=None)
        assert said["holes"] == []
        assert run.term() == 0
        verdict = world.judge()
        assert verdict["ok"], verdict


def test_on_gap_record_goes_on_after_gap_after_s(tmp_path: Path) -> None:
    with World(tmp_path, settings=["stream.on_gap=record", "stream.gap_after_s=0.5"]) as world:
        run = world.start("run")
        world.engine("--count", "1000", "--withhold", "400", "--withhold", "401").result()
        _status(world, acked=1000, state="running", holes=[])
        accepted = world.verb("gap", "list")["accepted"]
        assert [(gap["first"], gap["last"]) for gap in accepted] == [(400, 401)]
        assert run.term() == 0
        verdict = world.judge("--accepted-gaps", "400-401")
        assert verdict["ok"], verdict


def test_an_engine_that_starts_at_1_again_halts_settlement_and_is_recorded(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        world.engine("--count", "2000", "--restart-at", "1200").result()
        said = _status(world, acked=1200, state="halted")
        assert said["halted"]["code"] == "SESSION_CHANGED"
        assert said["sessions"] == 2
        sessions = world.verb("tape", "info")["sessions"]
        assert [session["head"] for session in sessions] == [1200, 800]
        assert run.term() == 0
        verdict = world.judge("--up-to", "1200")
        assert verdict["ok"], verdict


def test_other_content_under_a_known_sequence_opens_a_session(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        world.engine("--count", "2000", "--contradict", "900").result()
        said = _status(world, acked=900, state="halted")
        assert said["halted"]["code"] == "SESSION_CHANGED"
        assert run.term() == 0
        verdict = world.judge("--up-to", "900")
        assert verdict["ok"], verdict


def test_an_unknown_symbol_halts_and_is_rejected_by_decision(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        world.engine("--count", "1000", "--wrong-field", "600:base_asset=77").result()
        said = _status(world, acked=599, state="halted")
        assert (said["halted"]["code"], said["halted"]["sequence"]) == ("UNKNOWN_SYMBOL", 600)
        refused = world.verb("reject", "601", "--reason", "not that one", status=1)
        assert "halted by UNKNOWN_SYMBOL at 600" in refused["message"]
        world.verb("reject", "600", "--reason", "no such asset", status=0)
        _status(world, acked=1000, state="running", halted=None, rejected=1)
        assert world.verb("rejected", "list")["rejected"][0]["code"] == "OPERATOR"
        assert run.term() == 0
        verdict = world.judge("--rejected", "600:OPERATOR")
        assert verdict["ok"], verdict


def test_pause_survives_a_restart_and_recording_goes_on(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        world.verb("pause", "--reason", "maintenance", status=0)
        run = world.start("run")
        world.engine("--count", "1000").result()
        _status(world, taped=1000, state="paused", acked=0)
        assert run.term() == 0
        run = world.start("run")
        _status(world, taped=1000, state="paused", acked=0, settling=True)
        world.verb("resume", status=0)
        _status(world, acked=1000, state="running")
        assert run.term() == 0
        verdict = world.judge()
        assert verdict["ok"], verdict


def test_split_halves_and_status_while_nothing_runs(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        settle = world.start("settle")
        until(lambda: world.said().get("state") == "waiting", "the settler waits for a tape")
        record = world.start("record")
        world.engine("--count", "1000", "--heartbeat-s", "0.2", "--withhold", "1000").result()
        said = _status(world, acked=999, state="halted")
        assert said["holes"] == [[1000, 1000]]  # known by the heartbeat alone
        assert settle.term() == 0
        assert record.term() == 0
        said = world.status()
        assert (said["acked"], said["recording"], said["settling"]) == (999, False, False)


def test_a_second_recorder_and_a_second_settler_on_a_tape_are_refused(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        until(lambda: world.said().get("pid") == run.pid, "it runs")
        for verb in ("record", "settle"):
            second = world.start(verb, log=f"second-{verb}.log")
            assert second.wait() == 1
            assert f"process {run.pid}" in second.log.read_text()
        assert run.term() == 0


def test_changed_rules_exit_78_and_new_symbols_are_taken(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        world.engine("--count", "400").result()
        world.until_acked(400)
        assert run.term() == 0
        changed = world.start("run", "symbols.btc_usdt.quote_amount=scaled", log="changed.log")
        assert changed.wait() == 78
        assert "symbols.btc_usdt.quote_amount = 'scaled', settled by 'raw'" in changed.log.read_text()
        added = ["assets.sol.id=4", "assets.sol.decimals=8", "symbols.sol_usdt.base=sol", "symbols.sol_usdt.quote=usdt"]
        run = world.start("run", *added, "symbols.sol_usdt.price_decimals=2", log="added.log")
        until(lambda: world.said().get("pid") == run.pid and world.said().get("state") == "running", "it runs")
        assert run.term() == 0
        run = world.start("run", log="lacking.log")
        until(lambda: run.logged("configuration_differs"), "a warning about what the configuration lacks")
        assert run.term() == 0


def test_a_new_tape_beside_a_stream_that_is_far_on_goes_on_from_durable(tmp_path: Path) -> None:
    with World(tmp_path, settings=["pipeline.durable_after_s=0.5"]) as world:
        run = world.start("run")
        world.engine("--count", "2000").result()
        until(lambda: world.said().get("durable") == 2000, "all of it is durable")
        assert run.term() == 0
        run = world.start("run", tape="new.db")
        world.engine("--count", "3000").result()  # the same engine again: its first 2,000 are compared, not settled
        world.until_acked(3000, tape="new.db")
        said = world.status(tape="new.db")
        assert (said["state"], said["holes"]) == ("running", [])
        assert run.term() == 0
        verdict = world.judge()
        assert verdict["ok"], verdict


def test_a_new_tape_with_another_session_beside_a_settled_stream_halts(tmp_path: Path) -> None:
    with World(tmp_path, source="generated", settings=["pipeline.durable_after_s=0.5"]) as world:
        run = world.start("run")
        world.engine("--count", "2000").result()
        until(lambda: world.said().get("durable") == 2000, "all of it is durable")
        assert run.term() == 0
        run = world.start("run", tape="new.db")
        world.engine("--count", "3000", "--seed", "99", journal=tmp_path / "other.jsonl").result()
        said = until(lambda: (s := world.status(tape="new.db"))["halted"] and s, "it halts")
        assert said["halted"]["code"] == "SESSION_CHANGED"
        assert said["acked"] == 2000
        assert run.term() == 0
        verdict = world.judge()
        assert verdict["ok"], verdict
