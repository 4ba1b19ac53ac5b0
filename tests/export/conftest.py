"""Fixture of the tests of exports: Go's own text/template."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """A function from templates and their data to the texts; skipped without Go."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (apt-get install golang-go)")
    program = tmp_path_factory.mktemp("go") / "render_template"
    source = Path(__file__).with_name("render_template.go")
    subprocess.run(["go", "build", "-o", program, source], check=True)

    def render(inputs):
        done = subprocess.run(
            [program], input=json.dumps(inputs).encode(), stdout=subprocess.PIPE, check=True
        )
        return json.loads(done.stdout)

    return render
