"""Starting runs: accelerate's configuration files. No setting of a model or of training lives here."""
