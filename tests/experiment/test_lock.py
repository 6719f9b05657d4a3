"""One run in a folder at a time; a lock that a killed run left behind is noticed."""

import json
import os
import subprocess
import sys
import time

import pytest
from tiny_runs import FINISHED, tiny

from hodec.errors import ConfigError
from hodec.experiment import lock, pipeline


def put(folder, **changed):
    """A lock as another process would have left it."""
    path = folder / "run.lock"
    path.write_text(json.dumps({**lock.this_process(), **changed}))
    return path


@pytest.fixture
def other():
    """A process that lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_lock_is_there_while_it_is_held_and_gone_after(tmp_path):
    with lock.held(tmp_path):
        holder = json.loads((tmp_path / "run.lock").read_text())
        assert holder["pid"] == os.getpid()
        assert holder["host"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="within"), lock.held(tmp_path):
        raise ValueError("within")
    assert not list(tmp_path.iterdir())


def test_a_second_run_in_the_folder_is_refused_with_who_has_it(tmp_path, other):
    put(tmp_path, pid=other.pid, began=lock._began(other.pid))
    with pytest.raises(ConfigError, match=rf"is in use: process {other.pid} on .* hydra\.run\.dir=PATH"):
        pipeline.run(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_second_run_of_the_same_process_is_refused(tmp_path):
    with lock.held(tmp_path), pytest.raises(ConfigError, match="is in use"), lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, other, caplog):
    path = put(tmp_path, pid=other.pid, began=lock._began(other.pid))
    other.kill()
    other.wait()
    with lock.held(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert f"process {other.pid} on" in caplog.text
    assert "died in this folder" in caplog.text


def test_a_number_that_was_given_out_again_holds_nothing(tmp_path, other):
    put(tmp_path, pid=other.pid, began="1")
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"space": "pid:[1]"}])
def test_another_machine_is_dead_after_some_silence(tmp_path, elsewhere):
    """Its processes are not seen from here: a sign of life is all there is."""
    path = put(tmp_path, pid=1, **elsewhere)
    with pytest.raises(ConfigError, match="is in use: process 1 on"), lock.held(tmp_path):
        pass
    silent = time.time() - lock.STALE_S - 1
    os.utime(path, (silent, silent))
    with lock.held(tmp_path):
        pass


def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with lock.held(tmp_path):
        path = tmp_path / "run.lock"
        os.utime(path, (1, 1))
        end = time.monotonic() + 20
        while path.stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"\xff\xfe", b'{"pid": "x"}', b"[" * 10**5])
def test_what_names_nobody_holds_nothing(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from hodec.experiment.lock import held\n"
        "with held(Path(sys.argv[1])): print('mine', flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(3)]
    end = time.monotonic() + 120
    while sum(process.poll() is None for process in started) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    results = [process.communicate("\n") for process in started]
    assert sorted(out for out, _ in results) == ["", "", "mine\n"]
    assert sum("is in use: process" in err for _, err in results) == 2


def test_a_finished_run_leaves_no_lock(finished):
    assert not (finished[0] / "run.lock").exists()
    pipeline.run(tiny(**FINISHED), finished[0])
    assert not (finished[0] / "run.lock").exists()
