"""The admin endpoint of real processes: what Prometheus, a browser and an operator see in each state."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.world import ENVIRONMENT, World, free_port, until
from sidecar.life import Bounds

# As root and without a network: no sandbox of its own, nothing that calls home.
CHROMIUM_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Endpoint:
    """The admin endpoint of one process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.setting = f"admin.listen=127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/status.json")[1] or "{}")
        return found

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Each sample's value, by its name and the values of its labels but the stream's."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                labels = [value for name, value in sorted(sample.labels.items()) if name != "stream"]
                found[sample.name, *labels] = sample.value
        return found


def test_what_is_counted_is_what_happened(tmp_path: Path) -> None:
    at = Endpoint()
    with World(tmp_path, settings=["pipeline.durable_after_s=0.5", at.setting]) as world:
        run = world.start("run")
        until(lambda: at.get("/healthz") == (200, "ok\n"), "it answers")
        assert at.get("/ready") == (503, "not ready: waiting\n")
        assert "Waiting for the first event." in at.get("/")[1]
        world.engine("--count", "2000", "--wrong-field", "500:quantity=abc").result()
        world.until_acked(2000)
        until(lambda: at.status()["durable"] == 2000, "all of it is durable")
        until(lambda: at.metrics().get(("sidecar_rejected_events_total",)) == 1, "the rejected one is counted", 30)
        until(lambda: at.status()["rejected"] == 1, "and shown: what is shown is a second old at most")
        said, shown = at.status(), at.metrics()
        verb = world.status()
        assert {key: said[key] for key in said if key in verb} == {key: verb[key] for key in said}
        assert at.get("/ready") == (200, "ready\n")
        assert shown["sidecar_frames_received_total",] == shown["sidecar_events_recorded_total",] == 2000
        assert shown["sidecar_events_acknowledged_total",] == 2000
        assert 0 < shown["sidecar_acknowledge_seconds_count",] <= 2000, "the last few wait for the next sample"
        assert 2000 / Bounds().batch_trades_max <= shown["sidecar_batches_acknowledged_total",] <= 2000
        for position in ("taped", "acked", "durable"):
            assert shown[f"sidecar_{position}_sequence",] == 2000
        assert (shown["sidecar_lag_events",], shown["sidecar_state", "running"], shown["sidecar_lives_total",]) == (
            0,
            1,
            1,
        )
        assert shown["sidecar_tape_used_bytes",] > 0
        assert run.term() == 0
        assert at.get("/healthz")[0] == 0


def test_a_halt_is_seen_everywhere_and_ends_everywhere(tmp_path: Path) -> None:
    at = Endpoint()
    with World(tmp_path, settings=[at.setting]) as world:
        world.start("run")
        world.engine("--count", "1000", "--corrupt", "700").result()
        until(lambda: at.status().get("state") == "halted", "it halts", 30)
        assert at.get("/healthz")[0] == 200, "a halted sidecar is alive: nobody may restart it for that"
        assert at.get("/ready") == (503, "not ready: halted\n")
        page, shown = at.get("/")[1], at.metrics()
        assert "Halted: GAP at sequence 700." in page
        assert "<code>sidecar gap accept 700 700" in page
        assert (shown["sidecar_state", "halted"], shown["sidecar_halted", "GAP"]) == (1, 1)
        assert (shown["sidecar_holes",], shown["sidecar_missing_events",]) == (1, 1)
        world.verb("gap", "accept", "700", "700", "--reason", "garbage", status=0)
        until(lambda: at.get("/ready")[0] == 200, "it runs again", 30)
        shown = at.metrics()
        assert ("sidecar_halted", "GAP") not in shown
        assert (shown["sidecar_holes",], shown["sidecar_lives_total",]) == (0, 2)


def test_two_halves_each_have_their_own_and_a_taken_address_stops_neither(tmp_path: Path) -> None:
    at, other = Endpoint(), Endpoint()
    with World(tmp_path) as world:
        recording = world.start("record", at.setting)
        until(lambda: at.get("/ready")[0] == 200, "it records")
        settling = world.start("settle", at.setting, log="taken.log")
        until(lambda: settling.logged("admin_not_served"), "it says that the address is taken")
        world.engine("--count", "500").result()
        world.until_acked(500)
        assert settling.term() == 0
        world.start("settle", other.setting)
        until(lambda: other.status().get("state") == "running", "it settles")
        until(lambda: at.status().get("acked") == 500, "the recorder tells what the settler has said")
        recorder, settler = at.metrics(), other.metrics()
        assert recorder["sidecar_events_recorded_total",] == 500
        assert ("sidecar_lives_total",) not in recorder
        assert ("sidecar_frames_received_total",) not in settler
        assert settler["sidecar_acked_sequence",] == 500
        assert "This process records, since" in at.get("/")[1]
        assert recording.term() == 0


