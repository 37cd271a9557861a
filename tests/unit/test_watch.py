"""When the watch rings: `judge` on readings that no server need be in for."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from headrace.config import source_config
from headrace.errors import SourceUnavailable
from headrace.secret import Secret
from headrace.sources.postgres import watch as module
from headrace.sources.postgres.health import Holder, SlotHealth
from headrace.sources.postgres.watch import Alarm, Limits, Watch, Watched, judge

MIB, GIB = 1 << 20, 1 << 30
LIMITS = Limits(lag=5 * GIB, restart_age=900.0)
WELL = SlotHealth(
    exists=True,
    active=True,
    active_pid=4711,
    wal_status="reserved",
    confirmed_flush_lsn="0/100",
    restart_lsn="0/80",
    current_lsn="0/200",
    lag_bytes=256,
    retained_bytes=384,
    safe_wal_size=None,
    wal_keep_size=None,
    restart_age_s=1.0,
    holder=None,
)
MIGRATION = Holder("transaction", "815", "app", "migrate.py", 3600.0, "idle in transaction")


def kinds(health: SlotHealth, watched: Watched | None = None) -> list[str]:
    return [alarm.kind for alarm in judge(health, LIMITS, watched or Watched())]


def ringing(kind: str) -> Watched:
    return Watched(alarms={kind: Alarm(kind, "", "")})


def only(health: SlotHealth, watched: Watched | None = None) -> Alarm:
    (alarm,) = judge(health, LIMITS, watched or Watched())
    return alarm


def test_a_slot_that_fares_well_rings_nothing() -> None:
    assert kinds(WELL) == []


@pytest.mark.parametrize(
    ("lag", "keep", "before", "rings"),
    [
        (5 * GIB, None, False, False),
        (5 * GIB + 1, None, False, True),
        (5 * GIB - 1, None, True, True),
        (4 * GIB, None, True, False),
        (3 * GIB, 4 * GIB, False, True),
        (2 * GIB, 4 * GIB, False, False),
        (6 * GIB, 100 * GIB, False, True),
    ],
)
def test_lag_rings_over_its_limit_or_half_of_what_is_kept(
    lag: int, keep: int | None, *, before: bool, rings: bool
) -> None:
    health = replace(WELL, lag_bytes=lag, wal_keep_size=keep)
    assert kinds(health, ringing("lag") if before else None) == (["lag"] if rings else [])


def test_lag_names_its_figures() -> None:
    alarm = only(replace(WELL, lag_bytes=6 * GIB, wal_keep_size=8 * GIB))
    assert "6.0 GiB of WAL" in alarm.what
    assert "lag_alarm 4.0 GiB" in alarm.what
    assert "keeps 8.0 GiB at most" in alarm.what
    assert "headrace status" in alarm.remedy


def test_room_rings_under_a_fifth_and_is_over_at_a_quarter() -> None:
    def left(part: float) -> SlotHealth:
        return replace(WELL, wal_keep_size=10 * GIB, safe_wal_size=int(part * 10 * GIB))

    assert kinds(left(0.21)) == []
    assert kinds(left(0.19)) == ["room"]
    assert kinds(left(0.24), ringing("room")) == ["room"]
    assert kinds(left(0.26), ringing("room")) == []
    gone = only(left(-0.5))
    assert "after 0 B more" in gone.what
    assert "max_slot_wal_keep_size = '20GB'" in gone.remedy


def test_wal_status_rings_louder_as_it_worsens() -> None:
    alarms = [only(replace(WELL, wal_status=status)) for status in ("extended", "unreserved", "lost")]
    assert [alarm.grade for alarm in alarms] == [1, 2, 3]
    assert {alarm.kind for alarm in alarms} == {"wal_status"}
    assert "headrace run" in alarms[-1].remedy


def test_old_wal_names_who_holds_it() -> None:
    old = replace(WELL, restart_age_s=1000.0, retained_bytes=GIB, holder=MIGRATION)
    alarm = only(old)
    assert alarm.kind == "restart"
    assert "from 17 min ago on, 1.0 GiB" in alarm.what
    assert "pid 815 (app, migrate.py, idle in transaction), open for 60 min" in alarm.what
    assert "pg_terminate_backend(815)" in alarm.remedy
    prepared = replace(old, holder=Holder("prepared transaction", "it's", "app", "", 90.0, "prepared"))
    assert "ROLLBACK PREPARED 'it''s';" in only(prepared).remedy
    assert "open for 90.0 s" in only(prepared).what
    assert kinds(replace(old, restart_age_s=899.0)) == []
    assert kinds(replace(old, restart_age_s=800.0), ringing("restart")) == ["restart"]
    assert kinds(replace(old, restart_age_s=700.0), ringing("restart")) == []
    assert kinds(replace(old, retained_bytes=MIB)) == []
    assert "no transaction is open" in only(replace(old, holder=None)).what


def test_old_wal_of_a_slow_capture_blames_no_transaction() -> None:
    alarm = only(replace(WELL, restart_age_s=1000.0, retained_bytes=GIB, lag_bytes=GIB, holder=MIGRATION))
    assert "815" not in alarm.what + alarm.remedy
    assert "not captured yet" in alarm.remedy


def test_without_pg_monitor_the_age_is_how_long_the_place_did_not_move() -> None:
    blind = replace(WELL, restart_age_s=None, retained_bytes=GIB, holder=MIGRATION)
    watched = Watched()
    for _ in range(92):
        watched = watched.after(blind, 10.0, expected=True)
    assert kinds(blind, watched) == ["restart"]
    moved = replace(blind, restart_lsn="0/90")
    assert kinds(moved, watched.after(moved, 10.0, expected=True)) == []


def test_a_slot_that_nobody_reads_rings_only_when_it_ought_to_be_read() -> None:
    idle = replace(WELL, active=False, active_pid=None)
    copying = awaited = Watched()
    for _ in range(6):
        copying = copying.after(idle, 10.0, expected=False)
        awaited = awaited.after(idle, 10.0, expected=True)
    assert kinds(idle, copying) == []
    assert kinds(idle, awaited) == ["unread"]
    assert kinds(WELL, awaited.after(WELL, 10.0, expected=True)) == []


def test_no_progress_while_data_waits() -> None:
    watched = Watched()
    for step in range(32):
        standing = replace(WELL, lag_bytes=256 + step * MIB)
        watched = watched.after(standing, 10.0, expected=True)
    alarm = only(standing, watched)
    assert alarm.kind == "stalled"
    assert "0/100 for 5 min" in alarm.what
    assert "grew from 256 B to 31.0 MiB" in alarm.what
    assert kinds(replace(standing, lag_bytes=256), watched) == []
    going = replace(standing, confirmed_flush_lsn="0/101")
    assert kinds(going, watched.after(going, 10.0, expected=True)) == []


def test_a_slot_that_is_gone_rings_once_it_was_there() -> None:
    nothing = SlotHealth(False, *[None] * 5, "0/200", *[None] * 6)
    assert kinds(nothing) == []
    assert kinds(nothing, Watched().after(nothing, 10.0, expected=True)) == ["gone"]


def test_an_episode_is_told_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[SlotHealth | Exception] = [
        replace(WELL, wal_status="extended"),
        replace(WELL, wal_status="extended"),
        SourceUnavailable("away"),
        RuntimeError("unthought of"),
        replace(WELL, wal_status="unreserved"),
        replace(WELL, wal_status="extended"),
        WELL,
        WELL,
    ]

    class Scripted:
        def __init__(self, url: str, slot: str) -> None:
            assert (url, slot) == ("postgresql://u:p@h/d", "headrace_shop")

        def read(self) -> SlotHealth:
            reading = readings.pop(0)
            if isinstance(reading, Exception):
                raise reading
            return reading

    monkeypatch.setattr(module, "Probe", Scripted)
    watch = Watch(source_config("shop", Secret("postgresql://u:p@h/d")), expected=lambda: True)
    held = []
    with caplog.at_level(logging.INFO, "headrace"):
        while readings:
            watch.step(10.0)
            held.append(len(watch.alarms()))
    told = [record.getMessage() for record in caplog.records if record.name == "headrace.alert"]
    assert held == [1, 1, 1, 1, 1, 1, 0, 0]
    assert [text.split(":")[0] for text in told] == [
        "ALARM shop.wal_status",
        "ALARM shop.wal_status",
        "RESOLVED shop.wal_status",
    ]
    assert "wal_status unreserved" in told[1]
    assert sum("does not understand" in record.getMessage() for record in caplog.records) == 1
