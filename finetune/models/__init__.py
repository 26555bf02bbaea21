"""U-Nets, autoencoders, text encoders and adapters: loading, building, saving."""
