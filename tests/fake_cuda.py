"""A CUDA device for machines without one: tensors that say they are on cuda:0 and hold real values in main memory.

Code under test sees `device`, `is_cuda` and the rules of a GPU: tensors of two devices do not meet in one operation,
nothing is looked at without being counted, Triton kernels are launched (in the interpreter, which must have been chosen
before mgrpo is imported), and products that only a GPU has are computed as it defines them. Values are real, so that a
step's results can be compared with the CPU's, and code whose shapes depend on values runs as it is. torch's own fake
tensors have no values, and stop at the first such shape.

FakeCuda.launches counts operations by their name, and Triton kernels: about what a GPU would be given to do. (An
operation may be several kernels, and what is made on the device out of nothing is not seen.)

What a GPU would make the host wait for is written to FakeCuda.waits, by the function of this project (or else of a
library) that asked: reading a number or a whole tensor, nonzero and masks as indices, and ordinary copies to the
device, which end when the source has been read.

What is not shown: streams, memory, speed, and what a GPU's kernels compute.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from mgrpo.ops.tree_attention import Saved
from mgrpo.ops.tree_kernels import CpuKernel

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
_READS = {
    aten._local_scalar_dense.default: "a number",
    aten.is_nonzero.default: "a number",
    aten.equal.default: "a number",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "nonzero",
    aten._unique2.default: "nonzero",
    aten.repeat_interleave.Tensor: "a number",
}
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_NO_LAUNCH = {getattr(aten, name).default for name in (
    "alias", "detach", "empty_like", "expand", "new_empty", "permute", "t", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view", "as_strided",
)} | {
    aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.transpose.int, aten.unbind.int,
    aten.flatten.using_ints, aten.view.dtype,
}  # fmt: skip
"""Operations that start no kernel."""
_active: list[FakeCuda] = []


class FakeCudaTensor(torch.Tensor):
    """Real values that pass for a tensor on a GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> FakeCudaTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",  # as torch's C++ sees it, which has no CUDA here
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # FakeCuda's is enough

    @property
    def data(self) -> FakeCudaTensor:  # type: ignore[override]
        return FakeCudaTensor(self.inner.detach())

    @data.setter
    def data(self, value: FakeCudaTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"FakeCudaTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mgrpo":  # an op of ours: its own code runs, on these tensors
            from torch._library.custom_ops import OPDEFS

            if "_backward" in func.name():  # zeros that autograd makes for outputs without a gradient
                args = tree_map(wrap, args)
            with _active[-1].again():
                return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **kwargs)
        _check_devices(func, args, kwargs)
        _note(func, args, kwargs)
        plain, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        if func in (aten.mm.dtype_out, aten.mm.dtype, aten.addmm.dtype_out, aten.addmm.dtype):
            out = _half_product(func, plain, plain_kwargs)
        elif func is aten._flash_attention_forward.default:
            out = _flash_forward(*plain, **plain_kwargs)
        elif func is aten._flash_attention_backward.default:
            out = _flash_backward(*plain, **plain_kwargs)
        elif func is aten.histc.default and not plain[0].is_floating_point():
            out = func(plain[0].float(), *plain[1:], **plain_kwargs).to(plain[0].dtype)
        else:
            out = func(*plain, **plain_kwargs)
        if func not in _NO_LAUNCH and not (func.overloadpacket is aten.to and out is plain[0]):
            _active[-1].launches[func.name().removeprefix("aten::")] += 1
        out = tree_map(wrap, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def wrap(x: Any) -> Any:
    return FakeCudaTensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeCudaTensor) else x


def unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, FakeCudaTensor) else x


