"""What is shown of long work."""

import io
import re

import pytest

from bonnx.command import stages


def test_a_line_for_each_stage_that_ended(capsys):
    with stages.shown_stages() as report:
        report("tracing [rank]")
        report("comparing")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r" +\d+\.\d s  tracing \[rank\]\n +\d+\.\d s  comparing\n", err)


def test_a_stage_that_failed_has_none(capsys):
    def work():
        with stages.shown_stages() as report:
            report("tracing")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        work()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        """Say that someone is watching."""
        return True


def test_a_terminal_also_shows_the_running_one(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with stages.shown_stages() as report:
        report("tracing")
        report("comparing")
    shown = terminal.getvalue()
    assert re.search(r"\d+\.\d s  tracing", shown)
    assert re.search(r"\d+\.\d s  comparing", shown)
    # The spinner's line, which is erased at the end.
    assert re.search(r"comparing .*0:00:0\d", shown)


def test_without_stderr(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    with stages.shown_stages() as report:
        report("tracing")
    assert capsys.readouterr().out == ""
