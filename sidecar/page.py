"""The status page: one small page without anything from outside, readable without JavaScript.

It is made from the last look (watch.py). What a person needs first stands first: the state in words, and when something
is wrong what to do; then positions, then how the last minutes went. With JavaScript it renews itself in place and says
so when nobody answers; without, the browser loads it anew.
"""

from __future__ import annotations

import base64
import hashlib
import html as markup
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sidecar import __version__
from sidecar.proof.hourly import Numbers
from sidecar.standing import NODES_AWAY_MEANS, NODES_AWAY_STEP
from sidecar.watch import Span, Watch

RENEW_S: Final = 2
RELOAD_S: Final = 5  # without JavaScript
SPAN_S: Final = 10.0
HOLES_SHOWN_MAX: Final = 10
CHART_WIDTH, CHART_HEIGHT = 300, 56

STYLE: Final = """
:root { color-scheme: light dark; --line: #8883; --quiet: #667; --good: #1a7f37; --bad: #c62828; --hold: #a15c00;
  --draw: #2f6fdd; }
@media (prefers-color-scheme: dark) { :root { --quiet: #9aa; --good: #3fb950; --bad: #ff6b6b; --hold: #e3a54a;
  --draw: #7aa7ff; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 62rem; }
h1 { font-size: 1.25rem; margin: 0; display: flex; gap: .7rem; align-items: baseline; flex-wrap: wrap; }
h2 { font-size: .95rem; margin: 1.6rem 0 .5rem; }
.state { color: #fff; background: var(--hold); border-radius: .3rem; padding: .05rem .6rem; }
.running { background: var(--good); } .halted, .full { background: var(--bad); }
@media (prefers-color-scheme: dark) { .state { color: #111; } }
p { margin: .5rem 0; } .quiet { color: var(--quiet); }
.alarm { border-left: .35rem solid var(--hold); padding: .3rem .9rem; margin: 1rem 0; background: #8881; }
.alarm.bad { border-color: var(--bad); }
code { font: .93em ui-monospace, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; margin: 1rem 0 0; }
dl div { border: 1px solid var(--line); border-radius: .4rem; padding: .45rem .7rem; }
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .5rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .4rem; padding: .45rem .7rem; }
figcaption { font-size: .85rem; color: var(--quiet); display: flex; justify-content: space-between; gap: 1rem; }
svg { display: block; width: 100%; height: 3.5rem; margin-top: .3rem; }
path { fill: none; stroke: var(--draw); stroke-width: 1.6; stroke-linecap: round; vector-effect: non-scaling-stroke; }
table { border-collapse: collapse; width: 100%; } td { padding: .25rem .6rem .25rem 0; vertical-align: top;
  border-top: 1px solid var(--line); } td:first-child { color: var(--quiet); width: 11rem; }
#silent { display: none; } .silent #silent { display: block; } .silent main { opacity: .45; }
"""

SCRIPT: Final = f"""
setInterval(async () => {{
  try {{
    const answer = await fetch("/", {{ cache: "no-store", signal: AbortSignal.timeout(4000) }});
    if (!answer.ok) throw answer.status;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelector("main").replaceWith(fresh.querySelector("main"));
    document.title = fresh.title;
    document.body.className = "";
  }} catch {{
    document.body.className = "silent";
    document.title = "no answer";
  }}
}}, {RENEW_S * 1000});
"""


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


SECURITY_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_hash(STYLE)}'; script-src 'sha256-{_hash(SCRIPT)}'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def html(watch: Watch) -> str:
    """Write the page."""
    said = watch.standing
    state = said.get("state", "starting")
    title = f"{state}: sidecar {said.get('stream', watch.stream)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{markup.escape(title)}</title>
