"""A stand-in for a GPU that counts how often the host waits for it; no GPU needed.

    python tests/card.py train_ssl.py --steps 9 ...

The last line it prints is a JSON list: the waits of each step.

torch's spare device becomes a card. Its tensors keep their values on the CPU, but may not
meet tensors of the CPU. The host waits for a card where it reads a value, where a result's
size depends on values, and in a copy that blocks.
"""
import importlib
import json
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("privateuseone:0")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount"}
waits = []                                              # one entry each


class OnCard(torch.Tensor):
    """A tensor that says it lies on the card; `inner` holds its values."""
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(),
                                                     storage_offset=inner.storage_offset(),
                                                     dtype=inner.dtype, device=CARD)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()


class UseCard(TorchDispatchMode):
    """Let tensors be made on the card."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


def compute(operator, args, kwargs):
    name = operator.__name__.split(".")[0]
    if name in ("_to_copy", "copy_"):
        return copy(operator, args, kwargs)

    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    cards = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    if not cards and not is_card(kwargs.get("device")):
        return operator(*args, **kwargs)
    if any(type(tensor) is torch.Tensor and tensor.dim() for tensor in tensors):
        raise RuntimeError(
            f"{name}: expected all tensors on one device, found the card and the CPU")
    if name in READS or indexes_by_mask(name, args):
        waits.append(name)
    return compute_there(operator, args, kwargs)


def indexes_by_mask(name, args):
    """Tell whether an operator looks for the True values of a mask."""
    return name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        index is not None and index.dtype == torch.bool for index in args[1])


def compute_there(operator, args, kwargs):
    inner_args, inner_kwargs = tree_map(inner_of, (args, kwargs))
    if "device" in kwargs:
        inner_kwargs["device"] = "cpu"
    result = operator(*inner_args, **inner_kwargs)
    result = tree_map(lambda leaf: OnCard(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return return_and_correct_aliasing(operator, args, kwargs, result)


def copy(operator, args, kwargs):
    """Copy from the card, to it or within it; the host waits for what it reads,
    and for what blocks."""
    into = None if operator is torch.ops.aten._to_copy.default else args[0]
    source = args[0] if into is None else args[1]
    comes_from_card = isinstance(source, OnCard)
    if into is not None:
        goes_to_card = isinstance(into, OnCard)
    else:
        goes_to_card = is_card(kwargs.get("device") or source.device)
    if not comes_from_card and not goes_to_card:
        return operator(*args, **kwargs)
    if comes_from_card and goes_to_card:
        return compute_there(operator, args, kwargs)

    if comes_from_card or True not in (kwargs.get("non_blocking"), *args[2:]):
        waits.append("copy")
    if into is not None:
        inner_of(into).copy_(inner_of(source))
        return into
    copied = inner_of(source).to(dtype=kwargs.get("dtype"), copy=True)
    return OnCard(copied) if goes_to_card else copied


def is_card(device):
    return device is not None and torch.device(device).type == CARD.type


def inner_of(value):
    return value.inner if isinstance(value, OnCard) else value


# ----------------------------------------------------------- below all modes: tensors made of lists
def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return OnCard(torch.empty(size, dtype=dtype))


def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return OnCard(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, into, non_blocking=False):
    return copy(torch.ops.aten.copy_.default, (into, source, non_blocking), {})


class Backend(backend_registration._DummyBackendModule):
    """What torch.autocast asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def plug_in():
    """Make torch know the card; a process can do this once. Return what must be kept alive."""
    backend_registration._setup_privateuseone_for_python_backend(
        rename="card", backend_module=Backend())
    library, everything = (torch.library.Library(name, "IMPL") for name in ("aten", "_"))
    # Networks run in float32.
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name, kernel in (("empty.memory_format", empty), ("empty_strided", empty_strided),
                         ("_copy_from", copy_from)):
        library.impl(name, kernel, "PrivateUse1")
    return library, everything


# ---------------------------------------------------------------- the scripts
def run(script, flags):
    """Run a training script on the card, without pictures and checkpoints:
    the waits of each of its steps."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    script = importlib.import_module(Path(script).stem)
    figures, runtime = (importlib.import_module(f"smit.{name}") for name in ("figures", "runtime"))
    start, zero_grad = runtime.start, torch.optim.Optimizer.zero_grad
    counts = []

    def begin_step(self):
        counts.append(len(waits))
        zero_grad(self)
    torch.optim.Optimizer.zero_grad = begin_step
    runtime.start = lambda device: start("cpu")._replace(device=CARD)
    for owner, name in ((figures, "pretraining_report"), (figures, "finetuning_report"),
                        (runtime, "save_checkpoint"), (runtime, "save_state")):
        setattr(owner, name, lambda *arguments, **settings: None)

    with UseCard():
        script.main(script.parse_arguments(flags))
    return [after - before for before, after in zip(counts, counts[1:])]


if __name__ == "__main__":
    kept = plug_in()
    print(json.dumps(run(sys.argv[1], sys.argv[2:])))
