"""What a launcher such as torchrun says of this process, without torch."""

import os


def launched() -> tuple[int, int]:
    """Rank and number of ranks as the launcher says, before anyone joined; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
