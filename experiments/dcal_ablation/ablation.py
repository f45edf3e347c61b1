"""The paper's ablation (Zhu et al. 2022) at our size: which of the branches help, and is it for the reason the paper gives?

    python -m jaxdistill.main --config=experiments/dcal_ablation/ablation.py:glyphs --workdir=workdir/ablation_glyphs
    python -m jaxdistill.main --config=experiments/dcal_ablation/ablation.py:omniglot --workdir=workdir/ablation_omniglot \\
        --config.data.path=DIR/omniglot_small12_28.npz

Rows: self-attention alone, + GLCA, + PWCA, both, GLCA with random queries, PWCA with noise for a partner; and what any of them must
beat: the commonest class, the nearest neighbour, logistic regression on pixels, a convolutional network (fewer and dearer updates).
Three seeds, and five of sa_only and full.
"""

from configs import dcal, dcal_omniglot

THREE = ("sa_glca", "sa_pwca", "random_query", "noise_distractor")


def get_config(data: str = "glyphs"):
    config = {"glyphs": dcal, "omniglot": dcal_omniglot}[data].get_config()
    config.seeds, config.headline, config.dcal.figures = (0, 1, 2, 3, 4), "full", 0
    config.train.eval_every = config.train.checkpoint_every = 1000
    if data == "omniglot":
        config.data.validation = 0.0  # ten drawings a character are few enough: nothing is chosen by them
    floors = {name: dict(dcal.get_config().run[name]) for name in ("constant", "one_nn", "logistic")}
    few = lambda mode: dict(only_seeds=(0, 1, 2)) if mode in THREE else {}  # noqa: E731
    modes = {mode: dict(recipe="dcal", dcal=dict(mode=mode), **few(mode)) for mode in dcal.MODES}
    cnn = dict(recipe="experiments.dcal_ablation.cnn", only_seeds=(0, 1, 2), train=dict(lr=1e-3, steps=2500))
    config.run = dict(**floors, cnn=cnn, **modes)
    config.runs = (*floors, "cnn", *dcal.MODES)
    return config
