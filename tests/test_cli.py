"""The `umer1` command itself: its help, a misspelt command, and a reader that leaves."""

import os
import subprocess
import sys

import pytest

from umer1 import __version__, cli
from umer1.errors import NO_READER, exit_on_user_error


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_output_that_nobody_reads_any_more(flags):
    """`umer1 --help | head -1`: no traceback, and the status of a program that SIGPIPE ended."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, *flags, "-m", "umer1.cli", "--help"], stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (NO_READER, b"")


def test_another_broken_pipe_keeps_its_traceback():
    with pytest.raises(BrokenPipeError), exit_on_user_error("test"):
        raise BrokenPipeError("a socket's")


def test_help_version_and_a_misspelt_command(monkeypatch, capsys):
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["umer1", *arguments])
        cli.main()

    run()
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS) and "examples/grpo.py --help" in shown
    run("--version")
    assert capsys.readouterr().out == f"umer1 {__version__}\n"
    with pytest.raises(SystemExit) as ended:
        run("evla")
    assert ended.value.code == 2
    assert "unknown command 'evla'; did you mean eval?" in capsys.readouterr().err
