"""Train the autoencoder of `sketch`: 64x64 pictures to 8x16x16 latents and back.

The first half of the budget trains encoder and decoder together. Then the encoder is frozen, the scale and shift of
its latents are measured, and the decoder alone learns to draw clean edges from latents that are slightly off, as a
diffusion model's are.

    python -m farm.sketch.train_vae --work build/sketch --minutes 25
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from farm.sketch.drawing import COLOURS, SHAPES, SIDE, Scene, Thing, draw, sample
from farm.sketch.training import Average, Budget, hold_then_cosine, save_checkpoint

log = logging.getLogger(__name__)

LATENT_CHANNELS = 8
_JOINT_SHARE = 0.55
_CROWD_SHARE = 0.5
_LATENT_NOISE = 0.05


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder, a quarter of the side in latents."""
    widths = (16, 32, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # Group norms erase brightness and contrast, which flat drawings consist of: few groups erase least.
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
    )
    # Every residual branch starts at zero: the network begins as its short cuts, and learns in minutes.
    for name, parameter in vae.named_parameters():
        if ".resnets." in name and ".conv2." in name:
            torch.nn.init.zeros_(parameter)
    return vae.to(memory_format=torch.channels_last)


def pictures(rng: np.random.Generator, count: int, *, crowd_share: float) -> torch.Tensor:
    """Random pictures as a channels-last tensor from -1 to 1; a share of them are crowds, dense in edges."""
    scenes = [_crowd(rng) if rng.random() < crowd_share else sample(rng) for _ in range(count)]
    return to_tensor(scenes)


def to_tensor(scenes: list[Scene]) -> torch.Tensor:
    """Scenes drawn, as a tensor of (count, 3, 64, 64) from -1 to 1."""
    array = np.stack([np.asarray(draw(scene)) for scene in scenes])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def _crowd(rng: np.random.Generator) -> Scene:
    """Several shapes anywhere, in front of one another: most pixels of a plain scene teach the decoder nothing."""
    colours = list(COLOURS)
    things = tuple(
        Thing(
            shape=str(rng.choice(SHAPES)),
            colour=str(rng.choice(colours)),
            size="medium",
            x=float(rng.uniform(4, SIDE - 4)),
            y=float(rng.uniform(4, SIDE - 4)),
            radius=float(rng.uniform(7, 18)),
        )
        for _ in range(int(rng.integers(3, 7)))
    )
    return Scene(str(rng.choice(colours)), things)


def reconstruction_loss(drawn: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of pixels, and L1 of the differences between neighbours, which are the edges."""
    error = drawn - target
    across = error[..., :, 1:] - error[..., :, :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    return error.abs().mean() + error.square().mean() + 0.5 * (across.abs().mean() + down.abs().mean())


def measure_latents(vae: AutoencoderKL, rng: np.random.Generator, *, count: int = 512) -> tuple[float, float]:
    """The mean and the standard deviation of the latents of plain scenes."""
    with torch.no_grad():
        batches = [vae.encode(pictures(rng, 32, crowd_share=0.0)).latent_dist.mean for _ in range(count // 32)]
    latents = torch.cat(batches)
    return float(latents.mean()), float(latents.std())


def measure_psnr(vae: AutoencoderKL, *, count: int = 128) -> float:
    """Peak signal-to-noise ratio in decibels over fixed unseen scenes, through the whole autoencoder."""
    rng = np.random.default_rng(10**9)
    target = pictures(rng, count, crowd_share=0.0)
    with torch.no_grad():
        drawn = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / (drawn - target).square().mean()))


def train(work: Path, *, minutes: float, batch: int, rate: float, seed: int, resume: bool) -> None:
    """Train within the budget and leave the averaged autoencoder in `work / "vae"`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    average = Average({"vae": vae}, decay=0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=1e-4, betas=(0.9, 0.98))
    checkpoint = work / "vae.pt"
    step, budget, joint = 0, Budget(minutes), True
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"], steps=state["step"])
        optimizer.load_state_dict(state["optimizer"])
        vae.register_to_config(scaling_factor=state["scale"], shift_factor=state["shift"])
        step, joint, budget = state["step"], state["joint"], Budget(minutes, spent_s=state["spent_s"])
    rng = np.random.default_rng([seed, step])
    while not budget.over:
        if joint and budget.share >= _JOINT_SHARE:
            joint = False
            _freeze_encoder(vae, average, rng, device)
        factor = (
            hold_then_cosine(budget.share / _JOINT_SHARE, hold=0.3)
            if joint
            else hold_then_cosine((budget.share - _JOINT_SHARE) / (1 - _JOINT_SHARE), hold=0.2) * 0.7
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = _loss(vae, pictures(rng, batch, crowd_share=_CROWD_SHARE).to(device), joint=joint, device=device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        step += 1
        if step % 100 == 0:
            log.info("step %d, %.0f s, joint %s, loss %.4f", step, budget.spent_s, joint, loss.item())
        if step % 500 == 0:
            save_checkpoint(checkpoint, {
                "vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                "scale": vae.config.scaling_factor, "shift": vae.config.shift_factor or 0.0,
                "step": step, "joint": joint, "spent_s": budget.spent_s,
            })  # fmt: skip
            _export(vae, average, work, step)
    _export(vae, average, work, step)


def _loss(vae: AutoencoderKL, target: torch.Tensor, *, joint: bool, device: str) -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16):
        if joint:
            moments = vae.encoder(target).float()
            mean, log_variance = moments.chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 5)
            latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        else:
            with torch.no_grad():
                mean = vae.encoder(target).float().chunk(2, dim=1)[0]
                noise = _LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, device=device) / vae.config.scaling_factor
                latents = mean + noise * torch.randn_like(mean)
            divergence = torch.zeros((), device=device)
        drawn = vae.decoder(latents).float()
    return reconstruction_loss(drawn, target) + 1e-3 * divergence


def _freeze_encoder(vae: AutoencoderKL, average: Average, rng: np.random.Generator, device: str) -> None:
    vae.load_state_dict(average.state_dict()["vae"])
    for parameter in vae.encoder.parameters():
        parameter.requires_grad_(False)
    mean, deviation = measure_latents(vae.cpu(), rng)
    vae.to(device)
    vae.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
    log.info("encoder frozen, latents of mean %.3f and deviation %.3f", mean, deviation)


def _export(vae: AutoencoderKL, average: Average, work: Path, step: int) -> None:
    exported = build_vae()
    exported.register_to_config(**{key: vae.config[key] for key in ("scaling_factor", "shift_factor")})
    exported.load_state_dict({key: value.cpu() for key, value in average.state_dict()["vae"].items()})
    exported.save_pretrained(work / "vae")
    report = {"step": step, "psnr_db": round(measure_psnr(exported.eval()), 2)}
    (work / "vae.json").write_text(json.dumps(report) + "\n")
    log.info("exported at step %d: %.2f dB", step, report["psnr_db"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and of the result")
    parser.add_argument("--minutes", type=float, default=25, help="training time")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the work folder")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    train(options.work, minutes=options.minutes, batch=options.batch, rate=options.rate, seed=options.seed,
          resume=options.resume)  # fmt: skip


if __name__ == "__main__":
    main()
