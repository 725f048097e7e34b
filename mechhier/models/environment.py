"""What a training takes from the environment: how many processes share it and where, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from mechhier.progress import announce

# Where a process computes and what it reports. Any other ACCELERATE_ variable would change what is trained.
_PLACEMENT = {f"ACCELERATE_{name}" for name in ("USE_CPU", "TORCH_DEVICE", "CPU_AFFINITY", "LOG_LEVEL")} | {
    f"ACCELERATE_{name}" for name in ("DEBUG_MODE", "DEBUG_RDV_FILE")
}
# Ways to divide a model among devices, which neither the checkpoints nor the state for resuming are made for.
_SHARDING = {f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")}
# What a launcher writes where it asks for nothing.
_NOTHING = {"", "0", "1", "no", "none", "false", "default"}
_GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
_MASTER = {"MASTER_ADDR", "MASTER_PORT"}
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class EnvironmentVariableError(ValueError):
    """An environment variable asks for what a training cannot do; the message names it and says what to do."""


def on_cpu() -> bool:
    """Whether to train on the CPU: there is nothing else, or `accelerate launch --cpu` said so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def processes() -> PartialState:
    """The processes that train together; one, unless a launcher started more."""
    return PartialState(cpu=on_cpu())


@contextmanager
def only_processes_and_devices() -> Iterator[None]:
    """Hide every environment variable that would change what is trained; afterwards they are as they were.

    What `accelerate launch` and `torchrun` say of processes and devices stays. Precision, compilation and accumulation
    are the spec's alone (hidden, and said in a line where they ask for something). Ranks of a group that nobody set up
    are hidden where this process is the only one, and refused where they speak of several.

    Raises:
        EnvironmentVariableError: FSDP, DeepSpeed, Megatron or accelerate's parallelism is asked for; the variables of a
            group of processes are incomplete; or the group cannot be formed.
    """
    if asked := sorted(name for name in _SHARDING if os.environ.get(name, "").lower() not in _NOTHING - {"1"}):
        raise EnvironmentVariableError(
            f"{', '.join(asked)} asks accelerate to divide the model among devices, which train does not do: each device "
            "holds all of it. What to do: accelerate launch --multi_gpu without those options, or unset the variable"
        )
    hidden = {name for name in os.environ if name.startswith("ACCELERATE_")} - _PLACEMENT | _strays()
    ignored = [
        f"{name}={os.environ[name]}"
        for name in sorted(hidden)
        if name.startswith("ACCELERATE_") and os.environ[name].lower() not in _NOTHING
    ]
    if ignored:
        announce(f"Not followed, because the training's settings say what is trained: {', '.join(ignored)}")
    # accelerate writes some of a group's variables itself.
    before = {name: os.environ.get(name) for name in hidden | _GROUP | _MASTER}
    try:
        for name in hidden:
            del os.environ[name]
        _form_group()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _strays() -> set[str]:
    """The variables that speak of a group of processes, if this process is alone for all that.

    Raises:
        EnvironmentVariableError: It is not alone, but what it needs to find the others is not all there.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return set()
    present = {name: os.environ[name] for name in sorted(_GROUP) if name in os.environ}
    by_mpi = {name: os.environ[name] for name in _MPI_SIZES if name in os.environ} if on_cpu() else {}
    sizes = [value for name, value in (present | by_mpi).items() if name in ("WORLD_SIZE", *_MPI_SIZES)]
    if wrong := [value for value in [*present.values(), *by_mpi.values()] if not value.lstrip("-").isdigit()]:
        raise EnvironmentVariableError(
            f"{_listed(present | by_mpi)}: {wrong[0]!r} is no number. What to do: unset them"
        )
    needed = {"MASTER_ADDR"} if by_mpi and "WORLD_SIZE" not in present else {"MASTER_ADDR", "RANK", "WORLD_SIZE"}
    if not on_cpu():
        needed |= {"LOCAL_RANK", "MASTER_PORT"}
    missing = sorted(name for name in needed if name not in os.environ)
    several = max(map(int, sizes), default=1) > 1
    if several and missing and not (by_mpi and torch.distributed.is_mpi_available()):
        raise EnvironmentVariableError(
            f"{_listed(present | by_mpi)}: this is one of several processes by these environment variables, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so they cannot find each other. What "
            "to do: start them with torchrun or accelerate launch; or, to train alone, unset these variables"
        )
    return set() if several or not missing else {*present, *by_mpi}


def _form_group() -> None:
    """Find the other processes, or that there are none, anew: an attempt that failed would stay in accelerate's state."""
    AcceleratorState._reset_state(reset_partial_state=True)  # as TrainingArguments will
    try:
        processes()
    except (ValueError, RuntimeError, OSError) as error:
        AcceleratorState._reset_state(reset_partial_state=True)
        present = {n: os.environ[n] for n in sorted({*_GROUP, *_MASTER, *_MPI_SIZES}) if n in os.environ}
        raise EnvironmentVariableError(
            f"{_listed(present)}: the processes that these environment variables speak of did not come together: {error}. "
            "What to do: start them with torchrun or accelerate launch; or, to train alone, unset these variables"
        ) from error


def _listed(variables: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in variables.items())
