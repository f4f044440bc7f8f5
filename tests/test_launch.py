"""The launch scripts with a stand-in for Python that makes venvs and "installs" in no time, with no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# Acts as the real Python, but for the three things that set-up asks of it; `fail_*` files make them fail.
STAND_IN = f"""#!/bin/bash
case "$*" in
    "-m venv .venv")
        mkdir -p .venv/bin
        touch .venv/pyvenv.cfg
        [[ ! -e fail_venv ]] || exit 1
        cp "$0" .venv/bin/python ;;
    "-m pip install "*)
        echo "$*" >>installs.log
        [[ ! -e fail_pip ]] ;;
    "-c import venv, ensurepip")
        [[ ! -e fail_ensurepip ]] ;;
    *)
        exec "{sys.executable}" "$@" ;;
esac
"""
OLD_PYTHON = "#!/bin/bash\nexit 1\n"  # what `sys.exit(sys.version_info < (3, 11))` comes to


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with what the scripts need, and a `bin` with the stand-in as python3.11."""
    clone = tmp_path / "a clone"  # with a space, as users have it
    shutil.copytree(ROOT / "launch", clone / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    (clone / "bin").mkdir()
    for name in ("python3.13", "python3.12", "python3"):
        _program(clone / "bin" / name, OLD_PYTHON)
    _program(clone / "bin" / "python3.11", STAND_IN)
    return clone


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _run(clone: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SR3_")}
    env |= {"PATH": f"{clone / 'bin'}:/usr/bin:/bin"} | environment
    return subprocess.run(
        ["bash", *command], cwd=clone.parent, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def _setup(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _run(clone, str(clone / "launch/setup_venv.sh"), *arguments, **environment)


def _installs(clone: Path) -> int:
    log = clone / "installs.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One sentence on stderr, exit code 2."""
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 1 and result.stderr.endswith(".\n"), result.stderr
    for word in words:
        assert word in result.stderr


def test_a_second_run_does_not_install_again(clone: Path):
    first, second = _setup(clone), _setup(clone)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert _installs(clone) == 1
    assert "already" in second.stdout and "already" not in first.stdout


def test_the_tested_versions_are_installed_with_pip(clone: Path):
    _setup(clone, "test")
    line = (clone / "installs.log").read_text()
    assert "--constraint launch/constraints.txt" in line and "--editable .[test]" in line


def test_the_test_install_holds_the_plain_one_but_not_the_other_way_round(clone: Path):
    _setup(clone)
    _setup(clone, "test")
    assert _installs(clone) == 2
    _setup(clone)
    _setup(clone, "test")
    assert _installs(clone) == 2


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "launch/constraints.txt"])
def test_changed_requirements_are_installed(clone: Path, name: str):
    _setup(clone)
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    _setup(clone)
    assert _installs(clone) == 2


def test_a_moved_clone_is_installed_anew(clone: Path):
    _setup(clone)
    moved = clone.rename(clone.parent / "moved")
    _setup(moved)
    assert _installs(moved) == 2


def test_a_failed_install_fails_and_the_next_run_completes_it(clone: Path):
    (clone / "fail_pip").touch()
    assert _setup(clone).returncode != 0
    (clone / "fail_pip").unlink()
    assert _setup(clone).returncode == 0
    assert _installs(clone) == 2


def test_an_install_that_was_overwritten_in_part_is_not_taken_for_whole(clone: Path):
    before = (clone / "setup.cfg").read_text()
    _setup(clone)
    (clone / "fail_pip").touch()
    (clone / "setup.cfg").write_text(before + "# changed\n")
    assert _setup(clone).returncode != 0
    (clone / "fail_pip").unlink()
    (clone / "setup.cfg").write_text(before)
    _setup(clone)
    assert _installs(clone) == 3


def test_a_venv_half_made_is_made_anew(clone: Path):
    (clone / "fail_venv").touch()
    assert _setup(clone).returncode != 0
    (clone / "fail_venv").unlink()
    (clone / ".venv" / "half").touch()
    assert _setup(clone).returncode == 0
    assert not (clone / ".venv" / "half").exists()


def test_a_venv_whose_python_is_gone_is_made_anew(clone: Path):
    _setup(clone)
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to("/nowhere/python")
    assert _setup(clone).returncode == 0
    assert _installs(clone) == 2


def test_a_folder_that_is_no_venv_is_not_touched(clone: Path):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "mine.txt").touch()
    _refused(_setup(clone), ".venv")
    assert (clone / ".venv" / "mine.txt").exists()


def test_no_suitable_python(clone: Path):
    _program(clone / "bin/python3.11", OLD_PYTHON)
    _refused(_setup(clone), "3.11", "SR3_PYTHON")
    assert not (clone / ".venv").exists()


def test_python_without_venv(clone: Path):
    (clone / "fail_ensurepip").touch()
    _refused(_setup(clone), "python3.11", "venv", "SR3_PYTHON")


def test_the_newest_python_that_runs_is_taken(clone: Path):
    _program(clone / "bin/python3.13", STAND_IN.replace("#!/bin/bash", "#!/bin/bash\n# newest"))
    _setup(clone)
    assert "# newest" in (clone / ".venv/bin/python").read_text()


def test_sr3_python_is_taken_or_refused_and_nothing_else(clone: Path):
    _program(clone / "mine", STAND_IN.replace("#!/bin/bash", "#!/bin/bash\n# mine"))
    _refused(_setup(clone, SR3_PYTHON="/no/such/python"), "/no/such/python")
    assert _setup(clone, SR3_PYTHON=str(clone / "mine")).returncode == 0
    assert "# mine" in (clone / ".venv/bin/python").read_text()
    _refused(_setup(clone, SR3_PYTHON=str(clone / "bin/python3.13")), "SR3_PYTHON")


def test_a_venv_of_another_python_is_kept(clone: Path):
    other = 'case "$*" in "-c import platform"*) echo 3.99.0; exit;; esac\n'
    _program(clone / "other", STAND_IN.replace("#!/bin/bash\n", "#!/bin/bash\n" + other))
    _setup(clone)
    _refused(_setup(clone, SR3_PYTHON=str(clone / "other")), "3.99.0", "delete .venv")
    assert (clone / ".venv/bin/python").exists()


@pytest.mark.parametrize("minutes", ["soon", "0", "0.0", "-1", "1e9", "nan", "."])
def test_quickstart_refuses_minutes_that_are_none(clone: Path, minutes: str):
    _refused(_run(clone, str(clone / "launch/quickstart.sh"), SR3_QUICKSTART_MINUTES=minutes), minutes)
    assert _installs(clone) == 0


def test_quickstart_refuses_arguments(clone: Path):
    _refused(_run(clone, str(clone / "launch/quickstart.sh"), "--fast"), "--fast")


def test_pre_commit_runs_what_the_test_command_lints():
    lint = "bash launch/lint.sh"
    assert f"entry: {lint}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
    assert lint in (ROOT / "launch/test.sh").read_text().splitlines()


def test_ci_runs_the_test_command_alone():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[-1] == "bash launch/test.sh"


def test_the_quickstart_makes_its_small_image(tmp_path):
    """The Python in the middle of the script, as it stands there."""
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    [code] = re.findall(r"<<'PY'\n(.*?)\nPY\n", script, re.DOTALL)
    photo = next((ROOT / "sr3_jax" / "data" / "photos" / "test").glob("*.jpg"))
    command = [sys.executable, "-c", code, str(photo), str(tmp_path / "small.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(photo) as large, Image.open(tmp_path / "small.png") as small:
        assert small.size == tuple(side // 4 for side in large.size)
