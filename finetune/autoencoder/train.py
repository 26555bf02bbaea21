"""`finetune autoencoder`: train the first stage on image shards."""

from __future__ import annotations

import os
from collections.abc import Sequence

from finetune import outliving_readers

USAGE = """\
usage: finetune autoencoder [KEY=VALUE ...]

Train an autoencoder (the first stage) on image shards; the result is RUN/vae, in the diffusers layout.
The same command goes on where an earlier one stopped; asked to stop (SIGTERM, SIGUSR1, Ctrl-C) it saves first.

examples:
  data-tools ingest folder pictures/ --out shards/
  finetune autoencoder data.shards=shards run.dir=runs/vae
  finetune autoencoder data.shards=shards run.dir=runs/vae model=kl_f4 data.size=256 train.steps=50000
  finetune autoencoder data.shards=shards run.dir=runs/vq model=vq_f4 data.size=256
  finetune autoencoder data.shards=shards loss.discriminator_weight=0.5 loss.discriminator_start=5000
  finetune autoencoder data.shards=shards model.pretrained=runs/vae/vae train.decoder_only=true run.dir=runs/decoder
  torchrun --nproc-per-node 8 -m finetune autoencoder data.shards=shards train.global_batch=64 run.dir=runs/vae
  torchrun --nproc-per-node 8 -m finetune autoencoder data.shards=shards strategy=zero1 run.dir=runs/vae
  finetune autoencoder experiment=emoji data.shards=fluent-emoji run.dir=runs/emoji-vae
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with Hydra overrides; returns the exit code.

    Raises:
        UserError: a mistake in the overrides, the shards or the run folder.
    """
    from finetune.autoencoder import config as schema
    from finetune.help import describe
    from finetune.terminal import require_settings, speak_in_turn

    if any(argument in ("-h", "--help") for argument in argv):
        print(f"{USAGE}\n{describe(schema.NAME, schema.Config, schema.FOLDER)}")
        return 0
    require_settings(argv, "finetune autoencoder")
    # Warnings of torch's C++ parts are pages of stack where a peer is gone; their errors stay.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return speak_in_turn(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from finetune.autoencoder import config as schema
    from finetune.terminal import quiet_libraries, stopped_at_once

    config, composed = schema.load(argv)
    settings = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(settings, dict)
    with stopped_at_once():
        from finetune.distributed import StopRequest

        quiet_libraries()
        with outliving_readers(), StopRequest(int(os.environ.get("RANK", 0))) as request:
            from finetune.autoencoder.run import train

            plain = {str(key): value for key, value in settings.items()}
            return train(config, plain, OmegaConf.to_yaml(composed), request)
