"""`ray-ctrl answer` and the example, with a trained run."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, fine, ray_ctrl
from PIL import Image


def test_a_sample_is_asked_and_compared_with_its_reference(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = fine("answer", "--sample", "1", "-b", "1000", "--controller", trained)
    assert "trained on 64 rollouts only, a trial run" in done.err
    found = json.loads(fine("answer", "--sample", "1", "-b", "1000", "--controller", trained, "--json").out)
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert {"question", "reference", "answer", "plan", "latency", "controller"} <= set(lines)
    assert not list(tmp_path.iterdir()), "nothing is left in the folder it was called from"
    assert found["question"] in lines["question"]
    assert found["references"][0] in lines["reference"]


def test_settings_reach_the_model_and_the_run_folder(trained: Path, tmp_path: Path) -> None:
    given = ("-b", "1000", "--controller", str(trained))
    assert str(tmp_path) in ray_ctrl("answer", "-", "what?", f"model.name={tmp_path}", *given).err
    newest = fine("answer", "-", "what is this?", f"run.folder={trained.parent}", "-b", "1000")
    assert f"controller {trained}" in newest.out
    assert "counted from 0" in ray_ctrl("answer", "--sample", "1000000", "task.test_samples=3", *given).err
    assert "--sample N" in ray_ctrl("answer", *given).err
    assert "max_sequence_length" in ray_ctrl("answer", "-", "what is it " * 3000, *given).err


PIPELINE = """
import runpy, sys
TRAINING = sys.argv.pop().split(",")
sys.modules.update(dict.fromkeys(TRAINING))  # to import and to transformers' checks they are not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not set(TRAINING) & {name.partition(".")[0] for name, module in sys.modules.items() if module}
"""


def test_the_pipeline_answers_where_only_the_core_is_installed(trained: Path, tmp_path: Path) -> None:
    """Everything that the extras bring is hidden, Ray and gymnasium among it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    names = {re.split(r"[\[><=]", requirement)[0] for requirement in extras["train"]}
    assert {"ray", "gymnasium"} <= names
    extra = sorted(names - {"packaging"})  # which transformers brings
    hidden = ",".join({"scikit-learn": "sklearn"}.get(name, name) for name in extra)
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    program = ROOT / "examples" / "use_the_pipeline.py"
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, program, trained, tmp_path / "red.png", "what color is it?", "500", hidden],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ms of 500 ms" in done.stdout
