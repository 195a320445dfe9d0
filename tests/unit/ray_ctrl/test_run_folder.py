"""Run folders: nothing overwritten, one process at a time, damage recognized, metrics cut back."""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from envs.errors import UserError
from ray_ctrl.cli import main
from ray_ctrl.config import Config
from ray_ctrl.load_config import load_config
from ray_ctrl.run_folder import (
    RunFolder,
    check_writable,
    claim_folder,
    explained,
    locked,
    newest_run,
    select_checkpoint,
)
from ray_ctrl.tune.trial import open_folder


def _write(folder: Path) -> None:
    (folder / "algorithm").mkdir()
    (folder / "algorithm" / "weights.bin").write_bytes(b"\x00" * 64)


def _run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", load_config("smoke"))


def test_create_writes_origin_and_refuses_a_second_time(tmp_path: Path) -> None:
    run = _run(tmp_path)
    origin = json.loads((run.root / "run.json").read_text("utf-8"))
    assert origin["seed"] == 0
    assert {"torch", "ray"} <= set(origin["versions"])
    assert "git_commit" in origin
    assert run.config == load_config("smoke")
    with pytest.raises(UserError, match="exists already: continue it with --resume"):
        RunFolder.create(run.root, Config())
    assert run.config == load_config("smoke")


def test_empty_folder_may_be_used_and_a_file_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", Config())
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        RunFolder.create(tmp_path / "file", Config())


def _scores(path: Path, scores: Sequence[float]) -> None:
    path.write_text(json.dumps({"importance": list(scores)}), encoding="utf-8")


