"""Which module may import which: arrows run one way, and the two wings meet in the head."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import zipfneg

PACKAGE = Path(zipfneg.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}
KERNELS = {name for name in MODULES if name.startswith(("cpu", "cuda"))} | {"scalar"}
DRAWING = {"popularity", "logq", "sampling"}
COSTING = {"masking", "loss", "symmetric", "retrieval"}
# Modules that only the command line needs, and the packages they may import.
OPTIONAL = {
    "data": {"pyarrow"},
    "demo": {"pyarrow", "matplotlib", "wordsegment"},
    "fitting": {"matplotlib"},
}
# Each imports one framework, as these packages, and stands above all others.
ADAPTERS = {"torch": {"torch"}, "jax": {"jax"}, "tensorflow": {"tensorflow", "keras"}}
CORE_PACKAGES = {"numpy", "numba", "ml_dtypes"}
COMMAND_LINE = {"cli": {"typer", "tqdm", "cupy"}}


def imports(name):
    """(zipfneg modules, other packages) that a module imports, anywhere in it."""
    path, inner, outer = MODULES[name], set(), set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outer |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outer.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = [part for part in package[: len(package) - node.level + 1] if part]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner_name = ".".join([*base, alias.name])
                inner.add(inner_name if inner_name in MODULES else ".".join(base))
    return inner - {""}, outer


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_know_no_public_module(name):
    assert imports(name)[0] <= KERNELS | {"checks"}


def test_cuda_kernels_are_loaded_only_where_they_are_asked_for():
    for name, path in MODULES.items():
        if name.startswith("cuda."):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names}
                assert not {"cuda.sampling", "cuda.launch"} & names, name


def test_the_scalar_source_and_the_reference_stand_alone():
    assert imports("scalar") == (set(), {"numpy", "numba.extending"})
    assert imports("reference") == (set(), {"collections.abc", "typing", "numpy"})


def test_the_wings_do_not_know_each_other():
    for wing, other in ((DRAWING, COSTING), (COSTING, DRAWING)):
        for name in wing:
            assert not imports(name)[0] & other, name


def test_only_the_command_line_knows_the_trainer_and_files():
    above = {"training", "data", "demo", "fitting", "files", "cli"}
    for name in MODULES.keys() - above:
        assert not imports(name)[0] & above, name


def test_nothing_knows_the_adapters():
    for name in MODULES.keys() - ADAPTERS.keys():
        assert not imports(name)[0] & ADAPTERS.keys(), name
    for name in ADAPTERS:
        assert not imports(name)[0] & {"cli", "training", *KERNELS}, name


def test_imports_make_no_circle():
    done, doing = set(), []

    def visit(name):
        assert name not in doing, " -> ".join([*doing, name])
        if name in done or name == "":
            return
        doing.append(name)
        for other in sorted(imports(name)[0]):
            visit(other)
        done.add(doing.pop())

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_packages_stay_where_they_belong(name):
    allowed = CORE_PACKAGES | OPTIONAL.get(name, set()) | COMMAND_LINE.get(name, set())
    allowed = allowed | ADAPTERS.get(name, set())
    if name == "popularity":
        allowed = allowed | {"scipy"}  # imported only to fit
    if name == "cpu.product":
        allowed = allowed | {"llvmlite"}  # the compiler that Numba is made of
    if name == "interop":
        allowed = allowed | {"cupy"}  # imported only once CUDA is asked for
    if name == "cuda.launch":
        allowed = allowed | {"cupy", "cuda"}  # at the first launch
    packages = {package.split(".")[0] for package in imports(name)[1]}
    assert packages - set(sys.stdlib_module_names) <= allowed


def test_all_is_true():
    assert sorted(zipfneg.__all__) == zipfneg.__all__
    public = {
        name
        for name, value in vars(zipfneg).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(zipfneg.__all__)


@pytest.mark.parametrize("name", zipfneg.__all__)
def test_public_names_are_documented(name):
    documented = inspect.getdoc(getattr(zipfneg, name))
    assert documented
    assert "tuple" not in documented.split("\n")[0]  # a NamedTuple's own text


def test_the_page_on_the_loss_shows_the_reference_as_it_is():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "loss.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    shown = [block for block in blocks if ">>>" not in block]
    assert "d_negatives" in "".join(shown)
    for block in shown:
        assert block in (PACKAGE / "reference.py").read_text(encoding="utf-8")
