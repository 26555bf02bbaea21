"""The first stage: training of the autoencoder whose latents the diffusion model works on."""
