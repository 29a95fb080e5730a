"""What a forward pass does with weights and norms, seen where PyTorch's functions take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from inq_lightning.closed_form.composite import COMPOSITES
from inq_lightning.closed_form.norms import NORMS, Norm
from inq_lightning.closed_form.products import PRODUCTS, Layout, Linear, Product
from inq_lightning.core.layer import plain_name


class Watch(TorchFunctionMode):
    """Tells of each product by a weight of a model and of each of its norms, while it is the context.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = [*model.named_parameters(), *model.named_buffers()]
        self.names = {id(tensor): plain_name(name) for name, tensor in named}

    def name(self, tensor: object) -> str | None:
        """What the model calls a tensor, None where it is none of its own."""
        return self.names.get(id(tensor))

    def on_product(self, name: str, product: Product, output: Tensor) -> None:
        """A weight was multiplied with."""

    def on_norm(self, name: str, norm: Norm, output: Tensor) -> None:
        """Something was normalized; ``name`` is that of the first of the norm's tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            return COMPOSITES[func](self._linear, func, *args, **kwargs)
        output = func(*args, **kwargs)
        if func in PRODUCTS:
            product = PRODUCTS[func](*args, **kwargs)
            if product is not None and (name := self.name(product.weight)):
                self.on_product(name, product, output)
        elif func in NORMS:
            norm = NORMS[func](*args, **kwargs)
            names = [self.name(tensor) for tensor in norm.tensors] if norm else []
            if norm is not None and names and all(names):
                self.on_norm(str(names[0]), norm, output)
        return output

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, group: int | None = None) -> Tensor:
        if group is None:
            output, layout = functional.linear(x, weight, bias), Linear()
        else:
            part, constant = weight.chunk(3)[group], None if bias is None else bias.chunk(3)[group]
            output, layout = functional.linear(x, part, constant), Linear(stacked=3)
        if name := self.name(weight):
            self.on_product(name, Product(weight, bias, x, layout, group), output)
        return output


@dataclass
class Use:
    """What passes through a model do with one weight, or one norm.

    Attributes:
        calls: How often each pass, by its number, multiplies by it or normalizes.
        layouts: The different ways in which it is multiplied with; none for a norm.
        biases: Names of what is added to its products; None stands for nothing, and for what is no parameter.
        taken: How often its products are used.
        normed: How often of these by a batch norm with running statistics.
        norms: Names of these batch norms.
        norm: Of a norm, what it is, without its input.
    """

    calls: Counter[int] = field(default_factory=Counter)
    layouts: list[Layout] = field(default_factory=list)
    biases: set[str | None] = field(default_factory=set)
    taken: int = 0
    normed: int = 0
    norms: set[str] = field(default_factory=set)
    norm: Norm | None = None

    @property
    def only_normed(self) -> bool:
        """Whether a batch norm, and nothing else, takes each of its products."""
        return self.calls.total() == self.normed == self.taken


class Trace(Watch):
    """What is done with some weights, and with the norms, in the order in which they first come.

    Args:
        model: The model.
        weights: Names of the weights. One that is in use, but in no product of a known kind, has no calls.

    Attributes:
        uses: By name.
    """

    def __init__(self, model: nn.Module, weights: Collection[str]) -> None:
        super().__init__(model)
        self.uses: dict[str, Use] = {}
        self.passes = 0
        self._weights = weights
        self._made = WeakIdKeyDictionary()  # products' outputs

    def end_pass(self, output: Any) -> None:
        """A pass has ended and returned this."""
        self.passes += 1
        for tensor in _tensors(output):
            self._taken(tensor)

    def on_product(self, name: str, product: Product, output: Tensor) -> None:
        """Note it."""
        if name not in self._weights:
            return
        use = self._use(name)
        use.calls[self.passes] += 1
        use.biases.add(self.name(product.bias))
        if product.layout not in use.layouts:
            use.layouts.append(product.layout)
        self._made[output] = use

    def on_norm(self, name: str, norm: Norm, output: Tensor) -> None:
        """Note it."""
        use = self._use(name)
        use.calls[self.passes] += 1
        use.norm = replace(norm, input=norm.input.new_empty(0))
        if norm.mean is not None and norm.input in self._made:
            product = self._made[norm.input]
            product.normed += 1
            product.norms.add(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = list(_tensors((args, kwargs)))
        for tensor in given:
            if (name := self.name(tensor)) in self._weights:
                self._use(str(name))
        output = super().__torch_function__(func, types, args, kwargs)
        if any(True for _ in _tensors(output)):  # not size(), dim() and the like
            for tensor in given:
                self._taken(tensor)
        return output

    def _use(self, name: str) -> Use:
        return self.uses.setdefault(name, Use())

    def _taken(self, tensor: Tensor) -> None:
        if tensor in self._made:
            self._made[tensor].taken += 1


class Enough(BaseException):  # so that no model's `except Exception` takes it for its own
    """Ends a pass: what it was for has been seen."""


class Capture(Watch):
    """Keeps the calls of one weight or norm in a pass, and ends the pass after the last of them with :class:`Enough`.

    Args:
        model: The model.
        name: The weight or norm.
        calls: How many to wait for.

    Attributes:
        found: The calls and their outputs.
    """

    def __init__(self, model: nn.Module, name: str, calls: int) -> None:
        super().__init__(model)
        self.found: list[tuple[Any, Tensor]] = []
        self._wanted = name
        self._calls = calls

    def on_product(self, name: str, product: Product, output: Tensor) -> None:
        """Keep it."""
        self._keep(name, product, output)

    def on_norm(self, name: str, norm: Norm, output: Tensor) -> None:
        """Keep it."""
        self._keep(name, norm, output)

    def _keep(self, name: str, call: Product | Norm, output: Tensor) -> None:
        if name != self._wanted:
            return
        if len(self.found) + 1 == self._calls:
            self.found.append((call, output))
            raise Enough
        # What comes until the last call may write into both.
        self.found.append((replace(call, input=call.input.clone()), output.clone()))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value and in the lists, tuples and mappings in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
