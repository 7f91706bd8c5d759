"""A GPU that is not there: tensors that say they are on it, and an error wherever one meets a tensor that is not.

    with PretendedDevice() as device:
        model.to(device)(inputs.to(device))

Everything is computed on the CPU, with values. What is moved to `device` or made there, and whatever is computed from that, says
that it is there; an operation on tensors of both places fails as with a real GPU, and so does NumPy. As there, tensors
without axes on the CPU may join in arithmetic, `copy_` crosses, and what is on the device may be indexed from the CPU.
Each call from Python is looked at, not what torch does inside of it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
INDEXES = {Tensor.__getitem__, Tensor.__setitem__}
CROSSES = {Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type}
JOINS = {torch.cat, torch.stack}  # where a tensor without axes is not excused
NEEDS_CPU = {Tensor.numpy, Tensor.__array__}


class PretendedDevice(TorchFunctionMode):
    def __init__(self, name: str = "cuda:0"):
        super().__init__()
        self.device = torch.device(name)

    def __enter__(self) -> torch.device:
        super().__enter__()
        return self.device

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return self.device if is_there(args[0]) else CPU
        if function == Tensor.is_cuda.__get__:
            return is_there(args[0])
        check(function, args, kwargs)
        if function == Tensor.data.__set__:
            args[0].is_pretended = is_there(args[1])
            return function(*args)
        there = any(is_there(tensor) for tensor in tensors_in((args, kwargs)))
        if function in MOVES:
            args, kwargs, there = self.without_device(function, args, kwargs, there)
            result = function(*args, **kwargs)
            return mark(result.clone() if result is args[0] else result, there)
        if function == Tensor.copy_:
            return function(*args, **kwargs)  # stays where it is
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == self.device.type
            kwargs["device"] = CPU
        result = function(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: mark(tensor, True), result) if there else result

    def without_device(self, function: Callable, args: tuple, kwargs: dict, there: bool) -> tuple[tuple, dict, bool]:
        """The arguments of a move with the CPU for its device, and whether it leads to the pretended one."""
        if function != Tensor.to:
            return args[:1], {}, function == Tensor.cuda
        aims = [value for value in (*args[1:], kwargs.get("device")) if isinstance(value, (str, torch.device, Tensor))]
        for aim in aims:
            there = is_there(aim) if isinstance(aim, Tensor) else torch.device(aim).type == self.device.type
        places = (str, torch.device)
        args = tuple(CPU if isinstance(value, places) else value for value in args)
        return args, {name: CPU if isinstance(value, places) else value for name, value in kwargs.items()}, there


def check(function: Callable, args: tuple, kwargs: dict) -> None:
    """Raise what a GPU would."""
    if function in NEEDS_CPU and is_there(args[0]):
        raise TypeError(
            "can't convert a device tensor to numpy: use Tensor.cpu() to copy the tensor to host memory first"
        )
    if function in MOVES | CROSSES:
        return
    tensors = list(tensors_in((args, kwargs)))
    if function in INDEXES and is_there(args[0]):
        by_tensors = next(tensors_in(args[1:2]), None) is not None
        tensors = [args[0], *tensors_in(args[2:])] if by_tensors else []  # a plain slice is filled by copy_
    here = [tensor for tensor in tensors if not is_there(tensor) and (tensor.ndim or function in JOINS)]
    if here and len(here) < len(tensors) and any(is_there(tensor) for tensor in tensors):
        name = getattr(function, "__qualname__", str(function))
        places = ", ".join(f"{tuple(tensor.shape)} {'device' if is_there(tensor) else 'cpu'}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {places}")


def is_there(tensor: Tensor) -> bool:
    return getattr(tensor, "is_pretended", False)


def mark(tensor: Tensor, there: bool) -> Tensor:
    tensor.is_pretended = there  # type: ignore[attr-defined]
    return tensor


def tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
