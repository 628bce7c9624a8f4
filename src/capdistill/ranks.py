"""The processes that work together, its ranks: what they sum, agree on and leave to one of them."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from capdistill.data.source import skipped_images
from capdistill.errors import CapdistillError, ConfigError, RankFailed
from capdistill.runtime import launched, seed_everything, stable_hash

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # for a rank that caches features or scores captions
_CHUNK = 2**25  # values that are sent at once
_FAILURE = "capdistill/failure"
_OTHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
_KILLED = "Another rank has ended. Its own output has the reason; without one, it was killed."


class Ranks:
    """The processes that do one work together. On a single process nothing is exchanged.

    Rank 0, the main one, writes the files and calls the callbacks.

    Example:
        >>> ranks = Ranks()
        >>> ranks.main, ranks.total([2.0]), ranks.on_main(max, 1, 2)
        (True, [2.0], 2)

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self._control: Any = None  # a group of gloo: numbers and objects stay on the CPU

    @property
    def main(self) -> bool:
        """Whether this process writes files and calls callbacks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1

    def join(self, device: torch.device) -> None:
        """Join the process group, which is made here if the launcher's variables ask for one.

        Raises:
            ConfigError: the launcher left out a variable that the ranks need to meet.
        """
        if not dist.is_available() or (not dist.is_initialized() and launched().world_size == 1):
            _warn_of_copies()
            return
        if not dist.is_initialized():
            _require_variables()
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.several:
            self._control = _control_group(dist.group.WORLD)

    # -- agreement --------------------------------------------------------------------------------

    def total(self, values: Sequence[float]) -> list[float]:
        """Each of the values summed over the ranks; all give equally many."""
        if not self.several:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self._control)
        return totals.tolist()

    def add(self, values: Tensor) -> Tensor:
        """A tensor summed over the ranks, on its device."""
        if self.several:
            values = values.clone()
            dist.all_reduce(values, group=self._group(values))
        return values

    def highest(self, values: Tensor) -> Tensor:
        """The highest of each value over the ranks, on its device."""
        if self.several:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group(values))
        return values

    def _group(self, value: Tensor) -> Any:
        """Tensors on the CPU travel by gloo, whatever the others use."""
        return self._control if value.device.type == "cpu" else None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if not self.several else self.total([float(flag)])[0] > 0

    def interrupted(self, history: Any) -> bool:
        """Whether Ctrl-C or SIGTERM reached any rank: all stop after the same step.

        Args:
            history: The `History` of this rank, which then says so.
        """
        if not self.any(history.interrupted):
            return False
        history.interrupted = True
        history.signal = max(self.gather(history.signal or 0)) or None
        return True

    def gather(self, value: T) -> list[T]:
        """The value of each rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def gather_on_main(self, value: T) -> list[T]:
        """The value of each rank, on rank 0; nothing on the others."""
        if not self.several:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.main else None
        dist.gather_object(value, values, dst=0, group=self._control)
        return values or []

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function on rank 0; its result, or its error, is that of all ranks."""
        if not self.several:
            return function(*args)
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = function(*args)
            except CapdistillError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.several:
            dist.barrier(group=self._control)

    @torch.no_grad()
    def share(self, values: Iterable[Tensor]) -> None:
        """Give tensors the values of rank 0.

        Raises:
            ConfigError: other ranks have others.
        """
        if not self.several:
            return
        values = list(values)
        shapes = [str((*value.shape, value.dtype)) for value in values]
        size = f"{len(values)} tensors, {sum(value.numel() for value in values):,} values"
        self.require_equal({"weights": f"{size} ({stable_hash(*shapes) % 16**6:06x})"})
        for chunk in _alike(values):
            flat = torch.cat([value.detach().reshape(-1) for value in chunk])
            dist.broadcast(flat, src=0, group=self._group(flat))
            for value, part in zip(
                chunk, torch.split(flat, [v.numel() for v in chunk]), strict=True
            ):
                value.copy_(part.view_as(value))

    def gather_problems(self, source: Any) -> int:
        """Rank 0 learns which images the others could not read; returns how many there are."""
        add: Any = getattr(getattr(source, "skipped", None), "add", None)
        for problems in self.gather([*skipped_images(source)] if self.several else [])[1:]:
            for problem in problems if self.main and add is not None else ():
                add(problem)
        return self.on_main(lambda: len(skipped_images(source)))

    def require_equal(self, facts: Mapping[str, Any]) -> None:
        """Refuse ranks that would train different things.

        Raises:
            ConfigError: names what differs.
        """
        each = self.gather(dict(facts))
        differing = [k for k in each[0] if any(other.get(k) != each[0][k] for other in each)]
        if differing:
            shown = ", ".join(f"{k}: {sorted({str(e.get(k)) for e in each})}" for k in differing)
            raise ConfigError(
                f"The {self.world_size} ranks do not train the same: {shown}. Load the same "
                "weights and data on every rank; seed what is drawn at random."
            )

    # -- a step -----------------------------------------------------------------------------------

    def syncing(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last of a step's backward passes only."""
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
            cast(Any, module).set_requires_gradient_sync(last)
        postpone = getattr(module, "no_sync", None)
        return nullcontext() if last or postpone is None or not self.several else postpone()

    def finish_gradients(self, weighting: Any) -> None:
        """Set the gradients of a `Weighting`, which the wrapper leaves alone, over all ranks."""
        if weighting is None:
            return
        weighting.measure(self.add)
        for parameter in weighting.parameters() if self.several else ():
            if parameter.grad is not None:
                parameter.grad = self.add(parameter.grad) / self.world_size

    def numbers(self, sums: Sequence[Tensor], norm: Tensor) -> list[float]:
        """Sums over the ranks, then a norm that is that of all ranks, in one transfer."""
        one = cast(Any, norm).full_tensor() if hasattr(norm, "full_tensor") else norm
        added = self.add(torch.stack([value.float() for value in sums]))
        return torch.cat([added, one.float()[None]]).tolist()

    def reseed(self, seed: int, step: int) -> None:
        """Give every rank but the main one a random state of its own, known from seed and step."""
        if not self.main:
            seed_everything(stable_hash(seed, "rank", self.rank, step))

    # -- errors -----------------------------------------------------------------------------------

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Inside the block, an error of one rank is told to the others, which end with it too.

        Raises:
            RankFailed: another rank failed; with its message.
        """
        try:
            yield
        except BaseException as error:
            if not self.several or isinstance(error, RankFailed):
                raise
            cause = _failure_of_another(self.rank, error)
            if cause is not None:
                raise RankFailed(cause) from error
            _tell(self.rank, error)
            raise


@cache
def _control_group(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _leave() -> None:
    if dist.is_initialized():
        _control_group.cache_clear()
        dist.destroy_process_group()


def _require_variables() -> None:
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several processes, "
            f"but {', '.join(missing)} is not set. Start them by torchrun or accelerate launch, or "
            "with these variables exported (see docs/distributed.md)."
        )


def _warn_of_copies() -> None:
    """Warn if a launcher whose variables are not read has started several processes."""
    for name, launcher in _OTHERS.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1 and not os.environ.get("WORLD_SIZE"):
            warnings.warn(
                f"{launcher} started {count} processes ({name}), but RANK and WORLD_SIZE are not "
                "set, so each trains by itself. To train together, set them as docs/distributed.md "
                "shows; WORLD_SIZE=1 says that the processes are meant to be apart.",
                stacklevel=3,
            )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _tell(rank: int, error: BaseException) -> None:
    try:
        _store().set(_FAILURE, f"{rank} {type(error).__name__}: {error}")
    except (RuntimeError, ValueError):
        return  # the store is gone: so are the others


def _failure_of_another(rank: int, error: BaseException) -> str | None:
    """What another rank told before it ended; None if this error is not for its sake."""
    if not isinstance(error, RuntimeError) or isinstance(error, CapdistillError):
        return None
    try:
        known = _store().check([_FAILURE])
        told = _store().get(_FAILURE).decode() if known else ""
    except (RuntimeError, ValueError):
        return _KILLED  # the store is gone
    number, _, message = told.partition(" ")
    if told and number != str(rank):
        return f"Rank {number} failed. {message}"
    return _KILLED if isinstance(error, dist.DistError) or "gloo" in str(error) else None


def _alike(values: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, to be sent as one; none that lies on several ranks."""
    groups: dict[Any, list[Tensor]] = {}
    for value in values:
        if not hasattr(value, "full_tensor"):
            groups.setdefault((value.dtype, value.device), []).append(value)
    for group in groups.values():
        chunk, size = list[Tensor](), 0
        for value in group:
            if chunk and size + value.numel() > _CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(value)
            size += value.numel()
        yield chunk
