"""Weights of a backbone, from a hub or a file: loaded exactly, or an error that says how."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from capdistill.errors import CheckpointError
from capdistill.weights import load_exactly, read_state_dict, strip_prefixes

State = dict[str, Tensor]
_PLACES = ("pos_embed", "position", "rel_pos", "rope")  # may be resampled to another grid
_COUNTER = "num_batches_tracked"  # a batch norm's, without effect on what it computes


def load_file(
    backbone: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    classifiers: Iterable[str] = (),
    convert: Callable[[State], State] | None = None,
) -> None:
    """Lay a file of weights over a backbone: all of it but the classifier, or nothing.

    Wrappers' prefixes are removed. Counters of batch norms may be absent from the whole file.

    Example:
        >>> import tempfile, torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = {"module.weight": torch.ones(1, 1), "module.fc.bias": torch.ones(9)}
        ...     torch.save(state, f"{folder}/w.pt")
        ...     load_file(layer, f"{folder}/w.pt", "layer", classifiers=["fc"])
        >>> layer.weight.tolist()
        [[1.0]]

    Args:
        backbone: Receives the weights.
        path: A safetensors file or a state dict.
        name: How messages call the backbone.
        classifiers: Modules of the file that are left out knowingly.
        convert: Resamples position embeddings and the like; it changes no other shape.

    Raises:
        CheckpointError: the file can not be read, or does not fit; keys and shapes are listed.
    """
    own: State = backbone.state_dict()
    heads = tuple(f"{head}." for head in classifiers)
    leaves = [f"{head}{leaf}" for head in heads for leaf in ("weight", "bias")]
    state = strip_prefixes(read_state_dict(path), [*own, *leaves])
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    if convert is not None:
        state = _converted(state, own, convert)
    if not any(key.endswith(_COUNTER) for key in state):
        state.update({key: value for key, value in own.items() if key.endswith(_COUNTER)})
    load_exactly(backbone, state, f"The weights in '{path}' for '{name}'")


def _converted(state: State, own: State, convert: Callable[[State], State]) -> State:
    """What timm's own filters make of a file, except where they would hide a wrong shape."""
    try:
        converted = dict(convert(dict(state)))
    except Exception:  # what they can not read is compared as it is, and listed
        return state
    for key in converted.keys() & state.keys() & own.keys():
        resized = state[key].ndim == own[key].ndim and state[key].shape != own[key].shape
        if resized and not any(place in key for place in _PLACES):
            converted[key] = state[key]
    return converted


def reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether a server answers at all, through proxies too; a refusal to serve is an answer.

    Example:
        >>> reachable("http://127.0.0.1:9", seconds=1.0)
        False

    Args:
        url: Any address of the server.
        seconds: How long to wait, the look-up of its name included.
    """
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # a look-up of names knows no timeout
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def unavailable(name: str, source: str, cache: str, reason: str) -> CheckpointError:
    """The error for pretrained weights that can not be had.

    Example:
        >>> print(unavailable("resnet50", "https://hub", "~/.cache", "it does not answer"))
        The pretrained weights of 'resnet50' are not in the cache (~/.cache) and can not be had
        from https://hub: it does not answer.
        Fetch them elsewhere and give weights="path/to/file", or weights=False for random weights.
    """
    return CheckpointError(
        f"The pretrained weights of '{name}' are not in the cache ({cache}) and can not be had\n"
        f"from {source}: {reason}.\n"
        'Fetch them elsewhere and give weights="path/to/file", or weights=False for random weights.'
    )
