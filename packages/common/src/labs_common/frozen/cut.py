"""Cuts a network in two: the front that does not train, and the back from the first trained module to the output."""

import inspect
import math
from collections.abc import Sequence

import torch
from torch import fx

from labs_common.errors import LabError, reason_of


class Cut:
    """A network as back(front(images)); both parts share the network's modules.

    Everything that does not depend on a trained module belongs to the front. Whatever crosses the boundary (one
    tensor for most networks) becomes one flat row per picture.

    Attributes:
        front: pictures (batch, 3, height, width) to rows (batch, width).
        back: rows (batch, width) to the network's output.
        shapes: of the tensors that cross, without the batch.
        width: values in a row.
    """

    def __init__(self, model: torch.nn.Module, trained: Sequence[str], example: torch.Tensor) -> None:
        """Cuts `model`, in evaluation mode, before the modules named in `trained`.

        `example` is a batch of pictures of the size that the network will see.

        Raises:
            LabError: the network's forward cannot be traced, or what crosses is no tensor with a row per picture.
        """
        graph = _traced(model, trained)
        behind = _behind(model, graph, trained)
        crossing = [
            node for node in graph.nodes
            if node not in behind and any(user in behind for user in node.users)
        ]  # fmt: skip
        plain_front = _module(model, _front_graph(graph, behind, crossing))
        with torch.no_grad():
            values = plain_front(example)
        for node, value in zip(crossing, values, strict=True):
            if not isinstance(value, torch.Tensor) or value.shape[:1] != example.shape[:1]:
                raise LabError(f"the network cannot be cut before {', '.join(trained)} ({node.name} is not a tensor "
                               "with a row per picture); let a larger part of it train, or add --no-cache")  # fmt: skip
        self.shapes = [tuple(value.shape[1:]) for value in values]
        self.widths = [math.prod(shape) for shape in self.shapes]
        self.width = sum(self.widths)
        self.front = _Front(plain_front)
        self.back = _Back(_module(model, _back_graph(graph, behind, crossing)), self.shapes, self.widths)

    def calls(self, name: str) -> bool:
        """Says whether the back calls the network's module `name`."""
        return any(node.op == "call_module" and node.target == name for node in self.back.graph_module.graph.nodes)

    def replace(self, name: str, module: torch.nn.Module) -> None:
        """Lets the back call `module` where the network has its module `name`."""
        self.back.graph_module.set_submodule(name, module)


class _Front(torch.nn.Module):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([value.flatten(1) for value in self.graph_module(images)], 1)


class _Back(torch.nn.Module):
    def __init__(self, graph_module: fx.GraphModule, shapes: Sequence[tuple[int, ...]], widths: list[int]) -> None:
        super().__init__()
        self.graph_module, self.shapes, self.widths = graph_module, shapes, widths

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        parts = rows.split(self.widths, 1)
        return self.graph_module(*(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)))


class _Tracer(fx.Tracer):
    """Goes into the modules that contain a trained one; all others stay one call each."""

    def __init__(self, trained: Sequence[str]) -> None:
        super().__init__()
        self.trained = trained

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return not any(prefix.startswith(f"{module_qualified_name}.") for prefix in self.trained)


def _traced(model: torch.nn.Module, trained: Sequence[str]) -> fx.Graph:
    # Only the pictures vary; what else a forward takes (an attention mask) keeps its default.
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    try:
        graph = _Tracer(trained).trace(model, {other.name: other.default for other in others})
    except Exception as error:  # tracing runs the network's own code, which may fail in any way
        raise LabError(f"--model: this network cannot be cut ({reason_of(error)}); add --no-cache") from error
    _, *others_given = (node for node in graph.nodes if node.op == "placeholder")
    fixed = set(others_given)
    for node in graph.nodes:  # the tracer's checks that these were not varied
        if any(before in fixed for before in node.all_input_nodes):
            fixed.add(node)
    for node in reversed(list(graph.nodes)):
        if node in fixed:
            graph.erase_node(node)
    return _module(model, graph).graph


def _module(model: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Makes the graph a module, without unused nodes."""
    module = fx.GraphModule(model, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _behind(model: torch.nn.Module, graph: fx.Graph, trained: Sequence[str]) -> set[fx.Node]:
    """Finds the nodes that call a trained module, or one that shares a parameter with it, or come after such a node."""
    found: set[fx.Node] = set()
    moving = {id(own) for prefix in trained for own in model.get_submodule(prefix).parameters()}
    for node in graph.nodes:
        own = node.op in ("call_module", "get_attr") and any(
            node.target == prefix or str(node.target).startswith(f"{prefix}.") for prefix in trained
        )
        if node.op == "call_module":
            own = own or any(id(one) in moving for one in model.get_submodule(str(node.target)).parameters())
        if own or node.op == "output" or any(before in found for before in node.all_input_nodes):
            found.add(node)
    return found


def _front_graph(graph: fx.Graph, behind: set[fx.Node], crossing: Sequence[fx.Node]) -> fx.Graph:
    front = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in behind:
            copies[node] = front.node_copy(node, lambda before: copies[before])
    front.output(tuple(copies[node] for node in crossing))
    return front


def _back_graph(graph: fx.Graph, behind: set[fx.Node], crossing: Sequence[fx.Node]) -> fx.Graph:
    back = fx.Graph()
    copies = {node: back.placeholder(f"crossing_{place}") for place, node in enumerate(crossing)}
    for node in graph.nodes:
        if node in behind:
            copies[node] = back.node_copy(node, lambda before: copies[before])
    return back
