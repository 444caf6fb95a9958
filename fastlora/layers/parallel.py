"""Tensor parallelism of a patched layer, fastlora's own or PEFT's: its parameters are DTensors, and its calls run on
their local shards, by the same ops and kernels as in one process.

    column-wise   W0 (N/t, K), B (N/t, r), A whole    y's columns; dX and dA are sums over the processes
    row-wise      W0 (N, K/t), A (r, K/t), B whole    y = Σ xᵢ Wᵢᵀ + s·(xᵢ Aᵢᵀ) Bᵀ + b, and dB, are sums

y and dX are summed in the frozen layer too, and the low-rank terms ride in those all-reduces. What an adapter adds is
the gradient of its whole factor, r·K or N·r numbers a backward pass, fewer than S or dS (M·r) in any batch with more
tokens than the layer has features. Nothing is gathered.

Source: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, for the two ways to cut a layer.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from .fused import FusedLayer


class LoraParallel(ParallelStyle):
    """`ColwiseParallel` or `RowwiseParallel` (with its layouts) of a layer with adapters; None: every process has the
    layer whole. `fastlora.parallel_plan` makes them."""

    def __init__(self, style: ColwiseParallel | RowwiseParallel | None) -> None:
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        tables: list[tuple[dict[str, Any], str]] = []
        for path, owner in module.named_modules():
            for table in cast(Any, (owner._parameters, owner._buffers)):
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    part = f"{path}.{key}".lstrip(".").partition(".")[0]
                    base = part in ("weight", "bias", "base_layer")
                    if base and self.style is None:
                        continue
                    dim = self._cut(part, base, tensor.dim())
                    placement = Replicate() if dim is None else Shard(dim)
                    whole = distribute_tensor(tensor, device_mesh, [placement], src_data_rank=self.src_data_rank)
                    is_parameter = table is owner._parameters
                    table[key] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole
                    tables.append((table, key))
        calls = _Calls(self.style, device_mesh, tables, cast(Any, module).out_features)
        module.register_forward_pre_hook(calls.before)
        module.register_forward_hook(calls.after, always_call=True)
        cast(Any, module).tensor_parallel = calls
        return module

    def _cut(self, part: str, base: bool, dims: int) -> int | None:
        """Along which dimension a layer's tensor is cut, by the name of its part, fastlora's or PEFT's."""
        if isinstance(self.style, ColwiseParallel):
            return 0 if base or part in ("lora_B", "lora_B0", "lora_magnitude_vector") else None
        rowwise = isinstance(self.style, RowwiseParallel) and dims == 2
        return 1 if rowwise and (base or part in ("lora_A", "lora_A0")) else None


