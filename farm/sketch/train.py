"""Train the transformer and the text encoder of `sketch` on latents of drawn scenes, and export the whole model.

    python -m farm.sketch.train_vae --work build/sketch --minutes 25
    python -m farm.sketch.train --work build/sketch --minutes 75 --export build/sketch/weights

Latents are made once and cached in the work folder; captions are worded anew each time. On a GPU the same script needs
minutes. A stopped training continues with `--resume`.
"""

import argparse
import copy
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from farm.sketch.architecture import LONGEST_PROMPT, build_text_encoder, build_transformer, export, token_ids
from farm.sketch.batched import CAPTION_MULTIPLE, BatchedModel, pad_ids, patchify
from farm.sketch.drawing import Scene, sample
from farm.sketch.language import caption
from farm.sketch.muon import Muon
from farm.sketch.train_vae import LATENT_CHANNELS, to_tensor
from farm.sketch.training import Average, Budget, hold_then_cosine, save_checkpoint

log = logging.getLogger(__name__)

_EMPTY_SHARE = 0.1
_OMIT_SHARE = 0.06
_UNKNOWN_SHARE = 0.06
# One batch in so many has captions of more tokens than the library's padding multiple.
_LONG_EVERY = 24
_HOLD = 0.4
_EXPORT_EVERY_S = 300
_HIDDEN = (".attention.", ".feed_forward.", ".self_attn.", "layers.0.mlp.", "layers.1.mlp.")


@dataclass(frozen=True, slots=True)
class Data:
    """Scenes and their latents, scaled for the transformer and cut into its tokens."""

    scenes: list[Scene]
    patches: Tensor


