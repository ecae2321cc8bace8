"""Files that appear complete or not at all, and what killed writers leave."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from umer1.errors import UserError
from umer1.files import alone_in, atomic_path, remove_leftovers, write_text

KILLED = """
import os, signal, sys
from umer1.files import atomic_path
with atomic_path(sys.argv[1]) as aside:
    aside.write_text("half of")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_writer(path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert child.returncode == -signal.SIGKILL


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "run.json"
    write_text(path, "old")
    killed_writer(path)
    assert path.read_text() == "old" and len(names(tmp_path)) == 2
    killed_writer(tmp_path / "other.json")
    write_text(path, "new")
    assert path.read_text() == "new"
    left = [name for name in names(tmp_path) if name != "run.json"]
    assert len(left) == 1 and left[0].startswith(".other.json.tmp-"), left


def test_what_killed_writers_left_of_any_file_goes_with_a_sweep_of_the_folder(tmp_path):
    for name in ("one.png", "two.png"):
        killed_writer(tmp_path / name)
    (tmp_path / "mine.tmp-notes").write_text("no leftover")
    with atomic_path(tmp_path / "one.png", sweep=False) as mine:
        mine.write_text("whole")
        assert len(names(tmp_path)) == 4
        remove_leftovers(tmp_path)
    assert names(tmp_path) == ["mine.tmp-notes", "one.png"]


def test_a_live_writer_keeps_its_file(tmp_path):
    """Two processes write one file: whoever ends last wins, neither loses its half."""
    path = tmp_path / "run.json"
    with atomic_path(path) as mine:
        mine.write_text("mine")
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from umer1.files import write_text; write_text(sys.argv[1], 'theirs')",
                path,
            ],
            check=True,
        )
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine" and names(tmp_path) == ["run.json"]


def test_files_of_other_machines_stay(tmp_path):
    """Whether their writers live cannot be known here."""
    foreign = tmp_path / ".run.json.tmp-another-machine-999999999"
    foreign.write_text("half of")
    write_text(tmp_path / "run.json", "new")
    assert foreign.exists()


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*run\.json'"), atomic_path(tmp_path / "run.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write has it


def test_a_folder_that_another_run_writes_into_is_refused(tmp_path):
    with alone_in(tmp_path), pytest.raises(UserError, match="in use by another run"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_text(path, "old")
    with pytest.raises(OSError), atomic_path(path) as aside:
        aside.write_text("half of")
        os.stat(tmp_path / "absent")
    assert path.read_text() == "old" and names(tmp_path) == ["run.json"]
