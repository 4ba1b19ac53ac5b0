"""`import xinslm`: the commands as `run` and configuration classes, without torch."""

import subprocess
import sys

import pytest

import xinslm
from xinslm.commands import COMMANDS
from xinslm.errors import UsageError
from xinslm.tokenizer.config import ShowConfig


def test_configuration_classes_and_the_packages_load_without_torch():
    code = (
        "import sys, xinslm\n"
        "names = [name for name in dir(xinslm) if name.endswith('Config')]\n"
        f"assert len(names) == {len(COMMANDS)}, names\n"
        "assert all(getattr(xinslm, name).__name__ == name for name in names)\n"
        "from xinslm import losses\n"
        "assert losses.__name__ == 'xinslm.losses'\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_command_is_found_by_its_configuration():
    for command in COMMANDS.values():
        name = command.config.partition(":")[2]
        assert getattr(xinslm, name) is command.load("config")


def test_run_takes_the_command_of_the_configuration():
    notes = []
    shown = xinslm.run(xinslm.ShowConfig("aaa aaa aaa"), on_progress=notes.append)
    assert type(shown).__name__ == "ShowResult"
    with pytest.raises(UsageError, match="there is no text"):
        xinslm.run(ShowConfig(""))


def test_run_refuses_what_configures_no_command():
    class DistillConfig:
        pass

    for wrong in (DistillConfig(), {"data_path": "x"}):
        with pytest.raises(TypeError, match="not the configuration of a command"):
            xinslm.run(wrong)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no train_everything"):
        xinslm.train_everything  # noqa: B018
