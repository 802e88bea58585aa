"""From a reference to adapters: its frames encoded, the training, and the files that keep what was trained."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wan_mini.errors import UserError
from wan_mini.load import Wan
from wan_mini.lora import load_adapters, save_adapters
from wan_mini.peers.fit import Fit, FitConfig, loss_by_level, read_report
from wan_mini.peers.guidance import check_one_transformer
from wan_mini.peers.methods import METHODS, name_of, trains
from wan_mini.peers.plan import Clips, FrameSets, Plan
from wan_mini.pipeline import Journal, SamplingConfig, encode
from wan_mini.runs.cli import field_names, with_options
from wan_mini.runs.provenance import sha256_clip
from wan_mini.video import to_tensor

OF_SAMPLING = ("strengths", "adapter_strength", "difference")  # a method's options that do not shape what is trained


@dataclass(frozen=True)
class Loaded:
    """What a file of adapters holds."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]  # of the plan that they were trained by


@dataclass(frozen=True)
class Training:
    """How to train, beside the method's options."""

    seed: int
    recompute: str  # one of dit.RECOMPUTE
    described: Mapping[str, Any]  # what it depends on besides: a run that was stopped goes on where all of it is equal
    save: Path | None = None  # file for the adapters, beside which the state of a training waits
    journal: Journal | None = None  # of the run, beside which what was trained stays until the run ends

    @property
    def state(self) -> Path | None:
        """The file in the run's folder."""
        return None if self.journal is None else self.journal.beside(".fit")

    def path(self) -> Path | None:
        """Where the state of the training is."""
        if self.save is None or (self.state is not None and self.state.exists()):
            return self.state
        return self.save.with_name(self.save.name + ".state")


def training_options(config: FitConfig) -> dict[str, Any]:
    """The options that shape what is trained."""
    sampling = {*field_names(SamplingConfig()), *OF_SAMPLING}
    return {name: value for name, value in asdict(config).items() if name not in sampling}


def read_adapters(wan: Wan, config: FitConfig, path: Path | None) -> tuple[FitConfig, Loaded | None]:
    """The options with those that the file was trained with, and its contents; without a file or adapters, as they are.

    Raises UserError if it holds another method's adapters, or those of another model.
    """
    if path is None or not trains(config):
        return config, None
    tensors, settings = load_adapters(path, wan.hashes.values())
    name = name_of(config)
    if settings.get("method") != name:
        raise UserError(f"{path} holds adapters of {settings.get('method')}, got --method {name}: give the same")
    return with_options(config, settings["options"], str(path)), Loaded(tensors, settings["report"])


def encode_clips(
    wan: Wan,
    frames: np.ndarray,
    sets: FrameSets,
    device: torch.device,
    tile: int | None,
    journal: Journal | None = None,
) -> Clips:
    """Latents of every clip that the sets name, and of all frames as "whole"; equal clips are encoded once."""
    every: dict[str, Sequence[Sequence[int]]] = {"whole": [range(len(frames))], **sets}
    keys = {tuple(indices) for clips in every.values() for indices in clips}
    whole = tuple(range(len(frames)))
    encoded = {whole: encode(wan.vae, frames, tile=tile, journal=journal)}
    for key in tqdm(sorted(keys - {whole}, key=len, reverse=True), desc="encode", unit="clip"):
        video = to_tensor(frames[list(key)]).to(device)  # (T,H,W,3) -> (1,3,T,H,W)
        encoded[key] = wan.vae.encode(video, tile=tile)
    clips: Clips = {}
    for name, sequences in every.items():
        clips[name] = [encoded[tuple(indices)] for indices in sequences]
    return clips


def adapt(
    wan: Wan, clips: Clips, caption: Tensor, config: FitConfig, training: Training, loaded: Loaded | None = None
) -> tuple[list[nn.Module], dict[str, Any]]:
    """Train the method's parts, or take a file's -> those that act on the video to come, and what run.json keeps.

    caption (1,L,text_dim). Raises UserError, FloatingPointError.
    """
    if not trains(config):
        return [], {"gradients": 0}
    check_one_transformer(wan.dit)
    method = METHODS[name_of(config)]
    if loaded is None:
        saved = read_report(training.path())  # heads keep the labels that they had
        plan = method.plan(wan.dit, clips, caption, config, training.seed, saved)
        report = train(wan, plan, caption, config, training)
    else:
        plan = method.plan(wan.dit, clips, caption, config, training.seed, loaded.report)
        plan.parts.load_state_dict(loaded.tensors)
        report = {"gradients": 0}
    plan.prepare()
    parts = []
    for part, strength in zip(plan.parts.values(), plan.strengths, strict=True):
        part.set_strength(strength)  # type: ignore[operator]  # see Plan.parts
        if strength > 0:
            parts.append(part)
    return parts, {**plan.report, **report, "adapters_sha256": sha256_weights(plan.parts)}


def train(wan: Wan, plan: Plan, caption: Tensor, config: FitConfig, training: Training) -> dict[str, Any]:
    """Do the plan's stages, and write the file if there is one to write -> figures for run.json."""
    settings = {"method": name_of(config), "options": training_options(config), "seed": training.seed}
    settings |= training.described
    save, state = training.save, training.path()
    fit = Fit(plan.stages, seed=training.seed, state=state, settings=json.dumps(settings), report=plan.report)
    log = fit.run(wan.dit, caption, shift=config.fit_shift, recompute=training.recompute)
    if save is not None:
        save_adapters(save, plan.parts, {**settings, "report": plan.report}, wan.hashes.values())
    fit.finish(training.state)
    return {"gradients": len(log), "losses_by_level": loss_by_level(log), "losses": [[entry["loss"] for entry in log]]}


def describe_training(wan: Wan, frames: np.ndarray, ref_prompt: str) -> dict[str, Any]:
    """What a training depends on, beside options and seed."""
    base = sorted(wan.hashes.values())
    return {"ref_prompt": ref_prompt, "ref_sha256": sha256_clip(frames), "base": base, "dtype": str(wan.dtype)}


def sha256_weights(part: nn.Module) -> str:
    """SHA-256 of a module's tensors, in the order of their names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(part.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()
