"""The run settings of the published configs, for --like-published.

The paper's 21 runs have the settings of ALL_RUNS. DIFFERENCES has those in which a run departs from
them. The configs are configs/*.yaml of github.com/tang-bd/fuse-dit at commit 5e6431a;
docs/glossary.md lists every key in them with the flag that sets it here.
"""
import fusedit
from fusedit import FuseDiTError

HOSTS = 32                                  # of a TPU v4-256 pod: 128 chips, 4 on each host

# Settings of RunConfig. trainer.mixed_precision, which is bf16, is left out: --dtype auto is
# bf16 wherever the device computes in it natively.
ALL_RUNS = dict(
    train_llm=False,                        # trainer.train_llm

    # data
    crop="center",                          # data.center_crop
    resize="bilinear",                      # no key: data.py:24
    caption_drop=0.1,                       # data.random_dropping_rate
    original_caption_rate=0.0,              # data.original_caption_rate
    caption_pick="whole",                   # no key: data.py:17-20

    # optimization
    batch=16 * HOSTS,                       # data.batch_size, which is that of a host
    steps=500_000,                          # trainer.max_steps
    lr=1e-4,                                # optimizer.lr
    warmup_steps=0,                         # lr_scheduler.num_warmup_steps
    lr_schedule="constant",                 # lr_scheduler.name
    weight_decay=1e-4,                      # optimizer.weight_decay
    max_grad_norm=1.0,                      # trainer.gradient_clipping
    ema_decay=0.99,                         # ema.decay
    ema_every=100,                          # ema.update_steps
    ema_warmup=False,                       # no key: trainers.py:293
    seed=42,                                # trainer.seed

    # checkpoints and the log
    save_every=5000,                        # trainer.checkpointing_steps
    keep_every=50_000,                      # trainer.consolidation_steps
    log_every=100,                          # trainer.logging_steps
)
LARGE_RUN = dict(steps=1_000_000)
DIFFERENCES = {"fusedit/large-scale": LARGE_RUN, "fusedit": LARGE_RUN}
NOT_PUBLISHED = ("demo", "emoji")           # presets that have no published run


def published_settings(preset):
    """{field of RunConfig: value} of the published run of a preset.

    Raises FuseDiTError if the preset is unknown or has no published run.
    """
    fusedit.preset(preset)
    if preset in NOT_PUBLISHED:
        published = [name for name in fusedit.PRESETS if name not in NOT_PUBLISHED]
        raise FuseDiTError(f"--like-published needs --preset with one of the paper's runs "
                           f"({preset} has none): {', '.join(published)}")
    return ALL_RUNS | DIFFERENCES.get(preset, {})