class _Calls:
    """A layer's calls: local tensors in the parameters' places while its forward runs."""

    def __init__(self, style: Any, mesh: DeviceMesh, tables: Sequence[tuple[dict, str]], out_features: int) -> None:
        self.style, self.mesh, self.tables, self.out_features = style, mesh, tables, out_features
        self.rowwise = isinstance(style, RowwiseParallel)
        self.open = contextlib.ExitStack()
        self.seeds_compared = False

    def before(self, layer: Any, args: tuple) -> tuple:
        self.open.close()  # where Ctrl-C ended a call, `after` was not run
        x = self._input(args[0])
        self.open.enter_context(self.local())
        own: Any = layer  # an `nn.Linear` again after `unpatch`
        if isinstance(layer, FusedLayer) and self.style is not None:
            if self.rowwise and len(own.lora_magnitude_vector):
                self.open.enter_context(self._norms_over_processes(layer))
            if own.training and any(map(_drops, own.lora_dropout.values())):
                self.open.enter_context(self._masks(x.device))
        return (x, *args[1:])

    def after(self, layer: Any, args: tuple, y: Any) -> Any:
        """Also after a forward that raised, where y is None."""
        self.open.close()
        return None if y is None else self._output(y)

    @contextlib.contextmanager
    def local(self) -> Iterator[None]:
        """Within it the layer's parameters are this process's shards."""
        wholes = [(table, key, table[key]) for table, key in self.tables if isinstance(table.get(key), DTensor)]
        try:
            for table, key, whole in wholes:
                table[key] = self._local(key, whole)
            yield
        finally:
            for table, key, whole in wholes:
                table[key] = whole

    @contextlib.contextmanager
    def part_of(self, x: Tensor) -> Iterator[Tensor]:
        """`local`, with what this process's shards see of an input that is whole."""
        with self.local():
            yield x.chunk(self.mesh.size(), -1)[self.mesh.get_local_rank()] if self.rowwise else x

    def _local(self, key: str, whole: DTensor) -> Tensor | None:
        later = self.rowwise and key == "bias" and self.mesh.get_local_rank() > 0  # the first process adds it
        if not (whole.requires_grad and torch.is_grad_enabled()):
            with torch.no_grad():
                return None if later else whole.to_local()
        if self.style is None or not whole.placements[0].is_replicate():
            return whole.to_local()
        # Of what every process has whole, each has made a part of the gradient: their sum is taken in the first of
        # these two functions' backward pass.
        local = whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return local * 0 if later else local

    def _input(self, x: Tensor) -> Tensor:
        if self.style is None:
            if isinstance(x, DTensor):
                raise ValueError(
                    f"parallel_plan: the input of a layer that the plan does not name is a DTensor ({x.placements}), "
                    "want the layer in the plan, or a plain tensor that every process has whole"
                )
            return x
        wanted = Shard(x.dim() - 1) if self.rowwise else Replicate()
        if not isinstance(x, DTensor):
            if self.rowwise and self.style.input_layouts[0] in (Shard(-1), wanted):
                return x
            x = DTensor.from_local(x, self.mesh, self.style.input_layouts, run_check=False)
        x = x.redistribute(placements=[wanted]) if x.placements != (wanted,) else x
        return x.to_local(grad_placements=[wanted if self.rowwise else Partial()])

    def _output(self, y: Tensor) -> Tensor:
        if self.style is None:
            return y
        layouts, last = self.style.output_layouts, Shard(y.dim() - 1)
        if not self.rowwise and self.style.use_local_output and layouts[0] in (Shard(-1), last):
            return y
        shape = torch.Size((*y.shape[:-1], self.out_features))  # DTensor would take shards of one size
        stride = torch.empty(shape, device="meta").stride()
        made = [Partial() if self.rowwise else last]
        whole = DTensor.from_local(y, self.mesh, made, run_check=False, shape=shape, stride=stride)
        whole = whole.redistribute(placements=layouts)
        return whole.to_local() if self.style.use_local_output else whole

    @contextlib.contextmanager
    def _norms_over_processes(self, layer: Any) -> Iterator[None]:
        """DoRA's rows are cut: their norms are taken over all processes, N numbers."""
        kept, fell_back = layer.kept_norms, sum(layer.calls.fallback.values())
        layer.kept_norms = _Norms(kept, self.mesh)
        try:
            yield
        finally:
            layer.kept_norms = kept
            if sum(layer.calls.fallback.values()) > fell_back:
                raise ValueError(
                    f"{type(layer).__name__}.forward: DoRA with row-wise shards was left to PEFT "
                    f"({layer.calls.last_reason}), whose norms are those of one shard; docs/details/peft.md explains it"
                )

    @contextlib.contextmanager
    def _masks(self, device: torch.device) -> Iterator[None]:
        """Column-wise, every process draws the one mask of x from its own generator, which are in the same state.
        Row-wise, each draws the mask of its own columns from a stream of its own."""
        generators = [torch.default_generator]
        if device.type != "cpu":
            generators.append(torch.get_device_module(device).default_generators[device.index])
        if not self.seeds_compared:
            states: list[Any] = [None] * self.mesh.size()
            own = [zlib.crc32(bytes(generator.get_state().tolist())) for generator in generators]
            dist.all_gather_object(states, own, group=self.mesh.get_group())
            if any(state != own for state in states):
                raise ValueError(
                    "parallel_plan: dropout: the random generators of the processes that share a layer are in "
                    "different states, so that their masks would differ; want torch.manual_seed with one seed in all"
                )
            self.seeds_compared = True
        if not self.rowwise:
            yield
            return
        seed = int(torch.randint(2**62, ())) + self.mesh.get_local_rank()
        before = [(generator, generator.get_state()) for generator in generators]
        for generator, _ in before:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in before:
                generator.set_state(state)


class _Norms:
    """In the place of a layer's `KeptNorms`: ‖W0 + s·B A‖ of rows whose columns are on several processes."""

    def __init__(self, kept: Any, mesh: DeviceMesh) -> None:
        self.kept, self.mesh = kept, mesh

    def of(self, name: str, sources: Sequence[Tensor], scaling: float, make: Callable[[], Tensor]) -> Tensor:
        def whole() -> Tensor:
            squares = make().square()
            dist.all_reduce(squares, group=self.mesh.get_group())
            return squares.sqrt()

        kept = None if self.kept is None else self.kept.of(name, sources, scaling, whole)
        return whole() if kept is None else kept


def _drops(dropout: Any) -> bool:
    """Of fastlora's probabilities and PEFT's modules."""
    p = getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout
    return p > 0.0
