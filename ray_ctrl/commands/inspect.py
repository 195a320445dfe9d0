"""`ray-ctrl inspect`: a run or sweep folder, a controller, a latency profile, an importance file or a model."""

import json
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.model.block_importance import dropped_first, read_scores
from envs.model.checkpoint import check_revision
from envs.model.inspect import describe, inspect_model
from ray_ctrl.console import console
from ray_ctrl.run_folder import RunFolder, select_checkpoint


def run(path: Path, revision: str | None = None) -> None:
    """Print a summary of what is stored at `path`.

    Args:
        revision: of a model on the hub.

    Raises:
        UserError: nothing there that belongs to ray-ctrl, or a revision of something other than a hub id.
    """
    check_revision(path, revision)
    if (path / "run.json").is_file():
        facts = _run_folder(RunFolder.open(path))
    elif (path / "sweep.yaml").is_file():
        facts = _sweep(path)
    elif (path / "controller.json").is_file():
        facts = _controller(path)
    elif path.is_file() and path.suffix == ".json":
        facts = _importance(path) or _profile(path)
    elif (path / "config.json").is_file() or not path.exists():
        console.print(describe(inspect_model(str(path), revision)))
        return
    else:
        raise UserError(f"{path} is no run or sweep folder, controller, profile, importance file or model")
    for name, value in facts.items():
        console.print(f"{name:<18}{value}")


def _run_folder(folder: RunFolder) -> dict[str, Any]:
    origin = json.loads((folder.root / "run.json").read_text("utf-8"))
    metrics, checkpoints = folder.metrics(), folder.checkpoints()
    selected = select_checkpoint(checkpoints)
    score = "" if selected is None or selected.score is None else f", validation score {selected.score:.3f}"
    facts = {
        "run folder": folder.root,
        "started": origin["started"],
        "command": origin["command"],
        "commit": origin["git_commit"],
        "seed": origin["seed"],
        "hardware": origin["hardware"],
        "iterations": f"{len(metrics)} of {folder.config.run.iterations}",
        "checkpoints": ", ".join(str(c.iteration) for c in checkpoints) or "none",
        "chosen checkpoint": f"{selected.iteration}{score}" if selected else None,
        "last reward": f"{metrics[-1]['reward']:.3f}" if metrics else None,
        "controller": folder.controller if folder.controller.is_dir() else "not exported yet",
    }
    return {name: value for name, value in facts.items() if value is not None or name == "commit"}


def _sweep(path: Path) -> dict[str, Any]:
    """Trials of a sweep, the best first, as its last summary has them."""
    try:
        summary = json.loads((path / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {"sweep folder": path, "trials": f"no summary yet: ray-ctrl tune --resume --run-dir {path}"}
    facts = {"sweep folder": path, "command": summary["command"], "ranked by": summary["metric"]}
    for trial in summary["trials"]:
        score, at = ("no validation", "-") if trial["best"] is None else (f"{trial['best'][1]:+.4f}", trial["best"][0])
        chosen = ", ".join(f"{key}={value}" for key, value in trial["settings"].items())
        facts[f"trial {trial['trial']}"] = f"{score} after iteration {at} of {trial['iterations']}: {chosen}"
    return facts | {"controller": path / "controller" if (path / "controller").is_dir() else "not exported yet"}


def _controller(path: Path) -> dict[str, Any]:
    from policies.controller import Controller

    controller, metadata = Controller.load(path)
    config = metadata.get("config", {})
    return {
        "controller": path,
        "weights": f"{sum(p.numel() for p in controller.parameters()):,}",
        "d_model": controller.d_model,
        "model": config.get("model", {}).get("name"),
        "task": config.get("task", {}).get("name"),
        "latencies": config.get("latency", {}).get("source"),
        **{key: metadata.get(key) for key in ("fingerprint", "iteration", "validation_score", "reference_ms")},
    }


def _importance(path: Path) -> dict[str, Any] | None:
    """The content of a file of block importance; None for any other JSON file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or "importance" not in content:
        return None
    scores = read_scores(path)
    return {
        "block importance": path,
        **{key: content[key] for key in ("model", "task", "split", "samples", "metric") if key in content},
        "scores": ", ".join(f"{score:g}" for score in scores),
        "left out first": f"blocks {dropped_first(scores)}",
    }


def _profile(path: Path) -> dict[str, Any]:
    from envs.latency import LatencyProfile, ProfiledClock

    profile = LatencyProfile.load(path)
    clock, identity = ProfiledClock(profile), profile.identity
    return {
        "latency profile": path,
        "device": identity.device,
        "model": identity.model,
        "dtype, threads": f"{identity.dtype}, {identity.threads}",
        "requests": len(profile.cells),
        "reference": f"{clock.reference_ms:.2f} ms",
        "fit, median error": f"{clock.median_error:.1%}",
        "noise, p95": f"{clock.quantile(0.95):.2f} of the prediction",
    }
