"""The repository keeps its promises: nothing is unpickled, what ships explains itself."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "p2pllm").rglob("*.py"))
SHIPPED_YAML = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("peers/*/peer.yaml")])
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {("torch", "load"), ("torch", "save")}  # both speak pickle
FLAGS = {"trust_remote_code", "allow_pickle"}
# It names the flag once, as a key of UnitedLLM's configuration that it refuses.
REFUSES = {"unitedllm_data.py": ["trust_remote_code as a key"]}


def danger(node: ast.AST) -> str | None:
    """What in this node may run a stranger's code."""
    match node:
        case ast.Import(names=names) if UNPICKLERS & {n.name.partition(".")[0] for n in names}:
            return "imports an unpickler"
        case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNPICKLERS:
            return "imports from an unpickler"
        case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in LOADERS:
            return f"{module}.{name}"
        case ast.keyword(arg=str(flag), value=value) if flag in FLAGS:
            safe = isinstance(value, ast.Constant) and value.value is False
            return None if safe else flag
        case ast.Constant(value=str(flag)) if flag in FLAGS:
            return f"{flag} as a key"
    return None


def dangers(source: str) -> list[str]:
    return [found for node in ast.walk(ast.parse(source)) if (found := danger(node))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_remote_code(path):
    allowed = REFUSES.get(path.name, [])
    assert dangers(path.read_text()) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p, os",
        "def f():\n    from dill import loads",
        "import torch\ntorch.load('x')",
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=flag)",
        "load(x, **{'trust_remote_code': True})",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_the_check_sees_each_way_to_unpickle(source):
    assert dangers(source)


def test_the_check_lets_safe_loading_pass():
    assert not list(
        dangers("load(x, trust_remote_code=False)\nimport json\nsafetensors.torch.load(x)")
    )


@pytest.mark.parametrize("path", SHIPPED_YAML, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_shipped_configuration_starts_with_a_sentence(path):
    first = path.read_text().splitlines()[0]
    assert re.fullmatch(r"# [A-Z].{20,}\.", first), first
    assert len(first) <= 100


def test_each_kind_of_peer_has_settings_a_way_to_start_and_one_screen_to_read():
    kinds = {path.name for path in (ROOT / "peers").iterdir() if path.is_dir()}
    assert kinds == {"aggregator", "bootstrap", "hf-trainer", "laptop", "trainer"}
    kinds.remove("hf-trainer")  # a script of one's own; tests/swarm/test_script.py runs it
    for kind in kinds:
        folder = ROOT / "peers" / kind
        assert (folder / "peer.yaml").is_file()
        assert list(folder.glob("start.sh")) or list(folder.glob("*.service"))
        assert len((folder / "README.md").read_text().splitlines()) <= 45


def test_each_recipe_of_just_has_a_description():
    lines = (ROOT / "justfile").read_text().splitlines()
    recipes = [n for n, line in enumerate(lines) if re.match(r"@?[a-z_][\w-]*[^:=]*:(?!=)", line)]
    assert len(recipes) >= 6
    for n in recipes:
        before = next(line for line in reversed(lines[:n]) if not line.startswith("["))
        assert re.match(r"# [A-Z]\w+s ", before), f"{lines[n]} has no description"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", name)[0]).lower()


def test_each_dependency_is_pinned_to_a_version_within_its_range():
    from packaging.requirements import Requirement

    pinned = {}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines[1:]:
        name, _, version = line.partition("==")
        assert re.fullmatch(r"[\w.]+", version), (
            f"{line!r} is no exact version that every index has"
        )
        pinned[plain(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(wanted)
        assert plain(requirement.name) in pinned, wanted
        assert requirement.specifier.contains(pinned[plain(requirement.name)]), wanted


def test_each_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.partition("\ndependencies = [\n")[2].partition("\n]")[0].splitlines()
    assert len(listed) >= 10
    assert [line for line in listed if not re.search(r'",\s+# \w', line)] == []
