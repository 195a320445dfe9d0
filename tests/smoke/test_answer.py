"""`ray-ctrl answer` and the example, with a trained run."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, fine, refused


def test_a_sample_is_asked_and_compared_with_its_reference(trained: Path, tmp_path: Path) -> None:
    done = fine("answer", "--sample", 1, "-b", 1000, "--controller", trained, cwd=tmp_path)
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert {"question", "reference", "answer", "plan", "latency", "controller"} <= set(lines)
    assert "a trial run" in done.err, "a controller of 64 rollouts does not answer silently"
    assert not list(tmp_path.iterdir()), "nothing is left in the folder it was called from"
    found = json.loads(fine("answer", "--sample", 1, "-b", 1000, "--controller", trained, "--json").out)
    assert found["question"] in lines["question"]
    assert found["references"]


def test_settings_reach_the_model_and_the_run_folder(trained: Path, tmp_path: Path) -> None:
    moved = refused("answer", "-", "what?", f"model.name={tmp_path}", "-b", 100, "--controller", trained)
    assert str(tmp_path) in moved.err
    assert "no test sample" not in moved.err
    newest = fine("answer", "-", "what is this?", f"run.folder={trained.parent}", "-b", 1000, cwd=tmp_path)
    assert f"controller {trained}" in newest.out
    assert "counted from 0" in refused("answer", "--sample", 10**6, "-b", 100, "--controller", trained).err
    assert "--sample N" in refused("answer", "-b", 100, "--controller", trained).err


def test_sizes_that_cannot_fit_are_said_before_anything_runs(trained: Path) -> None:
    long = fine("answer", "-", "what " * 300 + "?", "-b", 3, "--repeats", 1, "--controller", trained)
    assert "301 words" in long.err or "300 words" in long.err
    assert "no plan is predicted to meet 3 ms" in long.err
    beyond = refused("answer", "-", "what is it " * 3000, "-b", 100, "--controller", trained)
    assert "max_sequence_length" in beyond.err


def test_the_example_answers(trained: Path) -> None:
    program = ROOT / "examples" / "answer_one_question.py"
    assert len(program.read_text("utf-8").splitlines()) <= 30
    done = subprocess.run(
        [sys.executable, program, trained, "500"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ms of 500 ms" in done.stdout
