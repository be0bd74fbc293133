"""One run in a work folder at a time."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from ieg_jax import files
from ieg_jax.errors import Interrupted, NonFiniteError, UserError
from ieg_jax.runtime import claim
from ieg_jax.runtime.claim import Claim

HOLD = """
import sys, time
from etils import epath
from ieg_jax.runtime.claim import Claim
with Claim(epath.Path(sys.argv[1])) as held:
    held.take()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claim, "WATCH_SECONDS", 0.5)
    return epath.Path(tmp_path)


def take(folder):
    held = Claim(folder)
    held.take()
    return held


def edit(folder, **changes):
    """Changes running.json as another machine would have written it."""
    file = folder / claim.FILE
    files.write_json(file, files.read_json(file) | changes)


def left_behind(folder, **changes):
    """The file of a run that is gone."""
    with Claim(folder) as held:
        held.take()
        content = (folder / claim.FILE).read_text()
    (folder / claim.FILE).write_text(content)
    edit(folder, **changes)


def test_the_second_is_refused_until_the_first_has_ended(folder):
    with take(folder):
        with pytest.raises(UserError, match=rf"is in use: process {os.getpid()} on .* is running in it"):
            take(folder)
        assert (folder / claim.FILE).exists(), "and the first still holds it"
    assert list(folder.iterdir()) == [], "nothing remains"
    with take(folder):
        pass


def test_another_process_is_refused_and_a_killed_one_is_followed_at_once(folder):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on "):
            take(folder)
        process.kill()
        process.wait()
        began = time.monotonic()
        with take(folder):
            assert time.monotonic() - began < claim.WATCH_SECONDS, "without watching"
        assert not (folder / claim.FILE).exists()


def test_a_number_of_a_process_that_has_been_given_again(folder):
    left_behind(folder, started=time.time() - 1e6)
    with take(folder):
        pass


def test_another_machine_is_watched(folder, caplog):
    left_behind(folder, machine="another", host="another")
    began = time.monotonic()
    with take(folder):
        assert time.monotonic() - began >= claim.WATCH_SECONDS, "its beat stood still"
    assert "on another was running in" in caplog.text


def test_another_machine_that_lives_is_refused(folder):
    left_behind(folder, machine="another", host="another")
    end = threading.Event()

    def beats():
        number = 0
        while not end.wait(0.1):
            number += 1
            edit(folder, beat=number)

    thread = threading.Thread(target=beats)
    thread.start()
    try:
        with pytest.raises(UserError, match="on another is running in it"):
            take(folder)
    finally:
        end.set()
        thread.join()


def test_another_machine_of_yesterday_is_not_watched(folder):
    left_behind(folder, machine="another", time=time.time() - 86400)
    began = time.monotonic()
    with take(folder):
        assert time.monotonic() - began < claim.WATCH_SECONDS


def test_a_copy_of_a_folder_is_free_while_its_run_goes_on(folder):
    (folder / "run").mkdir()
    (folder / "copy").mkdir()
    with take(folder / "run"):
        (folder / "run" / claim.FILE).copy(folder / "copy" / claim.FILE)
        with take(folder / "copy"):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_says_nothing_holds_nothing(folder, content):
    (folder / claim.FILE).write_text(content)
    with take(folder):
        pass


def test_who_was_taken_over_stops(folder):
    with take(folder) as suspended:
        suspended.check()
        edit(folder, run="another", host="elsewhere")
        deadline = time.monotonic() + 10
        with pytest.raises(UserError, match=r"process \d+ on elsewhere has taken over .* this one stops here"):
            while time.monotonic() < deadline:
                suspended.check()
                time.sleep(0.01)
    assert (folder / claim.FILE).exists(), "and leaves the other's file"


def test_the_beat_changes_and_outlives_a_removed_file(folder):
    with take(folder):
        seen = set()
        for _ in range(100):
            seen.add(json.loads((folder / claim.FILE).read_text())["beat"])
            time.sleep(0.02)
            if len(seen) > 2:
                break
        assert len(seen) > 2
        (folder / claim.FILE).unlink()
        for _ in range(100):
            time.sleep(0.02)
            if (folder / claim.FILE).exists():
                break
        assert (folder / claim.FILE).exists()


def test_signs_of_life(folder):
    assert claim.sign_of_life(folder) == ""
    (folder / claim.QUEUED).write_text("{}")
    assert claim.sign_of_life(folder) == "queued"
    with take(folder):
        assert claim.sign_of_life(folder) == "running"
        assert not (folder / claim.QUEUED).exists(), "it waits no more"
    assert claim.sign_of_life(folder) == ""
    left_behind(folder, pid=1 << 22, started=0.0)
    assert claim.sign_of_life(folder) == "", "its process is gone"
    left_behind(folder, machine="another", time=time.time() - 60)
    began = time.monotonic()
    assert claim.sign_of_life(folder) == "running", "for all that its file says"
    assert time.monotonic() - began < claim.WATCH_SECONDS, "without watching"
    edit(folder, time=time.time() - claim.OLD_SECONDS - 1)
    assert claim.sign_of_life(folder) == ""


def test_an_error_is_left_until_the_next_start(folder):
    with pytest.raises(NonFiniteError), take(folder):
        raise NonFiniteError("the loss is nan\nat step 7")
    assert claim.sign_of_life(folder) == "failed"
    assert claim.last_error(folder) == "NonFiniteError: the loss is nan"
    assert [path.name for path in folder.iterdir()] == [claim.FAILED]
    with pytest.raises(Interrupted), take(folder):
        assert not (folder / claim.FAILED).exists()
        raise Interrupted("stopped and saved")
    assert list(folder.iterdir()) == [], "to be stopped is no failure"
    (folder / claim.FAILED).write_text("damaged")
    assert claim.sign_of_life(folder) == "failed" and claim.last_error(folder) == ""


def test_who_is_refused_leaves_no_error(folder):
    with take(folder), pytest.raises(UserError), Claim(folder) as second:
        second.take()
    assert list(folder.iterdir()) == []
