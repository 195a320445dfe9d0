"""The model card of an exported controller: what it is for, what it was trained on, how well it does, how to use it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.files import atomic_write, write_json
from policies.controller import CARD_FILE
from ray_ctrl.controllers import README

TEXT = """---
library_name: ray-ctrl
license: apache-2.0
pipeline_tag: image-text-to-text
{base_model}tags: [latency, mixture-of-experts, grpo]
---

# Latency controller for {about}

Given an image, a question and a latency budget in milliseconds, it chooses how much of the model runs: at most 3, 6 or
12 image crops, 4 to 8 experts per token, 12 to 16 blocks. It works with this model alone: fingerprint
`{fingerprint:.12}`.

```python
from ray_ctrl.pipeline import AdaptivePipeline

pipe = AdaptivePipeline.from_pretrained("{model}", "FOLDER OR HUB ID OF THIS CONTROLLER")
print(pipe("photo.jpg", "what is this?", budget_ms={example:.0f}))
```

| | |
|---|---|
{facts}

{held_out}

Budgets outside the range are clamped to it. On another device the range scales with the latency of a reference request;
the promise about violations is then approximate until a controller is trained there.
"""


def describe_export(folder: Path, summary: Mapping[str, Any] | None = None) -> None:
    """Writes README.md next to an exported controller.

    Args:
        summary: of an evaluation on held-out budgets, stored in the controller's JSON as `held_out`.
    """
    card = json.loads((folder / CARD_FILE).read_text("utf-8"))
    metadata: dict[str, Any] = card["metadata"]
    if summary is not None:
        metadata["held_out"] = _held_out(summary)
        write_json(folder / CARD_FILE, card)
    atomic_write(folder / README, _text(metadata))


def _held_out(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the controller under each held-out budget, then of every method over all of them."""
    keys = ("budget_ms", "accuracy", "accuracy_error", "violations", "latency_ms", "latency_p95_ms")
    rows = [{"method": "controller", **row} for row in summary["per_budget"]["controller"]]
    rows += [{"method": name, **row} for name, row in summary["methods"].items()]
    return [{"method": row["method"], **{key: row[key] for key in keys if key in row}} for row in rows]


def _text(metadata: Mapping[str, Any]) -> str:
    config, budgets = metadata["config"], metadata["budgets"]
    name, guardrail = config["model"]["name"], metadata.get("guardrail")
    score = metadata.get("validation_score")
    facts = {
        "trained on": f"task `{config['task']['name']}`, {metadata.get('iteration', '?')} iterations",
        "validation score": "none" if score is None else f"{score:.3f}",
        "latencies": f"{config['latency']['source']}, on {metadata['device']}",
        "budgets": f"{budgets['low_ms']:.1f} to {budgets['high_ms']:.1f} ms",
        "reference request": f"{metadata['reference_ms']:.1f} ms",
        "guardrail": "off" if guardrail is None else f"{guardrail['confidence']:.0%} of requests within budget",
        "versions": ", ".join(f"{package} {version}" for package, version in metadata["versions"].items()),
    }
    return TEXT.format(
        base_model="" if Path(name).is_dir() or "/" not in name else f"base_model: {name}\n",
        model=name,
        about="the embedded model" if name == "embedded" else name,
        fingerprint=metadata["fingerprint"],
        example=budgets["high_ms"],
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        held_out=_table(metadata.get("held_out", ())),
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not evaluated yet."
    lines = [
        "Held-out budgets, test samples (violations: requests slower than their budget):",
        "",
        "| method | budget ms | accuracy | violations | mean ms | p95 ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        budget = f"{row['budget_ms']:.1f}" if "budget_ms" in row else "all"
        lines.append(
            f"| {row['method']} | {budget} | {row['accuracy']:.3f} | {row['violations']:.1%} | {row['latency_ms']:.1f} "
            f"| {row['latency_p95_ms']:.1f} |"
        )
    return "\n".join(lines)
