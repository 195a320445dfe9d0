"""JSON schemas of the KubeRay resources this project ships, and of Slurm's directives.

Written from KubeRay's field reference (`ray.io/v1`, KubeRay 1.6) and its published custom resource definitions: every
field of RayCluster and RayJob with its type, which are required, and no others. Pod templates inside are described
here only so far as every pod needs them; `check` adds Kubernetes' own schemas where `kubernetes-validate` is installed.
"""

from collections.abc import Mapping
from typing import Any, Final

Schema = dict[str, Any]

STRING: Final[Schema] = {"type": "string", "minLength": 1}
FLAG: Final[Schema] = {"type": "boolean"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
POSITIVE: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
SHARE: Final[Schema] = {"type": "number", "minimum": 0}
TEXTS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}
FREE: Final[Schema] = {"type": "object"}
# Kubernetes' quantities: a number with a decimal or binary suffix.
QUANTITY: Final[Schema] = {
    "anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE])?$"}]
}


def _closed(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _list(of: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": of, "minItems": least}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


RESOURCES: Final[Schema] = {
    "type": "object",
    "properties": {kind: {"type": "object", "additionalProperties": QUANTITY} for kind in ("requests", "limits")},
}
CONTAINER: Final[Schema] = {
    "type": "object",
    "required": ["name", "image"],
    "properties": {"name": STRING, "image": STRING, "resources": RESOURCES},
}
POD_TEMPLATE: Final[Schema] = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "metadata": FREE,
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {"containers": _list(CONTAINER, 1), "volumes": _list(FREE)},
        },
    },
}
HEAD_GROUP: Final[Schema] = _closed(
    ("template", "rayStartParams"),
    template=POD_TEMPLATE,
    headService=FREE,
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)
WORKER_GROUP: Final[Schema] = _closed(
    ("groupName", "minReplicas", "maxReplicas", "template", "rayStartParams"),
    suspend=FLAG,
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
    scaleStrategy=_closed(workersToDelete=_list(STRING)),
    numOfHosts=POSITIVE,
)
AUTOSCALER: Final[Schema] = _closed(
    resources=RESOURCES,
    image=STRING,
    imagePullPolicy=_one_of("Always", "Never", "IfNotPresent"),
    securityContext=FREE,
    idleTimeoutSeconds=COUNT,
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    version=_one_of("v1", "v2"),
    env=_list(FREE),
    envFrom=_list(FREE),
    volumeMounts=_list(FREE),
)
CLUSTER_SPEC: Final[Schema] = _closed(
    ("headGroupSpec",),
    upgradeStrategy=_closed(type=_one_of("Recreate", "None")),
    authOptions=_closed(mode=_one_of("disabled", "token"), enableK8sTokenAuth=FLAG, secretName=STRING),
    suspend=FLAG,
    managedBy=_one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=_closed(
        redisUsername=FREE, redisPassword=FREE, externalStorageNamespace=STRING, redisAddress=STRING
    ),
    headGroupSpec=HEAD_GROUP,
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    workerGroupSpecs=_list(WORKER_GROUP),
)
JOB_SPEC: Final[Schema] = _closed(
    ("entrypoint",),
    activeDeadlineSeconds=POSITIVE,
    preRunningDeadlineSeconds=POSITIVE,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=POD_TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=_closed(backoffLimit=COUNT),
    managedBy=_one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    deletionStrategy=FREE,
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=STRING,
    entrypointNumCpus=SHARE,
    entrypointNumGpus=SHARE,
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
METADATA: Final[Schema] = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}},
}


def _resource(kind: str, spec: Schema) -> Schema:
    return _closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


KUBERAY: Final[Mapping[str, Schema]] = {
    "RayCluster": _resource("RayCluster", CLUSTER_SPEC),
    "RayJob": _resource("RayJob", JOB_SPEC),
}

# Slurm: directive -> form of its value; None for a flag. Those marked in SBATCH_REQUIRED must be there.
SBATCH: Final[Mapping[str, str | None]] = {
    "job-name": r"\S+",
    "partition": r"\S+",
    "account": r"\S+",
    "qos": r"\S+",
    "constraint": r"\S+",
    "exclusive": None,
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"1",
    "cpus-per-task": r"[1-9]\d*",
    "gpus-per-node": r"([\w.\-]+:)?[1-9]\d*",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
    "signal": r"B:(TERM|INT|USR1|USR2)@\d+",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+",
    "error": r"\S+",
    "mail-type": r"\S+",
    "mail-user": r"\S+",
}
SBATCH_REQUIRED: Final = ("nodes", "ntasks-per-node", "cpus-per-task", "time", "output")
