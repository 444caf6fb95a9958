"""What every launcher needs: dtypes, the largest rank, buffers, the launch itself; and launches that are kept.

A launch through `kernel[grid](...)` costs the host 20 to 55 µs: the launcher's rules, then Triton's binder, which looks
at every argument again. `planned` pays that once for each kind of call. The first call of a kind runs the function and
records what it allocates and launches; a later one allocates the same, puts its own tensors' addresses among the kept
arguments and calls the compiled kernels' C launcher, 1 µs each. A plan holds addresses of nothing and keeps no tensor.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


MAX_RANK = 512  # what the kernels are compiled and tested for


# Triton decides when it is imported: with TRITON_INTERPRET=1 its functions run as Python on CPU tensors.
INTERPRETED = not isinstance(tl.cdiv, JITFunction)


VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))  # Tritons whose C launcher's arguments we know


MAX_PLANS = 2048  # of one function: every number of tokens is a kind of its own. A plan is a few KB


# The numbers that torch's C++ gives dtypes, and the integers among the types of Triton's parameters.
SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
}
CONSTANT, TENSOR_MAP = -1, -2  # in place of a register
NO_SCRATCH = ((CONSTANT, 0), (CONSTANT, 0))  # the two last parameters of each kernel
INTEGERS = {f"{sign}{bits}" for sign in "iu" for bits in (1, 8, 16, 32, 64)}


class Variant(NamedTuple):
    """Calls of a planned function with the same arguments but for the tensors."""

    number: int
    pick_places: tuple[int, ...] | None
    pick: Callable | None  # the results among what `plan_run` returns, the tensors and None

    @classmethod
    def of(cls, places: tuple[int, ...] | None, single: bool) -> Variant:
        if places is None:
            return cls(next(_numbers), None, None)
        pick = itemgetter(*places) if single or len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))
        return cls(next(_numbers), places, pick)


_numbers = itertools.count()


def has_native() -> bool:
    return _native is not None


def new_number() -> int:
    """What nothing was kept under."""
    return next(_numbers)


def run_kept(number: int, tensors: tuple) -> list[Tensor] | None:
    """What `planned.keep_as` has kept; None or nothing where this kind of call has to go its own way."""
    if _native is None or _here.tape is not None or _is_watched():
        return None
    return _run_plan(number, tensors)


_native: Any = None  # torch.ops.fastlora, where it has csrc/plans.cpp's ops
_run_plan: Any = None  # its plan_run, past a Python function


def use_native(ops: Any) -> None:
    """Lets plans run in `ops.plan_run`, a C++ op; with None, in Python."""
    global _native, _run_plan
    if _native is ops:
        return
    forget_plans()
    _native = ops
    if ops is not None:
        _past_autograd()
        _run_plan = ops.plan_run.default._op
        for (_, stream), counters in _counters.items():
            ops.plan_counters.default(counters, stream)


@functools.cache
def _past_autograd() -> torch.library.Library:
    """Says that `plan_run` is no step of a graph: its callers are."""
    library = torch.library.Library("fastlora", "IMPL")
    library.impl("plan_run", torch.library.fallthrough_kernel, "Autograd")
    return library


class _Here(threading.local):
    tape: Tape | None = None  # what records this thread's calls


_here = _Here()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options): the one way in which launchers launch, so that it can be recorded."""
    compiled = kernel[grid](*args, **options)
    if (tape := _here.tape) is not None:
        tape.launches.append((kernel, compiled, (*grid, 1, 1)[:3], args, options))


def new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor on like's device: the one way in which a planned function allocates."""
    tensor = like.new_empty(shape, dtype=dtype)
    if (tape := _here.tape) is not None:
        tape.allocated.append(tensor)
    return tensor


def new_workspace(like: Tensor, size: int) -> Tensor | None:
    return new(like, size, dtype=torch.float32) if size else None


