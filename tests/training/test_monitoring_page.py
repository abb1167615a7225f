"""The Python and the command of docs/monitoring.md run as they stand there."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
BLOCKS = re.findall(r"(?:<!-- file: (\S+) -->\n)?```(\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.S)
LOOP, RESUMED, TRAINER = [text for name, kind, text in BLOCKS if kind == "python" and not name]


@pytest.fixture
def folder(tmp_path):
    for name, _, text in BLOCKS:
        if name:
            (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(path):
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_loop_of_one_s_own_and_its_resumption(folder):
    (folder / "own.py").write_text(LOOP + RESUMED, "utf-8")
    told = run([sys.executable, "own.py"], folder)
    assert re.findall(r"^(\d+) skew 0\.\d{3}  CKA 0\.\d{3}$", told, re.M) == ["0", "10", "20", "30"]
    assert steps(folder / "monitor.csv") == [0, 10, 20]


def test_transformers_trainer(folder):
    (folder / "hf.py").write_text(TRAINER, "utf-8")
    told = run([sys.executable, "hf.py"], folder)
    assert steps(folder / "run" / "monitor.csv") == [0, 10, 20]
    assert len(re.findall(r"0\.\d+", told.strip().splitlines()[-1])) == 3


def test_the_command(folder):
    (command,) = [text for _, kind, text in BLOCKS if kind == "bash"]
    run(["bash", "-c", command], folder)
    assert steps(folder / "runs" / "base" / "monitor.csv") == [0, 5, 10]
