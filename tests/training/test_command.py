"""`pointillist`: what it lists, what it runs, and what it loads to do so."""

import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest
from paths import ROOT

from training import command
from training.common.arguments import CONFIGS, find_config


def pointillist(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pointillist", *words])
    command.main()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_every_command_is_listed(words, monkeypatch, capsys):
    pointillist(monkeypatch, *words)
    listed = re.findall(r"^  (\S+) +\S", capsys.readouterr().out, re.MULTILINE)
    assert set(listed) == set(command.COMMANDS)


def test_every_command_has_a_module_that_python_runs():
    for module, _ in command.COMMANDS.values():
        spec = importlib.util.find_spec(module)
        assert spec is not None
        if spec.submodule_search_locations:
            assert importlib.util.find_spec(f"{module}.__main__") is not None


def test_the_list_needs_no_library():
    code = "import sys; sys.argv[1:] = []; from training.command import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "transformers"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", ["convert-flame", "inspect", "build-corpus"])
def test_a_command_prints_the_help_of_its_module(name, monkeypatch, capsys):
    printed = []
    for words in ([name, "--help"], None):
        with pytest.raises(SystemExit) as end:
            if words:
                pointillist(monkeypatch, *words)
            else:
                monkeypatch.setattr(sys, "argv", ["", "--help"])
                command.runpy.run_module(command.COMMANDS[name][0], run_name="__main__", alter_sys=True)
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "--" in printed[0]


def test_a_command_ends_as_its_module_does(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        pointillist(monkeypatch, "inspect", str(tmp_path / "nothing"))
    assert end.value.code == 1 and "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "hint"), [("synthesise", "did you mean 'synthesize'"), ("xyz", "--help lists all")])
def test_an_unknown_command_is_refused_in_one_line(name, hint, monkeypatch):
    with pytest.raises(SystemExit) as end:
        pointillist(monkeypatch, name)
    assert name in end.value.code and hint in end.value.code and "\n" not in end.value.code


def test_the_package_installs_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"pointillist": f"{command.__name__}:{command.main.__name__}"}


def test_a_config_is_found_by_its_name_and_by_its_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config("debug") == CONFIGS / "debug.yaml"
    assert find_config(str(CONFIGS / "fit_demo.yaml")) == CONFIGS / "fit_demo.yaml"
    (tmp_path / "debug").mkdir()
    assert find_config("debug") == CONFIGS / "debug.yaml"
    (tmp_path / "own.yaml").touch()
    assert find_config("own.yaml").samefile(tmp_path / "own.yaml")


@pytest.mark.parametrize("name", ["debugg", "own.yaml", "accelerate"])
def test_an_unknown_config_lists_those_there_are(name):
    with pytest.raises(FileNotFoundError, match=rf"^{name}: no such config file.* base, debug, .*decoder_paper"):
        find_config(name)
