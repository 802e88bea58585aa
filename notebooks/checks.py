"""The functions that students write: each is compared with the right answer, and typical wrong ones are named."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F

rng = torch.Generator().manual_seed(0)


class WrongAnswer(AssertionError):
    """A function was written, and gives something else than it should."""


class Check:
    """Call it with a function. It returns the function if that is right, and the course's version if it is unwritten.

    A function is unwritten if it raises NotImplementedError. Raises WrongAnswer, which names the mistake where it can.
    """

    def __init__(self, answer: Callable, cases: Sequence[tuple], mistakes: dict[str, Callable]):
        """mistakes: what to say of an answer, and a function that gives this answer."""
        self.answer = answer
        self.cases = cases
        self.mistakes = mistakes

    def __call__(self, fn: Callable) -> Callable:
        try:
            results = [called(fn, case) for case in self.cases]
        except NotImplementedError:
            print(f"{fn.__name__} is still to be written. The notebook goes on with the course's version.")
            return self.answer
        if self.same(results, self.answer):
            print(f"{fn.__name__} is right.")
            return fn
        for diagnosis, mistake in self.mistakes.items():
            if self.same(results, mistake):
                raise WrongAnswer(f"not yet: {diagnosis}")
        for case, result in zip(self.cases, results):
            target = called(self.answer, case)
            if not equal(result, target):
                inputs = ", ".join(described(value) for value in case)
                raise WrongAnswer(f"not yet: for {inputs}, {difference(result, target)}")
        raise WrongAnswer("not yet: the result is another one each time")

    def same(self, results: Sequence[Any], function: Callable) -> bool:
        """Whether a function gives these results for the cases."""
        return all(equal(result, called(function, case)) for result, case in zip(results, self.cases))


def called(function: Callable, case: tuple) -> Any:
    """What a function gives for a case. It may change what it gets, and draws the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(*deepcopy(case))


def equal(result: Any, target: Any) -> bool:
    """Whether two numbers, tensors or linear layers have one shape and equal values, to 1e-5; None equals nothing."""
    if result is None:  # the function has no return
        return False
    first = numbers(result)
    second = numbers(target)
    return first.shape == second.shape and torch.allclose(first, second, atol=1e-5)


def difference(result: Any, target: Any) -> str:
    """How a result differs from what it should be: in kind, in shape, or at its first wrong entry."""
    if result is None:
        return "the result is None: return what was computed"
    first = numbers(result)
    second = numbers(target)
    if first.shape != second.shape:
        return f"the result has the shape {tuple(first.shape)}, it should be {tuple(second.shape)}"
    wrong = ~torch.isclose(first, second, atol=1e-5)
    index = tuple(wrong.nonzero()[0].tolist())  # of a scalar: ()
    place = f"entry {list(index)} of the result" if index else "the result"
    return f"{place} is {first[index]:.4g}, it should be {second[index]:.4g}"


def described(value: Any) -> str:
    """An input of a function in few words."""
    if isinstance(value, torch.nn.Linear):
        return f"a layer from {value.in_features} to {value.out_features}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "a function" if callable(value) else str(value)


def numbers(result: Any) -> torch.Tensor:
    """A number, a tensor, or a linear layer (its weight, and its bias as one more column) in float64."""
    if isinstance(result, torch.nn.Linear):
        bias = torch.zeros(result.out_features) if result.bias is None else result.bias
        return torch.cat([result.weight, bias[:, None]], dim=1).detach().double()
    return torch.as_tensor(result).double()


def normal(*shape: int) -> torch.Tensor:
    """Random numbers, the same in every session."""
    return torch.randn(shape, generator=rng)


check_00 = Check(
    lambda clean, noise, sigma: (1 - sigma) * clean + sigma * noise,
    [(normal(2, 3), normal(2, 3), sigma) for sigma in (0.0, 0.3, 1.0)],
    {
        "clean and noise have changed places. At sigma = 1 the result must be the noise": (
            lambda clean, noise, sigma: sigma * clean + (1 - sigma) * noise
        ),
        "these are DDPM's weights, whose squares add up to 1. Here the weights themselves add up to 1": (
            lambda clean, noise, sigma: (1 - sigma**2) ** 0.5 * clean + sigma * noise
        ),
        "the clean clip must fade as the noise grows": lambda clean, noise, sigma: clean + sigma * noise,
    },
)

