"""Every key that `training` reads, with its default. A config starts from here and changes what it means to.

Imports nothing heavy: a config must load fast (and on machines where only its text is looked at)."""

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    config = ConfigDict()
    config.seeds = (0,)               # each seed is one run of everything that is not run once
    config.runs = ()                  # names of config.run, in order
    config.run = ConfigDict()         # name -> recipe, and what this run changes of the rest
    config.mesh = (-1, 1, 1)          # devices as (data, fsdp, model); -1: all that are left
    config.monitor = "validation/bits_per_byte"  # decides which checkpoint is the best
    config.minimize = True            # whether a smaller monitored value is better
    config.headline = ""              # the run that the others are compared with, by seed
    config.tensorboard = False        # event files too (needs the extra `tensorboard`)
    config.cache = ""                 # where finished runs that say `cached` are kept; "": $XDG_CACHE_HOME/jaxdistill

    config.train = ConfigDict(dict(
        steps=400,                    # updates
        batch=16,                     # examples an update, over all devices
        micro=1,                      # micro-batches an update: same update (but for what is drawn), less memory
        lr=1e-3,
        warmup=0.05,                  # share of the updates in which the rate rises linearly from 0
        final_lr=0.0,                 # the cosine ends at this share of lr
        ema=0.0,                      # decay of the moving average that is deployed; 0: the parameters themselves
        eval_every=50,                # updates between evaluations (each is followed by a checkpoint)
        checkpoint_every=50,          # updates between checkpoints
        log_every=1,                  # updates between lines of metrics.jsonl
    ))
    config.optimizer = ConfigDict(dict(
        name="adamw",                 # adamw | sgd
        b1=0.9, b2=0.95, eps=1e-8,
        momentum=0.9,                 # sgd only
        weight_decay=0.01,            # on matrices only
        decay="decoupled",            # decoupled (as AdamW) | coupled (L2: part of the gradient, through the moments)
        clip_value=0.0,               # of each number of the gradient, before `clip`; 0: off
        clip=1.0,                     # global gradient norm, before the groups; 0: off
    ))
    config.probes = ConfigDict(dict(
        every=10,                     # updates from one whose distributions are looked at to the next, beside the first; 0: none is
        deep=200,                     # updates between looks at each term's own gradient; 0: none
    ))
    config.gates = ConfigDict(dict(
        non_finite=5,                 # non-finite updates in a row that stop the run
        zero_gradient=10,             # applied updates after which a reached parameter must have had a gradient; 0: off
        idle=10,                      # updates in a row that change nothing (rate 0, nothing counted, parameters as before); 0: off
        ledger_gap=1e-4,              # relative gap between the loss and the sum of its terms
        stop=("non_finite", "ledger_gap", "zero_gradient", "optimizer_not_stepping", "lr_zero", "all_masked", "frozen_moved"),  # findings
    ))
    return config
