"""Who may import what: documentation that cannot go stale (docs/architecture.md draws it)."""

import ast
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = {
    *("errors", "files", "rules", "atomic_directory", "configuration", "device", "progress", "processes"),
    *("megatron_import", "printable"),
    "__version__",
}
ALLOWED = {
    "errors": {"printable"},
    "files": {"errors"},
    "atomic_directory": {"files", "errors"},
    "rules": set(),
    "configuration": {"errors", "rules"},
    "optional_te": set(),
    "megatron_import": {"optional_te"},
    "printable": set(),
    "device": {"optional_te"},
    "progress": set(),
    "processes": set(),
    "testing": {"device"},
    "distributed": BASE,
    "ops": {"errors", "device"},
    "losses": BASE | {"distributed", "ops"},
    "models": BASE | {"distributed", "ops"},
    "checkpoints": BASE | {"distributed", "models"},
    "data": BASE | {"models"},
    "inference": BASE | {"distributed", "models", "checkpoints", "data"},
    "rl": BASE | {"ops", "distributed", "models", "checkpoints", "data", "inference"},
    "evaluation": BASE | {"distributed", "models", "checkpoints", "data", "inference", "rl"},
    "sharing": BASE | {"distributed", "models", "checkpoints", "data", "inference"},
    "mining": BASE | {"distributed", "models", "checkpoints", "data", "inference", "evaluation"},
    "training": BASE | {"ops", "distributed", "models", "checkpoints", "data", "losses", "rl", "evaluation", "sharing"},
    "annotation": BASE | {"distributed", "models", "checkpoints", "data", "inference", "rl", "evaluation"},
    "plan": BASE | {"ops", "distributed", "models", "data", "rl", "training"},
    "doctor": {"errors"},
    "report": BASE,
    "conversion": BASE | {"distributed", "models", "checkpoints", "training", "sharing"},
    "checkpoint_command": BASE | {"checkpoints", "conversion"},
    "cli": {"errors", "__version__"},
}
# Packages that one folder alone may import.
OWNERS = {
    "megatron": {"megatron_import", "distributed", "losses", "models", "checkpoints", "training", "inference"},
    "transformer_engine": {"models"},
    "wandb": {"training"},
    "vllm": {"rl"},
    "triton": {"device"},
    "umer1_kernels": {"ops"},
    "mteb": {"sharing"},
}


def imports(path: Path) -> list[str]:
    """Dotted names imported at run time; those under `if TYPE_CHECKING` are for readers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "umer1":
            found += [f"umer1.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return found


def sources() -> dict[Path, str]:
    """File -> the part of umer1 it belongs to."""
    files = {path: path.relative_to(ROOT / "umer1").parts[0].removesuffix(".py") for path in ROOT.glob("umer1/**/*.py")}
    return {path: part for path, part in files.items() if part != "__init__"}


def test_imports_point_downwards():
    wrong = []
    for path, part in sources().items():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "umer1" and len(parts) > 1 and parts[1] != part and parts[1] not in ALLOWED[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_packages_with_an_owner():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, part in sources().items()
        for name in imports(path)
        if name.split(".")[0] in OWNERS and part not in OWNERS[name.split(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_data_knows_no_process_groups():
    """Worker processes import `data`; what they make must not depend on ranks."""
    wrong = [path for path, part in sources().items() if part == "data" and "torch.distributed" in imports(path)]
    assert not wrong


def test_test_files_have_names_of_their_own():
    """pytest's prepend mode imports tests by base name, which lets spawned ranks import them again."""
    assert not list(ROOT.glob("tests/**/__init__.py"))
    names = [path.name for path in ROOT.glob("tests/**/*.py")]
    assert len(names) == len(set(names))


def test_the_name_kernels_is_left_alone():
    """A top-level package of that name would shadow the one that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or str(ROOT) not in str(spec.origin)
