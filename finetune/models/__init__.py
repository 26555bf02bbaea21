"""U-Nets, autoencoders, text encoders and adapters: loading, building, saving."""

SCHEDULERS = ("ddim", "euler", "dpm++", "ddpm")  # of `finetune.sampling.make_scheduler`, which is slow to import
