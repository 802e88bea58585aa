"""Samplers of the rectified flow x_sigma = (1 - sigma) clean + sigma noise, whose velocity is noise - clean.

Both are indexed by step number, never by a rounded timestep.
Source of the flow: rectified flow (arXiv 2209.03003); of the shift: Stable Diffusion 3 (arXiv 2403.03206), section 5.3.
"""

import math

import torch
from torch import Tensor

from wan_mini.errors import UserError

MAX_STEPS = 10_000


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Bend noise levels u, of any shape and in [0,1], towards 1: shift u / (1 + (shift - 1) u).

    Large clips need more of their steps at high noise (shift > 1); shift 1 changes nothing.
    """
    return shift * u / (1 + (shift - 1) * u)


class FlowEuler:
    """Euler steps on shifted uniform noise levels: u_i = strength (1 - i / steps), and 0 at the end.

    sigmas (steps + 1,) float32 in [0,1]; timesteps (steps,) float32 = 1000 sigma, not rounded.
    strength < 1 starts from a clip noised to sigmas[0] instead of from pure noise.
    Raises UserError unless steps >= 1, shift > 0 and strength is in (0, 1].
    """

    def __init__(self, steps: int, shift: float, strength: float = 1.0):
        if steps < 1 or shift <= 0 or not 0 < strength <= 1:
            raise UserError(f"need steps >= 1, shift > 0 and strength in (0, 1], got {steps}, {shift} and {strength}")
        u = strength * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
        self.sigmas = shift_sigma(u, shift).float()
        self.timesteps = 1000 * self.sigmas[:-1]

    def start_latents(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Latents at sigmas[0] of a clean clip and noise, (B,16,F,h,w) each; with strength 1 the noise itself."""
        sigma = self.sigmas[0]
        return (1 - sigma) * clean + sigma * noise

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents (B,16,F,h,w) at sigmas[index] and their velocity -> latents at sigmas[index + 1], float32."""
        difference = float(self.sigmas[index + 1] - self.sigmas[index])  # below 0
        return latents.float() + difference * velocity.float()


class FlowUniPC:
    """The official sampler: UniPC of order 2, B(h) = e^h - 1 ("bh2"), on the clean-latent prediction.

    A predictor step like Euler's in log-SNR time, bent by the previous prediction, and before the next one a corrector
    that repeats the step with the prediction it led to. Source: UniPC (arXiv 2302.04867), algorithms 1 and 2; noise
    levels and int64 timesteps as in Wan 2.1's fm_solvers_unipc.py. Steps must be taken in order; step 0 forgets the
    last run. Raises UserError unless steps >= 1 and shift > 0.
    """

    def __init__(self, steps: int, shift: float):
        if steps < 1 or shift <= 0:
            raise UserError(f"need steps >= 1 and shift > 0, got {steps} and {shift}")
        u = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)  # 0.999: the training grid's noisiest level
        sigmas = shift_sigma(u, shift)
        self.sigmas = sigmas.float()
        self.timesteps = (1000 * sigmas[:-1]).long()  # truncated, as the official sampler does
        self._sigma: list[float] = sigmas.tolist()
        self._log_snr = [_log_snr(sigma) for sigma in self._sigma]
        self._clean: list[Tensor] = []  # clean predictions of the last two steps, newest last
        self._start = torch.empty(0)  # (corrected) latents from which the last predictor step went

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents (B,16,F,h,w) at sigmas[index] and their velocity -> latents at sigmas[index + 1], float32."""
        clean = latents.float() - self._sigma[index] * velocity.float()
        if index == 0:
            self._clean = []
        else:
            correction = self._correction(index - 1, self._clean, clean)
            latents = self._advance(index - 1, self._start, self._clean[-1], correction)
        self._clean = [*self._clean[-1:], clean]
        self._start = latents.float()
        last = index == len(self.timesteps) - 1
        if last or len(self._clean) == 1:  # in first order; at sigma 0, where the last step ends, log-SNR is infinite
            return self._advance(index, self._start, clean, 0.0)
        return self._advance(index, self._start, clean, 0.5 * self._slope(index, self._clean))

    def memory(self) -> dict[str, Tensor]:
        """What a step needs of those before it, float32, to go on in another process."""
        named = {f"clean{age}": clean for age, clean in enumerate(reversed(self._clean))}
        return {"start": self._start, **named}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Go on with what `memory` has given."""
        self._start = memory["start"]
        self._clean = [memory[f"clean{age}"] for age in (1, 0) if f"clean{age}" in memory]

    def _advance(self, index: int, start: Tensor, clean: Tensor, drift: Tensor | float) -> Tensor:
        """One step from sigmas[index], whose clean prediction is `clean`.

        In log-SNR time, where the step is h long, the flow is  x' = (sigma' / sigma) x + (1 - sigma') (1 - e^-h) m  for
        a constant clean prediction m. `drift` is added to m: it stands for a prediction that changes during the step.
        """
        sigma = self._sigma[index]
        next_sigma = self._sigma[index + 1]
        decay = math.expm1(-self._length(index))  # e^-h - 1
        return next_sigma / sigma * start - (1 - next_sigma) * decay * (clean + drift)

    def _length(self, index: int) -> float:
        """The paper's h: how far log-SNR moves in a step."""
        return self._log_snr[index + 1] - self._log_snr[index]

    def _ratio(self, index: int) -> float:
        """The paper's r: where the prediction of the step before lies, in lengths of this step; below 0."""
        return (self._log_snr[index - 1] - self._log_snr[index]) / self._length(index)

    def _slope(self, index: int, clean: list[Tensor]) -> Tensor:
        """The paper's D_1 / r: how the last two predictions change, for one length of this step."""
        older, newer = clean
        return (older - newer) / self._ratio(index)

    def _correction(self, index: int, clean: list[Tensor], end: Tensor) -> Tensor:
        """Drift of a step whose prediction at its end is known too: exact along a line or a parabola."""
        change = end - clean[-1]
        if len(clean) == 1:
            return 0.5 * change
        # Weights that integrate the parabola through the three predictions exactly. With the paper's phi-functions and
        # z = -h, phi2 is z phi_2(z) and phi3 is z phi_3(z).
        h = self._length(index)
        decay = math.expm1(-h)
        phi2 = decay / -h - 1
        phi3 = phi2 / -h - 0.5
        older = (phi2 - 2 * phi3) / decay / (1 - self._ratio(index))
        return older * self._slope(index, clean) + (phi2 / decay - older) * change


def _log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma), infinite at sigma 0."""
    if sigma == 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma)
