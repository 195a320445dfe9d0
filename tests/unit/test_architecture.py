"""Which package may import which: one direction, and nothing imports the recipes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_BODY_LINES = 400, 45
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PACKAGES = ("envs", "policies", "ray_ctrl", "cluster", "recipes")
SHARED = ("envs.errors", "envs.files", "envs.section")
"""The one error family, the one way to write files and the one base of settings belong to everyone."""
ALLOWED = {
    "envs": ("envs",),
    "policies": ("policies", "envs.knobs", *SHARED),
    "cluster": ("cluster", *SHARED),
    "ray_ctrl": ("envs", "policies", "ray_ctrl", "cluster"),
    "recipes": ("recipes", "envs"),
}
RAY = ("ray",)
RAY_FREE = [
    "envs.knobs",
    "envs.errors",
    "envs.budgets",
    "envs.reward",
    "envs.schedule",
    "envs.latency",
    "envs.latency_token",
    "envs.scoring_step",
    "envs.observation",
    "envs.plan_tree",
    "envs.calibrate_guardrail",
    "envs.latency.guardrail",
    "envs.rendering",
    "envs.env_resources",
    "envs.model.molmoe",
    "envs.engine",
    "envs.processing.processor",
    "envs.data",
    "policies.controller",
    "ray_ctrl.pipeline",
    "ray_ctrl.serve.server",
    "policies.networks",
    "policies.baselines.rules",
    "policies.baselines.two_stage",
    "policies.grpo.config",
    "policies.grpo.ema",
    "policies.grpo.known_plans",
    "policies.grpo.objective",
    "policies.grpo.lagrangian",
]


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """Absolute names imported anywhere in a file, `from a import b` as a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join((*parts, base)).rstrip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package):
    assert modules(package)
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(package)
        for name in imported(path)
        if within(name, PACKAGES) and not within(name, ALLOWED[package])
    ]
    assert wrong == []


def test_envs_import_no_ray_and_gymnasium_in_one_file():
    uses_ray = [str(p) for p in modules("envs") if any(within(n, RAY) for n in imported(p))]
    uses_gym = [p.name for p in modules("envs") if any(within(n, ("gymnasium", "gym")) for n in imported(p))]
    assert uses_ray == []
    assert uses_gym == ["adaptive_vqa.py"]


@pytest.mark.parametrize(
    ("package", "below"),
    [
        ("model", ("envs.errors", "envs.files", "envs.knobs", "envs.model")),
        ("processing", ("envs.errors", "envs.files", "envs.knobs", "envs.model", "envs.processing")),
        ("data", ("envs.errors", "envs.files", "envs.knobs", "envs.model", "envs.processing", "envs.data")),
    ],
)
def test_model_processing_and_data_import_in_one_direction(package, below):
    """`envs.embedded` only says where the packaged weights are."""
    paths = modules(f"envs/{package}")
    wrong = [f"{path.name}: {name}" for path in paths for name in imported(path) if within(name, PACKAGES)]
    assert paths
    assert [w for w in wrong if not within(w.partition(": ")[2], (*below, "envs.embedded"))] == []


def test_the_walk_sees_every_form_of_import(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text("import ray.tune as t\nfrom ray import data\ndef f():\n    from policies.grpo import objective\n")
    assert imported(file) == ["ray.tune", "ray.data", "policies.grpo.objective"]


@pytest.mark.parametrize("path", [p for package in PACKAGES for p in modules(package)], ids=lambda p: p.name)
def test_files_and_functions_stay_short(path):
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    lengths = {node.name: body_lines(node) for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)}
    assert {name: length for name, length in lengths.items() if length > MAX_BODY_LINES} == {}


def body_lines(function):
    """Lines of a function's body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_body_lines_leave_out_signature_and_docstring():
    lengths = [body_lines(f) for f in ast.parse("def f():\n  'doc'\n\ndef g(\n a):\n  a = 1\n\n  return a").body]
    assert lengths == [0, 3]


def test_ray_free_parts_import_without_ray_and_gymnasium():
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "gymnasium"):
            raise ModuleNotFoundError(f"{{name}} is blocked here")
sys.meta_path.insert(0, Blocked())
for name in {RAY_FREE!r}:
    importlib.import_module(name)
assert not {{"ray", "gymnasium"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_names_of_models_and_files_of_data_are_checked_without_transformers():
    code = "import sys, envs.model.checkpoint, envs.data; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_every_function_that_the_walk_names_exists():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    walks = [part.split("\n## ")[0] for part in page.split("## One ")[1:]]
    for walk, most in zip(walks, (20, 10, 10), strict=True):
        steps = re.findall(r"^\d+\. `([\w/]+\.py):(\w+)`", walk, re.M)
        assert 5 < len(steps) <= most
        for path, name in steps:
            tree = ast.parse((ROOT / path).read_text("utf-8"))
            names = {node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}
            assert name in names, f"{path} has no function {name}"


def test_no_two_test_files_share_a_name():
    """pytest imports them by their base name: the second of a pair fails to be collected."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert sorted(set(names)) == names
