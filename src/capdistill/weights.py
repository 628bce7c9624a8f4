"""Read weights from files and load them into a module: all of them, or none.

Encoders use it for backbone files, `Captioner.load` for saved captioners.
"""

from __future__ import annotations

import itertools
import os
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from capdistill.errors import CheckpointError
from capdistill.files import user_path

_WRAPPERS = frozenset({"module", "_orig_mod", "model"})
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
_SHOWN = 5
_DEEPEST = 8  # most wrappers removed from a name


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a `torch.save`d state dict, on the CPU.

    The content decides which it is, not the file's name. A state dict is read with
    `weights_only=True`: a file cannot run code. If training scripts wrapped it
    (`{"state_dict": ...}`, `{"model": ...}`), the inner one is used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"weight": torch.ones(2)}}, f"{folder}/w.pt")
        ...     read_state_dict(f"{folder}/w.pt")
        {'weight': tensor([1., 1.])}

    Args:
        path: The file.

    Raises:
        CheckpointError: the file does not exist, is truncated, contains anything but tensors, or
            no tensors at all.
    """
    path = user_path(path, CheckpointError)
    if not path.is_file():
        raise CheckpointError(
            f"No weights file at '{path}'. Give the path of a safetensors file or of a state dict "
            "saved by torch.save, or weights=False for random weights."
        )
    try:
        content = _read_torch(path) if _is_torch(path) else load_file(path)
    except Exception as error:  # the readers raise a dozen classes, all with the same meaning
        raise CheckpointError(
            f"'{path}' ({path.stat().st_size:,} bytes) cannot be read as weights: it is "
            f"truncated, or neither safetensors nor a plain state dict ({_first_line(error)}). "
            "Fetch it again, or save it with safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    return _tensors_of(content, path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file; empty for any other file.

    Example:
        >>> read_metadata("no/such/file")
        {}
    """
    try:
        if _is_torch(Path(path)):
            return {}
        with safe_open(os.fspath(path), "pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # `read_state_dict` reports what is wrong with the file
        return {}


def strip_prefixes(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Remove what wrappers add to names: `module.`, `_orig_mod.`, `model.`, at any depth.

    A name is changed only if it is not expected and becomes so without wrappers. Any other name
    stays as it is, and `load_exactly` reports it.

    Example:
        >>> state = {"module._orig_mod.fc.weight": torch.ones(1), "other": torch.ones(1)}
        >>> list(strip_prefixes(state, ["fc.weight"]))
        ['fc.weight', 'other']

    Args:
        state: Names and tensors as read.
        expected: Names that the module has.

    Raises:
        CheckpointError: two names become one.
    """
    known, source = frozenset(expected), dict[str, str]()
    for name in state:
        bare = _bare_name(name, known)
        if bare in source:
            raise CheckpointError(
                f"'{source[bare]}' and '{name}' both mean '{bare}': the file contains the weights "
                "twice. Keep one of them."
            )
        source[bare] = name
    return {bare: state[name] for bare, name in source.items()}


class StateOf:
    """The state dict of a module; weights that `device_map` has put elsewhere are read one by one.

    Example:
        >>> sorted(StateOf(nn.Linear(2, 1)))
        ['bias', 'weight']

    Args:
        module: Any. A weight that nobody can give stays on the device "meta".
    """

    def __init__(self, module: nn.Module) -> None:
        self.state: dict[str, Tensor] = module.state_dict()
        self.places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for prefix, part in module.named_modules():
            hook = getattr(part, "_hf_hook", None)
            for each in getattr(hook, "hooks", [hook]):
                values: Any = getattr(each, "weights_map", None)
                for name in [] if values is None else part.state_dict():
                    self.places[f"{prefix}.{name}" if prefix else name] = values, name

    def __getitem__(self, name: str) -> Tensor:
        value = self.state[name]
        if value.is_meta and name in self.places:
            values, key = self.places[name]
            return values[key]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy every tensor of `state` into `module`, or change nothing and report what does not fit.

    Halves are converted to the module's precision.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> load_exactly(layer, {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}, "layer.pt")
        >>> float(layer(torch.tensor([3.0])).detach())
        3.0

    Args:
        module: Receives the weights.
        state: Names and tensors, wrappers' prefixes removed.
        what: Name of the weights in the message, such as "The weights in 'a.pt' for resnet50".

    Raises:
        CheckpointError: a name is missing or unexpected, or a shape or kind differs.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    shared = [name for name in wanted if name in state]
    differing = [_difference(name, state[name], wanted[name]) for name in shared]
    differing = [line for line in differing if line]
    lines = [
        *_listing("missing", [f"{name} {tuple(wanted[name].shape)}" for name in missing]),
        *_listing("unexpected", [f"{name} {tuple(state[name].shape)}" for name in unexpected]),
        *_listing("of another shape or kind", differing),
    ]
    if lines:
        raise CheckpointError(
            f"{what} do not fit, and nothing was loaded.\n  " + "\n  ".join(lines) + "\n"
            "Give weights of exactly this model, or weights=False for random ones."
        )
    module.load_state_dict(dict(state))


def _is_torch(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: a length of eight arbitrary bytes, then JSON
        return False
    return start[:2] == b"PK" or start[:1] == b"\x80"  # zip archive, or a bare pickle


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            unpacked = sum(part.file_size for part in file.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError("it is compressed, which torch.save does not do")
    with path.open("rb") as file:  # by its name, torch would take it for safetensors
        return torch.load(file, map_location="cpu", weights_only=True)


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"'{path}' holds {_kind(content)}, not names with tensors. "
            "Save model.state_dict() instead."
        )
    strange = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"'{path}' holds more than tensors: {', '.join(strange[:_SHOWN])}. "
            "Save model.state_dict() alone, or under the key 'state_dict'."
        )
    return {str(key): value for key, value in content.items()}


def _kind(content: Any) -> str:
    return f"an empty {type(content).__name__}" if content == {} else type(content).__name__


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {text[0][:160]}"


def _bare_name(name: str, known: frozenset[str]) -> str:
    """The expected name that is left when the fewest wrappers are taken out, at any depth."""
    if name in known:
        return name
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part in _WRAPPERS][:_DEEPEST]
    for count in range(1, len(places) + 1):
        for removed in itertools.combinations(places, count):
            bare = ".".join(part for place, part in enumerate(parts) if place not in removed)
            if bare in known:
                return bare
    return name


def _difference(name: str, given: Tensor, wanted: Tensor) -> str:
    if given.shape != wanted.shape:
        return f"{name}: the file has {tuple(given.shape)}, the model {tuple(wanted.shape)}"
    if given.is_floating_point() != wanted.is_floating_point():
        return f"{name}: the file has {given.dtype}, the model {wanted.dtype}"
    return ""


def _listing(kind: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [f"{len(items)} {kind}: {'; '.join(items[:_SHOWN])}{more}"]


State = dict[str, Tensor]
_PLACES = ("pos_embed", "position", "rel_pos", "rope")  # may be resampled to another grid
_COUNTER = "num_batches_tracked"  # a batch norm's, without effect on what it computes


def load_backbone(
    backbone: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    classifiers: Iterable[str] = (),
    convert: Callable[[State], State] | None = None,
) -> None:
    """Load a file of weights into a backbone: all of it except the classifier, or nothing.

    Prefixes of wrappers are removed. The file may lack all counters of batch norms.

    Example:
        >>> import tempfile, torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = {"module.weight": torch.ones(1, 1), "module.fc.bias": torch.ones(9)}
        ...     torch.save(state, f"{folder}/w.pt")
        ...     load_backbone(layer, f"{folder}/w.pt", "layer", classifiers=["fc"])
        >>> layer.weight.tolist()
        [[1.0]]

    Args:
        backbone: Receives the weights.
        path: A safetensors file or a state dict.
        name: Name of the backbone in messages.
        classifiers: Modules of the file that are not loaded.
        convert: Resamples position embeddings and the like; changes no other shape.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; keys and shapes are listed.
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
    """The file converted by timm's own filters, except where they would hide a wrong shape."""
    try:
        converted = dict(convert(dict(state)))
    except Exception:  # a file that they cannot read is compared as it is
        return state
    for key in converted.keys() & state.keys() & own.keys():
        resized = state[key].ndim == own[key].ndim and state[key].shape != own[key].shape
        if resized and not any(place in key for place in _PLACES):
            converted[key] = state[key]
    return converted


def reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether a server answers, proxies included; a refusal is an answer.

    Example:
        >>> reachable("http://127.0.0.1:9", seconds=1.0)
        False

    Args:
        url: Any address of the server.
        seconds: How long to wait, name resolution included.
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

    thread = threading.Thread(target=ask, daemon=True)  # name resolution has no timeout
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def require_cache(name: str, source: str, cache: str, variable: str) -> None:
    """Check that fetched weights could be kept, before anything is fetched.

    Example:
        >>> require_cache("resnet50", "https://hub", "/tmp", "TORCH_HOME")

    Args:
        name: The model.
        source: Where its weights come from.
        cache: Directory in which they would be kept.
        variable: The environment variable that sets it.

    Raises:
        CheckpointError: there is no home directory, or the cache cannot be written.
    """
    folder = Path(cache)
    if cache.startswith("~"):
        problem = "there is no home directory to keep them in"
    else:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return
        problem = f"the cache cannot be written ({folder})"
    raise unavailable(name, source, cache, f"{problem}; set {variable} to a directory")


def unavailable(name: str, source: str, cache: str, reason: str) -> CheckpointError:
    """The error for pretrained weights that cannot be fetched.

    Example:
        >>> print(unavailable("resnet50", "https://hub", "~/.cache", "it does not answer"))
        The pretrained weights of 'resnet50' are not in the cache (~/.cache) and cannot be fetched
        from https://hub: it does not answer.
        Fetch them elsewhere and give weights="path/to/file", or weights=False for random weights.
    """
    return CheckpointError(
        f"The pretrained weights of '{name}' are not in the cache ({cache}) and cannot be fetched\n"
        f"from {source}: {reason}.\n"
        'Fetch them elsewhere and give weights="path/to/file", or weights=False for random weights.'
    )