def test_block_importance_that_changed_is_refused_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "importance.json"
    scores = [block / 10 for block in range(16)]
    _scores(file, scores)
    run = RunFolder.create(tmp_path / "run", load_config("smoke", None, [f"model.block_importance={file}"]))
    file.write_text(json.dumps({"importance": scores, "task": "scenes"}, indent=4), encoding="utf-8")
    run.check_importance()  # the same scores, however they are written
    _scores(file, [*scores[:3], 0.35, *scores[4:]])
    assert main(["train", "--resume", "--run-dir", str(run.root)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"in {file} the score of block 3 is 0.35, and {run.root} began with 0.3" in error
    file.unlink()
    assert main(["train", "--resume", "--run-dir", str(run.root)]) == 2
    assert f"no file of block importance at {file}" in capsys.readouterr().err


def test_block_importance_written_next_to_the_weights_since_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    run = RunFolder.create(tmp_path / "run", load_config("smoke", None, [f"model.name={model}"]))
    run.check_importance()
    _scores(model / "importance.json", [1.0] * 16)
    with pytest.raises(UserError, match=r"importance\.json the score of block 0 is 1\.0"):
        run.check_importance()


def test_a_sweep_with_a_trial_of_other_block_importance_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "importance.json"
    _scores(file, range(16))
    sweep = {"preset": "smoke", "trials": 1, "set": {"model.block_importance": str(file)}}
    sweep["space"] = {"grpo.lr": {"log_uniform": [1e-4, 1e-1]}}
    root = tmp_path / "sweep"
    root.mkdir()
    (root / "sweep.yaml").write_text(json.dumps(sweep), encoding="utf-8")
    config = load_config("smoke", None, [f"model.block_importance={file}"])
    open_folder(root, "one", config, share=False)
    _scores(file, range(1, 17))
    with pytest.raises(UserError, match="block importance cannot change"):
        open_folder(root, "one", config, share=False)
    assert main(["tune", "--resume", "--run-dir", str(root)]) == 2
    assert "block importance cannot change" in capsys.readouterr().err


def test_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(UserError, match="no run folder under"):
        newest_run(tmp_path)
    assert newest_run(_run(tmp_path).root.parent).root == tmp_path / "run"


def test_metrics_are_cut_back_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for iteration in range(1, 6):
        run.append_metrics({"iteration": iteration, "reward": iteration / 10})
    with (run.root / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 6, "rew')
    assert [m["iteration"] for m in run.metrics()] == [1, 2, 3, 4, 5]
    run.cut_metrics(3)
    run.append_metrics({"iteration": 4, "reward": 0.0})
    assert [m["iteration"] for m in run.metrics()] == [1, 2, 3, 4]


def test_latest_falls_back_over_damage(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert run.latest() is None
    run.save_checkpoint(2, None, _write)
    later = run.save_checkpoint(4, 0.5, _write)
    assert run.latest() == later
    (later.path / "algorithm" / "weights.bin").write_bytes(b"\x01" * 64)
    with pytest.warns(UserWarning, match=r"weights\.bin is corrupt"):
        latest = run.latest()
    assert latest is not None
    assert latest.iteration == 2
    run.discard_after(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [c.iteration for c in run.checkpoints()] == [2]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "algorithm/weights.bin"])
def test_only_damaged_checkpoints_is_an_error(tmp_path: Path, name: str) -> None:
    run = _run(tmp_path)
    (run.save_checkpoint(2, None, _write).path / name).unlink()
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(UserError, match="every checkpoint"),
    ):
        run.latest()


def test_failed_write_leaves_earlier_checkpoints_alone(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.save_checkpoint(2, None, _write)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        run.save_checkpoint(4, None, full)
    assert [c.iteration for c in run.checkpoints()] == [2]
    assert not list((run.root / "checkpoints").glob(".*"))


def test_half_written_folder_of_a_killed_process_is_not_a_checkpoint(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.save_checkpoint(2, None, _write)
    _half = run.root / "checkpoints" / ".iteration_000004.partial-1"
    _half.mkdir()
    _write(_half)
    assert [c.iteration for c in run.checkpoints()] == [2]
    run.save_checkpoint(4, None, _write)
    assert [c.iteration for c in run.checkpoints()] == [2, 4]
    assert not _half.exists()


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for iteration, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, None), (5, 0.3)):
        run.save_checkpoint(iteration, score, _write)
    top = select_checkpoint(run.checkpoints())
    assert top is not None
    assert top.iteration == 2
    run.prune(2)
    assert [c.iteration for c in run.checkpoints()] == [2, 4, 5]


def test_best_is_the_last_within_one_standard_error_of_the_highest_score(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for iteration, score in ((1, 0.5), (2, 0.9), (3, 0.86), (4, None), (5, 0.84), (6, 0.3), (7, 0.2)):
        run.save_checkpoint(iteration, score, _write, score_error=0.05)
    top = select_checkpoint(run.checkpoints())
    assert top is not None
    assert top.iteration == 3
    assert top.score_error == 0.05
    # What it was measured by is kept, or the bar would sink with every pruning.
    run.prune(1)
    assert [c.iteration for c in run.checkpoints()] == [2, 3, 7]
    assert select_checkpoint(run.checkpoints()) == top


def test_best_without_scores_is_the_last(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.save_checkpoint(1, None, _write)
    run.save_checkpoint(2, None, _write)
    assert select_checkpoint(run.checkpoints()) == run.checkpoints()[-1]
    assert select_checkpoint([]) is None


def test_one_process_a_folder_and_a_dead_one_releases_it(tmp_path: Path) -> None:
    root = _run(tmp_path).root
    code = (
        "import sys, time; from pathlib import Path; from ray_ctrl.run_folder import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match="is in use by another process"), locked(root):
        pytest.fail("locked twice")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with locked(root):
        pass
    assert sorted(root.rglob("*")) == before


def test_a_locked_empty_folder_is_still_empty(tmp_path: Path) -> None:
    with locked(tmp_path):
        RunFolder.create(tmp_path, Config())


def test_two_processes_never_claim_the_same_folder(tmp_path: Path) -> None:
    names = [claim_folder(tmp_path / "evaluation").name for _ in range(3)]
    assert names == ["evaluation", "evaluation-2", "evaluation-3"]


def test_changed_weights_or_data_are_refused_on_resume(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.check_inputs({"model": "a", "train samples": "b"})
    run.check_inputs({"model": "a", "train samples": "b"})
    with pytest.raises(UserError, match=r"^train samples cannot change when a run is resumed"):
        run.check_inputs({"model": "a", "train samples": "c"})
    with pytest.raises(UserError, match=r"^model, train samples cannot change"):
        run.check_inputs({"model": "b", "train samples": "c"})


def test_a_run_folder_that_a_ray_job_removes_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "working_dir_files" / "_ray_pkg_0123" / "runs" / "one"
    with pytest.raises(UserError, match="removed with the job's working directory"):
        RunFolder.create(inside, Config())
    assert not inside.exists()


def test_a_name_of_300_letters_is_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(tmp_path / ("x" * 300))
    train = ["train", "-p", "smoke"]
    for arguments in (
        *([*train, "--run-dir", name], [*train, "--run-dir", name, "--resume"], ["evaluate", name], ["inspect", name]),
        *([*train, f"latency.profile={name}", "latency.source=profiled"], ["tune", name], ["compare", name]),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "File name too long" in error
        assert len(error) < 300
        assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "file"):
        pytest.fail("locked a file")
    with (
        pytest.raises(UserError, match=r"cannot write /full: No space left on device; free space"),
        explained(Path("/full"), "free space"),
    ):
        raise OSError(28, os.strerror(28))


def test_a_full_disk_leaves_no_half_made_run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray_ctrl.commands import train

    def full(*given: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("ray_ctrl.run_folder.write_json", full)
    with pytest.raises(UserError, match="No space left"), train.open_run(tmp_path / "run", Config(), None, None):  # type: ignore[arg-type]
        pytest.fail("opened")
    assert not (tmp_path / "run").exists()
