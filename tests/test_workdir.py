"""The check of a workdir at the start: one run at a time, shared by all processes, able to hold checkpoints."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from sr3_jax import files
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.train.workdir import locked_workdir
from tests.test_pods import pod


@pytest.fixture
def mesh():
    return sharding.make_mesh()


def test_second_run_is_told_who_has_the_workdir(tmp_path, mesh):
    with (
        locked_workdir(tmp_path, mesh),
        pytest.raises(UserError, match=f"process {os.getpid()} on ") as error,
        locked_workdir(tmp_path, mesh),
    ):
        pass
    assert error.value.exit_code == 2 and str(tmp_path) in str(error.value)
    with locked_workdir(tmp_path, mesh):  # free again
        assert os.listdir(tmp_path) == [files.LOCK_FILE]


def test_holder_on_another_machine_may_be_dead_so_launchers_try_again(tmp_path, mesh):
    with locked_workdir(tmp_path, mesh):
        (tmp_path / files.LOCK_FILE).write_text('{"host": "elsewhere", "pid": 7}')
        with (
            pytest.raises(UserError, match="process 7 on elsewhere") as error,
            locked_workdir(tmp_path, mesh),
        ):
            pass
    assert error.value.exit_code == 1


def test_killed_holder_leaves_no_lock(tmp_path):
    code = "import sys; from pathlib import Path; from sr3_jax.files import folder_lock\n"
    code += (
        "with folder_lock(Path(sys.argv[1]), 'workdir'):\n    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with (
            pytest.raises(files.FolderInUse, match=f"process {holder.pid}"),
            files.folder_lock(tmp_path, "run"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with files.folder_lock(tmp_path, "run"):
        pass


def test_file_system_that_cannot_rename_folders_fails_at_the_start(tmp_path, mesh, monkeypatch):
    def rename(old, new):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), os.fspath(old))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match="rename folders"), locked_workdir(tmp_path, mesh):
        pass
    assert os.listdir(tmp_path) == [files.LOCK_FILE]


def test_workdir_that_is_a_file_or_unwritable_fails(tmp_path, mesh):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"), locked_workdir(path, mesh):
            pass


def test_processes_that_do_not_share_the_workdir_fail_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sr3_jax.distributed import processes, sharding\n"
        "from sr3_jax.errors import UserError; from sr3_jax.train.workdir import locked_workdir\n"
        "index, _ = processes.start_processes()\n"
        "for name in ('shared', f'own{index}'):\n"
        "    try:\n"
        "        with locked_workdir(Path(sys.argv[1], name), sharding.make_mesh()): print('fine')\n"
        "    except UserError as error: print(error)\n"
    )
    with pod(2, 1, "-c", code, str(tmp_path)) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("fine") == 2 and out.count("of process 1 is not that of process 0") == 2
