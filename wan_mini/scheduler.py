"""Samplers of the rectified flow x_sigma = (1 - sigma) clean + sigma noise, whose velocity is noise - clean.

Both are indexed by step number, never by a rounded timestep.
"""

import math

import torch
from torch import Tensor


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Bend noise levels in [0,1] towards 1: large clips need more of their steps at high noise (shift > 1)."""
    return shift * u / (1 + (shift - 1) * u)


class FlowEuler:
    """Euler steps on shifted uniform levels: u_i = strength (1 - i / steps), and 0 at the end.

    sigmas (steps + 1,) float32 in [0,1]; timesteps (steps,) float32 = 1000 sigma, not rounded.
    strength < 1 starts from a clip noised to sigmas[0] instead of from pure noise.
    Raises ValueError on numbers out of range.
    """

    def __init__(self, steps: int, shift: float, strength: float = 1.0):
        if steps < 1 or shift <= 0 or not 0 < strength <= 1:
            raise ValueError(f"need steps >= 1, shift > 0 and strength in (0, 1], got {steps}, {shift} and {strength}")
        u = strength * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
        self.sigmas = shift_sigma(u, shift).float()
        self.timesteps = 1000 * self.sigmas[:-1]

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents at sigmas[index] -> latents at sigmas[index + 1], float32."""
        return latents.float() + float(self.sigmas[index + 1] - self.sigmas[index]) * velocity.float()


class FlowUniPC:
    """The official sampler: UniPC of order 2, B(h) = e^h - 1 ("bh2"), on the clean-latent prediction.

    A predictor step like Euler's in log-SNR time, bent by the previous prediction, and before the next one a corrector
    that repeats the step with the prediction it led to. Source: UniPC (arXiv 2302.04867); levels and int64 timesteps as
    in Wan 2.1's fm_solvers_unipc.py. Steps must be taken in order; step 0 forgets the last run.
    Raises ValueError on numbers out of range.
    """

    def __init__(self, steps: int, shift: float):
        if steps < 1 or shift <= 0:
            raise ValueError(f"need steps >= 1 and shift > 0, got {steps} and {shift}")
        u = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)  # 0.999: the training grid's noisiest level
        sigmas = shift_sigma(u, shift)
        self.sigmas = sigmas.float()
        self.timesteps = (1000 * sigmas[:-1]).long()  # truncated, as the official sampler does
        self._log_snr = [math.log1p(-s) - math.log(s) if s else math.inf for s in sigmas.tolist()]
        self._sigma = sigmas.tolist()
        self._clean: list[Tensor] = []  # clean predictions of the last two steps, newest last
        self._start: Tensor | None = None  # (corrected) latents from which the last predictor step went

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents at sigmas[index] -> latents at sigmas[index + 1], float32."""
        clean = latents.float() - self._sigma[index] * velocity.float()
        if index == 0:
            self._clean = []
        else:
            latents = self._advance(index - 1, self._start, self._clean, end=clean)
        self._clean = [*self._clean[-1:], clean]
        self._start = latents.float()
        last = index == len(self.timesteps) - 1  # to sigma 0 in first order: log-SNR is infinite there
        return self._advance(index, self._start, self._clean[-1:] if last else self._clean)

    def _advance(self, index: int, start: Tensor, clean: list[Tensor], end: Tensor | None = None) -> Tensor:
        """One step from sigmas[index], of order len(clean); `end` is the prediction at its end, if known.

        In log-SNR time, where the step is h long, the flow is  x' = (sigma' / sigma) x + (1 - sigma') (1 - e^-h) m  for
        a constant clean prediction m; `drift` corrects m for one that runs along a line or a parabola.
        """
        sigma, next_sigma = self._sigma[index], self._sigma[index + 1]
        h = self._log_snr[index + 1] - self._log_snr[index]
        b = math.expm1(-h)
        if len(clean) == 1:
            drift = 0.0 if end is None else 0.5 * (end - clean[-1])
        else:
            ratio = (self._log_snr[index - 1] - self._log_snr[index]) / h  # where the older prediction lies, < 0
            slope = (clean[0] - clean[1]) / ratio
            if end is None:
                drift = 0.5 * slope
            else:  # weights that integrate the parabola through the three predictions exactly
                phi2 = b / -h - 1
                phi3 = phi2 / -h - 0.5
                older = (phi2 - 2 * phi3) / b / (1 - ratio)
                drift = older * slope + (phi2 / b - older) * (end - clean[-1])
        return next_sigma / sigma * start - (1 - next_sigma) * b * (clean[-1] + drift)
