"""Who may import whom, read from the code: every import statement, those inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cggr_ray", "trainables", "search_spaces", "analysis")
STANDARD = sys.stdlib_module_names
# The command line knows everybody; nothing in the core may know it.
COMMANDS = (
    "cggr_ray.arguments",
    "cggr_ray.calibrate_command",
    "cggr_ray.cli",
    "cggr_ray.commands",
    "cggr_ray.doctor_command",
    "cggr_ray.evaluate_command",
    "cggr_ray.options",
    "cggr_ray.recipe_command",
    "cggr_ray.reproduce",
    "cggr_ray.sweep_command",
    "cggr_ray.tune_command",
)
BELOW_METHODS = (
    *("cggr_ray.compiling", "cggr_ray.transfer", "cggr_ray.codec", "cggr_ray.progress", "cggr_ray.schema"),
    *("cggr_ray.kernels", "cggr_ray.saying", "cggr_ray.seeds", "cggr_ray.workers"),
)
METHODS = ("cggr_ray.data.batch", "cggr_ray.models.adapter", "cggr_ray.routing", "cggr_ray.sparse")

# What a module may import beside the standard library; the longest prefix of its name decides. A name allows all below.
RULES: dict[str, tuple[str, ...]] = {
    "cggr_ray.schema": (),
    "cggr_ray.progress": ("cggr_ray.schema",),
    "cggr_ray.clock": ("cggr_ray.schema", "cggr_ray.progress"),
    "cggr_ray.codec": ("cggr_ray.schema",),
    "cggr_ray.compiling": ("torch",),
    "cggr_ray.counts": (),
    "cggr_ray.device": ("torch",),
    "cggr_ray.transfer": ("torch",),
    "cggr_ray.tried": (),
    "cggr_ray.arguments": (),
    "cggr_ray.files": (),
    "cggr_ray.remote": ("fsspec", "cggr_ray.files"),
    "cggr_ray.copying": ("cggr_ray.remote", "cggr_ray.schema"),
    "cggr_ray.options": ("typer",),
    "cggr_ray.paths": (),
    "cggr_ray.saying": (),
    "cggr_ray.seeds": (),
    "cggr_ray.lock": ("cggr_ray.schema",),
    "cggr_ray.stopping": ("cggr_ray.schema",),
    "cggr_ray.workers": ("torch",),
    "cggr_ray.hub": ("huggingface_hub", "cggr_ray.files"),
    "cggr_ray.kernels": ("torch", "triton", "cggr_ray.kernels", "cggr_ray.compiling"),
    "cggr_ray.models": (
        *("torch", "numpy", "safetensors", "transformers", "cggr_ray.models", "cggr_ray.data.batch", "cggr_ray.hub"),
        *BELOW_METHODS,
    ),
    "cggr_ray.routing": ("torch", "numpy", *BELOW_METHODS, *METHODS),
    "cggr_ray.sparse": ("torch", "cggr_ray.sparse", "cggr_ray.models", *BELOW_METHODS, *METHODS),
    "cggr_ray.objectives": ("torch", "cggr_ray.objectives", *BELOW_METHODS, *METHODS),
    "cggr_ray.optim": ("torch", "cggr_ray.optim", *BELOW_METHODS),
    "cggr_ray.updates": (
        "torch",
        "numpy",
        "cggr_ray.updates",
        "cggr_ray.routing.draws",
        "cggr_ray.optim.gauge",
        *BELOW_METHODS,
    ),
    "cggr_ray.data": (
        *("torch", "numpy", "pyarrow", "datasets", "tokenizers", "transformers"),
        *("cggr_ray.data", "cggr_ray.codec", "cggr_ray.hub", "cggr_ray.progress", "cggr_ray.schema"),
        *("cggr_ray.files", "cggr_ray.lock", "cggr_ray.saying", "cggr_ray.seeds", "cggr_ray.transfer"),
        "cggr_ray.workers",
    ),
    "cggr_ray.evaluation": (
        *("torch", "numpy", "transformers", "cggr_ray.evaluation", "cggr_ray.data", "cggr_ray.models.adapter"),
        *("cggr_ray.models.presets", "cggr_ray.files", "cggr_ray.out_of_memory", "scipy", "math_verify"),
        *BELOW_METHODS,
    ),
    "cggr_ray.api": (
        *("torch", "numpy", "transformers", "cggr_ray.api", "cggr_ray.models", "cggr_ray.objectives"),
        *("cggr_ray.optim", *BELOW_METHODS, *METHODS),
    ),
    "cggr_ray.studies": (
        *("torch", "numpy", "matplotlib", "flash_attn", "cggr_ray.studies", "cggr_ray.data", "cggr_ray.evaluation"),
        *("cggr_ray.models", "cggr_ray.environment"),
        *BELOW_METHODS,
    ),
    "cggr_ray.telemetry": ("torch", "wandb", "rich", "cggr_ray.telemetry", "cggr_ray.files", "cggr_ray.schema"),
    "trainables": ("ray", "numpy", "optuna", "tomli_w", "cggr_ray", "search_spaces", "trainables"),
    "search_spaces": ("numpy", "optuna", "cggr_ray.codec", "search_spaces"),
    "analysis": (
        *("cggr_ray.schema", "cggr_ray.saying", "cggr_ray.tried", "analysis"),
        *("pandas", "numpy", "pyarrow", "matplotlib", "scipy", "tabulate", "optuna"),
    ),
}
# Known to nobody in the core but the command line.
NOT_IN_CORE = ("ray", "pandas", "trainables", "search_spaces", "analysis", *COMMANDS)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))}


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def imports(module: str) -> Iterator[str]:
    """Every module that a module imports; `from package import module` counts as the module."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES or whole == "ray.tune" else node.module


