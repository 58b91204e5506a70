"""Configuration: every mistake names its path, its value and what is allowed; what is given last wins."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import config
from sidecar.config import Config, ConfigError, as_dict, as_toml, load, parse, read_secret

ROOT = Path(__file__).resolve().parents[2]

LEAST = """
[assets.btc]
id = 1
decimals = 8
[assets.usdt]
id = 2
decimals = 6
[symbols.btc_usdt]
base = "btc"
quote = "usdt"
price_decimals = 2
"""


def mistakes(text: str, *overrides: str, environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(text, overrides, environ)
    assert caught.value.exit_code == 78
    assert all(line in str(caught.value) for line in caught.value.mistakes)
    return caught.value.mistakes


def mistake(text: str, *overrides: str, environ: dict[str, str] | None = None) -> str:
    (only,) = mistakes(text, *overrides, environ=environ)
    return only


# --- the contract -----------------------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "stream": {"name": "main", "first_sequence": 1, "on_gap": "halt", "gap_after_s": 5.0},
    "engine": {
        "endpoint": "tcp://127.0.0.1:5557",
        "topic": "settlement",
        "receive_hwm_frames": 500_000,
        "receive_buffer_bytes": 8_388_608,
        "frame_bytes_max": 1_048_576,
        "silence_s": 10.0,
        "curve_server_key_file": None,
        "curve_key_file": None,
    },
    "replay": None,
    "replay_server": None,
    "tape": {
        "path": "tape.db",
        "size_bytes_max": 10_737_418_240,
        "retention_s": 3600.0,
        "turn_frames_max": 2_000,
        "turn_min_s": 0.002,
        "memory_events_max": 20_000,
        "malformed_kept_max": 10_000,
    },
    "store": {
        "backend": "sqlite",
        "sqlite": {"path": "settlement.db"},
        "cassandra": {
            "contact_points": ["127.0.0.1"],
            "port": 9042,
            "local_dc": "datacenter1",
            "keyspace": "trading",
            "replication_factor": 1,
            "batch": "logged",
            "request_timeout_s": 10.0,
            "username": None,
            "password_file": None,
            "tls_ca_file": None,
            "tls_cert_file": None,
            "tls_key_file": None,
        },
    },
    "pipeline": {
        "batch_trades_max": 32,
        "batch_bytes_max": 12_288,
        "inflight_batches_max": 32,
        "durable_after_s": 20.0,
        "accounts_max": 2_000_000,
        "shutdown_timeout_s": 20.0,
        "retry_backoff_max_s": 2.0,
        "ack_log": None,
    },
    "assets": {"btc": {"id": 1, "decimals": 8}, "usdt": {"id": 2, "decimals": 6}},
    "symbols": {
        "btc_usdt": {
            "base": "btc",
            "quote": "usdt",
            "price_decimals": 2,
            "quote_amount": "scaled",
            "trade_id_time": "none",
            "page_width": 10_000,
        }
    },
    "fees": {"revenue_user_id": 0},
    "admin": {"listen": "127.0.0.1:9464", "token_file": None},
    "reconcile": {"interval_s": 3600.0, "rate_rows_s": 2_500, "path": None},
}


def test_names_and_defaults_are_the_contract() -> None:
    assert as_dict(parse(LEAST)) == DEFAULTS


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(LEAST).stream.name = "other"  # type: ignore[misc]


def test_replay_is_there_when_its_section_is() -> None:
    replay = parse(LEAST + '[replay]\nendpoint = "ipc:///run/engine/replay"').replay
    assert replay is not None
    assert (replay.endpoint, replay.timeout_s) == ("ipc:///run/engine/replay", 1.0)


def test_nobody_asks_himself_for_the_past() -> None:
    both = LEAST + '[replay]\nendpoint = "tcp://h:1"\n[replay_server]\nendpoint = "tcp://h:{}"'
    served = parse(both.format(2)).replay_server
    assert served == config.ReplayServerSection(endpoint="tcp://h:2", answers_per_s_max=50)
    with pytest.raises(ConfigError, match="this sidecar would ask itself"):
        parse(both.format(1))


def test_who_may_ask_is_named_only_where_keys_prove_it() -> None:
    text, names = LEAST + '[replay_server]\nendpoint = "tcp://h:1"\n', "replay_server.curve_client_key_files="
    with_keys = [names + "a.key, b.key", "replay_server.curve_key_file=k"]
    served = parse(text, with_keys).replay_server
    assert served is not None
    assert served.curve_client_key_files == (Path("a.key"), Path("b.key"))
    assert "only together with replay_server.curve_key_file" in mistake(text, names + "a.key")
    assert "allowed is a list of paths" in mistake(text, names + "a,~b", with_keys[1])
    assert "allowed is a list of paths" in mistake(text + "curve_client_key_files = 'a.key'")


def test_rules_are_what_the_decision_log_holds() -> None:
    assert parse(LEAST + "[fees]\nrevenue_user_id = 9").rules() == {
        "assets": DEFAULTS["assets"],
        "symbols": DEFAULTS["symbols"],
        "revenue_user_id": 9,
    }


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, allowed",
    [
        ("stream.name=a/b", "letters, digits"),
        ("stream.name=", "letters, digits"),
        ("stream.name=*", "letters, digits"),
        (f"stream.name={'x' * 65}", "at most 64"),
        ("stream.first_sequence=0", "from 1 to 2^63 - 1"),
        ("stream.first_sequence=9223372036854775808", "from 1 to 2^63 - 1"),
        ("stream.first_sequence=1.0", "an integer"),
        ("stream.on_gap=skip", '"halt" or "record"'),
        ("stream.gap_after_s=0", "above 0"),
        ("stream.gap_after_s=5s", "a number of seconds"),
        ("stream.gap_after_s=nan", "a number of seconds"),
        ("stream.gap_after_s=inf", "at most 86400"),
        ("engine.endpoint=127.0.0.1:5557", "tcp://HOST:PORT"),
        ("engine.endpoint=tcp://*:5557", "tcp://HOST:PORT"),
        ("engine.endpoint=tcp://host", "tcp://HOST:PORT"),
        ("engine.endpoint=tcp://host:0", "tcp://HOST:PORT"),
        ("engine.endpoint=tcp://host:65536", "tcp://HOST:PORT"),
        ("engine.endpoint=tcp://::1:5557", "tcp://HOST:PORT"),
        ("engine.endpoint=udp://host:1", "tcp://HOST:PORT"),
        ("engine.endpoint=ipc://", "ipc://PATH"),
        (f"engine.endpoint=ipc:///{'x' * 107}", "at most 107 bytes"),
        ("engine.topic=", "1 to 255 bytes"),
        ("engine.receive_hwm_frames=0", "(frames) from 1"),
        ("engine.receive_buffer_bytes=1", "(bytes) from 4096"),
        ("engine.frame_bytes_max=4095", "(bytes) from 4096"),
        ("tape.path=", "the path of a file"),
        ("tape.path=~/tape.db", "~ is not expanded"),
        ("tape.size_bytes_max=0", "(bytes) from 65536"),
        ("tape.retention_s=-1", "from 0"),
        ("tape.turn_frames_max=0", "from 1"),
        ("tape.memory_events_max=0", "from 1"),
        ("tape.malformed_kept_max=0", "from 1"),
        ("store.backend=mysql", '"sqlite" or "cassandra"'),
        ("store.sqlite.path=./tape.db", "a file of its own"),
        ("store.cassandra.contact_points=", "at least one"),
        ("store.cassandra.contact_points=a,a", "different"),
        ("store.cassandra.contact_points=a:9042", "without ports"),
        ("store.cassandra.port=0", "from 1 to 65535"),
        ("store.cassandra.port=70000", "from 1 to 65535"),
        ("store.cassandra.local_dc=", "datacenter"),
        ("store.cassandra.keyspace=Trading", "[a-z][a-z0-9_]*"),
        ("store.cassandra.replication_factor=0", "from 1"),
        ("store.cassandra.batch=counter", '"logged" or "unlogged"'),
        ("store.cassandra.request_timeout_s=0", "above 0"),
        ("engine.curve_key_file=k", "together with engine.curve_server_key_file"),
        ("engine.curve_server_key_file=k", "together with engine.curve_key_file"),
        ("store.cassandra.username=app", "together with store.cassandra.password_file"),
        ("store.cassandra.password_file=secret", "together with store.cassandra.username"),
        ("store.cassandra.tls_key_file=key.pem", "together with store.cassandra.tls_cert_file"),
        ("pipeline.batch_trades_max=0", "from 1"),
        ("pipeline.batch_bytes_max=0", "from 1"),
        ("pipeline.inflight_batches_max=0", "from 1"),
        ("pipeline.durable_after_s=0", "above 0"),
        ("pipeline.accounts_max=999", "from 1000"),
        ("pipeline.shutdown_timeout_s=0", "above 0"),
        ("pipeline.retry_backoff_max_s=-1", "above 0"),
        ("assets.btc.id=-1", "from 0 to 2^31 - 1"),
        ("assets.btc.id=2147483648", "from 0 to 2^31 - 1"),
        ("assets.usdt.id=1", "one of its own"),
        ("assets.btc.decimals=19", "would not fit 2^63 - 1"),
        ("symbols.btc_usdt.base=eth", "one of: btc, usdt"),
        ("symbols.btc_usdt.quote=btc", "another asset"),
        ("symbols.btc_usdt.price_decimals=19", "from 0 to 18"),
        ("symbols.btc_usdt.quote_amount=net", '"scaled" or "raw"'),
        ("symbols.btc_usdt.trade_id_time=ms", '"none" or "ms16"'),
        ("symbols.btc_usdt.page_width=0", "from 1 to 2^62"),
        ("fees.revenue_user_id=-1", "from 0 to 2^63 - 1"),
        ("admin.listen=9464", "HOST:PORT"),
        ("admin.listen=host:65536", "HOST:PORT"),
        ("admin.listen=0.0.0.0:9464", "a loopback address, such as 127.0.0.1:9464"),
        ("admin.listen=[::]:9464", "a loopback address"),
        ("admin.listen=admin.example:9464", "a loopback address"),
        ("admin.listen=192.0.2.1:0", "admin.token_file"),
        ("reconcile.interval_s=-1", "from 0 (off)"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_its_path_and_what_is(override: str, allowed: str) -> None:
    path, _, value = override.partition("=")
    said = mistake(LEAST, override)
    assert said.startswith(f"{path} = ")
    assert value.removeprefix("./")[:40] in said
    assert allowed in said


@pytest.mark.parametrize(
    "text, said",
    [
        ("[stream]\nfirst_sequence = true", "stream.first_sequence = true: allowed is an integer"),
        ("[stream]\nfirst_sequence = 1.0", "stream.first_sequence = 1.0: allowed is an integer"),
        ('[stream]\nfirst_sequence = "1"', 'stream.first_sequence = "1": allowed is an integer'),
        ("[stream]\nname = 5", "stream.name = 5: allowed is a name"),
        ('[stream]\nname = "a\\u0000"', "stream.name = "),
        ("[stream]\nname = {x = 1}", "stream.name = {x = 1}: allowed is a name"),
        ("[stream]\ngap_after_s = true", "stream.gap_after_s = true: allowed is a number of seconds"),
        ("[stream]\ngap_after_s = nan", "stream.gap_after_s = nan: allowed is a number of seconds"),
        ("[stream]\ngap_after_s = 1979-05-27", "stream.gap_after_s = 1979-05-27: allowed is a number of seconds"),
        ("[tape]\nsize_bytes_max = 0x" + "f" * 5000, "tape.size_bytes_max = an integer of 20000 bits: allowed is"),
        ("[store.cassandra]\ncontact_points = 'a'", 'store.cassandra.contact_points = "a": allowed is a list'),
        ("[store.cassandra]\ncontact_points = [1]", "store.cassandra.contact_points = [1]: allowed is a list"),
        ("[store]\nsqlite = 'x.db'", 'store.sqlite = "x.db": allowed is a table, [store.sqlite]'),
        ("[assets]\neth = 3", "assets.eth = 3: allowed is a table, [assets.eth]"),
        ("[assets.ETH]\nid = 3\ndecimals = 8", "assets.ETH: allowed is a name [a-z][a-z0-9_]*, at most 30 characters"),
        ("[assets.'']\nid = 3\ndecimals = 8", 'assets."": allowed is a name'),
        (f"[assets.{'x' * 31}]\nid = 3\ndecimals = 8", "at most 30 characters"),
        ("[assets.eth]\nid = 3", "assets.eth.decimals: missing; needed is an integer from 0 to 18"),
        ("[replay]", "replay.endpoint: missing; needed is tcp://HOST:PORT"),
        (
            '[symbols.again]\nbase = "btc"\nquote = "usdt"\nprice_decimals = 2',
            "symbols.again: trades btc/usdt, as symbols.btc_usdt does; allowed is one symbol for each pair",
        ),
        (
            "[stream]\nnaem = 1",
            "stream.naem: unknown key; did you mean stream.name? Allowed here: name, first_sequence",
        ),
        ("[tape]\nretention_ms = 1", "tape.retention_ms: unknown key; did you mean tape.retention_s?"),
        ("[store]\nport = 1", "store.port: unknown key; did you mean store.cassandra.port?"),
        ("[pipelin]\nx = 1", "pipelin: unknown section; did you mean pipeline?"),
        ("[assets.eth]\nid = 3\ndecimals = 8\nscale = 8", "assets.eth.scale: unknown key; Allowed here: id, decimals"),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, said: str) -> None:
    assert said in mistake(LEAST + text)


def test_at_least_one_asset_and_one_symbol_are_needed() -> None:
    assert [line.split(";")[0] for line in mistakes("")] == ["assets: none given", "symbols: none given"]


def test_all_mistakes_are_reported_at_once() -> None:
    said = mistakes(
        LEAST + '[stream]\nname = "a/b"\nnaem = 1\n[pipelin]\n[store.cassandra]\nport = 0',
        "tape.turn_frames_max=0",
        environ={"SIDECAR_ENGINE__TOPIC": ""},
    )
    found = sorted(re.split(r"[ :]", line)[0] for line in said)
    assert found == [
        "engine.topic",
        "pipelin",
        "store.cassandra.port",
        "stream.naem",
        "stream.name",
        "tape.turn_frames_max",
    ]


def test_one_mistake_does_not_make_others_up() -> None:
    assert mistake(LEAST.replace("id = 2", "id = -2")).startswith("assets.usdt.id = -2")
    assert mistake(LEAST.replace('base = "btc"', "base = 7")).startswith("symbols.btc_usdt.base = 7")


def test_an_unknown_key_is_named_without_its_value_which_may_be_a_secret() -> None:
    said = mistake(LEAST + '[store.cassandra]\npassword = "hunter2"')
    assert "did you mean store.cassandra.password_file?" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("text", ["stream = ", "[a]\n[a]", "x = " + "[" * 100_000, "x = " + "9" * 10_000])
def test_what_is_not_toml_is_refused(text: str) -> None:
    assert "is not TOML" in mistake(text)


def test_accounts_of_one_batch_must_fit_into_memory() -> None:
    said = mistake(LEAST, "pipeline.batch_trades_max=1000", "pipeline.accounts_max=5999")
    assert said.startswith("pipeline.accounts_max = 5999: allowed is at least 6000")


@pytest.mark.parametrize(
    "override, value",
    [
        ("engine.endpoint=tcp://[::1]:5557", "tcp://[::1]:5557"),
        ("engine.endpoint=tcp://engine.example:1", "tcp://engine.example:1"),
        ("engine.endpoint=ipc:///run/engine/out", "ipc:///run/engine/out"),
        ("admin.listen=", ""),
        ("admin.listen=[::1]:0", "[::1]:0"),
        ("admin.listen=localhost:9464", "localhost:9464"),
        ("admin.listen=127.8.8.8:9464", "127.8.8.8:9464"),
        ("reconcile.interval_s=0", 0.0),
        ("tape.retention_s=0", 0.0),
        ("stream.gap_after_s=7", 7.0),
        ("tape.size_bytes_max=1_000_000", 1_000_000),
        ("pipeline.ack_log=acks.txt", "acks.txt"),
        ("pipeline.ack_log=", None),
        ("store.cassandra.contact_points=10.0.0.1, ::1,db-3.example", ["10.0.0.1", "::1", "db-3.example"]),
    ],
)
def test_a_value_at_the_border_is_taken(override: str, value: object) -> None:
    path = override.partition("=")[0].split(".")
    found: Any = as_dict(parse(LEAST, [override]))
    for name in path:
        found = found[name]
    assert found == value
    assert type(found) is type(value)


# --- precedence -------------------------------------------------------------------------------------------------------


def test_set_wins_over_the_environment_over_the_file_over_the_default() -> None:
    environ = {"SIDECAR_STORE__CASSANDRA__PORT": "3", "SIDECAR_STORE__CASSANDRA__CONTACT_POINTS": "a,b"}
    text = LEAST + "[store.cassandra]\nport = 2\nreplication_factor = 3"
    over = ["store.cassandra.port=4", "store.cassandra.port=5"]
    assert parse(LEAST).store.cassandra.port == 9042
    assert parse(text).store.cassandra.port == 2
    assert parse(text, environ=environ).store.cassandra.port == 3
    assert parse(text, over, environ).store.cassandra.port == 5
    assert parse(text, over, environ).store.cassandra.contact_points == ("a", "b")
    assert parse(text, over, environ).store.cassandra.replication_factor == 3


def test_assets_symbols_and_replay_can_be_given_from_outside() -> None:
    environ = {"SIDECAR_ASSETS__ETH__ID": "3", "SIDECAR_REPLAY__ENDPOINT": "tcp://127.0.0.1:1"}
    read = parse(LEAST, ["assets.eth.decimals=18"], environ)
    assert read.assets["eth"] == config.AssetSection(id=3, decimals=18)
    assert read.replay == config.ReplaySection(endpoint="tcp://127.0.0.1:1", timeout_s=1.0)


def test_only_what_is_in_force_is_checked() -> None:
    assert parse(LEAST + "[store.cassandra]\nport = 0", ["store.cassandra.port=1"]).store.cassandra.port == 1


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "SIDECAR_STORE__CASANDRA__PORT",
            "store.casandra (from environment SIDECAR_STORE__CASANDRA__PORT): unknown key",
        ),
        ("SIDECAR_STREAM__NAEM", "did you mean stream.name?"),
        ("SIDECAR_STREAM__NAME__X", "stream.name (from environment SIDECAR_STREAM__NAME__X): is a single value"),
        ("SIDECAR_STORE__CASSANDRA", "is a section; allowed is one of its keys: store.cassandra.contact_points"),
        ("SIDECAR___X", "unknown section"),
        ("SIDECAR__", "unknown section"),
    ],
)
def test_an_unknown_name_in_the_environment_is_refused(name: str, said: str) -> None:
    assert said in mistake(LEAST, environ={name: "1"})


def test_other_names_in_the_environment_are_left_alone() -> None:
    parse(LEAST, environ={"SIDECAR_HOME": "x", "PATH": "y", "OTHER__NAME": "z", "sidecar_stream__name": "!"})


@pytest.mark.parametrize(
    "override, said",
    [
        ("stream.name", '--set "stream.name": allowed is section.key=value'),
        ("name=x", "name (from --set): unknown section; did you mean stream.name?"),
        ("stream=x", "stream (from --set): is a section; allowed is one of its keys: stream.name"),
        ("=x", '"" (from --set): unknown section'),
        ("stream.name=a/b", 'stream.name = "a/b" (from --set)'),
    ],
)
def test_a_wrong_set_is_refused(override: str, said: str) -> None:
    assert said in mistake(LEAST, override)


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_file_is_the_one_named_else_the_first_of_the_known_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    system = tmp_path / "etc" / "sidecar.toml"
    monkeypatch.setattr(config, "PLACES", (Path("sidecar.toml"), system))
    with pytest.raises(ConfigError, match=r"neither \./sidecar\.toml nor .*sidecar\.toml is there.*to begin, copy"):
        load(environ={})
    system.parent.mkdir()
    system.write_text(LEAST)
    assert config.find() == system
    Path("sidecar.toml").write_text(LEAST + '[stream]\nname = "here"')
    assert load(environ={}).stream.name == "here"
    assert load(system, environ={}).stream.name == "main"
    with pytest.raises(ConfigError, match=r"other\.toml: there is no such file; to begin, copy"):
        load(Path("other.toml"), environ={})


def test_how_to_begin_leads_to_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "PLACES", (Path("sidecar.toml"),))
    with pytest.raises(ConfigError) as caught:
        load()
    copy = re.search(r"cp (\S+) (\S+)", str(caught.value))
    assert copy
    Path(copy[2]).write_bytes(Path(copy[1]).read_bytes())
    assert load(environ={}).assets


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b'[stream]\nname = "\xe4"')
    with pytest.raises(ConfigError, match=r"latin\.toml: is not UTF-8 text: byte 17 is 0xe4"):
        load(path, environ={})


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(LEAST + "[stream]\nname = 1\nfirst_sequence = 0")
    with pytest.raises(ConfigError, match=r"wrong\.toml: 2 mistakes\n  stream\.name"):
        load(path, environ={})


# --- printing, secrets ------------------------------------------------------------------------------------------------


def test_a_secret_is_read_from_its_file_and_never_shown(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    read = parse(LEAST, ["store.cassandra.username=app", f"store.cassandra.password_file={secret}"])
    assert read.store.cassandra.password_file == secret
    assert config.read_secret(secret, "store.cassandra.password_file") == "hunter2"
    for shown in (as_toml(read), str(as_dict(read)), repr(read)):
        assert str(secret) in shown
        assert "hunter2" not in shown


@pytest.mark.parametrize("content, said", [(None, "No such file"), (b"\n", "is empty"), (b"\xff", "is not UTF-8")])
def test_a_secret_that_cannot_be_read_is_named_by_its_key(tmp_path: Path, content: bytes | None, said: str) -> None:
    secret = tmp_path / "password"
    if content is not None:
        secret.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^store\.cassandra\.password_file: .*{said}") as caught:
        config.read_secret(secret, "store.cassandra.password_file")
    assert caught.value.exit_code == 78


def test_printed_and_read_again_it_is_the_same() -> None:
    text = LEAST + '[replay]\nendpoint = "tcp://h:1"\n[engine]\ntopic = "a\\"\\\\ü😀"\n[pipeline]\nack_log = "acks"'
    read = parse(text)
    assert parse(as_toml(read)) == read


names = st.from_regex(r"[a-z][a-z0-9_]{0,29}", fullmatch=True)
seconds = st.floats(min_value=0, max_value=86_400, exclude_min=True)


@given(
    names=st.lists(names, min_size=2, max_size=6, unique=True),
    decimals=st.integers(0, 18),
    page_width=st.integers(1, 2**62),
    topic=st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=30),
    gap_after_s=seconds,
    first_sequence=st.integers(1, 2**63 - 1),
)
def test_any_valid_configuration_survives_printing(
    names: list[str], decimals: int, page_width: int, topic: str, gap_after_s: float, first_sequence: int
) -> None:
    made = Config(
        stream=config.StreamSection(gap_after_s=gap_after_s, first_sequence=first_sequence),
        engine=config.EngineSection(topic=topic if topic.isprintable() else "x"),
        assets={name: config.AssetSection(id=index, decimals=decimals) for index, name in enumerate(names)},
        symbols={
            f"s{index}": config.SymbolSection(
                base=names[index], quote=names[-1], price_decimals=decimals, page_width=page_width
            )
            for index in range(len(names) - 1)
        },
    )
    assert parse(as_toml(made)) == made


toml_values = st.recursive(
    st.one_of(
        st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(st.characters(codec="utf-8"), max_size=20)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc.*", max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)
KEYS = sorted(config._all_keys())


def toml_of(value: object) -> str:
    """A TOML value, inline."""
    match value:
        case dict():
            return "{" + ", ".join(f"{config._toml(key)} = {toml_of(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(toml_of(inner) for inner in value) + "]"
        case str():
            return '"' + "".join(f"\\U{ord(character):08x}" for character in value) + '"'
        case bool():
            return "true" if value else "false"
        case _:
            return repr(value)


@given(
    path=st.one_of(
        st.sampled_from(KEYS).map(lambda key: key.replace("NAME", "btc").split(".")),
        st.lists(
            st.one_of(names, st.text("aB.-_ ", max_size=4), st.sampled_from(["stream", "assets", "store"])), min_size=1
        ),
    ),
    value=toml_values,
)
def test_any_value_anywhere_is_taken_or_refused_by_its_path(path: list[str], value: object) -> None:
    written = ".".join(config._toml(name) for name in path)
    try:
        tomllib.loads(f"{written} = {toml_of(value)}")
    except tomllib.TOMLDecodeError:
        return
    with contextlib.suppress(ConfigError):
        parse(f"{written} = {toml_of(value)}\n")


@given(name=st.text(st.characters(codec="ascii"), max_size=20), text=st.text(max_size=20))
def test_any_text_from_outside_is_taken_or_refused(name: str, text: str) -> None:
    for overrides, environ in (((f"{name}={text}",), {}), (("stream.name=x",), {f"SIDECAR_{name}": text})):
        with contextlib.suppress(ConfigError):
            parse(LEAST, overrides, environ)


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, warned", [(10_000, True), (6_553_600, False), (65_536_000, False), (2**40, True)])
def test_pages_far_from_a_second_of_ids_are_warned_of(width: int, warned: bool) -> None:
    read = parse(LEAST, ["symbols.btc_usdt.trade_id_time=ms16", f"symbols.btc_usdt.page_width={width}"])
    assert len(read.warnings) == warned
    assert all(f"symbols.btc_usdt.page_width = {width}" in line and "65536000" in line for line in read.warnings)


def test_a_durable_lag_below_what_cassandra_may_lose_is_warned_of() -> None:
    assert parse(LEAST, ["pipeline.durable_after_s=0.5"]).warnings == ()
    (line,) = parse(LEAST, ["pipeline.durable_after_s=0.5", "store.backend=cassandra"]).warnings
    assert line.startswith("pipeline.durable_after_s = 0.5")


def test_what_goes_over_a_network_unprotected_is_warned_of() -> None:
    (line,) = parse(LEAST, ["engine.endpoint=tcp://10.0.0.5:5557"]).warnings
    assert line.startswith('engine.endpoint = "tcp://10.0.0.5:5557": without CURVE')
    with_keys = ["engine.curve_server_key_file=e.key", "engine.curve_key_file=s.key_secret"]
    assert parse(LEAST, ["engine.endpoint=tcp://engine:5557", *with_keys]).warnings == ()
    for here in ("tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1", "ipc:///run/engine/pub"):
        assert parse(LEAST, [f"engine.endpoint={here}"]).warnings == ()
    login = ["store.backend=cassandra", "store.cassandra.username=app", "store.cassandra.password_file=p"]
    assert parse(LEAST, login).warnings == ()
    (line,) = parse(LEAST, [*login, "store.cassandra.contact_points=127.0.0.1,db"]).warnings
    assert "the password goes to" in line
    assert parse(LEAST, [*login, "store.cassandra.contact_points=db", "store.cassandra.tls_ca_file=ca"]).warnings == ()


# --- the files that come with it --------------------------------------------------------------------------------------


def test_the_sample_shows_every_key_with_its_default() -> None:
    text = config.example()
    sample = parse(text)
    assert sample.warnings == ()
    assert {**as_dict(sample), "assets": None, "symbols": None} == {**DEFAULTS, "assets": None, "symbols": None}
    symbol = dataclasses.asdict(sample.symbols["btc_usdt"])
    assert symbol == DEFAULTS["symbols"]["btc_usdt"]
    with_replay = re.sub(
        r"^# (?=\[replay|endpoint = |timeout_s = |retry_backoff_max_s = |answers_per_s_max = |curve_)",
        "",
        text,
        flags=re.MULTILINE,
    )
    assert parse(with_replay).replay == config.ReplaySection(endpoint="tcp://127.0.0.1:5559")
    assert parse(with_replay).replay_server == config.ReplayServerSection(endpoint="tcp://127.0.0.1:5560")
    given_keys = set(flat(tomllib.loads(with_replay)))
    known = {
        re.sub(r"^(assets|symbols)\.NAME", lambda m: f"{m[1]}.{'btc' if m[1] == 'assets' else 'btc_usdt'}", key)
        for key in KEYS
    }
    assert known <= given_keys


def flat(table: dict[str, Any], path: str = "") -> list[str]:
    return [
        key
        for name, value in table.items()
        for key in (flat(value, f"{path}{name}.") if isinstance(value, dict) else [path + name])
    ]


@pytest.mark.parametrize("name", ["session", "binance"])
def test_the_configurations_of_recorded_trades_parse(name: str) -> None:
    read = load(ROOT / "bench" / f"{name}.toml", environ={})
    assert read.warnings == ()
    assert {asset: (each.id, each.decimals) for asset, each in read.assets.items()} == {
        "btc": (1, 8),
        "usdt": (2, 8),
        "eth": (3, 8),
    }
    kind = ("raw", "ms16", 65_536_000) if name == "session" else ("scaled", "none", 10_000)
    assert {
        symbol: (each.base, each.quote, each.price_decimals, each.quote_amount, each.trade_id_time, each.page_width)
        for symbol, each in read.symbols.items()
    } == {"btc_usdt": ("btc", "usdt", 2, *kind), "eth_usdt": ("eth", "usdt", 2, *kind)}


def test_a_secret_with_a_bare_name_is_found_among_the_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_on, usual = tmp_path / "handed-on", tmp_path / "usual"
    for folder in (handed_on, usual):
        folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidecar.config.CREDENTIALS", usual)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed_on))
    name = Path("cassandra")
    for place in (
        usual / "cassandra",
        tmp_path / "cassandra",
        handed_on / "sidecar_cassandra",
        handed_on / "cassandra",
    ):
        place.write_text(f"{place.parent.name}\n")
        assert read_secret(name, "key") == place.parent.name
    assert read_secret(usual / "cassandra", "key") == "usual", "a path is a path"
    with pytest.raises(ConfigError, match="other: can't be read"):
        read_secret(Path("other"), "key")
