"""The layout is a promise: imports only go down the floors, and nothing in the package runs code from a file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dpo_cli"
# From the ground up; the rooms of one line stand beside each other and do not know each other.
FLOORS = [
    {"errors"},
    {"console", "theory", "assets"},
    {"paths", "signals", "pages"},
    {"engine"},
    {"config"},
    {"storage"},
    {"data", "trackers"},
    {"models"},
    {"objectives"},
    {"runs"},
    {"evaluation"},
    {"generation", "examination"},
    {"training"},
    {"labelling"},
    {"commands"},
    {"cli"},
]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else ""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dpo_cli."):
            yield room(node.module)
        elif isinstance(node, ast.Import):
            yield from (room(name.name) for name in node.names if name.name.startswith("dpo_cli."))


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_floors_below_its_own(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imports(path):
        assert floor(other) < floor(own) or other == own, f"{path} imports {other}"


def test_nothing_outside_its_room_asks_which_objective_runs() -> None:
    # What depends on the objective is a method or a trait of it: a question anywhere else is one more to forget.
    asked = []
    for path in modules():
        if path.is_relative_to(PACKAGE / "objectives"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                asked += [where for side in sides if side.split(".")[-1] in ("objective", "engine.name")]
            if isinstance(node, ast.ImportFrom) and node.module in (
                "dpo_cli.objectives.reward",
                "dpo_cli.objectives.preference",
            ):
                asked.append(where)
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                asked += [where] if name in ("is_reward_model", "of_rewards", "head_of", "has_head") else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                kinds = ast.unparse(node.args[1])
                asked += (
                    [where] if any(kind in kinds for kind in ("Reward", "Preference", "Distributed", "Engine")) else []
                )
    assert asked == []


def test_the_theory_knows_no_files_models_or_config() -> None:
    for path in (PACKAGE / "theory").glob("*.py"):
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert names <= {"torch", "numpy", "math", "inspect", "collections", "dataclasses", "functools", "dpo_cli"}, (
            path
        )


def test_nothing_reads_pickle_or_runs_code_named_in_a_file() -> None:
    forbidden_calls = {"eval", "exec", "compile", "instantiate", "__import__"}
    for path in modules():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & set(names), path
            if isinstance(node, ast.Call):
                function = node.func
                if isinstance(function, ast.Name):
                    assert function.id not in forbidden_calls, f"{path}:{node.lineno}"
                if isinstance(function, ast.Attribute):
                    dotted = ast.unparse(function)
                    assert not dotted.endswith((".instantiate", ".import_module")), f"{path}:{node.lineno}"
                    assert dotted not in {
                        "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system",
                        "os.popen", "np.load", "numpy.load",
                    }, f"{path}:{node.lineno}"  # fmt: skip
                for keyword in node.keywords:
                    literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                    refused = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "use_safetensors": False}
                    assert keyword.arg not in refused or literal is not refused[keyword.arg], f"{path}:{node.lineno}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                assert node.value != "_target_", path


IMPORT_ALL = """
import importlib, pkgutil, signal, sys
import dpo_cli
names = [module.name for module in pkgutil.walk_packages(dpo_cli.__path__, "dpo_cli.")]
for name in names:  # the packages of others may need what Linux has: they are written for Windows in other lines
    importlib.import_module(name)
for name in names:
    del sys.modules[name]
for name in ("fcntl", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGHUP", "SIGQUIT", "SIGTSTP", "SIGCONT", "SIGWINCH"):
    delattr(signal, name)
for name in names:
    importlib.import_module(name)
print(*names)
"""


def test_every_module_imports_where_windows_lacks_what_linux_has() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    files = [path for path in modules() if path.stem not in ("__init__", "__main__")]
    assert {path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".") for path in files} <= set(
        done.stdout.split()
    )