def test_a_token_that_is_none_ends_with_78(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        token = tmp_path / "token"

        def ends(*settings: str) -> tuple[int, str]:
            command = [sys.executable, "-m", "sidecar", "run", *world.config()]
            for setting in settings:
                command += ["--set", setting]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=60)
            return done.returncode, done.stderr

        status, said = ends("admin.listen=0.0.0.0:0")
        assert (status, "admin.token_file" in said) == (78, True)
        given = ("admin.listen=127.0.0.1:0", f"admin.token_file={token}")
        assert ends(*given)[0] == 78
        token.write_text("too-short\n")
        status, said = ends(*given)
        assert (status, "at least 16" in said, "too-short" in said) == (78, True, False)
        token.write_text("a-token-of-24-characters\n")
        run = world.start("run", *given)
        served = until(lambda: run.logged("admin_served"), "it serves")[0]
        request = urllib.request.Request(f"http://127.0.0.1:{served['port']}/status.json")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=10)  # noqa: S310 - our own process
        request.add_header("Authorization", "Bearer a-token-of-24-characters")
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - the same
            assert answer.status == 200
        assert "a-token-of-24" not in run.log.read_text()


class Browser:
    """A real Chromium, told what to do by its own driver (the WebDriver protocol)."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(lambda: self._ask("GET", "/status")["ready"], "the driver is ready")
        chrome = {"args": [*CHROMIUM_OPTIONS, f"--user-data-dir={folder / 'chromium'}", *options]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            return {"ready": False}

    def go(self, url: str) -> None:
        self._ask("POST", f"/session/{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._ask("POST", f"/session/{self._session}/execute/sync", {"script": script, "args": []})

    def text(self) -> str:
        body = "return document.body.innerText"
        return str(self.run(body))

    def console(self) -> list[str]:
        return [line["message"] for line in self._ask("POST", f"/session/{self._session}/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", f"/session/{self._session}/screenshot")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("DELETE", f"/session/{self._session}")
        finally:
            self._driver.terminate()
            self._driver.wait()


@pytest.mark.long
@pytest.mark.tool("chromium", "chromedriver")
def test_a_browser_shows_each_state_renews_itself_and_says_when_nobody_answers(tmp_path: Path) -> None:
    pictures = Path(os.environ.get("SIDECAR_TEST_PICTURES", tmp_path))
    at = Endpoint()
    with World(tmp_path, settings=[at.setting]) as world, Browser(tmp_path, "--window-size=1000,1000") as browser:
        run = world.start("run")
        until(lambda: at.get("/healthz")[0] == 200, "it answers")
        browser.go(f"http://127.0.0.1:{at.port}/")
        assert "Waiting for the first event." in browser.text()
        browser.picture(pictures / "waiting.png")
        faults = ("--corrupt", "4500", "--pause-file", str(world.pause_file))
        engine = world.engine("--count", "5000", *faults, rate=500)
        until(lambda: "running" in browser.run("return document.title"), "the page has renewed itself", 30)
        world.until_acked(1500)
        world.pause_file.touch()
        world.verb("pause", "--reason", "an upgrade of the database", status=0)
        until(lambda: "Paused by an operator." in browser.text(), "it says that it is paused", 30)
        assert "an upgrade of the database" in browser.text()
        browser.picture(pictures / "paused.png")
        world.verb("resume", status=0)
        until(lambda: "running" in browser.run("return document.title"), "it runs again", 30)
        browser.picture(pictures / "running.png")
        world.pause_file.unlink()
        engine.result()
        until(lambda: "Halted: GAP at sequence 4500." in browser.text(), "it says that it is halted", 30)
        assert "sidecar gap accept 4500 4500" in browser.text()
        browser.picture(pictures / "halted.png")
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.console() == [], "no script, style or address is refused by the page's own policy"
        run.kill()
        until(lambda: "No answer." in browser.text(), "it says that nobody answers", 30)
        assert browser.run("return document.title") == "no answer"
        browser.picture(pictures / "no-answer.png")
        world.start("run", log="again.log")
        until(lambda: "No answer." not in browser.text(), "it goes on by itself", 30)


def test_without_javascript_the_page_says_the_same_and_is_loaded_anew(tmp_path: Path) -> None:
    at = Endpoint()
    with World(tmp_path, settings=[at.setting]) as world:
        world.start("run")
        world.engine("--count", "1000", "--corrupt", "700").result()
        until(lambda: at.status().get("state") == "halted", "it halts", 30)
        page = re.sub(r"<script>.*?</script>", "", at.get("/")[1], flags=re.DOTALL)
        for said in ("halted", "Halted: GAP at sequence 700.", "sidecar gap accept 700 700", "<svg", ">699<"):
            assert said in page
        assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in page
        assert not re.search(r"(src|href)=\"(?!/)", page), "nothing comes from outside"
