"""`ray-ctrl inspect`: what a run folder, a controller, a profile table, an importance file or a model holds."""

import json
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.model.checkpoint import check_revision
from envs.model.block_importance import read_scores, removal_order
from envs.model.inspect import describe, inspect_model
from ray_ctrl.console import console
from ray_ctrl.run_folder import RunFolder, choose


def run(path: Path, revision: str | None = None) -> None:
    """Prints a summary of what lies at `path`.

    Args:
        revision: of a model on the hub.

    Raises:
        UserError: nothing there that belongs to ray-ctrl, or a revision of what has none.
    """
    check_revision(path, revision)
    if (path / "run.json").is_file():
        facts = _run_folder(RunFolder.open(path))
    elif (path / "controller.json").is_file():
        facts = _controller(path)
    elif path.is_file() and path.suffix == ".json":
        facts = _importance(path) or _table(path)
    elif (path / "config.json").is_file() or not path.exists():
        console.print(describe(inspect_model(str(path), revision)), markup=False)
        return
    else:
        raise UserError(f"{path} is no run folder, exported controller, profile table or importance (.json) or model")
    for name, value in facts.items():
        console.print(f"{name:<18}{value}", markup=False)


def _run_folder(folder: RunFolder) -> dict[str, Any]:
    origin = json.loads((folder.root / "run.json").read_text("utf-8"))
    metrics, checkpoints = folder.metrics(), folder.checkpoints()
    chosen = choose(checkpoints)
    facts: dict[str, Any] = {"run folder": folder.root, "started": origin["started"]}
    facts |= {"command": origin["command"], "commit": origin["git_commit"], "seed": origin["seed"]}
    facts |= {"hardware": origin["hardware"], "iterations": f"{len(metrics)} of {folder.config.run.iterations}"}
    facts["checkpoints"] = ", ".join(str(c.iteration) for c in checkpoints) or "none"
    if chosen is not None:
        score = "" if chosen.score is None else f", validation score {chosen.score:.3f}"
        facts["chosen checkpoint"] = f"{chosen.iteration}{score}"
    if metrics:
        facts["last reward"] = f"{metrics[-1]['reward']:.3f}"
    facts["controller"] = folder.controller if folder.controller.is_dir() else "not exported yet"
    return facts


def _controller(path: Path) -> dict[str, Any]:
    from policies.controller import Controller

    controller, metadata = Controller.load(path)
    weights = sum(p.numel() for p in controller.parameters())
    facts: dict[str, Any] = {"controller": path, "weights": f"{weights:,}", "d_model": controller.d_model}
    config = metadata.get("config", {})
    facts |= {"model": config.get("model", {}).get("name"), "task": config.get("task", {}).get("name")}
    facts["latencies"] = config.get("latency", {}).get("source")
    facts |= {key: metadata.get(key) for key in ("fingerprint", "iteration", "validation_score", "reference_ms")}
    return facts


def _importance(path: Path) -> dict[str, Any]:
    """What a file of block importance holds; nothing where it is no such file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or "importance" not in content:
        return {}
    scores = read_scores(path)
    facts: dict[str, Any] = {"block importance": path}
    facts |= {key: content[key] for key in ("model", "task", "split", "samples", "metric") if key in content}
    facts["scores"] = ", ".join(f"{score:g}" for score in scores)
    facts["left out first"] = "blocks " + ", ".join(map(str, removal_order(scores)[:4]))
    return facts


def _table(path: Path) -> dict[str, Any]:
    from envs.latency import ProfiledClock, ProfileTable

    table = ProfileTable.load(path)
    clock = ProfiledClock(table)
    identity = table.identity
    return {
        "profile table": path,
        "device": identity.device,
        "model": identity.model,
        "dtype, threads": f"{identity.dtype}, {identity.threads}",
        "requests": len(table.cells),
        "reference": f"{clock.reference_ms:.2f} ms",
        "fit, median error": f"{clock.median_error:.1%}",
        "spread, p95": f"{clock.quantile(0.95):.2f} of the prediction",
    }
