"""Omniglot's 20-way one-shot classification with the re-identification head: which of 20 drawings, by one hand, is of the same character
as this one, by another?

    python -m jaxdistill.main --config=experiments/dcal_one_shot/one_shot.py --workdir=workdir/one_shot \\
        --config.data.path=DIR/omniglot_small12_28.npz
    python experiments/dcal_one_shot/score.py workdir/one_shot DIR/all_runs.zip

Trained as re-identification (characters are identities, drawers are cameras) on all characters but two of the 242 of the two small
background sets, whose alphabets are not those of the 20 official runs.
"""

from configs import dcal_omniglot


def get_config():
    config = dcal_omniglot.get_config("reid")
    config.seeds, config.dcal.figures = (0, 1, 2), 0
    config.data.update(dict(group="", test_groups=(), test=0.01, validation=0.0))
    config.train.eval_every = config.train.checkpoint_every = 1000
    return config
