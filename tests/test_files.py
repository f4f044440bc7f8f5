"""JSON-lines files that survive a killed writer, atomic writes, portable names, and the walk of a folder."""

from __future__ import annotations

import errno
import json
import os
import tempfile

import numpy as np
import pytest
from safetensors import safe_open

from sr3_jax import files, storage
from sr3_jax.data import store
from sr3_jax.errors import UserError
from sr3_jax.image_io.inputs import walk
from sr3_jax.storage import cache_folder
from sr3_jax.train import metric_writer


def test_jsonl_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert files.read_jsonl(path) == []
    files.append_jsonl(path, [{"a": 1}, {"b": [2.5, None]}])
    files.append_jsonl(path, [{"c": "line\nbreak"}])
    assert files.read_jsonl(path) == [{"a": 1}, {"b": [2.5, None]}, {"c": "line\nbreak"}]
    assert len(path.read_text().splitlines()) == 3


def test_an_incomplete_jsonl_line_is_skipped_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.append_jsonl(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"b": ')
    files.append_jsonl(path, [{"c": 3}])
    assert files.read_jsonl(path) == [{"a": 1}, {"c": 3}]
    path.write_bytes(path.read_bytes() + b"[1]\n\xff\n")  # valid JSON but not an object; not UTF-8
    assert files.read_jsonl(path) == [{"a": 1}, {"c": 3}]


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), storage.atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(UserError, match="nowhere"):
        files.write_text(tmp_path / "nowhere" / "file", "text")


def test_leftovers_of_killed_writers_are_removed_and_files_being_written_are_not(tmp_path):
    path = tmp_path / "file"
    with storage.atomic_write(path):
        (working,) = os.listdir(tmp_path)
        dead = tmp_path / working.replace(".tmp", "0.tmp")
        dead.write_bytes(b"half")
        (tmp_path / "download.partial").write_bytes(b"not ours")
        storage.remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [working, "download.partial"]
    assert sorted(os.listdir(tmp_path)) == ["download.partial", "file"]


def test_first_write_into_a_folder_removes_leftovers(tmp_path):
    (tmp_path / f"{storage.SCRATCH_PREFIX}1.tmp").write_bytes(b"half")
    files.write_text(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == ["file"]


def test_full_disks_are_recognized_through_causes_and_texts():
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("a save failed") from error
    except RuntimeError as error:
        assert storage.is_disk_full(error)
    assert storage.is_disk_full(
        ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")
    )
    assert not storage.is_disk_full(ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 28 bytes"))
    assert not storage.is_disk_full(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def test_file_names_are_portable_and_unique():
    taken: set[str] = set()
    names = [files.unique_file_name(name, taken) for name in ("a/b c", "A/B C", "../..", "x" * 99, "")]
    assert names == ["a_b_c", "A_B_C_2", "image", "x" * 60, "image_2"]


def test_infinite_metrics_survive_json():
    metrics = {"psnr": float("inf"), "ssim": 1.0}
    assert files.from_json(json.loads(json.dumps(files.to_json(metrics)))) == metrics


def test_a_walk_visits_each_folder_once_and_never_the_excluded_one(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in ("b/1", "a/2", "3", ".hidden", ".cache/4", "out/5"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    outside.mkdir()
    (outside / "6").touch()
    (outside / "back").symlink_to(root)
    (root / "a" / "up").symlink_to(root)
    (root / "c").symlink_to(outside)
    (root / "d").symlink_to(outside)
    (root / "0").symlink_to(root / "b")  # sorts before the folder that it points to

    def names(**options):
        found, failed = walk(root, **options)
        assert failed == []
        return [file.relative_to(root).as_posix() for file in found]

    assert names() == ["3", "a/2", "b/1", "c/6", "out/5"]
    assert names(exclude=root / "out") == ["3", "a/2", "b/1", "c/6"]
    assert names(hidden=True) == [".hidden", "3", ".cache/4", "a/2", "b/1", "c/6", "out/5"]


def test_hashes_depend_on_shape_dtype_and_values():
    arrays = [np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), np.zeros((2, 3), np.int8)]
    arrays += [np.eye(2, 3, dtype=np.uint8)]
    assert len({files.sha256_hex(array) for array in arrays}) == 4
    assert files.sha256_hex(np.asfortranarray(arrays[3])) == files.sha256_hex(arrays[3])
    assert (
        files.sha256_hex({"a": 1, "b": 2}) == files.sha256_hex({"b": 2, "a": 1}) != files.sha256_hex({"a": 1})
    )


def test_unwritable_folders_fail_with_their_path(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            files.make_folder(path)
    with pytest.raises(UserError, match=r"a\.json"):
        files.write_text(tmp_path / "none" / "a.json", "{}")
    assert list(files.make_folder(tmp_path / "new" / "deep").iterdir()) == []


def test_equal_models_are_equal_files(tmp_path):
    """The metadata of a safetensors file comes in random order from the library."""
    arrays = {"b": np.arange(6, dtype=np.float32), "a": np.ones((2, 3), np.float32)}
    metadata = {name: f"é {name}" for name in "zyxwvu"}
    made = {files.safetensors_bytes(arrays, metadata) for _ in range(10)}
    assert len(made) == 1
    (tmp_path / "a.safetensors").write_bytes(made.pop())
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert file.metadata() == metadata
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 300 + "]" * 300, '{"a":' * 100_000, "1" * 20_000_000, "{", "9" * 10_000]
)
def test_json_from_outside_fails_with_one_kind_of_error(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError):
        files.parse_json(text)
    with pytest.raises(ValueError):
        files.read_json(tmp_path / "a.json")


def test_every_reader_of_json_survives_hostile_text(tmp_path):
    """Lines and files of runs, caches and locks count as damaged, as if they were cut."""
    deep = "[" * 100_000
    lines = tmp_path / "metrics.jsonl"
    lines.write_text(f'{deep}\n{{"step": 1}}\n{{"step": {"[" * 300}{"]" * 300}}}\n')
    assert files.read_jsonl(lines) == [{"step": 1}]
    assert metric_writer.read_metrics(tmp_path) == [{"step": 1}]
    with metric_writer.MetricWriter(tmp_path, total_steps=2, first_step=1):
        pass
    assert lines.read_text() == '{"step": 1}\n'
    (tmp_path / files.LOCK_FILE).write_text(deep)
    with files.folder_lock(tmp_path, "workdir"):
        (tmp_path / files.LOCK_FILE).write_text(deep)
        with (
            pytest.raises(files.FolderInUse, match="another process"),
            files.folder_lock(tmp_path, "workdir"),
        ):
            pass


def test_caches_are_private_to_the_user_or_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = cache_folder("compiled")
    assert folder == tmp_path / "cache" / "sr3_jax" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o777)  # others could replace the folder
    assert cache_folder("compiled") is None
    folder.parent.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert cache_folder("compiled") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder("compiled") is None


def test_without_a_home_folder_nothing_is_made_in_or_read_from_the_working_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME", "SR3_DATA_DIR", "TFDS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an id that is not in passwd
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    assert cache_folder("compiled") is None
    assert store.data_dir().is_relative_to(tmp_path / "tmp")
    assert all(os.path.isabs(place) for place in store.search_path())
    assert not (tmp_path / "~").exists()
