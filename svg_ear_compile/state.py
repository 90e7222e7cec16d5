"""Which model and which layer is this, and what did its clusters look like last time?

A layer is known by the Parameter of its query projection: the object, weakly held. Its data_ptr changes under
offload, and an id may come back with another object. A graph of a single block is shared by all layers, and
by the layers of other models; the Parameter that a call brings along tells them apart.

What clustering carries on (centroids of k-means, orders of splits) and what controls the density (control.py)
are kept per layer and branch. They
go away with the model, with torch._dynamo.reset(), with a new generation, and when shape or device change.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .control import Control

MAX_BRANCHES = 8
"""Of so many branches something is kept per layer, the oldest goes first: guidance needs 2 or 4."""

Carried = tuple[Tensor, Tensor]
"""Of queries and of keys."""


@dataclass(eq=False)
class Model:
    """A model, as far as its calls show it: the number of layers seen. Layers know it; it holds no tensor."""

    number: int
    layers: int = 0


@dataclass(eq=False)
class Layer:
    """One attention layer. number: in the order of first appearance in a call of its model."""

    model: Model
    number: int
    carried: OrderedDict[int, tuple[Hashable, Carried]] = field(default_factory=OrderedDict)
    controls: OrderedDict[tuple[int, Hashable], Control] = field(default_factory=OrderedDict)


class Layers:
    """All layers that are alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._numbers = itertools.count()

    def model_of(self, parameter: Tensor) -> Model:
        """The model that has this layer; a new one for a layer never seen."""
        with self._lock:
            layer: Layer | None = self._layers.get(parameter)
            return Model(next(self._numbers)) if layer is None else layer.model

    def new_model(self) -> Model:
        return Model(next(self._numbers))

    def layer(self, parameter: Tensor, model: Model) -> Layer:
        """The layer of this parameter; one never seen is the next of `model`, the model now running."""
        with self._lock:
            layer: Layer | None = self._layers.get(parameter)
            if layer is None:
                layer = self._layers[parameter] = Layer(model, model.layers)
                model.layers += 1
            return layer

    def carried(self, layer: Layer, branch: int, stamp: Hashable) -> Carried | None:
        """What `keep` was given for this layer and branch, if it was under the same stamp."""
        with self._lock:
            kept = layer.carried.get(branch)
            if kept is not None and kept[0] != stamp:
                layer.carried.clear()
                return None
            return None if kept is None else kept[1]

    def keep(self, layer: Layer, branch: int, stamp: Hashable, carried: Carried) -> None:
        """Keeps it. stamp: the generation, the shape and the device that they belong to."""
        with self._lock:
            layer.carried[branch] = (stamp, carried)
            layer.carried.move_to_end(branch)
            while len(layer.carried) > MAX_BRANCHES:
                layer.carried.popitem(last=False)

    def control(self, layer: Layer, branch: int, stamp: Hashable, make: Callable[[], Control]) -> Control:
        """What controls this layer in this branch under this stamp, made where it is new."""
        with self._lock:
            key = (branch, stamp)
            if key not in layer.controls:
                layer.controls[key] = make()
                while len(layer.controls) > MAX_BRANCHES:
                    layer.controls.popitem(last=False)
            layer.controls.move_to_end(key)
            return layer.controls[key]

    def clear(self) -> None:
        with self._lock:
            self._layers.clear()

    def __len__(self) -> int:
        return len(self._layers)


layers = Layers()
