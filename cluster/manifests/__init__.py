"""Files for real clusters, and their check: `python -m cluster.manifests FILE...`.

`raycluster.yaml` and `rayjob.yaml` are for Kubernetes with KubeRay, `ray-up.yaml` for `ray up`, `slurm.sh` for
`sbatch`, `Dockerfile` for an image with everything. Copy one, change what its first lines name, check it, apply it.
"""

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from cluster.manifests.schemas import KUBERAY, SBATCH, SBATCH_REQUIRED

FOLDER: Final = Path(__file__).parent
SHIPPED: Final = ("raycluster.yaml", "rayjob.yaml", "ray-up.yaml", "slurm.sh")


def check(path: Path) -> list[str]:
    """What is wrong with a manifest, one line each; an empty list where nothing is.

    The kind is told by content: Slurm script by its directives, `ray up` file by `cluster_name`, else Kubernetes.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path} cannot be read: {error}"]
    if text.startswith("#!"):
        return _slurm(path, text)
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        return [f"{path.name} is not valid YAML: {' '.join(str(error).split())}"]
    if not documents:
        return [f"{path.name} holds nothing"]
    return [f"{path.name}: {problem}" for document in documents for problem in _document(document)]


def _document(document: Any) -> Iterator[str]:
    if not isinstance(document, dict):
        yield f"a {type(document).__name__} stands where an object is wanted"
    elif "cluster_name" in document:
        yield from _ray_up(document)
    elif document.get("kind") in KUBERAY:
        yield from _kuberay(document)
    else:
        yield from _kubernetes(document)


def _schema_problems(document: Any, schema: Any) -> Iterator[str]:
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema)
    for error in sorted(validator.iter_errors(document), key=lambda e: [str(part) for part in e.absolute_path]):
        place = ".".join(str(part) for part in error.absolute_path) or "the document"
        yield f"{place}: {error.message}"


def _kuberay(document: dict[str, Any]) -> Iterator[str]:
    yield from _schema_problems(document, KUBERAY[document["kind"]])
    spec = document.get("spec")
    cluster = spec.get("rayClusterSpec") if document["kind"] == "RayJob" and isinstance(spec, dict) else spec
    for place, group in _groups(cluster):
        template = group.get("template")
        if isinstance(template, dict) and isinstance(template.get("spec"), dict):
            yield from (f"{place}: {problem}" for problem in _pod(template))
        bounds = (group.get("minReplicas"), group.get("replicas", group.get("minReplicas")), group.get("maxReplicas"))
        low, now, high = bounds
        if all(isinstance(bound, int) for bound in bounds) and not low <= now <= high:
            yield f"{place}: replicas = {now} lies outside minReplicas {low} .. maxReplicas {high}"


def _groups(cluster: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(cluster, dict):
        return
    if isinstance(cluster.get("headGroupSpec"), dict):
        yield "headGroupSpec", cluster["headGroupSpec"]
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        if isinstance(group, dict):
            yield f"workerGroupSpecs.{index}", group


def _pod(template: dict[str, Any]) -> Iterator[str]:
    """A pod template: every mount has its volume, GPUs are limits, and Kubernetes' own schema of a pod."""
    spec = template["spec"]
    volumes = {volume.get("name") for volume in spec.get("volumes") or [] if isinstance(volume, dict)}
    for container in spec.get("containers") or []:
        if not isinstance(container, dict):
            continue
        for mount in container.get("volumeMounts") or []:
            if mount.get("name") not in volumes:
                yield f"container {container.get('name')} mounts {mount.get('name')!r}, which is no volume of the pod"
        resources = container.get("resources") or {}
        wanted, limit = ((resources.get(kind) or {}).get("nvidia.com/gpu") for kind in ("requests", "limits"))
        if str(wanted) != str(limit):
            yield f"container {container.get('name')} requests {wanted} GPUs, limit {limit}: both must be equal"
    pod = copy.deepcopy(template) | {"apiVersion": "v1", "kind": "Pod"}
    pod.setdefault("metadata", {}).setdefault("name", "checked")
    yield from _kubernetes(pod)


def _kubernetes(document: dict[str, Any]) -> Iterator[str]:
    """By Kubernetes' own schemas, where the package that carries them is installed."""
    if not document.get("kind") or not document.get("apiVersion"):
        yield "apiVersion and kind are missing"
        return
    try:
        import kubernetes_validate
    except ImportError:
        return
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(str(part) for part in error.path)
        yield f"{place or document['kind']}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"kind {document['kind']!r} of {document['apiVersion']} is not known"


def _ray_up(document: dict[str, Any]) -> Iterator[str]:
    """By the schema that Ray ships, and what Ray checks beyond it."""
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text("utf-8"))
    yield from _schema_problems(document, schema)
    types = document.get("available_node_types")
    if isinstance(types, dict):
        if document.get("head_node_type") not in types:
            yield f"head_node_type {document.get('head_node_type')!r} is none of available_node_types"
        least = sum(kind.get("min_workers", 0) for kind in types.values() if isinstance(kind, dict))
        if least > document.get("max_workers", 0):
            yield f"max_workers {document.get('max_workers')} is less than the sum of min_workers, {least}"


def _slurm(path: Path, text: str) -> list[str]:
    """Directives known, well-formed, complete and before the first command; and the shell's own syntax check."""
    problems, seen, begun = [], set(), False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#SBATCH"):
            if begun:
                problems.append(f"{path.name}:{number}: a directive after the first command is ignored by sbatch")
            name, sign, value = line.removeprefix("#SBATCH").strip().partition("=")
            key = name.removeprefix("--")
            form = SBATCH.get(key, "")
            if not name.startswith("--") or key not in SBATCH:
                problems.append(f"{path.name}:{number}: directive {name!r} is not known")
            elif bool(sign) != (form is not None) or (form is not None and not re.fullmatch(form, value)):
                problems.append(f"{path.name}:{number}: value {value!r} of {name} is not allowed")
            seen.add(key)
        elif line.strip() and not line.startswith("#"):
            begun = True
    problems += [f"{path.name}: directive --{key} is missing" for key in SBATCH_REQUIRED if key not in seen]
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30, check=False)
    if parsed.returncode:
        problems.append(" ".join(parsed.stderr.split()))
    return problems