def _half_product(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Products of half-precision matrices with float32 results, which the CPU lacks."""
    if func in (aten.mm.dtype_out, aten.mm.dtype):
        (a, b, dtype), base = args, None
    else:
        base, a, b, dtype = args
    assert a.dtype == b.dtype == torch.bfloat16 and dtype == torch.float32, (a.dtype, b.dtype, dtype)
    out = a.float() @ b.float()
    if base is not None:
        assert base.dtype == torch.float32, base.dtype
        out = base + out
    if "out" in kwargs:
        assert kwargs["out"].dtype == torch.float32, kwargs["out"].dtype
        return kwargs["out"].copy_(out)  # type: ignore[no-any-return]
    return out


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """What a GPU refuses: a tensor in main memory beside one of its own, unless it is one number."""
    if func in (aten.copy_.default, *_INDEXED):  # copies cross; indices may come from main memory
        return
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    strange = [x for x in tensors if not isinstance(x, FakeCudaTensor) and x.dim() > 0]
    if strange:
        shapes = [tuple(x.shape) for x in strange]
        raise RuntimeError(f"{func}: expected all tensors to be on cuda:0, found {shapes} on the cpu")


def _note(func: Any, args: Any, kwargs: Any) -> None:
    if func in _READS:
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
            return
        wait(_READS[func])
    elif func in _INDEXED:
        given = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) and isinstance(x, FakeCudaTensor) for x in given):
            wait("nonzero")
        elif any(not isinstance(x, FakeCudaTensor) and x.dim() > 0 for x in given):
            wait("to the device")
    elif func is aten.copy_.default:
        into, source = args[:2]
        pinned = hasattr(source if isinstance(into, FakeCudaTensor) else into, "pinned")
        asynchronous = pinned and (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if isinstance(into, FakeCudaTensor) != isinstance(source, FakeCudaTensor) and not asynchronous:
            wait("to the device" if isinstance(into, FakeCudaTensor) else "to the host")


def wait(what: str) -> None:
    """Count a wait of the host."""
    if _active:
        _active[-1].waits[f"{_asker()}: {what}"] += 1


def _asker() -> str:
    """module.function nearest the wait, of this project where one is on the stack."""
    frame, library = sys._getframe(2), ""
    while frame is not None:
        path = frame.f_code.co_filename
        within = frame.f_code.co_name.startswith("<")  # a comprehension or lambda: its function is meant
        if path.startswith(str(ROOT / "mgrpo")) and not within:
            name = str(Path(path).relative_to(ROOT)).removesuffix(".py").replace("/", ".")
            return f"{name}.{frame.f_code.co_name}" + (f" ({library})" if library else "")
        if not library and (
            "/transformers/" in path or "/torch/optim/" in path or "/torch/nn/utils/" in path
        ):
            library = f"{Path(path).stem}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return library or "a test"


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class FakeCuda(TorchFunctionMode):
    """Inside the block "cuda" names the fake device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.pinned = 0  # tensors that were made in pinned memory

    def __enter__(self) -> FakeCuda:
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.pop()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The mode inside a function that torch called with the mode off."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, args, kwargs)
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], FakeCudaTensor):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to the host first")
            wait("to the host")
            return args[0].inner.tolist()
        if func in (Tensor.untyped_storage, Tensor.data_ptr) and isinstance(args[0], FakeCudaTensor):
            return func(args[0].inner)  # which memory it is; nobody reads there
        if func is Tensor.backward:
            with self.again():
                return torch.autograd.backward(args[0], kwargs.get("gradient"))
        device = kwargs.get("device")
        if kwargs.pop("pin_memory", False):
            made = func(*args, **kwargs)
            made.pinned = True  # so that a copy which need not wait does not
            self.pinned += 1
            return made
        if device is not None:
            kwargs["device"] = "cpu" if _is_cuda(device) else device
            out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
            if func in (torch.tensor, torch.as_tensor) and _is_cuda(device):
                wait("to the device")
            return wrap(out) if _is_cuda(device) else out
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, rest = args[0], list(args[1:])
        here = isinstance(tensor, FakeCudaTensor)
        target: Any = {Tensor.cpu: "cpu", Tensor.cuda: "cuda"}.get(func, kwargs.pop("device", None))
        dtype = kwargs.pop("dtype", None)
        flags = [x for x in rest if isinstance(x, bool)]  # non_blocking, copy
        for x in rest if func is Tensor.to else ():
            if isinstance(x, (str, torch.device)):
                target = x
            elif isinstance(x, torch.dtype):
                dtype = x
            elif isinstance(x, Tensor):
                target, dtype = x.device, x.dtype
        there = here if target is None else _is_cuda(target)
        asynchronous = kwargs.pop("non_blocking", False) or (bool(flags) and flags[0])
        if there != here:
            if tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError("a tensor with a gradient leaves its device")
            if not (there and asynchronous):
                wait("to the device" if there else "to the host")
            tensor = wrap(tensor.detach().clone()) if there else tensor.inner.detach().clone()
        if dtype is not None or kwargs:
            return Tensor.to(tensor, dtype=tensor.dtype if dtype is None else dtype, **kwargs)
        return tensor


def put(model: torch.nn.Module) -> torch.nn.Module:
    """The same module with copies of its parameters and buffers on the fake device, tied ones tied."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in known:
                    known[id(p)] = torch.nn.Parameter(wrap(p.detach().clone()), p.requires_grad)
                module._parameters[name] = known[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = wrap(b.clone())
    return model


class Launcher:
    """A Triton kernel that is launched on fake tensors: the interpreter runs it on their values."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            _active[-1].launches[self.kernel.fn.__name__] += 1
            for name, x in zip(self.arg_names, args, strict=False):
                if isinstance(x, Tensor):
                    assert isinstance(x, FakeCudaTensor), f"{name} is on the cpu"
                    assert x.inner.dim() == 0 or x.inner.stride(-1) == 1, f"{name} is not contiguous"
            known = {k: v for k, v in kwargs.items() if k not in ("num_warps", "maxnreg")}
            self.kernel[grid](*(unwrap(x) for x in args), **known)

        return launch


