"""Locks: one holder at a time, freed by its death, never by hand; a warning where there are none."""

import errno
import multiprocessing
import os
import signal

import pytest

from common import locks

FORK = multiprocessing.get_context("fork")


def in_child(work, *args):
    """A forked child that runs work(queue, *args), and the queue."""
    queue = FORK.Queue()
    child = FORK.Process(target=work, args=(queue, *args))
    child.start()
    return child, queue


def try_to_hold(queue, path):
    try:
        with locks.hold(path, wait=False) as held:
            queue.put(held)
    except OSError as error:
        queue.put(str(error))


def hold_until_killed(queue, path):
    with locks.hold(path, wait=False):
        grandchild = FORK.Process(target=signal.pause)  # as a loader's worker, it outlives its killed parent
        grandchild.start()
        queue.put(grandchild.pid)
        signal.pause()


def wait_for_it(queue, path):
    queue.put("waiting")
    with locks.hold(path, wait=True):
        queue.put(path.with_name("state").read_text())


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    with locks.hold(tmp_path / "lock", wait=False) as held:
        child, queue = in_child(try_to_hold, tmp_path / "lock")
        said = queue.get(timeout=30)
        child.join()
    assert held and said == f"{tmp_path / 'lock'} is held by process {os.getpid()} on {os.uname().nodename}"
    child, queue = in_child(try_to_hold, tmp_path / "lock")
    assert queue.get(timeout=30) is True
    child.join()


def test_a_killed_holder_leaves_no_lock_even_if_its_children_live_on(tmp_path):
    child, queue = in_child(hold_until_killed, tmp_path / "lock")
    grandchild = queue.get(timeout=30)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    try:
        with locks.hold(tmp_path / "lock", wait=False) as held:
            assert held
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_waiting_ends_when_the_holder_is_done(tmp_path):
    with locks.hold(tmp_path / "lock", wait=False):
        child, queue = in_child(wait_for_it, tmp_path / "lock")
        assert queue.get(timeout=30) == "waiting"
        (tmp_path / "state").write_text("done")
    assert queue.get(timeout=30) == "done"
    child.join()


def test_the_same_process_gets_its_lock_again_and_the_outer_block_releases_it(tmp_path):
    with locks.hold(tmp_path / "lock", wait=False):
        with locks.hold(tmp_path / "lock", wait=False) as again:
            assert again
        child, queue = in_child(try_to_hold, tmp_path / "lock")
        assert "is held by" in queue.get(timeout=30)
        child.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_warned_of_once_and_used(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked") as told:
        for _ in range(3):
            with locks.hold(tmp_path / "lock", wait=False) as held:
                assert held is False
    assert len(told) == 1 and str(tmp_path) in str(told[0].message)


class Windows:
    """msvcrt over a table of locked bytes, as one system would keep it: refuses what is locked, needs unlocking."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self):
        self.locked = set()

    def locking(self, descriptor, mode, count):
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR), count
        if mode == self.LK_UNLCK:
            self.locked.remove(place)
        elif place in self.locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        else:
            self.locked.add(place)


def test_windows_locks_a_byte_unlocks_it_and_names_the_holder(tmp_path, monkeypatch):
    system = Windows()
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", system)
    with locks.hold(tmp_path / "lock", wait=False) as held:
        assert held and len(system.locked) == 1
        with monkeypatch.context() as other:
            other.setattr(locks, "_held", {})  # as another process, which knows nothing of it
            with pytest.raises(locks.Held, match=f"held by process {os.getpid()} on "):
                with locks.hold(tmp_path / "lock", wait=False):
                    pass
        assert len(system.locked) == 1
    assert not system.locked


def test_a_python_without_any_locks_goes_on_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", None)
    with pytest.warns(UserWarning, match="no file locks"), locks.hold(tmp_path / "lock", wait=True) as held:
        assert held is False


def test_a_held_lock_is_an_oserror_so_that_scripts_say_it_in_one_sentence():
    assert issubclass(locks.Held, OSError)
