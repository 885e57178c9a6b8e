"""Runs whose failures were published, as inputs of the simulation; docs/thousands.md says where each number is from."""

from __future__ import annotations

from launcher.simulation import DAY, HOUR, Cluster, Fault, Job

LLAMA_3_GPUS, LLAMA_3_HOURS = 16384, 54 * 24
LLAMA_3_RATE = 419 / (LLAMA_3_GPUS * LLAMA_3_HOURS)
"""Unexpected stops for each GPU-hour of 54 days of Llama 3 405B (arXiv 2407.21783, section 3.3.4): 2.0e-5."""
LLAMA_3_PLANNED = 47 / (LLAMA_3_GPUS * LLAMA_3_HOURS)
HARDWARE_SHARE = 0.78
"""Of the unexpected ones, those that hardware caused, or is suspected to have caused (the same)."""
RESTART = 600.0
"""Seconds for which a failure stalls synchronous training on 100,000 GPUs (FT-HSDP, arXiv 2602.00277)."""
# Of Llama 3 405B: bf16 weights, and float32 weights and moments; Tectonic's sustained 2 TB/s (section 3.3.1).
LLAMA_3_STATE, LLAMA_3_STORE = 405e9 * 14, 2e12


def stops_of_llama_3(restart: float = RESTART) -> tuple[Fault, ...]:
    """Unexpected and planned stops, all of which take `restart` seconds (assumed: Llama 3's own time is not known)."""
    seconds = (restart, restart)
    return (
        Fault("unexpected", LLAMA_3_RATE, seconds),
        Fault("planned", LLAMA_3_PLANNED, seconds, is_warned=True),
    )


def llama_3(restart: float = RESTART) -> tuple[Cluster, Job]:
    """54 days of Llama 3 405B; checkpoints are waited for, at Daly's optimum (both assumed)."""
    cluster = Cluster(LLAMA_3_GPUS, stops_of_llama_3(restart), store=LLAMA_3_STORE)
    return cluster, Job("llama-3", LLAMA_3_GPUS, 0.9 * LLAMA_3_HOURS * HOUR, state_bytes=LLAMA_3_STATE)


BYTEROBUST_GPUS, BYTEROBUST_HOURS = 9600, 90 * 24


def byterobust() -> tuple[Cluster, Job]:
    """Three months of ByteRobust's dense job (arXiv 2509.16293): 175 incidents (table 4).

    Explicit ones are noticed in about 60 s, located in 2 to 15 minutes (section 2.2) and resolved in 93 s (table 6,
    CUDA errors); hangs, slow GPUs and rollbacks take up to 50 minutes (section 8.1.3; assumed: all of them do); changes
    of code 57 s. A checkpoint at each step costs 0.9 % of speed; here 0.54 s in every minute.
    """
    hours = BYTEROBUST_GPUS * BYTEROBUST_HOURS
    explicit = Fault("explicit", 128 / hours, (60 + 120 + 93, 60 + 900 + 93))
    implicit = Fault("implicit", (15 + 12) / hours, (3000, 3000))
    manual = Fault("manual", 20 / hours, (57, 57), is_warned=True)
    cluster = Cluster(BYTEROBUST_GPUS, (explicit, implicit, manual))
    return cluster, Job("byterobust", BYTEROBUST_GPUS, 0.97 * 90 * DAY, pause=0.009 * 60, every=60)


def ft_hsdp() -> tuple[Cluster, Job]:
    """Synchronous training on 100,000 GPUs: a failure every 18 minutes, of 10 minutes each (arXiv 2602.00277).

    Assumed, as nothing is said of it: a model of 2e12 parameters and 14 bytes each on a store of 7 TB/s.
    """
    cluster = Cluster(100_000, (Fault("unexpected", 1 / (0.3 * 100_000), (RESTART, RESTART)),), store=7e12)
    return cluster, Job("ft-hsdp", 100_000, 5 * DAY, state_bytes=2e12 * 14)
