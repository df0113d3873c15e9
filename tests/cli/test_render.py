"""render: plain text off a terminal, a drawn table on one, and no control characters on either."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.cli import render
from openvmnet.cli.render import Column


@given(st.text())
def test_no_name_reaches_the_terminal_with_control_characters(text: str) -> None:
    assert render.clean(text).isprintable()
    assert render.clean(text)


def test_clean_keeps_what_is_printable() -> None:
    assert render.clean("wéb-1 ☃") == "wéb-1 ☃"
    assert render.clean("a\x1b[31mb\n") == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}"
    assert render.clean(None) == "-"
    assert render.clean("") == "-"


def test_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    render.table([Column("NAME"), Column("N", right=True), Column("X")], [("a", 5, None), ("long", 12345, "")])
    assert capsys.readouterr().out == "NAME      N  X\na         5  -\nlong  12345  -\n"


def test_drawn_table_takes_no_markup_from_a_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    render.table([Column("NAME")], [("[red]x[/red]",)])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "─" in out


def test_fields(capsys: pytest.CaptureFixture[str]) -> None:
    render.fields([("a", 1), ("longer", "x\x07")])
    assert capsys.readouterr().out == "a       1\nlonger  x\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize(
    ("octets", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_951, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (5 * 10**18, "5.0 EB"),
        (5 * 10**21, "5000 EB"),
    ],
)
def test_size(octets: int, text: str) -> None:
    assert render.size(octets) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0 s"),
        (0.4, "0 s"),
        (7, "7 s"),
        (60, "1 min"),
        (312, "5 min 12 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (183_700, "2 d 3 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text
