"""Which process speaks: rank zero of the job, told before the process group exists as well as after."""

from __future__ import annotations

import os
import sys

# The launchers that set them: torchrun and accelerate; Open MPI; MPICH, Intel MPI; PMIx; Slurm. Slurm is last because a
# torchrun that Slurm starts on every node sets RANK too, and RANK is then the one that counts processes.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
# Lightning starts its further ranks with these alone.
_PARTIAL_VARIABLES = ("LOCAL_RANK", "NODE_RANK")


def is_rank_zero() -> bool:
    """Whether this process is rank zero: by ``torch.distributed`` once it is initialised, else by the environment.

    A process that nothing says anything about is rank zero, so that a plain run always speaks.
    """
    dist = sys.modules.get("torch.distributed")  # never imported here: a job that did not is not distributed by it
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    for name in _RANK_VARIABLES:
        rank = os.environ.get(name, "")
        if rank.strip().isdigit():
            return int(rank) == 0
    return all(os.environ.get(name, "").strip() in ("", "0") for name in _PARTIAL_VARIABLES)
