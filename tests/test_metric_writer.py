"""Logs of killed, resumed, disabled and interactive runs, in the workdir and on stderr."""

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from sr3_jax.errors import UserError
from sr3_jax.train import metric_writer
from sr3_jax.train.metric_writer import WRITERS, MetricWriter


def lines(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def board(workdir):
    """The values in the TensorBoard files as (tag, step, number or None for an image), and the purged steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    values, purges = [], []
    for path in sorted((Path(workdir) / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                purges.append(event.step)
            for value in event.summary.value:
                image = value.HasField("image")
                values.append((value.tag, event.step, None if image else value.simple_value))
    return values, purges


def test_scalars_go_to_jsonl_and_tensorboard(tmp_path):
    with MetricWriter(tmp_path / "new" / "run", total_steps=10) as writer:
        writer.write_scalars(1, {"loss": np.float32(0.5), "eval/psnr": 20})
        assert lines(tmp_path / "new" / "run") == [
            {"step": 1, "loss": 0.5, "eval/psnr": 20.0}
        ]  # before close
        writer.write_scalars(np.int64(2), {"loss": 0.25})
    assert lines(tmp_path / "new" / "run")[1] == {"step": 2, "loss": 0.25}
    values, purges = board(tmp_path / "new" / "run")
    assert values == [("loss", 1, 0.5), ("eval/psnr", 1, 20.0), ("loss", 2, 0.25)]
    assert purges == []


def test_non_finite_values_are_null_in_json(tmp_path, caplog):
    with MetricWriter(tmp_path, total_steps=10) as writer:
        writer.write_scalars(1, {"a": math.nan, "b": -math.inf, "c": 1.0})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]
    assert math.isnan(board(tmp_path)[0][0][2])
    assert caplog.text == ""


def test_resumed_run_drops_later_steps(tmp_path):
    valid = b'{"step": 10, "loss": 0.3}\n{"step":20,"loss":  1e-1}\n{"step": 20, "eval/psnr": 30.0}\n'
    later = b'{"step": 30, "loss": 0.1}\n{"step": 40, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(valid + later)
    with MetricWriter(tmp_path, total_steps=50, first_step=20) as writer:
        assert (tmp_path / "metrics.jsonl").read_bytes() == valid
        writer.write_scalars(30, {"loss": 0.2})
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 20, 30]
    assert board(tmp_path)[1] == [21]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("tail", [b'{"step": 3', b'{"step": 3}', b"\x00\x00\n", b'{"step": null}\n', b"[]\n"])
def test_broken_last_line_is_dropped(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 2}\n' + tail)
    with MetricWriter(tmp_path, total_steps=9, first_step=5) as writer:
        writer.write_scalars(6, {})
    assert lines(tmp_path) == [{"step": 2}, {"step": 6}]


def test_lines_survive_a_kill(tmp_path):
    code = (
        "import os, signal, sys; from sr3_jax.train.metric_writer import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1], total_steps=99)\n"
        "for step in range(1, 51): writer.write_scalars(step, {'loss': 1 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 51))


def test_images_are_written_as_png_without_partial_files(tmp_path):
    grid = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    with MetricWriter(tmp_path, total_steps=10) as writer:
        writer.write_image(1000, "grid", grid)
        writer.write_image(1000, "grid", grid)  # as when a step runs again
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["grid_0001000.png"]
    np.testing.assert_array_equal(np.asarray(PillowImage.open(tmp_path / "samples/grid_0001000.png")), grid)
    assert board(tmp_path)[0][0] == ("grid", 1000, None)


def test_disabled_writer_does_nothing(tmp_path, capfd):
    with MetricWriter(tmp_path / "run", total_steps=10, enabled=False, writers=WRITERS) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_image(1, "grid", np.zeros((4, 4, 3), np.uint8))
        writer.progress(10, loss=1.0)
        writer.message("hello")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_progress_lines_without_a_terminal(tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(metric_writer.time, "monotonic", lambda: clock[0])
    with MetricWriter(tmp_path, total_steps=60) as writer:
        for step in range(1, 61):
            clock[0] += 2.0
            writer.progress(step, loss=1 / step, images_per_second=64.0)
            if step == 20:
                writer.message("saved step 20")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 1/60, loss 1.0000, 64.0 images/s",
        "step 16/60, loss 0.0625, 64.0 images/s, 01:28 left",
        "saved step 20",
        "step 31/60, loss 0.0323, 64.0 images/s, 00:58 left",
        "step 46/60, loss 0.0217, 64.0 images/s, 00:28 left",
        "step 60/60, loss 0.0167, 64.0 images/s, 00:00 left",
    ]


def test_long_work_between_steps_prints_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metric_writer, "PLAIN_SECONDS", 0.05)
    with MetricWriter(tmp_path, total_steps=10) as writer, writer.busy("compiling"):
        time.sleep(0.2)
    count = capsys.readouterr().err.count("compiling: 00:00\n")
    assert 2 <= count <= 4
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_time_left_is_the_minimum_of_steps_and_time_limit(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(metric_writer.time, "monotonic", lambda: clock[0])
    with MetricWriter(tmp_path, total_steps=1000, first_step=100, minutes=4) as writer:
        for now, step in [(60, 101), (120, 131), (180, 971)]:
            clock[0] = now
            writer.progress(step)
    # The time limit gives 180 s, 120 s (869 steps of 2 s take longer) and 60 s (29 steps take 4 s).
    assert [line.split(", ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "03:00 left",
        "02:00 left",
        "00:04 left",
    ]


@pytest.mark.parametrize("columns", [100, 0])
def test_progress_bar_in_a_terminal(tmp_path, columns):
    """On a pseudo-terminal of 100 columns, and on one of unknown width."""
    import fcntl
    import pty
    import termios

    code = (
        "import sys; from sr3_jax.train.metric_writer import MetricWriter\n"
        "with MetricWriter(sys.argv[1], total_steps=8) as writer:\n"
        "    writer.progress(2, loss=0.5, images_per_second=10)\n"
        "    writer.message('a message')\n"
        "    writer.progress(4, loss=0.25, images_per_second=20)\n"
    )
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        stderr=terminal,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 65536):
            shown += chunk
    except OSError:  # the terminal is closed
        pass
    os.close(controller)
    printed = [line.strip() for line in shown.decode().replace("\r", "\n").splitlines()]
    assert done.stdout == b""
    assert "a message" in printed
    last = [line for line in printed if line][-1]
    assert last.startswith("step 4/8") and " 50% " in last and "█" in last
    assert last.endswith("loss 0.2500, 20.0 images/s, 00:00 left")


def test_unwritable_workdir_fails(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir .*file/run "):
        MetricWriter(tmp_path / "file" / "run", total_steps=1)


def test_no_heavy_imports_and_close_is_idempotent(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=1)
    writer.close()
    writer.close()
    code = (
        "import sys; from sr3_jax.train.metric_writer import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1], total_steps=1)\n"
        "writer.write_scalars(1, {'a': 1}); writer.close()\n"
        "print([m for m in ('torch', 'tensorflow', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n" and done.stderr == ""


def test_full_disk_gives_one_warning_and_later_lines_are_valid(tmp_path):
    """With a limit on the size of files, writes fail as on a full disk; when it is lifted, logging resumes."""
    code = (
        "import resource, signal, sys; import numpy as np\n"
        "from sr3_jax.train.metric_writer import MetricWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "writer = MetricWriter(sys.argv[1], total_steps=10)\n"
        "writer.write_scalars(1, {'loss': 1.0})\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))\n"
        "image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)\n"
        "for step in range(2, 40):\n"
        "    writer.write_scalars(step, {'loss': 1.0})\n"
        "    writer.write_image(step, 'samples', image)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "writer.write_scalars(40, {'loss': 2.0})\n"
        "writer.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    warnings = done.stderr.splitlines()
    assert len(warnings) == 3 and all("cannot be written" in line for line in warnings)
    assert [row["step"] for row in metric_writer.read_metrics(tmp_path)] == [1, 40]
    assert not list((tmp_path / "samples").iterdir())


# --- Weights & Biases


def wandb_records(workdir):
    """The records of each offline run of a workdir, in order: LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        data, position, records, partial = path.read_bytes(), 7, [], b""
        while position + 7 <= len(data):
            if (left := -position % 32768) and left < 7:
                position += left
            length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
            partial += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                records.append(Record.FromString(partial))
                partial = b""
        yield records


def rows(records):
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture
def offline(monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return wandb


def test_wandb_gets_metrics_images_and_config_and_is_resumed(tmp_path, offline):
    image = np.zeros((6, 8, 3), np.uint8)
    options = {
        "total_steps": 9,
        "writers": ("wandb",),
        "config": {"model": {"channels": 4, "multipliers": (1, 2)}},
    }
    with MetricWriter(tmp_path / "run", **options) as writer:
        writer.write_scalars(1, {"loss": 0.5})
        writer.write_scalars(2, {"loss": 0.25})
        writer.write_image(2, "samples", image)
    with MetricWriter(tmp_path / "run", first_step=1, **options) as writer:
        writer.write_scalars(2, {"loss": 0.25})
    first, second = wandb_records(tmp_path / "run")
    deadline = time.monotonic() + 20
    while (
        not rows(second) and time.monotonic() < deadline
    ):  # its service writes the file after it has answered
        time.sleep(0.05)
        first, second = wandb_records(tmp_path / "run")
    logged = [{key: row[key] for key in row if key[0] != "_"} for row in rows(first)]
    assert logged[:2] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert logged[2]["step"] == 2 and any(key.startswith("samples") for key in logged[2])
    (file,) = (tmp_path / "run" / "wandb").rglob("*.png")
    np.testing.assert_array_equal(np.asarray(PillowImage.open(file)), image)
    assert [row["loss"] for row in rows(second)] == [0.25]  # written again after a resume
    runs = [record.run for part in (first, second) for record in part if record.HasField("run")]
    assert len(runs) >= 2 and len({run.run_id for run in runs}) == 1
    assert runs[0].display_name == "run" and runs[0].project == "sr3_jax"
    given = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert given["model"] == {"channels": 4, "multipliers": [1, 2]}
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("where", ["init", "log"])
def test_wandb_that_fails_is_one_warning_and_the_other_logs_go_on(
    tmp_path, offline, monkeypatch, capsys, where
):
    calls = []

    def fail(*arguments, **options):
        calls.append(where)
        raise ValueError("no route\nto host")

    if where == "init":
        monkeypatch.setattr(offline, "init", fail)
    with MetricWriter(tmp_path, total_steps=9, writers=WRITERS) as writer:
        if where == "log":
            monkeypatch.setattr(offline.Run, "log", fail)
        for step in (1, 2, 3):
            writer.write_scalars(step, {"loss": 0.5})
    assert len(calls) == 1
    assert "(no route to host)" in capsys.readouterr().err.strip().splitlines()[-1]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [step for _, step, _ in board(tmp_path)[0]] == [1, 2, 3]


def test_wandb_that_is_not_installed_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.train\.writers.*pip install"):
        MetricWriter(tmp_path, total_steps=9, writers=WRITERS)
