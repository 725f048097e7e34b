import errno
import multiprocessing
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mechhier
from mechhier import files, hashes, results
from mechhier.files import LOCK, append_durably, make_folder, new_folder, only_process_in, replacing, write_whole
from mechhier.models.run import weights_sha256


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_many_writers_of_one_file_all_succeed_and_one_of_them_stays(tmp_path):
    path = tmp_path / "result.json"
    contents = [bytes([65 + i]) * 200_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(write_whole, path, content) for _ in range(20) for content in contents]
        while not all(each.done() for each in written):
            if path.exists():
                assert path.read_bytes() in contents
        assert [each.exception() for each in written] == [None] * len(written)
    assert path.read_bytes() in contents
    assert _names(tmp_path) == ["result.json"]


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".result.json.00000000.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "result.json", "new")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("writer", [replacing, new_folder])
def test_what_fails_midway_leaves_the_old_and_no_trace(tmp_path, writer):
    path = tmp_path / "thing"
    if writer is replacing:
        path.write_text("old")
    before = _names(tmp_path)

    def half_done():
        with writer(path) as temporary:
            (temporary if writer is replacing else temporary / "file").write_text("new")
            raise KilledError

    with pytest.raises(KilledError):
        half_done()
    assert _names(tmp_path) == before
    assert writer is new_folder or path.read_text() == "old"


def test_modes_follow_the_umask_whatever_wrote_the_file(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            with replacing(tmp_path / "file") as temporary:
                temporary.unlink()
                os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
            with new_folder(tmp_path / f"folder{mask}") as temporary:
                (temporary / "inner").mkdir()
                os.close(os.open(temporary / "inner" / "file", os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(before)
        for path in (tmp_path / "file", tmp_path / f"folder{mask}" / "inner" / "file"):
            assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("filename", [None, "temporary"])
def test_errors_name_the_file_that_was_to_be_written(tmp_path, filename):
    def fail(temporary: Path):
        named = [str(temporary)] if filename else []
        raise OSError(errno.ENOSPC, "No space left on device", *named)

    def failing_file():
        with replacing(tmp_path / "result.nc") as temporary:
            fail(temporary)

    def failing_folder():
        with new_folder(tmp_path / "step-000007") as temporary:
            fail(temporary / "config.json")

    with pytest.raises(OSError, match=r"No space left on device: '.*/result.nc'$") as error:
        failing_file()
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"'.*/step-000007" + ("/config.json'$" if filename else "'$")):
        failing_folder()


def _hold(folder, held, done):
    with only_process_in(folder, otherwise=ValueError("busy")):
        held.set()
        done.wait(60)


def test_a_folder_is_one_process_s_until_it_ends_however_it_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "folder", held, done))
    process.start()
    assert held.wait(60)

    def work():
        with only_process_in(tmp_path / "folder", otherwise=ValueError("someone else works there")):
            pass

    with pytest.raises(ValueError, match="someone else works there"):
        work()
    process.kill()
    process.join()
    work()
    assert _names(tmp_path / "folder") == [LOCK]


def test_the_next_to_hold_a_folder_removes_what_killed_writers_left(tmp_path):
    (tmp_path / ".a.json.0123abcd.tmp").write_text("half")
    (tmp_path / ".step-000001.0123abcd.tmp").mkdir()
    (tmp_path / ".step-000001.0123abcd.tmp" / "file").write_text("half")
    (tmp_path / ".mine.tmp").write_text("no leftover of ours")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".b.json.0123abcd.tmp").write_text("someone may be writing it")
    with only_process_in(tmp_path, otherwise=ValueError("busy")):
        assert _names(tmp_path) == [LOCK, ".mine.tmp", "sub"]
        assert _names(tmp_path / "sub") == [".b.json.0123abcd.tmp"]


def _recorded_syncs(monkeypatch) -> list[tuple[int, int]]:
    """Inodes and sizes of what is synced, by a system that, as Windows does, refuses what is open for reading only."""
    fcntl = pytest.importorskip("fcntl")
    synced, fsync = [], os.fsync

    def recorded(descriptor):
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append((status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else -1))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    return synced


def test_bytes_are_synced_before_names_and_the_names_too(tmp_path, monkeypatch):
    synced = _recorded_syncs(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    assert {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino} == {inode for inode, _ in synced}
    synced.clear()
    write_whole(tmp_path / "a" / "file", "text")
    assert synced == [((tmp_path / "a" / "file").stat().st_ino, 4), ((tmp_path / "a").stat().st_ino, -1)]
    synced.clear()
    append_durably(tmp_path / "a" / "file", "more")
    assert synced == [((tmp_path / "a" / "file").stat().st_ino, 8)]
    synced.clear()
    with new_folder(tmp_path / "a" / "new") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("text")
    new = tmp_path / "a" / "new"
    expected = [(new / "inner" / "file", 4), (new / "inner", -1), (new, -1), (tmp_path / "a", -1)]
    assert synced == [(path.stat().st_ino, size) for path, size in expected]


def test_nothing_is_synced_or_locked_but_here():
    for path in Path(mechhier.__file__).parent.rglob("*.py"):
        if path.name != "files.py":
            text = path.read_text(encoding="utf-8")
            assert "os.fsync" not in text, path
            assert "filelock" not in text, path


def test_a_list_of_hashes_is_what_sha256sum_reads_and_half_a_line_counts_for_nothing(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "b b.txt").write_text("b")
    path = tmp_path / hashes.LIST
    hashes.write(path, hashes.of_folder(tmp_path))
    if sys.platform == "linux":
        subprocess.run(["sha256sum", "--check", "--quiet", hashes.LIST], cwd=tmp_path, check=True)
    assert hashes.is_as_written(tmp_path, hashes.read(path))
    (tmp_path / "a.txt").write_text("c")
    assert hashes.changed(tmp_path, hashes.read(path)) == ["a.txt"]
    assert not hashes.is_as_written(tmp_path, hashes.read(path))
    hashes.append(path, {"a.txt": hashes.of_file(tmp_path / "a.txt")})
    assert hashes.is_as_written(tmp_path, hashes.read(path))
    path.write_bytes(path.read_bytes()[:-5])  # of the line that was appended
    assert hashes.changed(tmp_path, hashes.read(path)) == ["a.txt"]
    assert not hashes.is_as_written(tmp_path / "nowhere", {})


@pytest.mark.skipif(sys.platform != "linux", reason="a file that cannot be read, for anyone")
@pytest.mark.parametrize("read", [hashes.of_file, hashes.read, results.load, lambda path: weights_sha256(path.parent)])
def test_a_file_that_cannot_be_read_is_named(tmp_path, read):
    path = tmp_path / "model.safetensors"
    path.symlink_to("/proc/self/mem")  # at its beginning: an input/output error
    with pytest.raises(OSError, match=rf"Input/output error: '{path}'"):
        read(path)
