"""Errors of a full disk."""

import errno


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of any of the writers (Python, safetensors, torch.save) means: no space left."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(
        text in str(error)
        # torch.save says where its zip writer stopped, not why.
        for text in (
            "No space left",
            "StorageFull",
            "Disk quota exceeded",
            "os error 28",
            "inline_container",
            "iostream",
        )
    )