def load_data(work: Path, *, count: int, seed: int, device: str) -> Data:
    """Draw and encode the scenes, or read the latents of an earlier call for the same scenes and autoencoder."""
    rng = np.random.default_rng([seed, 1])
    scenes = [sample(rng) for _ in range(count)]
    autoencoder = (work / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    cache = work / f"latents-{count}-{zlib.crc32(autoencoder + repr(scenes).encode()):08x}.pt"
    if not cache.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
        save_checkpoint(cache, {"patches": _encode(vae, scenes, device)})
    return Data(scenes, torch.load(cache)["patches"])


def _encode(vae: AutoencoderKL, scenes: list[Scene], device: str) -> Tensor:
    vae.to(memory_format=torch.channels_last)
    patches = []
    for start in range(0, len(scenes), 16):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            mean = vae.encode(to_tensor(scenes[start : start + 16]).to(device)).latent_dist.mean.float()
        latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        patches.append(patchify(latents).half().cpu())
    return torch.cat(patches)


class Captions:
    """Words scenes anew for each batch: some captions empty, some with unknown words, some batches long."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def batch(self, scenes: list[Scene], *, long: bool) -> tuple[Tensor, Tensor]:
        return pad_ids([self._ids(scene, long=long) for scene in scenes])

    def _ids(self, scene: Scene, *, long: bool) -> list[int]:
        rng = self._rng
        if not long and rng.random() < _EMPTY_SHARE:
            return token_ids("")
        text = caption(scene, rng, omit=_OMIT_SHARE)
        tokens = len(token_ids(text))
        if long:
            text = self._surround(text, int(rng.integers(CAPTION_MULTIPLE + 1, LONGEST_PROMPT + 1)) - tokens)
        elif rng.random() < _UNKNOWN_SHARE:
            text = self._surround(text, int(rng.integers(1, CAPTION_MULTIPLE - tokens + 1)))
        return token_ids(text)

    def _surround(self, text: str, unknown: int) -> str:
        """Put unknown words before and after a caption: a model that has never met them would be thrown off."""
        before = int(self._rng.integers(0, unknown + 1))
        return "unknown " * before + text + " unknown" * (unknown - before)


def noise_levels(count: int) -> Tensor:
    """Sigmas to train on: mostly high, where layout and shapes are decided, the rest uniform."""
    high = torch.sigmoid(torch.randn(count) * 0.8 + 1.2)
    return torch.where(torch.rand(count) < 0.7, high, torch.rand(count))


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden matrices, for Muon, and all else, for AdamW."""
    hidden: list[Tensor] = []
    other: list[Tensor] = []
    for name, parameter in model.named_parameters():
        of_layer = any(part in name for part in _HIDDEN)
        (hidden if of_layer and parameter.ndim == 2 else other).append(parameter)
    return hidden, other


class Trainer:
    """The model under training with its optimizers and average."""

    def __init__(self, *, device: str, muon_rate: float, adam_rate: float, compile_model: bool) -> None:
        self.device = device
        self.model = BatchedModel(build_transformer(LATENT_CHANNELS), build_text_encoder()).to(device)
        self._forward = torch.compile(self.model) if compile_model else self.model
        hidden, other = split_parameters(self.model)
        self._peaks = (muon_rate, adam_rate)
        self.optimizers = (Muon(hidden), torch.optim.AdamW(other, betas=(0.9, 0.98), weight_decay=0.0))
        self.average = Average({"model": self.model}, decay=0.998)

    def step(self, clean: Tensor, ids: Tensor, lengths: Tensor, *, factor: float) -> Tensor:
        """One step on a batch of clean latents and captions; returns the loss."""
        sigma = noise_levels(len(clean)).to(self.device)
        noise = torch.randn_like(clean)
        level = sigma[:, None, None]
        # Only the common padded length is compiled: compiling costs more than long captions ever would.
        forward = self._forward if ids.shape[1] == CAPTION_MULTIPLE else self.model
        with torch.autocast(self.device, torch.bfloat16):
            velocity = forward((1 - level) * clean + level * noise, 1 - sigma, ids, lengths)
        loss = (velocity.float() - (clean - noise)).square().mean()
        for optimizer, peak in zip(self.optimizers, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update()
        return loss.detach()

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: dict[str, Any], *, step: int) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"], steps=step)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def export(self, work: Path, folder: Path) -> None:
        """Write the averaged model with the autoencoder of the work folder."""
        transformer, text_encoder = build_transformer(LATENT_CHANNELS), build_text_encoder()
        averaged = BatchedModel(copy.deepcopy(transformer), copy.deepcopy(text_encoder))
        averaged.load_state_dict({key: value.cpu() for key, value in self.average.state_dict()["model"].items()})
        transformer.load_state_dict(averaged.transformer.state_dict())
        text_encoder.load_state_dict(averaged.text_encoder.state_dict())
        vae = AutoencoderKL.from_pretrained(work / "vae")
        export(folder, vae=vae, transformer=transformer, text_encoder=text_encoder)


def train(
    work: Path, folder: Path, *, minutes: float, scenes: int, batch: int, seed: int, resume: bool, compile_model: bool
) -> None:
    """Train within the budget, exporting to `folder` every few minutes and at the end."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(work, count=scenes, seed=seed, device=device)
    torch.manual_seed(seed)
    trainer = Trainer(device=device, muon_rate=0.02, adam_rate=2e-3, compile_model=compile_model)
    checkpoint = work / "transformer.pt"
    step, budget = 0, Budget(minutes)
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        trainer.restore(state["trainer"], step=state["step"])
        step, budget = state["step"], Budget(minutes, spent_s=state["spent_s"])
    rng = np.random.default_rng([seed, 2, step])
    torch.manual_seed(seed + step)
    captions = Captions(rng)
    exported_s = budget.spent_s
    running = 0.0
    while not budget.over:
        chosen = rng.integers(0, len(data.scenes), size=batch)
        ids, lengths = captions.batch([data.scenes[i] for i in chosen], long=step % _LONG_EVERY == _LONG_EVERY - 1)
        clean = data.patches[torch.from_numpy(chosen)].to(device).float()
        loss = trainer.step(
            clean, ids.to(device), lengths.to(device), factor=hold_then_cosine(budget.share, hold=_HOLD)
        )
        step += 1
        running += (float(loss) - running) / min(step, 200)
        if step % 100 == 0:
            log.info("step %d, %.0f s, loss %.4f", step, budget.spent_s, running)
        if budget.spent_s - exported_s > _EXPORT_EVERY_S or budget.over:
            exported_s = budget.spent_s
            save_checkpoint(checkpoint, {"trainer": trainer.state(), "step": step, "spent_s": budget.spent_s})
            trainer.export(work, folder)
            log.info("exported at step %d to %s", step, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder with the trained autoencoder; keeps checkpoints"
    )
    parser.add_argument("--export", type=Path, required=True, help="folder for the exported pipeline")
    parser.add_argument("--minutes", type=float, default=75, help="training time")
    parser.add_argument("--scenes", type=int, default=48_000, help="scenes to cache latents of")
    parser.add_argument("--batch", type=int, default=32, help="scenes a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="compile the model first (1 to 3 minutes; faster after)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the work folder")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    train(options.work, options.export, minutes=options.minutes, scenes=options.scenes, batch=options.batch,
          seed=options.seed, resume=options.resume, compile_model=options.compile)  # fmt: skip


if __name__ == "__main__":
    main()
