"""SIGReg: keeps embeddings near a standard normal distribution, against a collapse (LeJEPA, arXiv 2511.08544).

Dimension key:  V views, N images of the global batch, d embedding dim, S slices, T positive knots
"""

import torch
from torch import Tensor, nn


class SIGRegLoss(nn.Module):
    """Mean over random directions of the Epps-Pulley statistic, which compares a sample with N(0, 1).

    For the projections x_n of N embeddings on a unit vector, and their characteristic function:

        N * integral_{-limit}^{limit} |1/N sum_n exp(i t x_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

    by the trapezoidal rule with `n_knots` (an odd number). The integrand is even and 0 at t = 0: only the knots t > 0
    are computed, with twice their weight.
    """

    knots: Tensor
    target: Tensor
    weights: Tensor

    def __init__(self, n_slices: int = 1024, n_knots: int = 17, limit: float = 5.0) -> None:
        super().__init__()
        self.n_slices = n_slices
        knots = torch.linspace(-limit, limit, n_knots)[n_knots // 2 + 1 :]
        target = torch.exp(-knots.square() / 2)
        weights = 2 * target * (2 * limit / (n_knots - 1))
        weights[-1] /= 2
        # not in checkpoints: they follow from the settings
        self.register_buffer("knots", knots, persistent=False)  # [T]
        self.register_buffer("target", target, persistent=False)  # [T]: the characteristic function of N(0, 1)
        self.register_buffer("weights", weights, persistent=False)  # [T]

    def forward(self, embeddings: Tensor, seed: int) -> Tensor:
        """Average the statistic over slices and views.

        Args:
            embeddings: [V, N, d]; memory for several float32 [V, N, S, T] is needed.
            seed: of the slices; another one for each step.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            device, dim = embeddings.device, embeddings.shape[-1]
            generator = torch.Generator(device).manual_seed(seed)
            slices = torch.randn(dim, self.n_slices, generator=generator, device=device)
            slices /= slices.norm(dim=0)  # [d, S]
            phases = (embeddings.float() @ slices).unsqueeze(-1) * self.knots  # [V, N, S, T]
            real, imaginary = phases.cos().mean(dim=1), phases.sin().mean(dim=1)  # [V, S, T]
            distances = (real - self.target).square() + imaginary.square()
            return embeddings.shape[1] * (distances @ self.weights).mean()
