"""Kandinsky's prior on the other side: diffusers' UnCLIP scheduler, and its pipeline with given noise."""

import torch
from diffusers import UnCLIPScheduler


def unclip() -> UnCLIPScheduler:
    """Kandinsky's scheduler, its table multiplied up in float64: in float32, 1 - ᾱ is off by 5e-4 at t = 0."""
    theirs = UnCLIPScheduler(variance_type="fixed_small_log", num_train_timesteps=1000, clip_sample_range=10.0,
                             prediction_type="sample")
    theirs.alphas_cumprod = (1 - theirs.betas.double()).cumprod(0)
    return theirs


def run_pipeline(pipe, prompt: str, draws: list[torch.Tensor]) -> torch.Tensor:
    """The pipeline with given noise: the first for its latents, the others for the steps, in order."""
    waiting = iter(draws[1:])
    step = pipe.scheduler.step

    def stepped(model_output, timestep, sample, generator=None, prev_timestep=None):
        import diffusers.schedulers.scheduling_unclip as module
        original = module.randn_tensor
        module.randn_tensor = lambda *args, **options: next(waiting)
        try:
            return step(model_output, timestep, sample=sample, generator=generator, prev_timestep=prev_timestep)
        finally:
            module.randn_tensor = original

    pipe.scheduler.step = stepped
    return pipe(prompt, num_inference_steps=6, guidance_scale=4.0, latents=draws[0]).image_embeds