def outside(module: str) -> list[str]:
    """Imports that are not of the standard library."""
    return [name for name in imports(module) if name.split(".")[0] not in STANDARD]


def test_the_packages_are_found() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(PACKAGES)
    assert set(RULES) - {".".join(n.split(".")[:2]) for n in MODULES} == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_it_may(module: str) -> None:
    rules = [prefix for prefix in RULES if below(module, (prefix,))]
    if rules:
        allowed = RULES[max(rules, key=len)]
        assert [name for name in outside(module) if not below(name, allowed)] == []


@pytest.mark.parametrize("module", [m for m in MODULES if below(m, ("cggr_ray",)) and not below(m, COMMANDS)])
def test_the_core_knows_nothing_of_ray_pandas_and_the_command_line(module: str) -> None:
    assert [name for name in outside(module) if below(name, NOT_IN_CORE)] == []


ORDER = ("recipe", "learner", "assembly", "checkpoint", "summary", "loop")


@pytest.mark.parametrize("module", MODULES)
def test_recipe_learner_and_loop_know_each_other_in_one_direction(module: str) -> None:
    ranks = [ORDER.index(name) for name in ORDER if module == f"cggr_ray.{name}"]
    if ranks:
        later = tuple(f"cggr_ray.{name}" for name in ORDER[ranks[0] + 1 :])
        assert [name for name in outside(module) if below(name, later)] == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("cggr_ray.kernels")])
def test_triton_is_imported_in_kernel_files_alone(module: str) -> None:
    if not module.endswith(".kernel"):
        assert "triton" not in {name.split(".")[0] for name in outside(module)}


# Readers that run what they read, or may: by module, by function, and by a keyword that has to be False.
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml", "runpy", "ExperimentAnalysis"}
RUNNING = (
    "torch.load",
    "pd.read_pickle",
    "tune.Tuner.restore",
    "Tuner.restore",
    "eval",
    "exec",
    "compile",
    "__import__",
)
MUST_BE_FALSE = ("trust_remote_code", "allow_pickle")


def running_readers(tree: ast.AST) -> list[str]:
    """Calls in a module that could run what they read."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        found += [name] if name in RUNNING or name.split(".")[-1] in PICKLES else []
        found += [f"{name}({key})" for key in MUST_BE_FALSE if given.get(key, "False") != "False"]
        # These have a reader of pickles, or of code, inside that is only off where it is said.
        found += [name] if name in ("np.load", "numpy.load") and "allow_pickle" not in given else []
        found += (
            [name] if name.startswith("Auto") and "from_pretrained" in name and "trust_remote_code" not in given else []
        )
    return found


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_read_can_run_code(module: str) -> None:
    assert {name.split(".")[0] for name in imports(module)} & PICKLES == set()
    assert running_readers(ast.parse(MODULES[module].read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(name)",
        "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trusted)",
        "yaml.safe_load(text) if yaml.load(text) else pd.read_pickle(path)",
        "tune.Tuner.restore(path, trainable)",
        "eval(text)",
    ],
)
def test_readers_that_run_what_they_read_are_found(line: str) -> None:
    assert running_readers(ast.parse(line)) != []


@pytest.mark.parametrize("module", MODULES)
def test_nobody_catches_everything(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not {"Exception", "BaseException"} & {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cggr_ray.schema", ("torch", "ray", "numpy", "pandas")),
        ("cggr_ray.clock", ("torch", "ray", "numpy", "pandas")),
        ("cggr_ray.api", ("ray", "pandas", "cggr_ray.recipe", "cggr_ray.learner")),
        ("cggr_ray.cli", ("torch", "ray", "pandas")),
        ("cggr_ray.copying", ("torch", "ray", "pandas", "fsspec")),
        ("analysis.frames", ("torch", "ray", "transformers", "matplotlib", "scipy")),
        ("analysis.output", ("torch", "ray", "transformers")),
    ],
)
def test_what_an_import_brings_with_it(module: str, absent: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print(sorted(set(sys.modules) & set({absent!r})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
