"""How threads wait is set before torch loads OpenMP, and the user's own choice is kept."""

import os
import subprocess
import sys

import pytest

from xinslm.cli.threads import WAIT_SETTINGS, set_wait_policy


def test_threads_wait_passively_unless_told_otherwise():
    environ = {"HOME": "/"}
    set_wait_policy(environ)
    assert environ == {"HOME": "/", "OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("name", WAIT_SETTINGS)
def test_the_users_choice_is_kept(name):
    environ = {name: "1000"}
    set_wait_policy(environ)
    assert environ == {name: "1000"}


@pytest.mark.skipif(sys.platform != "linux", reason="GOMP_SPINCOUNT is libgomp's")
def test_openmp_reads_what_the_command_line_sets():
    code = (
        "from xinslm.cli.main import main\n"
        "assert main(['--version']) == 0\n"
        "import torch\n"
        "torch.ones(100_000).sum()\n"
    )
    plain = {key: value for key, value in os.environ.items() if key not in WAIT_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**plain, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert "GOMP_SPINCOUNT = '0'" in done.stderr