check_01 = Check(
    lambda x, velocity, sigma, next_sigma: x + (next_sigma - sigma) * velocity,
    [(normal(4, 2), normal(4, 2), 0.9, 0.7), (normal(3), normal(3), 0.2, 0.0)],
    {
        "the sign. The noise level falls, so the difference of the levels is negative": (
            lambda x, velocity, sigma, next_sigma: x + (sigma - next_sigma) * velocity
        ),
        "this goes all the way to sigma = 0. It is the clean prediction, not one step": (
            lambda x, velocity, sigma, next_sigma: x - sigma * velocity
        ),
        "the step is the difference of the two levels, not the new level": (
            lambda x, velocity, sigma, next_sigma: x - next_sigma * velocity
        ),
    },
)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighboring channels, x (..., D), by angle (..., D/2)."""
    first = x[..., 0::2]
    second = x[..., 1::2]
    turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)  # (..., D/2, 2) -> (..., D)


def rotate_apart(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Neighbors turned, and then all first channels before all second ones."""
    turned = rotate(x, angle)
    return torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)


def rotate_halves(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Llama's convention: channel i with channel i + D/2."""
    first, second = x.chunk(2, dim=-1)
    turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
    return torch.cat(turned, dim=-1)


check_02 = Check(
    rotate,
    [(normal(5, 8), normal(5, 4)), (normal(2), normal(1))],
    {
        "the pairs. Wan turns neighbors (0 and 1, 2 and 3, ...), not the two halves of the vector": rotate_halves,
        "the turned channels must go back to their places, even and odd. Here all even ones come first": rotate_apart,
        "the direction. A positive angle turns the first channel towards the second": (
            lambda x, angle: rotate(x, -angle)
        ),
        "sine and cosine have changed places. At angle 0 nothing may change": (
            lambda x, angle: rotate(x, torch.pi / 2 - angle)
        ),
    },
)


def filtered(x: torch.Tensor, kernel: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Kernel (3,) over x (T,), with zeros before and after."""
    return F.conv1d(F.pad(x, (before, after))[None, None], kernel[None, None])[0, 0]


check_03 = Check(
    lambda x, kernel: filtered(x, kernel, 2, 0),
    [(normal(6), normal(3)), (normal(1), normal(3))],
    {
        "this looks one frame into the future. All zeros belong before the first frame": (
            lambda x, kernel: filtered(x, kernel, 1, 1)
        ),
        "this looks two frames into the future. The zeros are at the wrong end": (
            lambda x, kernel: filtered(x, kernel, 0, 2)
        ),
        "the kernel is reversed. Its last entry belongs to the present frame": (
            lambda x, kernel: filtered(x, kernel.flip(0), 2, 0)
        ),
    },
)

MASK = torch.tensor([True, True, True, False, False])
check_04 = Check(
    lambda logits, mask: logits.masked_fill(~mask, float("-inf")).softmax(-1),
    [(normal(4, 5), MASK), (normal(5), MASK.flip(0))],
    {
        "a logit of 0 is not no weight, since exp(0) = 1. Set the logits of padding to minus infinity": (
            lambda logits, mask: (logits * mask).softmax(-1)
        ),
        "the weights no longer add up to 1. Mask before the softmax": lambda logits, mask: logits.softmax(-1) * mask,
        "the mask is the wrong way round. True marks a real token": (
            lambda logits, mask: logits.masked_fill(mask, float("-inf")).softmax(-1)
        ),
    },
)

check_05 = Check(
    lambda length, begin, end: (8 + length + begin, 8 + length + end),
    [(100, 0, 16), (40, 8, 20)],
    {
        "the offsets count from the end of the header, not from the start of the file": (
            lambda length, begin, end: (begin, end)
        ),
        "the 8 bytes that hold the header's length come first": lambda length, begin, end: (
            length + begin,
            length + end,
        ),
        "the second offset is an end, not a length": (
            lambda length, begin, end: (8 + length + begin, 8 + length + begin + end)
        ),
    },
)

POSITIONS = torch.tensor([[row, column] for row in range(3) for column in range(4)], dtype=torch.float32)
check_06 = Check(
    lambda weights, positions: weights @ positions - positions,
    [(normal(12, 12).softmax(-1), POSITIONS), ((9 * normal(12, 12)).softmax(-1), POSITIONS)],
    {
        "this is where a token is found. Its displacement is that minus its own position": (
            lambda weights, positions: weights @ positions
        ),
        "the sign. The displacement leads from the token's own position to the matched one": (
            lambda weights, positions: positions - weights @ positions
        ),
        "this uses the columns of the weights. A token's own weights are its row": (
            lambda weights, positions: weights.T @ positions - positions
        ),
        "this is the best match, which has no gradient. Take the mean position, weighted by attention": (
            lambda weights, positions: positions[weights.argmax(-1)] - positions
        ),
    },
)


def window_start(center: int, window: int, size: int) -> int:
    """First row of a window around a center, shifted to lie inside a frame of `size` rows."""
    window = min(window, size)
    return min(max(center - window // 2, 0), size - window)


check_07 = Check(
    window_start,
    [(4, 3, 8), (0, 5, 8), (7, 5, 8), (4, 4, 8), (7, 4, 8), (2, 9, 8)],
    {
        "near the border this window hangs out of the frame. Shift it inside": (
            lambda center, window, size: center - min(window, size) // 2
        ),
        "the window is shifted at the first border only. The last row must be inside, too": (
            lambda center, window, size: max(center - min(window, size) // 2, 0)
        ),
        "a window that is larger than the frame must be cut to its size first": (
            lambda center, window, size: min(max(center - window // 2, 0), size - window)
        ),
        "with an even side the window reaches one row further up than down": (
            lambda center, window, size: min(max(center - (min(window, size) - 1) // 2, 0), size - min(window, size))
        ),
        "the window begins at the center. It should lie around it": (
            lambda center, window, size: min(max(center, 0), size - min(window, size))
        ),
    },
)

check_08 = Check(
    lambda reference, generated, weight: (weight * (reference - generated).square().sum((1, 2))).mean(),
    [(normal(3, 5, 2), normal(3, 5, 2), torch.tensor([1.0, 0.9, 0.8]))],
    {
        "Eq. 5 adds up over tokens and coordinates. The mean is over pairs only": (
            lambda reference, generated, weight: (weight * (reference - generated).square().mean((1, 2))).mean()
        ),
        "Eq. 5 is a mean over pairs, not a sum": (
            lambda reference, generated, weight: (weight * (reference - generated).square().sum((1, 2))).sum()
        ),
        "Eq. 5 divides by the number of pairs, not by the sum of their weights": (
            lambda reference, generated, weight: (
                (weight * (reference - generated).square().sum((1, 2))).sum() / weight.sum()
            )
        ),
        "the norm in Eq. 5 is squared": (
            lambda reference, generated, weight: (weight * (reference - generated).flatten(1).norm(dim=1)).mean()
        ),
        "the pairs are weighted by their distance (Eq. 6)": (
            lambda reference, generated, weight: (reference - generated).square().sum((1, 2)).mean()
        ),
    },
)


def reuse(x: torch.Tensor, gradient: Callable, steps: int, interval: int, rate: float) -> torch.Tensor:
    """Plain gradient steps with a new gradient at steps 0, interval, 2 interval, ..."""
    for j in range(steps):
        if j % interval == 0:
            g = gradient(x)
        x = x - rate * g
    return x


def only_fresh(x: torch.Tensor, gradient: Callable, steps: int, interval: int, rate: float) -> torch.Tensor:
    """Steps only where the gradient is new."""
    for _ in range(0, steps, interval):
        x = x - rate * gradient(x)
    return x


def accumulated(x: torch.Tensor, gradient: Callable, steps: int, interval: int, rate: float) -> torch.Tensor:
    """Gradients added up, as by backward() without zero_grad()."""
    g = torch.zeros_like(x)
    for j in range(steps):
        if j % interval == 0:
            g = g + gradient(x)
        x = x - rate * g
    return x


check_09 = Check(
    reuse,
    [(normal(4), lambda x: x**3, 10, 3, 0.05), (normal(4), lambda x: 2 * x, 7, 2, 0.1)],
    {
        "this asks for a gradient at every step, so nothing is saved": (
            lambda x, gradient, steps, interval, rate: reuse(x, gradient, steps, 1, rate)
        ),
        "a step without a new gradient is still a step. It uses the old one": only_fresh,
        "the gradients add up. A new one replaces the old one": accumulated,
    },
)


def denoise(x: torch.Tensor, sigmas: Sequence[float], guided: int, guide: Callable, velocity: Callable) -> torch.Tensor:
    """Euler steps, the first of them guided."""
    for n, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        if n < guided:
            x = guide(x, sigma)
        x = x + (next_sigma - sigma) * velocity(x, sigma)
    return x


def guided_late(x: torch.Tensor, sigmas: Sequence[float], guided: int, guide: Callable, velocity: Callable):
    """The guidance after the Euler step."""
    for n, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        x = x + (next_sigma - sigma) * velocity(x, sigma)
        if n < guided:
            x = guide(x, sigma)
    return x


def stale(x: torch.Tensor, sigmas: Sequence[float], guided: int, guide: Callable, velocity: Callable) -> torch.Tensor:
    """The velocity of the latents as they were before the guidance."""
    for n, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        direction = velocity(x, sigma)
        if n < guided:
            x = guide(x, sigma)
        x = x + (next_sigma - sigma) * direction
    return x


check_10 = Check(
    denoise,
    [(normal(4), [1.0, 0.7, 0.4, 0.0], 2, lambda x, sigma: x - 0.3 * sigma * x**2, lambda x, sigma: torch.sin(3 * x))],
    {
        "the guidance comes before the model's step, so that the model answers it": guided_late,
        "the model must look at the optimized latents. This velocity is that of the latents before": stale,
        "only the first steps are guided": (
            lambda x, sigmas, guided, guide, velocity: denoise(x, sigmas, len(sigmas), guide, velocity)
        ),
        "the sign of Euler's step. The noise level falls": (
            lambda x, sigmas, guided, guide, velocity: denoise(x, sigmas, guided, guide, lambda x, s: -velocity(x, s))
        ),
    },
)

check_11 = Check(
    lambda share, factor: 1 / ((1 - share) + share / factor),
    [(0.5, 2.0), (0.58, 2.5), (0.9, 10.0)],
    {
        "this is the time that is left. The whole becomes faster by its reciprocal": (
            lambda share, factor: (1 - share) + share / factor
        ),
        "the rest of the run, 1 - share, keeps its time": lambda share, factor: factor / share,
        "this is the limit, if the part took no time at all": lambda share, factor: 1 / (1 - share),
    },
)

check_12 = Check(
    lambda one, two: (one - two).std() / len(one) ** 0.5,
    [(normal(9), normal(9)), (normal(5), normal(5))],
    {
        "this treats the two as different clips. Subtract clip by clip first": (
            lambda one, two: ((one.var() + two.var()) / len(one)) ** 0.5
        ),
        "this is how far one clip lies from the mean. The mean itself is surer by the root of n": (
            lambda one, two: (one - two).std()
        ),
        "this spread divides by n. Of a sample it divides by n - 1": (
            lambda one, two: (one - two).std(correction=0) / len(one) ** 0.5
        ),
        "divide by the root of n, not by n": lambda one, two: (one - two).std() / len(one),
        "this is the variance of the mean. The standard error is its root": (
            lambda one, two: (one - two).var() / len(one)
        ),
    },
)

check_13 = Check(
    lambda x, heads: x.unflatten(2, (heads, -1)).mean(2),
    [(normal(1, 12, 12), 3), (normal(1, 8, 8), 4)],
    {
        "this is the published mistake. It averages neighboring tokens, head by head": (
            lambda x, heads: x.reshape(1, x.shape[1] // heads, heads, -1).mean(2).reshape(1, x.shape[1], -1)
        ),
        "a row holds head after head, so it splits into (heads, width), not (width, heads)": (
            lambda x, heads: x.unflatten(2, (-1, heads)).mean(3)
        ),
        "this is the mean within each head. Average over the heads": (
            lambda x, heads: x.unflatten(2, (heads, -1)).mean(3)
        ),
        "this is the sum of the heads, not their mean": lambda x, heads: x.unflatten(2, (heads, -1)).sum(2),
    },
)


def change_distance(means: torch.Tensor, reference: torch.Tensor, anchors: torch.Tensor | None = None) -> torch.Tensor:
    """1 minus the mean cosine of the changes from frame to frame, self pairs left out; anchors: None for `means`."""
    frames = len(means)
    change = means - (means if anchors is None else anchors)[:, None]  # (F,C), (F,1,C) -> (F,F,C)
    target = reference - reference[:, None]
    cosines = F.cosine_similarity(change, target, dim=-1)  # -> (F,F)
    return 1 - cosines[~torch.eye(frames, dtype=torch.bool)].mean()


def over_time(means: torch.Tensor, reference: torch.Tensor, anchors: torch.Tensor | None = None) -> torch.Tensor:
    """The same with cosines over time, channel by channel."""
    change = means - (means if anchors is None else anchors)[:, None]
    target = reference - reference[:, None]
    return 1 - F.cosine_similarity(change, target, dim=1).mean()  # (F,F,C) -> (F,C)


def with_self_pairs(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The same with the pairs of a frame with itself, whose cosine counts 0."""
    change = means - means[:, None]
    target = reference - reference[:, None]
    return 1 - F.cosine_similarity(change, target, dim=-1).mean()


check_14 = Check(
    change_distance,
    [(normal(4, 6), normal(4, 6)), (normal(3, 5), normal(3, 5))],
    {
        "both mistakes of the port at once: another video's anchor, and cosines over time": (
            lambda means, reference: over_time(means, reference, reference)
        ),
        "the generated video's changes start at the reference's frame i. Each video has anchors of its own": (
            lambda means, reference: change_distance(means, reference, reference)
        ),
        "this cosine runs over time, channel by channel. A direction is one of all channels together": over_time,
        "a frame's change to itself is zero and has no direction. Leave these pairs out": with_self_pairs,
        "this is the mean cosine. It is largest for equal motion, so the distance is 1 minus it": (
            lambda means, reference: 1 - change_distance(means, reference)
        ),
    },
)


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """A linear layer with this weight; bias None: the random one of a new layer."""
    with torch.random.fork_rng(devices=[]):  # an import draws no random numbers
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


check_14b = Check(
    lambda layer, rows: layer_of(layer.weight[rows], layer.bias[rows]),
    [
        (layer_of(normal(4, 6), normal(4)), torch.tensor([True, False, True, True])),
        (layer_of(normal(4, 4), normal(4)), POSITIONS[:4, 1] > 1),
    ],
    {
        "the published mistake: a new layer has a random bias. Copy the bias as well as the weight": (
            lambda layer, rows: layer_of(layer.weight[rows], None)
        ),
        "the bias is left out, or zero. It belongs to the output": (
            lambda layer, rows: layer_of(layer.weight[rows], torch.zeros(int(rows.sum())))
        ),
        "these are the first biases, not those of the chosen outputs": (
            lambda layer, rows: layer_of(layer.weight[rows], layer.bias[: int(rows.sum())])
        ),
    },
)

check_14c = Check(
    lambda labels, order: labels.flatten()[order].view_as(labels),
    [(torch.rand(3, 4, generator=rng) < 0.4, torch.randperm(12, generator=rng)) for _ in range(2)],
    {
        "this turns every label over. A control must have as many temporal heads as before": lambda labels, order: (
            ~labels
        ),
        "whole blocks have changed their order. Shuffle all heads of all blocks together": (
            lambda labels, order: labels[order[order < len(labels)]]
        ),
        "give the labels the shape (blocks, heads) again": lambda labels, order: labels.flatten()[order],
    },
)

check_a6 = Check(
    lambda estimate, noise: (estimate * noise).sum() / estimate.norm(),
    [(3 * normal(4, 5), normal(4, 5)), (0.2 * normal(7), normal(7))],
    {
        "this is the cosine. Divide by the estimate's length only, or the noise is no longer standard normal": (
            lambda estimate, noise: (estimate * noise).sum() / (estimate.norm() * noise.norm())
        ),
        "this divides by the noise's length. The estimate is the one whose size means nothing": (
            lambda estimate, noise: (estimate * noise).sum() / noise.norm()
        ),
        "this is right only if the estimate's values have variance 1. Divide by its own length": (
            lambda estimate, noise: (estimate * noise).sum() / estimate.numel() ** 0.5
        ),
        "the sum is still to be divided by the estimate's length": lambda estimate, noise: (estimate * noise).sum(),
    },
)
