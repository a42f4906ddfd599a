"""Plug-ins: files outside the package whose components a configuration can name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lqer.config import read_config
from lqer.config.plugins import load_plugin, load_plugins
from lqer.errors import PluginError
from lqer.methods import METHODS, QeraExact
from lqer.rounding import ROUNDINGS

ROOT = Path(__file__).parents[2]
METHOD = """
from lqer.methods import QeraExact

class Tenfold(QeraExact):
    kind = "tenfold"
    iterations = 10
"""


@pytest.fixture(autouse=True)
def leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules, methods, roundings = set(sys.modules), dict(METHODS), dict(ROUNDINGS)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    for registry, before in ((METHODS, methods), (ROUNDINGS, roundings)):
        registry.clear()
        registry.update(before)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_its_components_can_be_named(tmp_path):
    load_plugin(write(tmp_path, "a_tenfold_method.py", METHOD))
    config = read_config(ROOT / "configs/demo.toml", None, ["--quantize.method=tenfold"])
    assert isinstance(config.quantize.method, QeraExact)
    assert (config.quantize.method.kind, config.quantize.method.iterations) == ("tenfold", 10)


def test_loading_it_twice_is_loading_it_once(tmp_path):
    path = write(tmp_path, "a_tenfold_method.py", METHOD)
    load_plugins([path, path])
    assert METHODS["tenfold"].__module__ == "a_tenfold_method"


def test_editing_its_file_changes_what_stands_for_it_in_keys(tmp_path):
    found = []
    for folder, text in (("one", METHOD), ("other", METHOD + "# edited\n")):
        (tmp_path / folder).mkdir()
        load_plugin(write(tmp_path / folder, f"method_of_{folder}.py", text.replace("tenfold", f"tenfold-{folder}")))
        found.append(METHODS[f"tenfold-{folder}"]().identity["source"])
    assert found[0] != found[1]
    assert QeraExact().identity is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("raises.py", "x = 1\n\nraise KeyError('no\\nsuch')\n", r"KeyError: .*no.*such.* \(raises.py, line 3\)"),
        ("does_not_parse.py", "def f(:\n", "SyntaxError: invalid syntax"),
        ("imports_nothing.py", "import nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere_to_be"),
        ("exits.py", "import sys\nsys.exit(3)\n", r"SystemExit: 3 \(exits.py, line 2\)"),
        ("random.py", "", "a module called 'random' exists already; rename the file"),
        ("takes_a_kind.py", METHOD.replace("tenfold", "gptq"), "ValueError: method 'gptq' is defined twice"),
    ],
)
def test_a_broken_one_is_one_line(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(PluginError, match=message) as caught:
        load_plugin(path)
    assert str(caught.value).startswith(f"--plugin {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.py", "folder", "text.txt"])
def test_what_is_no_python_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").touch()
    with pytest.raises(PluginError, match="no such Python file"):
        load_plugin(tmp_path / name)


def test_installed_packages_offer_plugins_as_entry_points(tmp_path, monkeypatch):
    write(tmp_path, "an_installed_method.py", METHOD)
    package = tmp_path / "tenfold-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tenfold\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[lqer.plugins]\ntenfold = an_installed_method\n")
    sys.path.insert(0, str(tmp_path))
    load_plugins()
    assert METHODS["tenfold"].__module__ == "an_installed_method"


def test_a_broken_entry_point_is_one_line_that_names_it(tmp_path):
    write(tmp_path, "a_broken_method.py", "1 / 0")
    package = tmp_path / "broken-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[lqer.plugins]\nbroken = a_broken_method\n")
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(PluginError, match=r"plug-in broken \(a_broken_method\): ZeroDivisionError"):
        load_plugins()
