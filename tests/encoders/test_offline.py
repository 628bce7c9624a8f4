"""Case 15: unavailable pretrained weights are an error within seconds; caches suffice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
from safetensors.torch import save_file

from capdistill import encoders
from capdistill.encoders.timm import TimmEncoder
from capdistill.errors import CheckpointError
from capdistill.weights import reachable

NO_NETWORK = """
import os, socket
tried = []
def refuse(*a, **k):
    tried.append(a)
    raise OSError("network is off")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
from capdistill import encoders
"""


class Refusing(BaseHTTPRequestHandler):
    """Knows no method, so that every request is answered with 501."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def run_without_network(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    nowhere = {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/proc/none", "TORCH_HOME": "/proc/none"}
    return subprocess.run(
        [sys.executable, "-c", NO_NETWORK + program],
        capture_output=True,
        text=True,
        env={**os.environ, **nowhere, "HF_HOME": "/proc/none", **environment},
        timeout=120,
    )


MISSING = [
    ("timm", "tf_efficientnet_lite0", "/proc/none/hub"),
    ("torchvision", "resnet18", "/proc/none/hub/checkpoints"),
]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """What a process without network and caches answers: `tried` connections, `errors` by name."""
    weights = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), weights)
    program = f"""
import json, time
encoders.create("timm", name="test_efficientnet", weights=False)
encoders.create("timm", name="test_efficientnet", weights={str(weights)!r})
encoders.create("torchvision", name="resnet18", weights=False)
answers = {{"tried": len(tried), "errors": {{}}}}
for kind, name, _ in {MISSING!r}:
    start = time.monotonic()
    try:
        encoders.create(kind, name=name)
    except RuntimeError as error:
        answer = [time.monotonic() - start, f"{{type(error).__name__}} {{error}}"]
        answers["errors"][name] = answer
print(json.dumps(answers))
"""
    run = run_without_network(program)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(("kind", "name", "cache"), MISSING)
def test_new_pretrained_weights_offline_fail_fast_and_say_how_to_go_on(offline, kind, name, cache):
    seconds, message = offline["errors"][name]
    assert seconds < 10
    assert message.startswith(f"CheckpointError The pretrained weights of '{name}'")
    assert cache in message
    assert 'weights="path/to/file"' in message
    assert "weights=False" in message


def test_random_weights_and_local_files_try_no_connection(offline):
    assert offline["tried"] == 0


def test_weights_in_the_hubs_cache_try_no_connection(tmp_path):
    state = timm.create_model("test_efficientnet").state_dict()
    repository = tmp_path / "hub" / "models--timm--test_efficientnet.r160_in1k"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    save_file(state, snapshot / "model.safetensors")
    program = """
encoder = encoders.create("timm", name="test_efficientnet")
print(len(tried), float(encoder.backbone.conv_stem.weight.detach().double().sum()))
"""
    run = run_without_network(program, HF_HOME=str(tmp_path))

    assert run.stdout.split()[:1] == ["0"], run.stderr
    assert float(run.stdout.split()[1]) == float(state["conv_stem.weight"].double().sum())


def test_a_model_without_pretrained_weights_says_so():
    with pytest.raises(CheckpointError, match=r"no pretrained weights for 'cspresnet50d'"):
        TimmEncoder("cspresnet50d")


def test_a_hub_that_answers_but_does_not_serve_is_the_same_error(monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise OSError("404 Not Found")

    monkeypatch.setattr("capdistill.encoders.timm.reachable", lambda url: True)
    monkeypatch.setattr("capdistill.encoders.timm.try_to_load_from_cache", lambda *a: None)
    monkeypatch.setattr("timm.create_model", refuse)

    with pytest.raises(CheckpointError, match=r"'test_vit'[\s\S]*404 Not Found"):
        TimmEncoder("test_vit")


def test_a_server_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        answered = reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.5)

    assert not answered
    assert time.monotonic() - start < 5


def test_a_server_that_refuses_is_an_answer():
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()

    answered = reachable(f"http://127.0.0.1:{server.server_port}", seconds=5)

    thread.join()
    server.server_close()
    assert answered


@pytest.mark.parametrize(
    ("kind", "name", "variable"),
    [("timm", "tf_efficientnet_lite0", "HF_HOME"), ("torchvision", "resnet18", "TORCH_HOME")],
)
@pytest.mark.parametrize("problem", ["no home", "read-only"])
def test_a_cache_that_cannot_be_kept_names_the_variable_to_set(
    kind, name, variable, problem, monkeypatch, tmp_path
):
    """Else a directory named `~` would be made, or the weights be fetched in vain."""
    folder = "~/.cache" if problem == "no home" else str(tmp_path / "file" / "cache")
    (tmp_path / "file").write_text("taken")
    monkeypatch.setattr("torch.hub.get_dir", lambda: folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"capdistill.encoders.{kind}.reachable", lambda url: True)
    monkeypatch.chdir(tmp_path)
    reason = "there is no home directory" if problem == "no home" else "cache cannot be written"

    with pytest.raises(CheckpointError, match=f"'{name}'(?s:.*){reason}(?s:.*)set {variable} to"):
        encoders.create(kind, name=name)

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
