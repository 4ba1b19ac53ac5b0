"""Uploads to a stand-in for the Hub, by huggingface_hub's own code, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from fake_hub import TOKEN, FakeHub
from small_models import save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export.all import run as run_all
from xinslm.export.config import AllConfig, PublishConfig
from xinslm.export.publish import run
from xinslm.files import read_json
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("publish")
    save_random_model(root / "full")
    quantize(QuantizeConfig(root / "full", root / "q", method="rtn"))
    run_all(AllConfig(root / "q", root / "all"))
    return root


@pytest.fixture
def exports(made, tmp_path):
    return shutil.copytree(made / "all", tmp_path / "exports")


@pytest.fixture
def publish(tmp_path):
    """The command, in a process of its own, because huggingface_hub reads its variables once."""

    def start(hub, *arguments, token=TOKEN):
        names = {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HOME": str(tmp_path)}
        names |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        names |= {"HF_TOKEN": token} if token else {}
        inherited = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_TOKEN_PATH")}
        return subprocess.run(
            [sys.executable, "-m", "xinslm", "publish", *map(str, arguments)],
            env=inherited | names,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return start


@pytest.mark.parametrize("part", ["hf", "mlx", "."])
def test_what_arrives_is_the_folder_without_its_manifest(part, exports, publish):
    folder = exports / part
    with FakeHub() as hub:
        done = publish(hub, folder, "me/model", "--message", "first")
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/me/model/commit/1" in done.stdout
        assert hub.visibility == {"me/model": "private"} and hub.messages == ["first"]
        arrived = hub.repos["me/model"]
        expected = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        del expected["manifest.json"]
        assert {k: v for k, v in arrived.items() if k != ".gitattributes"} == expected
        assert ("model.gguf" if part == "." else "model.safetensors") in expected
        assert not any(str(exports.parent).encode() in content for content in expected.values())
        # the same again is no new content; another one is
        assert publish(hub, folder, "me/model").returncode == 0
        (folder / "README.md").write_text("# edited\n")
        done = publish(hub, folder, "me/model")
        assert done.returncode == 2 and "me/model exists and holds another README.md" in done.stderr
        assert publish(hub, folder, "me/model", "--force").returncode == 0
        assert arrived["README.md"] == b"# edited\n"


def test_a_repository_with_other_files_is_left_alone(exports, publish):
    with FakeHub() as hub:
        hub.repos["me/model"] = {"pytorch_model.bin": b"x"}
        done = publish(hub, exports / "hf", "me/model")
        assert done.returncode == 2 and "holds pytorch_model.bin, which is not in" in done.stderr
        assert hub.repos["me/model"] == {"pytorch_model.bin": b"x"}
        assert publish(hub, exports / "hf", "me/model", "--force").returncode == 0
        assert hub.repos["me/model"]["pytorch_model.bin"] == b"x"


def test_a_public_repository_is_asked_for(exports, publish):
    with FakeHub() as hub:
        assert publish(hub, exports / "hf", "me/model", "--public").returncode == 0
        assert hub.visibility == {"me/model": "public"}


def test_a_dry_run_asks_nobody(exports, publish):
    with FakeHub() as hub:
        done = publish(hub, exports / "hf", "me/model", "--dry-run", token=None)
        assert done.returncode == 0 and not hub.requests
        assert "model.safetensors" in done.stdout and "nothing was uploaded" in done.stdout
        assert "manifest.json" not in done.stdout


@pytest.mark.parametrize(
    ("token", "status", "code", "message"),
    [
        (None, None, 2, "needs a token that may write: run `hf auth login`"),
        ("hf_wrong", None, 1, "refuses this token for me/model (401)"),
        (TOKEN, 403, 1, "refuses this token for me/model (403)"),
        (TOKEN, 400, 1, "the Hub refuses me/model (400)"),
    ],
)
def test_what_the_hub_refuses_is_said(token, status, code, message, exports, publish):
    with FakeHub(status) as hub:
        done = publish(hub, exports / "hf", "me/model", token=token)
        assert done.returncode == code and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and hub.repos == {}


def test_no_network_is_said(exports, publish):
    done = publish("http://127.0.0.1:9", exports / "hf", "me/model")
    assert done.returncode == 1
    assert "the Hub at http://127.0.0.1:9 cannot be reached" in done.stderr


def refused(folder, error=UsageError):
    with pytest.raises(error) as raised:
        run(PublishConfig(folder, "me/model", dry_run=True))
    return str(raised.value)


def test_folders_that_are_not_exports_are_refused(made, tmp_path):
    assert "no runtime reads a quantized folder" in refused(made / "q")
    assert "does not exist" in refused(tmp_path / "none")
    assert "is not an exported folder" in refused(made / "full")
    with pytest.raises(UsageError, match="give USER/NAME"):
        run(PublishConfig(made / "all" / "hf", "model", dry_run=True))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "may be a pickle"),
        ("inner/optimizer.pt", "may be a pickle"),
        (".model.safetensors.partial-123", "is half-written"),
        ("model.safetensors.incomplete", "is half-written"),
        (".env", "is not part of the export"),
    ],
)
def test_strange_files_are_refused(name, reason, exports):
    (exports / "hf" / name).parent.mkdir(exist_ok=True)
    (exports / "hf" / name).write_text("x")
    assert reason in refused(exports / "hf")


def test_a_damaged_file_is_refused(exports):
    file = exports / "mlx" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "model.safetensors is missing or damaged" in refused(exports / "mlx", XinslmError)
    (exports / "hf" / "config.json").unlink()
    assert "config.json is missing or damaged" in refused(exports / "hf", XinslmError)


def test_an_access_token_in_a_text_is_refused(exports):
    (exports / "hf" / "README.md").write_text("HF_TOKEN=hf_" + "aB3" * 11)
    assert "looks like an access token" in refused(exports / "hf")


def test_a_pickle_that_the_manifest_lists_is_refused(exports):
    manifest = read_json(exports / "hf" / "manifest.json")
    (exports / "hf" / "w.pt").write_bytes(b"x")
    manifest["files"]["w.pt"] = {
        "bytes": 1,
        "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
    }
    (exports / "hf" / "manifest.json").write_text(json.dumps(manifest))
    assert "may be a pickle" in refused(exports / "hf")


def test_the_card_is_one_for_the_hub(exports):
    for folder, library in (("hf", "transformers"), ("mlx", "mlx"), (".", "gguf")):
        card = ModelCard.load(exports / folder / "README.md")
        assert card.data.library_name == library and card.data.pipeline_tag == "text-generation"
        assert "4-bit" in card.data.tags and card.data.license is None
