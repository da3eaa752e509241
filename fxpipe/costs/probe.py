"""What one operator does, seen by running it once on fake tensors: flops, aliases, what autograd keeps.

No kernel runs and no memory is taken. Nothing here is a table of operators: flops come from the formulas of
``torch.utils.flop_counter``, saved tensors from autograd's own hooks, aliases from the storages that come out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fxpipe.ir.cost import Size


@dataclass(frozen=True)
class TensorMade:
    """One tensor that came out of an operator.

    ``alias`` is the position of the argument whose storage it shares, ``None`` where its storage is new and holds
    ``storage_bytes``. ``bytes`` counts its different elements.
    """

    alias: int | None
    bytes: Size
    storage_bytes: Size
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Probe:
    """What one call of an operator does. A position counts the tensors among its arguments, or among its outputs.

    ``read_bytes``: the different elements of each argument, an argument passed twice counted once (0 at its second
    place). ``mutated``: arguments written in place. ``saved_arguments`` and ``saved_outputs``: those whose storage
    autograd keeps for backward; ``saved_inside_bytes``: what it keeps of storages that appear nowhere else (dropout
    masks, mean and rstd). ``gradient_bytes``: each new gradient that backward writes; one that is passed on as it came
    is not written. ``backward_read_bytes``: the output's gradients and everything saved; 0 where backward writes
    nothing.
    """

    read_bytes: tuple[Size, ...]
    makes: tuple[TensorMade, ...]
    mutated: tuple[int, ...]
    flops: Size
    backward_flops: Size
    saved_arguments: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    saved_inside_bytes: Size
    gradient_bytes: tuple[Size, ...]
    backward_read_bytes: Size


class LeafCall:
    """A call whose tensors are leaves of their own, so that one operator can be run and differentiated alone.

    ``tensors`` are the tensors passed, in order; ``leaves`` those that autograd follows. Values are shared with the
    caller's tensors, except where the operator would write them: those are copies.
    """

    def __init__(
        self, target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], requires_grad: Sequence[bool]
    ) -> None:
        self.target = target
        self.tensors: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []
        self.mutated = mutated_arguments(target, args, kwargs)
        self._known: dict[int, torch.Tensor] = {}
        self._flags = iter(requires_grad)
        self.args, self.kwargs = pytree.tree_map_only(torch.Tensor, self._bind, (tuple(args), dict(kwargs)))

    def _bind(self, tensor: torch.Tensor) -> torch.Tensor:
        flag = next(self._flags)
        if id(tensor) not in self._known:
            leaf = tensor.detach()
            if flag:
                self.leaves.append(leaf.requires_grad_())
            self._known[id(tensor)] = leaf.clone() if len(self.tensors) in self.mutated else leaf
        self.tensors.append(self._known[id(tensor)])
        return self.tensors[-1]

    def run(self) -> Any:
        """The operator's result."""
        return self.target(*self.args, **self.kwargs)

    def gradients(self, outputs: Sequence[torch.Tensor], received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients of the leaves, given those of the outputs; none for an operator that has no derivative."""
        try:
            found = torch.autograd.grad(outputs, self.leaves, received, retain_graph=True, allow_unused=True)
        except (NotImplementedError, RuntimeError) as e:
            if isinstance(e, NotImplementedError) or "no autograd formula was registered" in str(e):
                return []
            raise
        return [g for g in found if g is not None]


def probe(
    target: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    requires_grad: Sequence[bool],
    mode: FakeTensorMode,
) -> Probe:
    """Runs ``target(*args, **kwargs)`` and its backward once on fakes, under the caller's grad mode.

    The tensors among the arguments are fake tensors of ``mode`` and are not changed; ``requires_grad`` has one flag for
    each. Raises whatever the operator raises.
    """
    with mode, _no_new_facts(mode):
        call = LeafCall(target, args, kwargs, requires_grad)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(_append_to(saved), _same), _flop_counter() as forward:
            made = tensors_of(call.run())
        outputs = [t for t in made if t.requires_grad]
        received = [torch.empty_like(t) for t in outputs]
        with _flop_counter() as backward:
            gradients = call.gradients(outputs, received) if outputs and call.leaves else []
        flops = size(forward.get_total_flops()), size(backward.get_total_flops())
        return _describe(call, made, saved, received=received, gradients=gradients, flops=flops)


def _describe(
    call: LeafCall,
    made: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    *,
    received: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    flops: tuple[Size, Size],
) -> Probe:
    arguments, own = _first_place(call.tensors), _first_place(made)
    kept = {_storage(t): t for t in saved}
    passed_on = {_storage(t) for t in received}
    written = {_storage(g): g for g in gradients if _storage(g) not in passed_on}
    seen: set[int] = set()
    return Probe(
        read_bytes=tuple(0 if _repeated(t, seen) else distinct_bytes(t) for t in call.tensors),
        makes=tuple(
            TensorMade(arguments.get(_storage(t)), distinct_bytes(t), storage_bytes(t), t.dtype, t.requires_grad)
            for t in made
        ),
        mutated=call.mutated,
        flops=flops[0],
        backward_flops=flops[1],
        saved_arguments=tuple(sorted(arguments[s] for s in kept if s in arguments)),
        saved_outputs=tuple(sorted(own[s] for s in kept if s in own and s not in arguments)),
        saved_inside_bytes=total(storage_bytes(t) for s, t in kept.items() if s not in arguments and s not in own),
        gradient_bytes=tuple(distinct_bytes(g) for g in written.values()),
        backward_read_bytes=total(map(distinct_bytes, [*received, *kept.values()])) if written else 0,
    )


def mutated_arguments(target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Positions, among the tensors of the arguments, of those that the operator's schema says it writes."""
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return ()
    flags: list[bool] = []
    named = {a.name: a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments}
    for written, value in [*zip(named.values(), args, strict=False), *((named[k], v) for k, v in kwargs.items())]:
        flags += [written] * len(tensors_of(value))
    return tuple(i for i, written in enumerate(flags) if written)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, in order; none for numbers and ``None``."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def size(number: int | torch.SymInt) -> Size:
    """A plain integer, or the sympy expression of a symbolic one."""
    if isinstance(number, int):
        return number
    expr = number.node.expr
    return int(expr) if expr.is_Integer else expr


def total(sizes: Iterable[Size]) -> Size:
    """The sum; 0 for none."""
    return sum(sizes, start=0)


def element_bytes(tensor: torch.Tensor) -> Size:
    """Bytes of all elements of a tensor, those of an expanded dimension repeated."""
    return size(tensor.numel()) * tensor.element_size()


def distinct_bytes(tensor: torch.Tensor) -> Size:
    """Bytes of the different elements of a tensor: an expanded dimension counts once."""
    count: Size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if not (isinstance(stride, int) and stride == 0):
            count = count * size(length)
    return count


def storage_bytes(tensor: torch.Tensor) -> Size:
    """Bytes of the whole storage that a tensor is a view of."""
    return size(tensor.untyped_storage().nbytes())


def _storage(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _first_place(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    return {_storage(t): i for i, t in reversed(list(enumerate(tensors)))}


def _repeated(tensor: torch.Tensor, seen: set[int]) -> bool:
    known = id(tensor) in seen
    seen.add(id(tensor))
    return known


def _append_to(saved: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    return pack


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _flop_counter() -> FlopCounterMode:
    """torch's counter, told that the CPU's fused attention is the attention that it has formulas for."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return sdpa_backward_flop_count(gradient, query, key, value)  # type: ignore[no-untyped-call]


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@contextmanager
def _no_new_facts(mode: FakeTensorMode) -> Iterator[None]:
    """Keeps the probing from telling the program's symbols anything: no guards, no symbols of its own."""
    if mode.shape_env is None:
        yield
        return
    with mode.shape_env.suppress_guards(), mode.shape_env.ignore_fresh_unbacked_symbols():
        yield