<style>{STYLE}</style>
<noscript><meta http-equiv="refresh" content="{RELOAD_S}"></noscript>
</head>
<body>
<p id="silent" class="alarm bad" role="alert"><strong>No answer.</strong> What stands below is old. Does it run?
<code>systemctl status sidecar</code>, <code>sidecar status</code></p>
<main>
{_body(watch, said, state)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _body(watch: Watch, said: dict[str, Any], state: str) -> str:
    halves = " and ".join([*(["records"] if watch.recorder else []), *(["settles"] if watch.settler else [])])
    parts = [
        f'<h1>sidecar {markup.escape(watch.stream)} <span class="state {markup.escape(state)}">{markup.escape(state)}'
        f"</span></h1>",
        f'<p class="quiet">This process {halves}, since {_moment(watch.started_at_us)}, version {__version__},'
        f" store {markup.escape(watch.store_name)}.</p>",
        *_alarms(watch, said, state),
        "<h2>Positions</h2>",
        _tiles(
            [
                ("taped", _number(said.get("taped"))),
                ("acknowledged", _number(said.get("acked"))),
                ("durable", _number(said.get("durable"))),
                ("behind", _number(said.get("lag_events"))),
                ("holes", _number(len(said.get("holes", ())))),
                ("rejected", "…" if watch.settler and watch.rejected is None else _number(said.get("rejected"))),
            ]
        ),
        "<h2>The last minute</h2>",
        _tiles(_minute(watch)),
        "<h2>The last ten minutes</h2>",
        _charts(watch),
        "<h2>Details</h2>",
        _table(_details(watch, said)),
        f'<p class="quiet">Looked at {_moment(watch.looked_at_us)}. For machines:'
        ' <a href="/status.json">status.json</a>, <a href="/metrics">metrics</a>.</p>',
    ]
    return "\n".join(parts)


def _alarms(watch: Watch, said: dict[str, Any], state: str) -> Iterable[str]:
    """What is not as it should be, with the next step."""
    halted = said.get("halted")
    goes_on = "Recording goes on." if said.get("recording") else "Nothing is being recorded either!"
    if halted:
        what = f"Halted: {halted['code']} at sequence {halted['sequence']}. "
        yield _alarm("bad", what, f"{halted['reason']}. {goes_on}", halted["next_step"])
    elif state == "paused":
        paused = said.get("paused") or {}
        why = f"{paused.get('reason', 'no reason given')} ({paused.get('by', 'by hand')}). {goes_on}"
        yield _alarm("", "Paused by an operator. ", why, "when it may go on: `sidecar resume`")
    elif state == "waiting" and not said.get("sessions"):
        step = "is the engine publishing? `sidecar doctor` listens to it"
        yield _alarm("", "Waiting for the first event. ", "Nothing was recorded yet.", step)
    elif state == "waiting":
        step = "is the database up, and reachable from here? `sidecar doctor`; the log has its errors"
        yield _alarm("", "Waiting for the store. ", f"{goes_on} Settlement takes up where it was.", step)
    if away := said.get("nodes_away"):
        yield _alarm("", "Database nodes are away. ", f"{', '.join(away)}: {NODES_AWAY_MEANS}.", NODES_AWAY_STEP)
    for late in said.get("late", ()):
        if late.get("halted"):
            why = late["halted"]
            what = f"The late stream {late['stream']} is halted: {why['code']} at its sequence {why['sequence']}. "
            yield _alarm("bad", what, f"{why['reason']}.", why["next_step"])
    if watch.proofs is not None and watch.proofs.findings:
        what = f"The last proof of the ledger has {watch.proofs.findings:,} findings. "
        yield _alarm("bad", what, "Balances or rows are not what the events say.", "`sidecar reconcile`")
    if watch.recorder is not None and watch.recorder.tape.full is not None:
        step = "make room on the tape's disk, or raise tape.size_bytes_max; what is durable is deleted by itself"
        yield _alarm("bad", "Recording stands still. ", watch.recorder.tape.full, step)
    if "tape" in said and watch.recorder is not None:
        yield _alarm("bad", "The tape can't be read. ", str(said["tape"]), "`sidecar doctor`")


def _alarm(kind: str, what: str, why: str, step: str) -> str:
    return (
        f'<div class="alarm {kind}" role="alert"><p><strong>{markup.escape(what)}</strong>{markup.escape(why)}</p>'
        f"<p>Next step: {_with_code(step)}</p></div>"
    )


def _with_code(text: str) -> str:
    """Escape a text; what stands in backticks is code."""
    pieces = markup.escape(text, quote=False).split("`")
    return "".join(f"<code>{piece}</code>" if at % 2 else piece for at, piece in enumerate(pieces))


def _minute(watch: Watch) -> list[tuple[str, str]]:
    minute = watch.over(60.0)
    if minute is None:
        return [("a moment", "…")]
    tiles = [("recorded/s", _rate(minute.recorded_per_s))] if watch.recorder else []
    if watch.settler is not None:
        tiles += [
            ("acknowledged/s", _rate(minute.acked_per_s)),
            ("median latency", _milliseconds(minute.p50_ms)),
            ("99 of 100 within", _milliseconds(minute.p99_ms)),
            ("events a batch", _rate(minute.batch_events)),
        ]
    return tiles


def _charts(watch: Watch) -> str:
    spans = watch.spans(SPAN_S)
    charts = [_chart("recorded/s", spans, [one.recorded_per_s for one in spans], _rate)] if watch.recorder else []
    if watch.settler is not None:
        charts += [
            _chart("acknowledged/s", spans, [one.acked_per_s for one in spans], _rate),
            _chart("99 of 100 within", spans, [one.p99_ms for one in spans], _milliseconds),
            _chart("events a batch", spans, [one.batch_events for one in spans], _rate),
        ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _chart(says: str, spans: Sequence[Span], values: Sequence[float | None], write: Any) -> str:
    """Draw one line; where there is no value it is broken."""
    known = [value for value in values if value is not None]
    most = max(known, default=0.0)
    step = CHART_WIDTH / 59
    left = CHART_WIDTH - step * max(len(values) - 1, 0)
    way, pen = [], "M"
    for at, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        y = CHART_HEIGHT - 3 - (value / most if most else 0.0) * (CHART_HEIGHT - 6)
        way.append(f"{pen}{left + at * step:.1f} {y:.1f}{'h0' if pen == 'M' else ''}")
        pen = "L"
    minutes = len(spans) * SPAN_S / 60
    told = f"at most {write(most)}" if known else "nothing yet"
    return (
        f"<figure><figcaption><span>{says}</span><span>{told}</span></figcaption>"
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="{says}, the last {minutes:.0f} minutes: {told}"><path d="{" ".join(way)}"/></svg>'
        "</figure>"
    )


def _details(watch: Watch, said: dict[str, Any]) -> Iterable[tuple[str, str]]:
    recorder, settler = watch.recorder, watch.settler
    if recorder is not None:
        heard = f"{_ago(recorder.heard_at_us)}" if recorder.heard_at_us else "nothing since the start"
        yield "last frame heard", heard
        yield (
            "frames",
            (
                f"{recorder.frames_total:,} taken, {recorder.tape.duplicates_total:,} repeated,"
                f" {said.get('malformed', 0):,} malformed on this tape"
            ),
        )
    if settler is not None:
        counts = settler.counts()
        steady = "all known nodes connected" if settler.store.steady_since is not None else "not all nodes connected"
        yield "store", f"{steady}; {settler.store.outages} outages, {counts['retries']:,} batches sent again"
        yield "below zero", f"{counts['negative']:,} postings left an account below zero"
    holes = said.get("holes", [])
    if holes:
        shown = ", ".join(
            f"{first:,} to {last:,}" if last > first else f"{first:,}" for first, last in holes[:HOLES_SHOWN_MAX]
        )
        more = len(holes) - HOLES_SHOWN_MAX
        yield "holes", shown + (f" and {more:,} more (`sidecar gap list`)" if more > 0 else "")
    if replay := said.get("replay"):
        yield "replay", f"{replay.get('state', '?')}; {replay.get('filled_total', 0):,} frames brought"
    for late in said.get("late", ()):
        yield f"late {late['stream']}", f"{late['state']}: taped {late['taped']:,}, acked {late['acked']:,}"
    if watch.proofs is not None:
        yield "last reconciliation", _proof(watch.proofs)
    yield "session", f"{said.get('session', 0)} of {said.get('sessions', 0)} on the tape"
    if watch.disk is not None:
        yield (
            "tape",
            (
                f"{_bytes(watch.disk.used_bytes)} of {_bytes(watch.tape_size_bytes_max)};"
                f" {_bytes(watch.disk.free_bytes)} free on its disk"
            ),
        )
    if not said.get("settling", True):
        yield "settler", "no process settles from this tape right now"
    if not said.get("recording", True):
        yield "recorder", "no process records on this tape right now"


def _proof(proofs: Numbers) -> str:
    under_way = "; one is under way" if proofs.is_running else ""
    failed = f"; {proofs.failed_total:,} could not be finished" if proofs.failed_total else ""
    if not proofs.finished_at_s:
        return f"none since the start{under_way}{failed}"
    found = f"{proofs.findings:,} findings" if proofs.findings else "no finding"
    checked = f"{proofs.accounts:,} accounts, {proofs.events:,} events in {proofs.duration_s:,.1f} s"
    return f"{_moment(int(proofs.finished_at_s * 1e6))}: {found}; {checked}{under_way}{failed}"


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    inner = "".join(
        f"<div><dt>{markup.escape(name)}</dt><dd>{markup.escape(value)}</dd></div>" for name, value in tiles
    )
    return f"<dl>{inner}</dl>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f"<tr><td>{markup.escape(name)}</td><td>{_with_code(value)}</td></tr>" for name, value in rows)
    return f"<table>{inner}</table>"


def _number(value: int | None) -> str:
    return "…" if value is None else f"{value:,}"


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms" if value < 10_000 else f"{value / 1_000:,.0f} s"


def _bytes(value: int) -> str:
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:,.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.1f} {unit}"


def _moment(time_us: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_us / 1e6))


def _ago(time_us: int) -> str:
    seconds = max(time.time() - time_us / 1e6, 0.0)
    if seconds < 2:
        return "just now"
    return f"{seconds:,.0f} s ago" if seconds < 600 else _moment(time_us)
