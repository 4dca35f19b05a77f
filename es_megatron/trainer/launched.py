"""What launchers tell the processes of a run through the environment."""

from __future__ import annotations

from collections.abc import Mapping

from es_megatron.errors import LayoutError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_ranks(environment: Mapping[str, str]) -> int:
    """Number of ranks that a launcher has started; 1 for a process that was started alone.

    Args:
        environment: variables of this process.

    Raises:
        LayoutError: some of the launcher's variables are there and others are not, so that ranks would train alone or
            never meet; or they are no numbers, or out of range.
    """
    needed = NEEDED if environment.get("WORLD_SIZE") in (None, "", "1") else (*NEEDED, "LOCAL_RANK")
    missing = [name for name in needed if not environment.get(name)]
    if "RANK" in missing and needed is NEEDED:
        return 1
    if missing:
        given = [f"{name}={environment[name]}" for name in needed if name not in missing]
        raise LayoutError(
            f"{', '.join(missing)} must be set where {', '.join(given)} is. Start with `es-megatron launch`, "
            "`torchrun` or `deepspeed`, which set them all, or unset all of them to run one process."
        )
    try:
        rank, ranks, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise LayoutError(f"RANK, WORLD_SIZE and MASTER_PORT must be integers: {error}. Correct them.") from error
    if not 0 <= rank < ranks or not 0 <= port <= 65535:
        raise LayoutError(
            f"RANK must be in [0, WORLD_SIZE) and MASTER_PORT in [0, 65535], but there are RANK={rank}, "
            f"WORLD_SIZE={ranks} and MASTER_PORT={port}. Correct them, or start with `torchrun`."
        )
    return ranks