COUNTERS = 4096  # a kernel in parts has fewer blocks than the device has multiprocessors, twice that at most
_counters: dict[tuple[torch.device, int], Tensor] = {}


def parts(workspace: Tensor | None, count: int, size: int, blocks: int) -> tuple[Tensor | None, Tensor | None]:
    """(partials, counters) for `tiling.store_sum`: `count` fp32 partials of `size` elements; the result is `blocks`."""
    if count == 1:
        return None, None
    assert workspace is not None and workspace.numel() >= count * size, "parts need a workspace"
    assert blocks <= COUNTERS, blocks
    device, tape = workspace.device, getattr(_here, "tape", None)
    if tape is not None and tape.counters is not None:
        return workspace, tape.counters
    counters = counters_of(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if tape is not None:
        tape.counters = counters
    return workspace, counters


def counters_of(device: torch.device, stream: int) -> Tensor:
    """Zeros of int32 for the kernels of one stream, which run one after another and each leave zeros behind.

    While a CUDA graph is captured, zeros that the graph fills: two graphs may be replayed side by side.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    if (device, stream) not in _counters:
        counters = _counters[device, stream] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        if _native is not None:
            _native.plan_counters.default(counters, stream)
    return _counters[device, stream]


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever device its arguments are on."""
    index = tensor.get_device()
    return contextlib.nullcontext() if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


class planned:
    """Makes plans of the calls of `function`, one for each kind.

    The function allocates with `new`, launches, and does nothing else to tensors. Its arguments are tensors, None,
    sequences of these, and what can be hashed; it returns a tensor, or a tuple of Nones and of tensors that it
    allocated or was given. What it allocates and does not return becomes one buffer. It runs on its first tensor's
    device.

    A kind is all that Triton and the launchers' rules ask: the shape, dtype and strides of each tensor, its alignment
    to 16 bytes, which arguments are one tensor, all other arguments, the device, and how fp32 is multiplied, where the
    first tensor is fp32.

    Where csrc/ is compiled, the op `plan_run` runs the plans of a function whose first parameters are annotated as
    tensors, or whose first parameter is a tuple of them: `variants` numbers its other arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.plans: dict[tuple, Plan | None] = {}
        kinds = [str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()]
        self.leading = next((i for i, kind in enumerate(kinds) if not kind.startswith("Tensor")), len(kinds))
        self.variants: dict[tuple, Variant] = {}
        _planned.add(self)

    def __call__(self, *args: Any) -> Any:
        if self.variants:
            n = self.leading
            tensors, rest = (args[:n], args[n:]) if n else (args[0], args[1:])
            if tensors[0].dtype is torch.float32:
                rest = (*rest, configs.input_precision(torch.float32))
            if (variant := self.variants.get(rest)) is not None and _here.tape is None and not _is_watched():
                made = _run_plan(variant.number, tensors)
                if made:
                    return made if variant.pick is None else variant.pick([*made, *tensors, None])
        return self._in_python(*args)

    def _in_python(self, *args: Any) -> Any:
        kind, tensors, addresses = self._kind(args)
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._in_python(*args)
        if _here.tape is not None or _is_watched():
            return self.function(*args)  # part of another function's plan, or to be seen with Triton's metadata
        plan = self.plans.get(kind)
        if plan is not None:
            return plan(tensors, addresses)
        if kind in self.plans or 0 in addresses:  # tried in vain; or empty
            return self.function(*args)
        return self._first_call(kind, args, tensors)

    @staticmethod
    def _kind(args: tuple) -> tuple[tuple, list[Any], list[Any]]:
        """(the key of a plan, all tensors, their addresses)"""
        key: list[Any] = []
        tensors: list[Any] = []
        addresses: list[Any] = []
        unaligned = _describe(args, key, tensors, addresses)
        first = tensors[0]
        key.append(first.get_device())
        if first.dtype is torch.float32:
            key.append(configs.input_precision(torch.float32))
        if unaligned & 15:
            key.append(tuple([address & 15 for address in addresses]))
        if len(set(addresses)) < len(addresses):
            key.append(tuple(map(addresses.index, addresses)))
        return tuple(key), tensors, addresses

    def keep_as(self, number: int, tensors: tuple, args: tuple) -> bool:
        """Lets `run_kept(number, tensors)` run the plan of `self(*args)`, if there is one: `tensors` are that call's,
        in its order but of any shape, and others, which are only looked at."""
        plan = self.plans.get(self._kind(args)[0])
        if _native is None or plan is None or plan.program is None:
            return False
        results, flags, *rest = plan.program
        _native.plan_keep.default(number, tensors, [results, flags | 2, *rest])
        return True

    def _first_call(self, kind: tuple, args: tuple, tensors: list[Tensor]) -> Any:
        tape = _here.tape = Tape(tensors)
        try:
            result = self.function(*args)
        finally:
            _here.tape = None
        if len(self.plans) >= MAX_PLANS:
            self.plans.clear()
        try:
            plan = self.plans[kind] = tape.plan(result)
        except Unplannable:
            self.plans[kind] = None
        else:
            self._keep(plan, tape, args, result)
        return result

    def _keep(self, plan: Plan, tape: Tape, args: tuple, result: Any) -> None:
        """Hands a plan to `plan_run` too, where that can run it."""
        if _native is None or VERSION not in KNOWN or not isinstance(args[0], tuple if not self.leading else Tensor):
            return
        n = self.leading
        tensors: Any = args[:n] if n else args[0]
        rest = args[n:] if n else args[1:]
        if tensors[0].dtype is torch.float32:
            rest = (*rest, configs.input_precision(torch.float32))
        if sum(tensor is not None for tensor in tensors) != len(tape.inputs):  # others are further on, or in lists
            return
        try:
            pick, program = tape.program(tensors, result)
        except Unplannable:
            return
        if len(self.variants) >= MAX_PLANS:
            self.variants.clear()
        variant = self.variants.setdefault(rest, Variant.of(pick, not isinstance(result, tuple)))
        if variant.pick_places == pick:
            plan.program = program if pick is None else None
            _native.plan_keep.default(variant.number, tensors, program)


_planned: weakref.WeakSet[planned] = weakref.WeakSet()


def forget_plans() -> None:
    """Makes every call a first one again: for tests that put something in a launcher's place."""
    for function in _planned:
        function.plans.clear()
        function.variants.clear()


def _describe(args: Sequence[Any], key: list[Any], tensors: list[Any], addresses: list[Any]) -> int:
    """Appends what the arguments are to the key. Returns the low bits of all addresses."""
    bits = 0
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            bits |= address
            tensors.append(arg)
            addresses.append(address)
            key += (arg.shape, arg.dtype, arg.is_contiguous() or arg.stride())
        elif isinstance(arg, (list, tuple)):
            key.append(len(arg))
            bits |= _describe(arg, key, tensors, addresses)
        else:
            key.append(arg)
    return bits


_hooks: Any = knobs.runtime


def _is_watched() -> bool:
    """Whether hooks, a profiler's for example, want to see launches with their metadata."""
    try:
        return bool(_hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls)
    except AttributeError:  # none of Triton's chains of hooks
        return True


class Plan:
    """What a call allocates and launches, on a list of registers: the addresses of its tensors, of what it allocates,
    and what is derived from those. (In the interpreter, the tensors themselves.)"""

    def __init__(
        self,
        device: int,
        allocations: list,
        counts_on: torch.device | None,
        derived: list,
        launches: list,
        pick: Callable,
    ) -> None:
        self.device = max(0, device)
        self.counts_on = counts_on  # where its kernels need counters, if they do
        self.allocations = allocations  # (a tensor of its dtype or None, shape, dtype)
        self.derived = derived  # functions of the registers
        self.launches = launches  # (function of a stream, arguments, [(place to fill in, register)])
        self.on_stream: dict[int, list] = {}  # of each stream: the same, with functions of the arguments
        self.pick = pick  # the results among tensors, allocations and None
        self.program: list[int] | None = None  # the same for csrc/plans.cpp, where its results are all of the call's
        triton_driver: Any = driver  # `active` raises where there is no GPU
        self.current_stream = (lambda device: 0) if INTERPRETED else triton_driver.active.get_current_stream

    def __call__(self, tensors: list[Any], registers: list[Any]) -> Any:
        if INTERPRETED:
            registers = tensors.copy()
        for like, shape, dtype in self.allocations:
            tensor = tensors[0].new_empty(shape, dtype=dtype) if like is None else tensors[like].new_empty(shape)
            tensors.append(tensor)
            registers.append(tensor if INTERPRETED else tensor.data_ptr())
        stream = self.current_stream(self.device)
        counters = None
        if self.counts_on is not None:
            counters = counters_of(self.counts_on, stream)
            registers.append(counters if INTERPRETED else counters.data_ptr())
        for derive in self.derived:
            registers.append(derive(registers))
        launches = self.on_stream.get(stream)
        if launches is None:
            launches = self.on_stream[stream] = [(on(stream), *rest) for on, *rest in self.launches]
        for send, template, slots in launches:
            arguments = template.copy()  # not the template itself: another thread's call may be under way
            for place, register in slots:
                arguments[place] = registers[register]
            send(arguments)
        tensors.append(None)
        return self.pick(tensors)


class Unplannable(Exception):
    """A call that does what a plan cannot say."""


class Tape:
    """What a call of a planned function allocates and launches, while it is recorded."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)
        self.allocated: list[Tensor] = []
        self.launches: list[tuple] = []
        self.counters: Tensor | None = None
        self.derived: dict[Any, Callable] = {}

    def plan(self, result: Any) -> Plan:
        inputs, results = self.inputs, result if isinstance(result, tuple) else (result,)
        returned = {id(one) for one in results}
        # The interpreter's registers are tensors, so each temporary one stays a tensor of its own.
        kept = [tensor for tensor in self.allocated if INTERPRETED or id(tensor) in returned]
        kept.sort(key=lambda tensor: [*map(id, results), id(tensor)].index(id(tensor)))
        self.kept = kept
        allocations = [_allocation(inputs, tuple(tensor.shape), tensor.dtype) for tensor in kept]
        self.places = [(tensor, i, 0) for i, tensor in enumerate([*inputs, *kept])]
        size, buffer = 0, len(self.places)
        for tensor in self.allocated:
            if all(tensor is not one for one in kept):
                self.places.append((tensor, buffer, size))
                size += -(-tensor.nbytes // 256) * 256
        if size:
            allocations.append((None, (size,), torch.uint8))
        self.buffer = size
        self.base = len(inputs) + len(allocations)  # the first derived register
        counts_on = None
        if self.counters is not None:
            counts_on = self.counters.device
            self.places.append((self.counters, self.base, 0))
            self.base += 1
        launches = [self._launch(*launched) for launched in self.launches]
        order = {id(tensor): i for i, tensor in reversed([*enumerate([*inputs, *kept])])}
        if not all(one is None or id(one) in order for one in results):
            raise Unplannable("returns what it neither allocated nor was given")
        pick = itemgetter(*(-1 if one is None else order[id(one)] for one in results))
        if isinstance(result, tuple) and len(result) == 1:  # of one, itemgetter makes no tuple
            pick = itemgetter(slice(order[id(result[0])], order[id(result[0])] + 1))
        return Plan(inputs[0].get_device(), allocations, counts_on, list(self.derived.values()), launches, pick)

    def _launch(self, kernel: Any, compiled: Any, grid: tuple, args: tuple, options: dict) -> tuple:
        """(function of a stream, arguments, [(place, register) of those to fill in])"""
        if compiled is None and not INTERPRETED:
            raise Unplannable("nothing was compiled")
        values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
        registers = [(place, self._register(value)) for place, value in enumerate(values)]
        slots = [(place, register) for place, register in registers if register is not None]
        template = [None if register is not None else value for value, (_, register) in zip(values, registers)]
        return _sender(kernel, compiled, grid), template, slots

    def _register(self, value: Any) -> int | None:
        """Where an argument is found; None for a constant."""
        if isinstance(value, Tensor):
            return self._address(value)
        if isinstance(value, TensorDescriptor):
            register, rest = self._address(value.base), _without_base(value)
            return self._derive((register, id(value)), lambda registers: rest(registers[register]))
        if isinstance(value, tuple) and any(isinstance(one, Tensor) for one in value):
            members = tuple(self._register(one) for one in value)
            return self._derive(members, lambda registers: tuple([registers[member] for member in members]))
        return None

    def program(self, tensors: tuple, result: Any) -> tuple[tuple[int, ...] | None, list[int]]:
        """(where the results are among what is returned, the tensors and None; or None where they are what is
        returned), and the plan as csrc/plans.cpp reads it; after `plan`."""
        results, kept = result if isinstance(result, tuple) else (result,), self.kept
        order = {id(tensor): i for i, tensor in reversed([*enumerate([*kept, *tensors, None])])}
        pick = tuple(order[id(one)] for one in results)
        if INTERPRETED or not kept:
            raise Unplannable("returns nothing new")
        shapes = [(tensor.dtype, tensor.shape) for tensor in kept] + [(torch.uint8, (self.buffer,))] * bool(self.buffer)
        numbers = [len(kept), self.counters is not None, len(shapes)]
        for dtype, shape in shapes:
            numbers += [SCALAR_TYPES[dtype], len(shape), *shape]
        numbers.append(len(self.launches))
        for kernel, compiled, grid, args, options in self.launches:
            metadata, run = compiled.metadata, compiled.run
            others = (run.global_scratch_size, run.profile_scratch_size, run.launch_cooperative_grid, run.launch_pdl)
            if any(others) or metadata.num_ctas != 1 or getattr(run, "gsan_enabled", False):
                raise Unplannable("needs more than a plain launch")
            values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
            described = iter(getattr(metadata, "tensordesc_meta", None) or ())
            maps: list[list[int]] = []
            params = [*self._params(values, list(compiled.src.signature.values()), described, maps), *NO_SCRATCH]
            numbers += [compiled.function, *grid, 32 * metadata.num_warps, metadata.shared, len(params), len(maps)]
            numbers += [number for parts in (*params, *maps) for number in parts]
        return None if isinstance(result, tuple) and pick == tuple(range(len(kept))) else pick, numbers

    def _params(self, values: Sequence[Any], types: Sequence[Any], described: Iterator[Any], maps: list[list[int]]):
        """(register, offset), (CONSTANT, bits) or (TENSOR_MAP, which of `maps`) for each of a kernel's parameters."""
        for value, type_ in zip(values, types, strict=True):
            if isinstance(type_, (tuple, list)):
                yield from self._params(value, type_, described, maps)
            elif isinstance(value, Tensor):
                yield self._find(value)
            elif isinstance(value, TensorDescriptor):
                yield TENSOR_MAP, len(maps)
                maps.append(self._map(value, next(described, None)))
                yield from ((CONSTANT, number) for number in (*value.shape, *value.strides))
            elif type_ in ("fp32", "fp64"):
                bits = struct.pack("<f" if type_ == "fp32" else "<d", value)
                yield CONSTANT, int.from_bytes(bits, "little", signed=True)
            elif type_ in INTEGERS:
                yield CONSTANT, int(value)
            elif type_ != "constexpr":
                raise Unplannable(f"a parameter of type {type_}")

    def _map(self, value: TensorDescriptor, meta: Any) -> list[int]:
        from triton.backends.nvidia import driver as nvidia

        if meta is None or meta["fp4_padded"] or getattr(value, "round_f32_to_tf32", False):
            raise Unplannable("no plain tensor map")
        type_, size = nvidia.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["elem_size"]
        sizes = zip(value.shape, value.strides, meta["block_size"], strict=True)
        numbers = [number for n, stride, box in reversed([*sizes]) for number in (n, stride * size, box)]
        # The innermost stride is left out: the driver is given those of the outer dimensions first.
        numbers[1::3] = [*numbers[4::3], 0]
        return [*self._find(value.base), meta["swizzle"], type_, value.padding == "nan", len(value.shape), *numbers]

    def _address(self, tensor: Tensor) -> int:
        register, offset = self._find(tensor)
        if not offset:
            return register
        if INTERPRETED:
            start = offset // next(one.itemsize for one, at, _ in self.places if at == register)
            return self._derive((register, offset), lambda registers: registers[register].flatten()[start:])
        return self._derive((register, offset), lambda registers: registers[register] + offset)

    def _find(self, tensor: Tensor) -> tuple[int, int]:
        """(register, offset) of an address."""
        address = tensor.data_ptr()
        exact = [(one, register, place) for one, register, place in self.places if one.data_ptr() == address]
        around = [at for at in self.places if at[0].data_ptr() < address < at[0].data_ptr() + at[0].nbytes]
        if not exact and len(around) != 1:
            raise Unplannable("launches with what it neither allocated nor was given")
        one, register, place = (exact or around)[0]
        return register, place + address - one.data_ptr()

    def _derive(self, key: Any, function: Callable) -> int:
        self.derived.setdefault(key, function)
        return self.base + list(self.derived).index(key)


def _allocation(inputs: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
    """`new_empty` is faster without a dtype: 0.9 against 1.5 µs."""
    alike = [i for i, tensor in enumerate(inputs) if tensor.dtype == dtype]
    return (alike[0], shape, None) if alike else (None, shape, dtype)


class Described:
    """A tensor descriptor as Triton's launchers read it, without the checks and without a tensor."""

    __slots__ = ("address", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, address: int, like: TensorDescriptor) -> None:
        self.address = address
        self.shape, self.strides, self.padding = like.shape, like.strides, like.padding
        self.round_f32_to_tf32 = getattr(like, "round_f32_to_tf32", False)

    @property
    def base(self) -> Described:
        return self

    def data_ptr(self) -> int:
        return self.address


def _without_base(descriptor: TensorDescriptor) -> Callable[[Any], Any]:
    """A function that makes such a descriptor of an address (in the interpreter, of a tensor)."""
    if INTERPRETED:
        shape, strides, block = descriptor.shape, descriptor.strides, descriptor.block_shape
        return lambda tensor: TensorDescriptor(tensor, shape, strides, block)
    like = Described(0, descriptor)
    return lambda address: Described(address, like)  # type: ignore[arg-type]


def _sender(kernel: Any, compiled: Any, grid: tuple[int, int, int]) -> Callable[[int], Callable[[list[Any]], Any]]:
    """Of a stream, what launches there with all of the kernel's parameters: the C launcher in the Tritons that we know,
    called as `CompiledKernel.run` would; else Triton's public runner, which takes 3 µs more."""
    if INTERPRETED:
        return lambda stream: lambda arguments: kernel[grid](*arguments)
    run = compiled.run
    scratch = run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False)
    if scratch or VERSION not in KNOWN:
        runner = compiled[grid]
        return lambda stream: lambda arguments: runner(*arguments, stream=stream)
    head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    metadata = compiled.packed_metadata
    if VERSION == (3, 6):
        rest = (*head, None, None, metadata, None, None, None)
        return lambda stream: lambda arguments: run.launch(*grid, stream, *rest, *arguments)
    rest = (*head, metadata, *[None] * 5, run.arg_annotations, run.kernel_signature)
    return lambda stream: functools.partial(run.launch, *grid, stream, *rest)
