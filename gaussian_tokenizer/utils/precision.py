"""Whether a device is fast in bfloat16: what `auto` chooses, and why, for training and generation alike."""

import torch

# Private functions of torch.cpu, by what they look for. One that a release of torch lacks counts as no.
CPU_CHECKS = {"AMX": "_is_amx_tile_supported", "AVX-512 bf16": "_is_avx512_bf16_supported"}


def supports_bf16(device: torch.device | str) -> bool:
    """Whether the device has instructions for bfloat16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and any(
        getattr(torch.cpu, name, lambda: False)() for name in CPU_CHECKS.values()
    )


def choose_bf16(asked: bool | None, device: torch.device | str, flag: str) -> tuple[bool, str]:
    """Whether to compute in bfloat16, and why, for what the user asked with `flag`; None: where the device is fast in it."""
    kind, supported = torch.device(device).type, supports_bf16(device)
    lacks = f"this CPU has neither {' nor '.join(CPU_CHECKS)}" if kind == "cpu" else f"this {kind} device lacks it"
    if asked is None:
        found = f"this CPU has {' or '.join(CPU_CHECKS)}" if kind == "cpu" else f"this {kind} device has it"
        return supported, f"{flag}: {found if supported else lacks}"
    return asked, f"{flag}: slow, {lacks}" if asked and not supported else flag
