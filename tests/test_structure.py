"""The rules that keep the house in order: which file may import which."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_flickr8k_sgd", "show_flickr8k_results", "download_flickr8k"}


def modules():
    """{dotted name: path} of the project's code outside tests."""
    paths = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "src").rglob("*.py")]
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in paths}


def imports_of(path, known):
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found.update(name for name in names if name in known)
    return found


@pytest.fixture(scope="module")
def imports():
    known = modules()
    found = {name: imports_of(path, known) for name, path in known.items()}
    assert len(found) > 20 and sum(map(len, found.values())) > 60  # else nothing was checked
    return found


def test_utils_import_nothing_from_src_outside_utils(imports):
    outside = {name: {other for other in found if not other.startswith("src.utils.")}
               for name, found in imports.items() if name.startswith("src.utils.")}
    assert not {name: others for name, others in outside.items() if others}


def test_nothing_in_src_imports_a_script_except_the_experiments(imports):
    assert not {name: found & SCRIPTS for name, found in imports.items()
                if name.startswith("src.") and not name.startswith("src.experiments.")
                and found & SCRIPTS}


def test_there_is_no_circle_of_imports(imports):
    remaining = {name: set(found) for name, found in imports.items()}
    while remaining:
        free = {name for name, found in remaining.items() if not found & remaining.keys()}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {name: found for name, found in remaining.items() if name not in free}


def test_the_model_and_the_loss_stand_alone(imports):
    encoders = {"src.image_encoder", "src.text_encoder"}
    assert imports["src.model"] == encoders and imports["src.losses"] == {"src.model"}
    assert not any(imports[encoder] for encoder in encoders)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_does_not_import_torch(script):
    """torch alone takes seconds to import, and --help should answer at once."""
    code = ("import runpy, sys\n"
            "sys.modules['torch'] = sys.modules['torchvision'] = None\n"  # an import raises
            f"sys.argv = ['{script}.py', '--help']\n"
            f"runpy.run_path('{script}.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and f"usage: {script}.py" in done.stdout, done.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_an_old_python_is_told_in_one_line(script):
    """src/__init__.py, which every script imports before anything else of the project, says it. It
    and the script must be valid in that version."""
    for path in (REPOSITORY / f"{script}.py", REPOSITORY / "src/__init__.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    code = (f"import runpy, sys; sys.version_info = (3, 8, 20, 'final', 0)\n"
            f"sys.argv = ['{script}.py', '--help']\n"
            f"runpy.run_path('{script}.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Python 3.11 or newer is needed; this is Python 3.8.20\n"

