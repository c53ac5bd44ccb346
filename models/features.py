"""The pooled features of a network, taken as its predictions are made."""

import torch
from torch import Tensor, nn

from cluster.errors import ModelError


class Features:
    """What enters the last linear layer of a network, kept by a hook as a batch passes ("pool5" of a ResNet).

    Args:
        uri: of the model, for messages.
        model: whose `forward` is called between calls of `take`.

    Attributes:
        width: features of an image.

    Raises:
        ModelError: the network has no linear layer.
    """

    def __init__(self, uri: str, model: nn.Module) -> None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ModelError("model", uri, "has no linear layer, before which features are taken", "use another model")
        self._uri = uri
        self._seen: Tensor | None = None
        self.width = linear[-1].in_features
        linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0].detach()

    def take(self) -> Tensor:
        """Those of the last batch: float16 [N, width], on the device; beyond what float16 holds, its largest number.

        Raises:
            ModelError: the last linear layer did not see one vector for each image.
        """
        seen, self._seen = self._seen, None
        if seen is None or seen.ndim != 2:
            rule = "has a last linear layer that does not see one vector of features for each image"
            raise ModelError("model", self._uri, rule, "use another model, or no embedding")
        limit = torch.finfo(torch.float16).max
        return seen.float().clamp(-limit, limit).half()
