"""DEMix layers: one feed-forward expert per domain, added and removed at will.

Shapes: T tokens, D model width, J domains.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moe_kernels.errors import MoeError, check_range
from moe_kernels.experts import ExpertList, SwigluFfn
from moe_kernels.layers.routed import RoutedLayer
from moe_kernels.routers import DomainRouter


class DemixLayer(RoutedLayer):
    """The expert of a token is the one of its domain (Gururangan et al. 2021, https://arxiv.org/abs/2108.05036).

    Experts without tokens get no gradient at all, so no optimizer moves them. At inference either name the domain in
    ``TokenInfo.domain_T``, or run the whole network once per domain and mix its outputs with `mix_domains`.

    Args:
        experts: One network per domain, each a map of ``(n, D)`` to ``(n, D)``.
        width: Model width D.
    """

    router: DomainRouter
    experts: ExpertList

    def __init__(self, experts: Sequence[nn.Module], *, width: int) -> None:
        super().__init__(DomainRouter(len(experts)), ExpertList(experts), width=width)

    @property
    def num_domains(self) -> int:
        """Number of domains."""
        return self.experts.num_experts

    def add_domain(self, like: int) -> int:
        """Add a domain whose expert starts as a copy of another one.

        Train it alone with `freeze_except` on the whole model, so that nothing of the old domains changes.

        Args:
            like: Domain to copy, best the one with the highest posterior on the new data.

        Returns:
            Id of the new domain.

        Raises:
            MoeError: If there is no domain ``like``.
        """
        self._check(like)
        expert = copy.deepcopy(self.experts.experts[like]).requires_grad_(True)
        for parameter in expert.parameters():
            parameter.grad = None
        self.experts.experts.append(expert)
        self.router.num_experts += 1
        return self.num_domains - 1

    def remove_domain(self, domain: int) -> None:
        """Remove a domain's expert for good. The ids of the domains after it go down by one.

        Args:
            domain: Domain to remove.

        Raises:
            MoeError: If there is no such domain or it is the last one.
        """
        self._check(domain)
        check_range("domains left", self.num_domains - 1, low=1, remedy="keep at least one domain")
        del self.experts.experts[domain]
        self.router.num_experts -= 1

    def _check(self, domain: int) -> None:
        check_range("domain", domain, low=0, high=self.num_domains - 1)


def freeze_except(model: nn.Module, domain: int) -> list[nn.Parameter]:
    """Freeze a model but for the experts of one domain in all its DEMix layers.

    Args:
        model: A model with `DemixLayer` modules.
        domain: The domain to train.

    Returns:
        The parameters left to train, for the optimizer.

    Raises:
        MoeError: If the model has no DEMix layer or one without this domain.
    """
    layers = [module for module in model.modules() if isinstance(module, DemixLayer)]
    if not layers:
        raise MoeError(
            "model", got=type(model).__name__, allowed="a model with DemixLayer", remedy="build it with demix"
        )
    for layer in layers:
        check_range("domain", domain, low=0, high=layer.num_domains - 1)
    model.requires_grad_(False)
    return [p for layer in layers for p in layer.experts.experts[domain].requires_grad_(True).parameters()]


def mix_domains(logp_JT: torch.Tensor, log_prior_J: torch.Tensor) -> torch.Tensor:
    """Log probability of each token under the domain posterior given all tokens before it.

    ``p(x_t) = sum_j p_j(x_t) p(j | x_<t)`` with ``p(j | x_<t)`` proportional to ``prior_j * prod_{s<t} p_j(x_s)``.

    Args:
        logp_JT: Log probability of each token of one sequence when every layer uses domain j's expert ``(J, T)``.
        log_prior_J: Log prior of the domains ``(J,)``; ``-inf`` removes one.

    Returns:
        Log probabilities ``(T,)``; token t depends on tokens up to t only.
    """
    before_JT = logp_JT.cumsum(1) - logp_JT
    log_weight_JT = torch.log_softmax(log_prior_J.unsqueeze(1) + before_JT, dim=0)
    return torch.logsumexp(log_weight_JT + logp_JT, dim=0)


@dataclass(frozen=True, kw_only=True)
class DemixConfig:
    """A DEMix layer of SwiGLU experts."""

    width: int
    """Model width D."""
    hidden_width: int
    """Feed-forward width F of each expert."""
    num_domains: int
    """Domains, one expert each."""

    def build(self) -> DemixLayer:
        """Build the layer.

        Returns:
            The layer, in training mode.
        """
        check_range("num_domains", self.num_domains, low=1)
        return DemixLayer([SwigluFfn(self.width, self.hidden_width) for _ in range(self.num_domains)], width=self.width)
