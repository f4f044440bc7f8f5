"""The setup and quickstart scripts with a fake Python that creates venvs and "installs" without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# The real Python except for three commands of the setup; files named `fail_*` make these fail.
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
OLD_PYTHON = "#!/bin/bash\nexit 1\n"  # `sys.exit(sys.version_info < (3, 11))` of an older Python


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the files that the scripts need, and a `bin` with the fake Python as python3.11."""
    clone = tmp_path / "a clone"  # users have paths with spaces
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


def _fails(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One sentence on stderr that contains the words, exit code 2."""
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 1 and result.stderr.endswith(".\n"), result.stderr
    for word in words:
        assert word in result.stderr


def test_a_second_run_does_not_install_again(clone: Path):
    first, second = _setup(clone), _setup(clone)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert _installs(clone) == 1


def test_the_tested_versions_are_installed_with_pip(clone: Path):
    _setup(clone, "test")
    line = (clone / "installs.log").read_text()
    assert "--constraint launch/constraints.txt" in line and "--editable .[test]" in line


def test_an_extra_includes_the_base_install_but_not_vice_versa(clone: Path):
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


def test_a_moved_clone_is_installed_again(clone: Path):
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


def test_a_failed_update_is_repeated_even_if_the_old_requirements_return(clone: Path):
    before = (clone / "setup.cfg").read_text()
    _setup(clone)
    (clone / "fail_pip").touch()
    (clone / "setup.cfg").write_text(before + "# changed\n")
    assert _setup(clone).returncode != 0
    (clone / "fail_pip").unlink()
    (clone / "setup.cfg").write_text(before)
    _setup(clone)
    assert _installs(clone) == 3


def test_a_partly_created_venv_is_created_again(clone: Path):
    (clone / "fail_venv").touch()
    assert _setup(clone).returncode != 0
    (clone / "fail_venv").unlink()
    (clone / ".venv" / "half").touch()
    assert _setup(clone).returncode == 0
    assert not (clone / ".venv" / "half").exists()


def test_a_venv_without_a_working_python_is_created_again(clone: Path):
    _setup(clone)
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to("/nowhere/python")
    assert _setup(clone).returncode == 0
    assert _installs(clone) == 2


def test_a_folder_that_is_not_a_venv_is_not_changed(clone: Path):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "mine.txt").touch()
    _fails(_setup(clone), ".venv")
    assert (clone / ".venv" / "mine.txt").exists()


def test_without_a_suitable_python_it_fails(clone: Path):
    _program(clone / "bin/python3.11", OLD_PYTHON)
    _fails(_setup(clone), "3.11", "SR3_PYTHON")
    assert not (clone / ".venv").exists()


def test_a_python_without_venv_fails(clone: Path):
    (clone / "fail_ensurepip").touch()
    _fails(_setup(clone), "python3.11", "venv", "SR3_PYTHON")


def test_the_newest_working_python_is_used(clone: Path):
    _program(clone / "bin/python3.13", STAND_IN.replace("#!/bin/bash", "#!/bin/bash\n# newest"))
    _setup(clone)
    assert "# newest" in (clone / ".venv/bin/python").read_text()


def test_sr3_python_is_used_or_fails(clone: Path):
    _program(clone / "mine", STAND_IN.replace("#!/bin/bash", "#!/bin/bash\n# mine"))
    _fails(_setup(clone, SR3_PYTHON="/no/such/python"), "/no/such/python")
    assert _setup(clone, SR3_PYTHON=str(clone / "mine")).returncode == 0
    assert "# mine" in (clone / ".venv/bin/python").read_text()
    _fails(_setup(clone, SR3_PYTHON=str(clone / "bin/python3.13")), "SR3_PYTHON")


def test_a_venv_of_another_python_is_not_deleted(clone: Path):
    other = 'case "$*" in "-c import platform"*) echo 3.99.0; exit;; esac\n'
    _program(clone / "other", STAND_IN.replace("#!/bin/bash\n", "#!/bin/bash\n" + other))
    _setup(clone)
    _fails(_setup(clone, SR3_PYTHON=str(clone / "other")), "3.99.0", "delete .venv")
    assert (clone / ".venv/bin/python").exists()


@pytest.mark.parametrize("minutes", ["soon", "0", "0.0", "-1", "1e9", "nan", "."])
def test_quickstart_fails_on_invalid_minutes(clone: Path, minutes: str):
    _fails(_run(clone, str(clone / "launch/quickstart.sh"), SR3_QUICKSTART_MINUTES=minutes), minutes)
    assert _installs(clone) == 0


def test_quickstart_takes_no_arguments(clone: Path):
    _fails(_run(clone, str(clone / "launch/quickstart.sh"), "--fast"), "--fast")


def test_the_quickstart_input_is_a_downscaled_photograph(tmp_path):
    photo = next((ROOT / "sr3_jax" / "data" / "photos" / "test").glob("*.jpg"))
    script = ROOT / "launch" / "downscale.py"
    command = [sys.executable, str(script), str(photo), str(tmp_path / "small.png"), "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(photo) as large, Image.open(tmp_path / "small.png") as small:
        assert small.size == tuple(side // 4 for side in large.size)
