"""Errors of a full disk."""

import errno


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of any of the writers (Python, safetensors, torch.save) means: no space left."""
    # torch.save says where its zip writer stopped, not why: the last two.
    texts = ("No space left", "StorageFull", "Disk quota exceeded", "os error 28", "inline_container", "iostream")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or any(text in str(error) for text in texts)