def varlen_attn(
    q: Any, k: Any, v: Any, borders: Any, borders_k: Any, longest: int, *_: Any, **more: Any
) -> Any:
    """In place of torch.nn.attention.varlen.varlen_attn: its rules, and its numbers from whole rows."""
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}, [x.dtype for x in (q, k, v)]
    assert all(isinstance(x, FakeCudaTensor) for x in (q, k, v, borders, borders_k))
    assert borders.dtype == torch.int32 and isinstance(longest, int)
    assert more["window_size"] == (-1, 0)
    edges = borders.inner.tolist()
    assert longest == max(b - a for a, b in itertools.pairwise(edges))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)),
            is_causal=True,
            scale=more.get("scale"),
            enable_gqa=more.get("enable_gqa", False),
        )[0].transpose(0, 1)
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat(parts)


def _flash_forward(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *given: Any, scale: float) -> Any:
    """As a GPU has it for segments of varying length: output, log-sum-exp (H, n), random state and two more."""
    longest_q, longest_k, dropout, causal, _ = given
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16} and (dropout, cu_q.dtype) == (0.0, torch.int32)
    assert [longest_q, longest_k] == [int(x.diff().max()) for x in (cu_q, cu_k)] and len(cu_q) == len(cu_k)
    at: Any = SimpleNamespace(cu_q=cu_q, cu_k=cu_k, causal=causal)
    out, lse, _ = CpuKernel().forward(q, k, v, at, scale)
    return out, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)


def _flash_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *given: Any, scale: float) -> Any:
    cu_q, cu_k, _, _, _, causal, *state = given
    assert {x.dtype for x in (grad, q, k, v, out)} == {torch.bfloat16} and lse.dtype == torch.float32
    assert lse.is_contiguous() and [x.shape for x in state] == [(2,), ()]
    at: Any = SimpleNamespace(cu_q=cu_q, cu_k=cu_k, causal=causal)
    return CpuKernel().backward(grad, Saved(q, k, v, out, lse, None), at, scale)


def _tied(apply: Any) -> Any:
    """Module._apply that leaves tied what was tied: it makes new parameters here, where it fills the old ones with a
    GPU's memory."""

    def run(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    places.setdefault(id(p), []).append((part, name))
        apply(module, *args, **kwargs)
        for (first, name), *others in places.values():
            for part, other in others:
                part._parameters[other] = first._parameters[name]
        return module

    return run


def _with_mode(hook: Any) -> Any:
    def run(x: Any) -> Any:
        with _active[-1].again(), torch.no_grad():
            return hook(x)

    return run


@contextlib.contextmanager
def fake_cuda(monkeypatch: Any) -> Iterator[FakeCuda]:
    """The device, and stubs for what asks torch's C++ about it."""
    import torch.nn.attention.varlen as varlen
    from torch.nn.utils import clip_grad

    from mgrpo.ops import device
    from tests.interpreted import patch_once_a_launch

    patch_once_a_launch(monkeypatch)
    for module in (device.group_kernels, device.loss_kernels, device.row_kernels, device.total_kernels):
        for name in dir(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Launcher(getattr(module, name)))
    monkeypatch.setattr(device, "THREADS", 4)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    by_device = clip_grad._group_tensors_by_device_and_dtype

    def grouped(lists: Any) -> Any:  # C++ calls the device of a fake tensor cpu
        fake = any(isinstance(x, FakeCudaTensor) for given in lists for x in given)
        return {(CUDA if fake else d, t): found for (d, t), found in by_device(lists).items()}

    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", grouped)
    # Views of a tensor that wraps another cannot be made in inference mode.
    off = torch.no_grad()
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda _: off.__enter__())
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda _, *error: off.__exit__(*error))
    offload = torch.autograd.graph.save_on_cpu

    def save_on_cpu(**options: Any) -> Any:
        """torch's, with the mode on in its hooks: they run inside the operation whose tensors they keep."""
        made = offload(**options)
        for name in ("pack_hook", "unpack_hook"):
            setattr(made, name, _with_mode(getattr(made, name)))
        return made

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", save_on_cpu)
    whole = torch.autocast

    def autocast(kind: str, *args: Any, **kwargs: Any) -> Any:
        return whole("cpu" if kind == "cuda" else kind, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.nn.Module, "_apply", _tied(torch.nn.Module._apply))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # else Module.to swaps C++ tensors below ours
    try:
        with FakeCuda() as mode:
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
